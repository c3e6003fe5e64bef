"""The pieces of a learning-rate schedule: each a curve over its own updates, one after the other.

A segment of n updates is a function of the number i = 0 .. n - 1 of the update within it, of the factor ``start`` that
the segment before it leads to, and of the factor ``to`` that it leads to itself. It is evaluated at i = n too, where
it must be ``to``: that value is the next segment's ``start``, and no update of this segment has it. So the last of n
linear updates to zero has the rate start / n, and none is spent at rate zero.

``warmup`` alone has ``to`` at its last update, i = n - 1, so that no update has rate zero.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from sparsetrain.errors import UserError
from sparsetrain.registry import Registry

Curve = Callable[[int, int, float, float], float]
"""Maps (i, n, start, to) to the factor of the peak learning rate in update i of n."""

SEGMENTS: Registry[Curve] = Registry("schedule", "schedule.segments: shape")
"""The shapes of segments by name."""


@SEGMENTS.register("warmup")
def warmup(i: int, n: int, start: float, to: float) -> float:
    """Rise linearly; the first update is one n-th of the way up, and the last one is at the top."""
    return start + (to - start) * (min(i + 1, n) / n)


@SEGMENTS.register("linear")
def linear(i: int, n: int, start: float, to: float) -> float:
    """Go in a straight line ("Straight to Zero", arXiv 2502.15938, with ``to=0``)."""
    return to + (start - to) * ((n - i) / n)


@SEGMENTS.register("cosine")
def cosine(i: int, n: int, start: float, to: float) -> float:
    """Go along half a period of a cosine, flat at both ends (arXiv 1608.03983, equation 5)."""
    return to + (start - to) * 0.5 * (1.0 - math.cos(math.pi * ((n - i) / n)))


@SEGMENTS.register("constant")
def constant(i: int, n: int, start: float, to: float) -> float:
    """Stay where the segment before it ended; ``to`` is not read."""
    return start


@dataclass
class SegmentConfig:
    """One piece of a schedule.

    Args:
        shape: one of `SEGMENTS`: ``warmup``, ``linear``, ``cosine``, ``constant``, or a registered one.
        to: the factor of the peak learning rate that it leads to, at least 0; null stays at the factor before it, or
            rises to the peak for ``warmup``.
        share: its length as a share of all updates. tokens: its length in training tokens. steps: in updates. At most
            one of the three; the one segment that has none of them takes what the others leave.

    Raises:
        UserError: a field out of range, or two lengths.
    """

    shape: str
    to: float | None = None
    share: float | None = None
    tokens: int | None = None
    steps: int | None = None

    def __post_init__(self) -> None:
        SEGMENTS.check(self.shape)
        if self.to is not None and not 0.0 <= self.to < math.inf:
            raise UserError(f"schedule.segments: to={self.to} must be a factor of the peak, at least 0 and finite")
        given = [name for name in ("share", "tokens", "steps") if getattr(self, name) is not None]
        if len(given) > 1:
            raise UserError(
                f"schedule.segments: {given[0]}={getattr(self, given[0])} and {given[1]}={getattr(self, given[1])}: "
                "a segment has only one length"
            )
        if self.share is not None and not 0.0 <= self.share <= 1.0:
            raise UserError(f"schedule.segments: share={self.share} must lie in [0, 1]")
        for name in ("tokens", "steps"):
            value = getattr(self, name)
            if value is not None and value < 0:
                raise UserError(f"schedule.segments: {name}={value} must be at least 0")

    @property
    def open(self) -> bool:
        """Whether it takes what the other segments leave."""
        return self.share is None and self.tokens is None and self.steps is None

    def exact_steps(self, total_steps: int, steps_of_tokens: Callable[[int], float] | None) -> float:
        """Return its length in updates, not rounded; 0 for the open one.

        Args:
            total_steps: updates of the whole schedule.
            steps_of_tokens: the number of updates in which that many tokens are seen, from the first update on.

        Raises:
            UserError: a length in tokens where nothing says how many tokens an update has.
        """
        if self.steps is not None:
            return float(self.steps)
        if self.tokens is not None:
            if steps_of_tokens is None:
                raise UserError(f"schedule.segments: tokens={self.tokens}: how many tokens a step has is not known")
            return steps_of_tokens(self.tokens)
        return 0.0 if self.share is None else self.share * total_steps
