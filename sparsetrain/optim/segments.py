"""The segments of a learning-rate schedule: consecutive curves, each over its own steps.

A segment of n steps is a function of the step number i = 0 .. n - 1 within it, of the factor ``start`` at which the
previous segment ends, and of the factor ``to`` at which it ends itself. At i = n it must be ``to``: no step of this
segment uses that value, but the next segment starts with it. So the last of n linear steps to zero has the rate
start / n, and no step has rate zero.

Only ``warmup`` reaches ``to`` at its last step, i = n - 1, so that no step has rate zero.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from sparsetrain.errors import UserError
from sparsetrain.registry import Registry

Curve = Callable[[int, int, float, float], float]
"""Maps (i, n, start, to) to the factor of the peak learning rate in step i of n."""

SEGMENTS: Registry[Curve] = Registry("schedule", "schedule.segments: shape", {"": ("i", "n", "start", "to")})
"""The shapes of segments by name."""


@SEGMENTS.register("warmup")
def warmup(i: int, n: int, start: float, to: float) -> float:
    """Rise linearly; the first step is one n-th of the way up, and the last one is at the top."""
    return start + (to - start) * (min(i + 1, n) / n)


@SEGMENTS.register("linear")
def linear(i: int, n: int, start: float, to: float) -> float:
    """Change linearly ("Straight to Zero", arXiv 2502.15938, with ``to=0``)."""
    return to + (start - to) * ((n - i) / n)


@SEGMENTS.register("cosine")
def cosine(i: int, n: int, start: float, to: float) -> float:
    """Follow half a period of a cosine, flat at both ends (arXiv 1608.03983, equation 5)."""
    return to + (start - to) * 0.5 * (1.0 - math.cos(math.pi * ((n - i) / n)))


@SEGMENTS.register("exponential")
def exponential(i: int, n: int, start: float, to: float) -> float:
    """Change by the same ratio in each step; neither end may be 0."""
    return start * (to / start) ** (i / n)


@SEGMENTS.register("one_minus_sqrt")
def one_minus_sqrt(i: int, n: int, start: float, to: float) -> float:
    """Fall fast at first and then ever more slowly (the cooldown ``1-sqrt`` of arXiv 2405.18392)."""
    return to + (start - to) * (1.0 - math.sqrt(i / n))


@SEGMENTS.register("inverse_sqrt")
def inverse_sqrt(i: int, n: int, start: float, to: float) -> float:
    """Follow ``1 / sqrt(t + const)``, with the constant that leads from ``start`` to ``to``; neither may be 0."""
    return start / math.sqrt(1.0 + (i / n) * ((start / to) ** 2 - 1.0))


NEVER_ZERO = ("exponential", "inverse_sqrt")
"""The shapes that neither begin nor end at zero."""


def default_end(shape: str, start: float, before: int, n: int) -> float:
    """Return the factor at which a segment of n steps without ``to`` ends.

    Args:
        shape: of the segment. start: the factor at its beginning. before: the steps in front of it, at least 1.
    """
    if shape == "warmup":
        return 1.0
    if shape == "inverse_sqrt":  # 1 / sqrt(t) from the first step on, as in arXiv 1706.03762, equation 3
        return start * math.sqrt(before / (before + n))
    return start


@SEGMENTS.register("constant")
def constant(i: int, n: int, start: float, to: float) -> float:
    """Stay at the factor of the previous segment; ``to`` is ignored."""
    return start


@dataclass
class SegmentConfig:
    """One segment of a schedule.

    Args:
        shape: one of `SEGMENTS`: ``warmup``, ``linear``, ``cosine``, ``exponential``, ``inverse_sqrt``,
            ``one_minus_sqrt``, ``constant``, or a registered one.
        to: factor of the peak learning rate at its end, at least 0, and above 0 for ``exponential`` and
            ``inverse_sqrt``. Null rises to the peak for ``warmup``, goes on as 1 / sqrt(t) over all steps t so far for
            ``inverse_sqrt``, and keeps the factor of the previous segment for other shapes.
        share: length as a share of all steps.
        tokens: length in training tokens.
        steps: length in steps. At most one of share, tokens and steps may be set; the segment that has none of them
            takes the remaining steps.

    Raises:
        UserError: a field is out of range, or there are two lengths.
    """

    SECTION: ClassVar[str] = "schedule.segments"  # in messages

    shape: str
    to: float | None = None
    share: float | None = None
    tokens: int | None = None
    steps: int | None = None

    def __post_init__(self) -> None:
        SEGMENTS.check(self.shape)
        if self.to is not None and not 0.0 <= self.to < math.inf:
            raise UserError(f"schedule.segments: to={self.to} must be a factor of the peak, at least 0 and finite")
        if self.to == 0.0 and self.shape in NEVER_ZERO:
            raise UserError(f"schedule.segments: to={self.to} must be above 0 for {self.shape}, which never gets there")
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
        """Whether it takes the steps that the other segments leave."""
        return self.share is None and self.tokens is None and self.steps is None

    def exact_steps(self, total_steps: int, steps_of_tokens: Callable[[int], float] | None) -> float:
        """Return its length in steps, not rounded; 0 for the open one.

        Args:
            total_steps: steps of the whole schedule.
            steps_of_tokens: maps a number of tokens to the steps in which they are seen, from the first step on.

        Raises:
            UserError: the length is in tokens, and ``steps_of_tokens`` is None.
        """
        if self.steps is not None:
            return float(self.steps)
        if self.tokens is not None:
            if steps_of_tokens is None:
                raise UserError(f"schedule.segments: tokens={self.tokens}: the number of tokens per step is unknown")
            return steps_of_tokens(self.tokens)
        return 0.0 if self.share is None else self.share * total_steps
