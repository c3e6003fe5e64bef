"""The clock: contenders take turns, so that what slows the machine for a second slows all of them."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from torch import Tensor

_MOST_CALLS = 1000
_Name = TypeVar("_Name", bound=Hashable)


@dataclass
class Work:
    """One contender's training step in two halves.

    Attributes:
        forward: computes the result, keeping what ``backward`` needs.
        backward: takes that result; leaves nothing behind that makes the next step another one. None where there is
            no backward pass.
        fresh: the whole step on an input of its own, to see what memory it takes; returns the gradients of the weights.
            None where that cannot be seen.
    """

    forward: Callable[[], Any]
    backward: Callable[[Any], None] | None = None
    fresh: Callable[[], list[Tensor]] | None = None


@dataclass
class Times:
    """Seconds of one contender, an entry a round; ``step`` is forward and backward, empty without a backward pass."""

    forward: list[float] = field(default_factory=list)
    step: list[float] = field(default_factory=list)
    calls: int = 1
    given_up: bool = False


def run_once(work: Work) -> tuple[float, float]:
    """Return the seconds of the forward half and of the whole step."""
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

    In each round every contender runs once, or as often as takes ``least_seconds`` (an entry is then the mean over
    these calls); the order rotates from round to round. Two calls before the first round warm up and are not counted.
    Of one that takes more than ``patience`` times as long as the first of ``works``, or as the one before it that
    ``beside`` says, the second of these two calls is all there is: `Times.given_up`.
    """
    times: dict[_Name, Times] = {}
    longest: dict[_Name, float] = {}
    for name, work in works.items():
        run_once(work)
        # The second call: the first one may compile, or build what is built once.
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


def median(values: Sequence[float]) -> float:
    """Return the median of at least one value."""
    ordered = sorted(values)
    half = len(ordered) // 2
    return ordered[half] if len(ordered) % 2 else (ordered[half - 1] + ordered[half]) / 2
