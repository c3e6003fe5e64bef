"""Timing: contenders take turns, so that a slow moment of the machine affects all of them."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from torch import Tensor

_MOST_CALLS = 1000
_Name = TypeVar("_Name", bound=Hashable)


@dataclass
class Work:
    """One contender's training step, split into forward and backward pass.

    Attributes:
        forward: computes the result and keeps what ``backward`` needs.
        backward: takes that result; it must not leave state (gradients, caches) that changes the next step. None if
            there is no backward pass.
        fresh: the whole step on a new input, to measure its memory; returns the gradients of the weights. None if its
            memory cannot be measured.
        before: called before each step, outside of what is timed. None for nothing.
    """

    forward: Callable[[], Any]
    backward: Callable[[Any], None] | None = None
    fresh: Callable[[], list[Tensor]] | None = None
    before: Callable[[], Any] | None = None


@dataclass
class Times:
    """Seconds of one contender per round; ``step`` is forward plus backward, and empty without a backward pass."""

    forward: list[float] = field(default_factory=list)
    step: list[float] = field(default_factory=list)
    calls: int = 1
    given_up: bool = False

    def plain(self, note: str = "") -> dict[str, Any]:
        """Return the times as plain values, with a note about the contender."""
        if self.given_up:
            note = "; ".join(filter(None, [note, "much slower than dense in some cells, so it was timed once there"]))
        found: dict[str, Any] = {"forward_seconds": self.forward, "calls": self.calls, "note": note}
        return found | ({"step_seconds": self.step} if self.step else {})


def run_once(work: Work) -> tuple[float, float]:
    """Return the seconds of the forward pass and of the whole step."""
    if work.before is not None:
        work.before()
    start = time.perf_counter()
    result = work.forward()
    middle = time.perf_counter()
    if work.backward is not None:
        work.backward(result)
    return middle - start, time.perf_counter() - start


def interleaved(
    works: Mapping[_Name, Work],
    repeats: int,
    least_seconds: float = 0.0,
    patience: float = math.inf,
    beside: Mapping[_Name, _Name] | None = None,
) -> dict[_Name, Times]:
    """Return the times of all ``works``, measured in rounds.

    In each round every contender runs once, or as often as fits into ``least_seconds``; an entry is then the mean over
    these calls. The order rotates from round to round. Two calls before the first round warm up and do not count.

    A contender is given up (`Times.given_up`) if its second warm-up call takes more than ``patience`` times as long as
    that of the first contender, or of the one that ``beside`` assigns to it. That call is then its only timing.
    """
    times: dict[_Name, Times] = {}
    longest: dict[_Name, float] = {}
    for name, work in works.items():
        run_once(work)
        # The second call, because the first may compile or build caches.
        forward, whole = run_once(work)
        longest[name] = max(whole, 1e-9)
        times[name] = Times(calls=min(_MOST_CALLS, max(1, math.ceil(least_seconds / longest[name]))))
        if longest[name] > patience * longest[beside[name] if beside else next(iter(works))]:
            times[name] = Times([forward], [] if work.backward is None else [whole], given_up=True)
    order = [name for name in works if not times[name].given_up]
    for turn in range(repeats):
        shift = turn % len(order)
        for name in order[shift:] + order[:shift]:
            calls = times[name].calls
            spent = [run_once(works[name]) for _ in range(calls)]
            times[name].forward.append(sum(forward for forward, _ in spent) / calls)
            if works[name].backward is not None:
                times[name].step.append(sum(step for _, step in spent) / calls)
    return times
