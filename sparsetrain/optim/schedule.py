"""Learning-rate schedules as pure functions of the step number, composed of the segments in `segments`.

The convention, for T steps with w warmup steps, and step number t = 0 .. T-1:

    warmup   t < w     (t + 1) / w                   no step has rate 0, and step w - 1 has the peak
    decay    t >= w    1 - (1 - final) * f           linear, with f = (t - w) / (T - w)
                       final + (1 - final) * (1 + cos(pi * f)) / 2      cosine

f is 0 at the first step after the warmup and would be 1 at t = T, which never runs. So the last step of linear-to-zero
("Straight to Zero", arXiv 2502.15938: eta * (T - t) / (T - w)) has the rate eta / (T - w), and no step has rate zero.
Likewise, the last step of a 10x decay ends one step before a tenth of the peak.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import overload

from sparsetrain.errors import UserError
from sparsetrain.optim.segments import SEGMENTS, Curve, SegmentConfig
from sparsetrain.registry import Registry

WARMUP = 0.1  # default share of steps


@dataclass(frozen=True)
class NamedSchedule:
    """The decay of a named schedule after its warmup.

    Args:
        segment: shape of the decay, one of `SEGMENTS`.
        final: factor of the peak learning rate at its end, if ``schedule.final`` is not set.
        final_is_free: whether ``schedule.final`` may be set.
    """

    segment: str
    final: float
    final_is_free: bool


SCHEDULES: Registry[NamedSchedule] = Registry("schedule", "schedule.name")
"""The names that `ScheduleConfig` accepts without ``segments``."""

SCHEDULES.register("linear_to_zero", NamedSchedule("linear", 0.0, final_is_free=False))
SCHEDULES.register("linear_10x", NamedSchedule("linear", 0.1, final_is_free=True))
SCHEDULES.register("cosine", NamedSchedule("cosine", 0.1, final_is_free=True))
SCHEDULES.register("constant", NamedSchedule("constant", 1.0, final_is_free=False))


@overload
def register_schedule(name: str, *, final: float = 0.0) -> Callable[[Curve], Curve]: ...


@overload
def register_schedule(name: str, curve: Curve, *, final: float = 0.0) -> Curve: ...


def register_schedule(name: str, curve: Curve | None = None, *, final: float = 0.0) -> Curve | Callable[[Curve], Curve]:
    """Make a curve of the learning rate available by name; without ``curve``, return a decorator that does so.

    The name is then a shape of a segment, as in ``schedule.segments=[{shape: warmup, share: 0.1}, {shape: sqrt, to:
    0.0}]``, and a schedule of its own: ``schedule.name=sqrt`` is a warmup and then this curve down to ``final``.

    ```python
    @sparsetrain.register_schedule("sqrt")
    def sqrt(i: int, n: int, start: float, to: float) -> float:
        return start + (to - start) * math.sqrt(i / n)
    ```

    Args:
        name: the name, see `Registry.register`.
        curve: maps (i, n, start, to) to the factor of the peak learning rate in step i of n, for i from 0, the factor
            ``start`` before the first step and the factor ``to`` after the last one. At i = n it must return ``to``.
        final: ``to`` of the schedule ``name`` if ``schedule.final`` is not set, in [0, 1].

    Returns:
        ``curve``, or the decorator, which returns what it decorates.

    Raises:
        UserError: the name is malformed or taken, ``curve`` is no function of four arguments, or ``final`` lies outside
            [0, 1].
    """
    if curve is None:
        return lambda decorated: register_schedule(name, decorated, final=final)
    if not 0.0 <= final <= 1.0:
        raise UserError(f"schedule {name!r}: final={final} must be a fraction of the peak, between 0 and 1")
    named = NamedSchedule(name, final, final_is_free=True)
    if name in SCHEDULES.names() and SCHEDULES[name] != named:
        raise UserError(f"schedule name {name!r} is taken; registered are {', '.join(SCHEDULES)}")
    SEGMENTS.register(name, curve)
    SCHEDULES.register(name, named, replace=True)
    return curve


@dataclass
class ScheduleConfig:
    """The learning rate over the steps of a training.

    A schedule is either one of `SCHEDULES`, a warmup followed by one decay, or a list of ``segments``.

    Args:
        name: one of `SCHEDULES`: ``linear_to_zero`` (D2Z), ``linear_10x`` (to a tenth of the peak, or to ``final``),
            ``cosine`` (to ``final``, by default a tenth), ``constant`` (after the warmup), or a registered one. With
            ``segments`` it may be any name, for reports.
        warmup: fraction of steps that warm up linearly, in [0, 1), rounded to the nearest step; null means 0.1.
        warmup_steps: number of warmup steps, instead of ``warmup``.
        final: end of the decay as a fraction of the peak, in [0, 1]; not for ``linear_to_zero`` and ``constant``.
        segments: the whole schedule as a list; each segment has a ``shape`` and a length, as ``share`` of all steps, in
            ``tokens`` or in ``steps``. One segment may have no length and takes the remaining steps. Borders between
            segments are rounded to the nearest step.

    Raises:
        UserError: a field is out of range, or two fields contradict each other.
    """

    name: str = "linear_to_zero"
    warmup: float | None = None
    warmup_steps: int | None = None
    final: float | None = None
    segments: list[SegmentConfig] | None = None

    def __post_init__(self) -> None:
        if self.segments is not None:
            self._check_segments(self.segments)
            return
        SCHEDULES.check(self.name)
        if self.warmup is None:
            self.warmup = WARMUP
        if not 0.0 <= self.warmup < 1.0:
            raise UserError(f"schedule.warmup={self.warmup} must be a fraction of the steps, at least 0 and below 1")
        if self.warmup_steps is not None and self.warmup_steps < 0:
            raise UserError(f"schedule.warmup_steps={self.warmup_steps} must be at least 0")
        if self.final is None:
            return
        if not SCHEDULES[self.name].final_is_free:
            free = ", ".join(name for name in SCHEDULES if SCHEDULES[name].final_is_free)
            raise UserError(f"schedule.final={self.final} has no meaning for {self.name}; it is for {free}")
        if not 0.0 <= self.final <= 1.0:
            raise UserError(f"schedule.final={self.final} must be a fraction of the peak, between 0 and 1")

    def _check_segments(self, segments: Sequence[SegmentConfig]) -> None:
        if not segments:
            raise UserError("schedule.segments=[]: a schedule has at least one segment")
        for name in ("warmup", "warmup_steps", "final"):
            if getattr(self, name) is not None:
                raise UserError(f"schedule.{name}={getattr(self, name)} cannot be combined with schedule.segments")
        if sum(segment.open for segment in segments) > 1:
            raise UserError("schedule.segments: only one segment may be without share, tokens and steps")
        shares = sum(segment.share or 0.0 for segment in segments)
        if shares > 1.0 + 1e-9:
            raise UserError(f"schedule.segments: the shares add up to {shares:g}; they must be at most 1")
        if all(segment.share is not None for segment in segments) and shares < 1.0 - 1e-9:
            raise UserError(
                f"schedule.segments: the shares add up to {shares:g}; they must be 1, or one segment has none"
            )
        if self.name in SCHEDULES:
            self.name = "segments"

    def expanded(self) -> list[SegmentConfig]:
        """Return the segments of this schedule; a named one is expanded into its warmup and its decay."""
        if self.segments is not None:
            return self.segments
        shape = SCHEDULES[self.name]
        first = SegmentConfig("warmup", 1.0, share=None if self.warmup_steps is not None else self.warmup)
        first.steps = self.warmup_steps
        return [first, SegmentConfig(shape.segment, shape.final if self.final is None else self.final)]


class Schedule:
    """The factor of the peak learning rate, as a pure function of the step number.

    Args:
        config: the schedule.
        total_steps: T, the number of steps.
        steps_of_tokens: maps a number of tokens to the steps in which they are seen; for segments in tokens.

    Raises:
        UserError: the segments leave no step after the warmup, or do not fill the training.
        ValueError: ``total_steps`` is not positive.
    """

    def __init__(
        self, config: ScheduleConfig, total_steps: int, steps_of_tokens: Callable[[int], float] | None = None
    ) -> None:
        if total_steps < 1:
            raise ValueError(f"total_steps={total_steps} must be at least 1")
        if config.warmup_steps is not None and config.warmup_steps >= total_steps:
            raise UserError(
                f"schedule.warmup_steps={config.warmup_steps} must be below the {total_steps} steps of the training"
            )
        self.total_steps = total_steps
        segments = config.expanded()
        self._ends = _ends(segments, total_steps, steps_of_tokens)
        self._curves = [SEGMENTS[segment.shape] for segment in segments]
        self._factors: list[tuple[float, float]] = []
        before = 0.0 if segments[0].shape == "warmup" else 1.0
        for index, segment in enumerate(segments):
            after = (1.0 if segment.shape == "warmup" else before) if segment.to is None else segment.to
            if segment.shape == "constant":
                after = before
            self._factors.append((before, after))
            # An empty segment has no effect, except that an empty first warmup counts as finished.
            if self._length(index) > 0 or index == 0:
                before = after
        self.final = self._factors[-1][1] if self._length(len(segments) - 1) > 0 else before
        self.warmup_steps = self._ends[0] if segments[0].shape == "warmup" else 0

    def _length(self, index: int) -> int:
        return self._ends[index] - (self._ends[index - 1] if index else 0)

    def factor(self, step: int) -> float:
        """Return the factor of the peak learning rate in step number ``step`` (0-based).

        From ``total_steps`` on it is ``final``, which no step of the training uses.

        Raises:
            ValueError: ``step`` is negative.
        """
        if step < 0:
            raise ValueError(f"step={step} must be at least 0")
        if step >= self.total_steps:
            return self.final
        index = bisect.bisect_right(self._ends, step)
        length = self._length(index)
        return self._curves[index](step - (self._ends[index] - length), length, *self._factors[index])


def _ends(
    segments: Sequence[SegmentConfig], total_steps: int, steps_of_tokens: Callable[[int], float] | None
) -> list[int]:
    """Return the number of steps up to the end of each segment; borders are rounded to the nearest step, half up."""
    lengths = [segment.exact_steps(total_steps, steps_of_tokens) for segment in segments]
    left = total_steps - sum(lengths)
    opened = [index for index, segment in enumerate(segments) if segment.open]
    if opened:
        if left < -0.5:
            raise UserError(
                f"schedule.segments take {sum(lengths):.6g} steps in total, but the training has {total_steps}"
            )
        lengths[opened[0]] = max(0.0, left)
    elif abs(left) > 0.5:
        raise UserError(
            f"schedule.segments take {sum(lengths):.6g} steps in total, but the training has {total_steps}: leave "
            "out the length of one of them"
        )
    ends = [min(math.floor(total + 0.5), total_steps) for total in accumulate(lengths)]
    # The last segment, if open, keeps at least one step, however short the training is.
    last = len(segments) - 1
    ends[:last] = [min(end, total_steps - 1) for end in ends[:last]] if segments[last].open else ends[:last]
    ends[last] = total_steps
    return ends
