"""Learning-rate schedules as pure functions of the step number, composed of the segments in `segments`.

The convention, for T steps with w warmup steps, and step number t = 0 .. T-1:

    warmup   t < w     (t + 1) / w                   no step has rate 0, and step w - 1 has the peak
    decay    t >= w    1 - (1 - final) * f           linear, with f = (t - w) / (T - w)
                       final + (1 - final) * (1 + cos(pi * f)) / 2      cosine
                       final^f                       exponential
                       final + (1 - final) * (1 - sqrt(f))              one_minus_sqrt
                       sqrt(w / t)                   inverse_sqrt, which has no final factor unless one is set
    wsd                1, and one of these over the last share ``decay`` of all steps

f is 0 at the first step after the warmup and would be 1 at t = T, which never runs. So the last step of linear-to-zero
("Straight to Zero", arXiv 2502.15938: eta * (T - t) / (T - w)) has the rate eta / (T - w), and no step has rate zero.
Likewise, the last step of a 10x decay ends one step before a tenth of the peak.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import ClassVar, overload

from sparsetrain.errors import UserError, check_choice
from sparsetrain.optim.segments import NEVER_ZERO, SEGMENTS, Curve, SegmentConfig, default_end
from sparsetrain.registry import Registry

WARMUP = 0.1  # default share of steps
WSD_DECAY = 0.2  # default share of steps of the decay of ``wsd``


@dataclass(frozen=True)
class NamedSchedule:
    """The decay of a named schedule after its warmup.

    Args:
        segment: shape of the decay, one of `SEGMENTS`.
        final: factor of the peak learning rate at its end, if ``schedule.final`` is not set; None leaves it to the
            shape, see `default_end`.
        final_is_free: whether ``schedule.final`` may be set.
        stable: whether the rate stays at its peak for a while, and ``schedule.decay`` and ``schedule.shape`` may be
            set.
    """

    segment: str
    final: float | None
    final_is_free: bool
    stable: bool = False


SCHEDULES: Registry[NamedSchedule] = Registry("schedule", "schedule.name")
"""The names that `ScheduleConfig` accepts without ``segments``."""

SCHEDULES.register("linear_to_zero", NamedSchedule("linear", 0.0, final_is_free=False))
SCHEDULES.register("linear_10x", NamedSchedule("linear", 0.1, final_is_free=True))
SCHEDULES.register("cosine", NamedSchedule("cosine", 0.1, final_is_free=True))
SCHEDULES.register("constant", NamedSchedule("constant", 1.0, final_is_free=False))
SCHEDULES.register("linear", NamedSchedule("linear", 0.0, final_is_free=True))
SCHEDULES.register("exponential", NamedSchedule("exponential", 0.1, final_is_free=True))
SCHEDULES.register("inverse_sqrt", NamedSchedule("inverse_sqrt", None, final_is_free=True))
SCHEDULES.register("wsd", NamedSchedule("linear", 0.0, final_is_free=True, stable=True))


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
        name: one of `SCHEDULES`: ``linear_to_zero`` (D2Z), ``linear_10x`` (to a tenth of the peak), ``linear`` (to
            zero, or to ``final``), ``cosine`` and ``exponential`` (to ``final``, by default a tenth), ``inverse_sqrt``,
            ``constant`` (after the warmup), ``wsd`` (constant, and then a decay), or a registered one. With
            ``segments`` it may be any name, for reports.
        warmup: fraction of steps that warm up linearly, in [0, 1), rounded to the nearest step; null means 0.1.
        warmup_steps: number of warmup steps, instead of ``warmup``.
        final: end of the decay as a fraction of the peak, in [0, 1]; not for ``linear_to_zero`` and ``constant``.
        decay: for ``wsd``, the fraction of all steps that decay, above 0; null means 0.2.
        shape: for ``wsd``, the shape of the decay: a registered segment, by default ``linear``.
        cycles: repeat warmup and decay so many times, each time over an equal share of the steps; a later warmup rises
            from the factor at which the cycle before it ends.
        continues: for the schedule of a phase: begin at the factor at which the phase before it ends, and not at zero
            (with a warmup) or at the peak.
        segments: the whole schedule as a list; each segment has a ``shape`` and a length, as ``share`` of all steps, in
            ``tokens`` or in ``steps``. One segment may have no length and takes the remaining steps. Borders between
            segments are rounded to the nearest step.

    Raises:
        UserError: a field is out of range, or two fields contradict each other.
    """

    SECTION: ClassVar[str] = "schedule"  # in messages

    name: str = "linear_to_zero"
    warmup: float | None = None
    warmup_steps: int | None = None
    final: float | None = None
    segments: list[SegmentConfig] | None = None
    decay: float | None = None
    shape: str | None = None
    cycles: int | None = None
    continues: bool = False

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
        self._check_stable(self.warmup if self.warmup_steps is None else 0.0)
        if self.cycles is not None:
            if self.cycles < 1:
                raise UserError(f"schedule.cycles={self.cycles} must be at least 1")
            if self.warmup_steps is not None:
                raise UserError(
                    f"schedule.cycles={self.cycles} and schedule.warmup_steps={self.warmup_steps}: the warmup of a "
                    "cycle is a fraction of it, schedule.warmup"
                )
        if self.final is None:
            return
        if not SCHEDULES[self.name].final_is_free:
            free = ", ".join(name for name in SCHEDULES if SCHEDULES[name].final_is_free)
            raise UserError(f"schedule.final={self.final} has no meaning for {self.name}; it is for {free}")
        if not 0.0 <= self.final <= 1.0:
            raise UserError(f"schedule.final={self.final} must be a fraction of the peak, between 0 and 1")
        if self.final == 0.0 and self._shape in NEVER_ZERO:
            raise UserError(f"schedule.final={self.final} must be above 0 for {self._shape}, which never gets there")

    def _check_stable(self, warmup: float) -> None:
        if not SCHEDULES[self.name].stable:
            for name in ("decay", "shape"):
                if getattr(self, name) is not None:
                    wsd = ", ".join(name for name in SCHEDULES if SCHEDULES[name].stable)
                    given = getattr(self, name)
                    raise UserError(f"schedule.{name}={given} has no meaning for {self.name}; it is for {wsd}")
            return
        if self.decay is None:
            self.decay = WSD_DECAY
        if not 0.0 < self.decay <= 1.0 - warmup:
            raise UserError(
                f"schedule.decay={self.decay} must be a fraction of the steps, above 0 and at most {1.0 - warmup:g}, "
                "what the warmup leaves"
            )
        if self.shape is not None:
            check_choice(
                "schedule.shape", self.shape, [name for name in SEGMENTS if name not in ("warmup", "constant")]
            )

    @property
    def _shape(self) -> str:
        """The shape of the decay of a named schedule."""
        return self.shape or SCHEDULES[self.name].segment

    def _check_segments(self, segments: Sequence[SegmentConfig]) -> None:
        if not segments:
            raise UserError("schedule.segments=[]: a schedule has at least one segment")
        for name in ("warmup", "warmup_steps", "final", "decay", "shape", "cycles"):
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
        named, final = SCHEDULES[self.name], self.final
        if final is None:
            final = SCHEDULES[self._shape].final if self._shape in NEVER_ZERO else named.final
        cycles, warmup = self.cycles or 1, self.warmup or 0.0
        first = SegmentConfig("warmup", 1.0, share=None if self.warmup_steps is not None else warmup / cycles)
        first.steps = self.warmup_steps
        decay = (self.decay or 0.0) if named.stable else 0.0
        if named.stable:
            parts = [first, SegmentConfig("constant"), SegmentConfig(self._shape, final, share=decay / cycles)]
        else:
            parts = [first, SegmentConfig(self._shape, final)]
        # Only the last cycle may leave a length open.
        closed = [replace(part, share=(1.0 - warmup - decay) / cycles) if part.open else part for part in parts]
        return closed * (cycles - 1) + parts


class Schedule:
    """The factor of the peak learning rate, as a pure function of the step number.

    Args:
        config: the schedule.
        total_steps: T, the number of steps.
        steps_of_tokens: maps a number of tokens to the steps in which they are seen; for segments in tokens.
        start: the factor at which the first segment begins; by default 0 for a warmup and 1 for another shape.
        unit: the first step's length, where the schedule counts tokens and every "step" here is one of them.

    Raises:
        UserError: the segments leave no step after the warmup, or do not fill the training; or a shape that is never
            zero would begin at zero.
        ValueError: ``total_steps`` is not positive.
    """

    def __init__(
        self,
        config: ScheduleConfig,
        total_steps: int,
        steps_of_tokens: Callable[[int], float] | None = None,
        start: float | None = None,
        unit: int = 1,
    ) -> None:
        if total_steps < 1:
            raise ValueError(f"total_steps={total_steps} must be at least 1")
        if config.warmup_steps is not None and config.warmup_steps >= total_steps:
            raise UserError(
                f"schedule.warmup_steps={config.warmup_steps} must be below the {total_steps} steps of the training"
            )
        if config.cycles is not None and 2 * config.cycles * unit > max(total_steps, 2 * unit):
            steps = total_steps // unit
            raise UserError(
                f"schedule.cycles={config.cycles} must be at most {max(1, steps // 2)}: the training has {steps} "
                "steps, and a cycle takes at least 2"
            )
        self.total_steps = total_steps
        segments = config.expanded()
        self._ends = _ends(segments, total_steps, steps_of_tokens)
        self._curves = [SEGMENTS[segment.shape] for segment in segments]
        self._warms = [segment.shape == "warmup" for segment in segments]
        self._factors: list[tuple[float, float]] = []
        before = (0.0 if segments[0].shape == "warmup" else 1.0) if start is None else start
        for index, segment in enumerate(segments):
            length = self._length(index)
            if segment.shape in NEVER_ZERO and before == 0.0 and length > 0:
                raise UserError(f"schedule.segments[{index}]: {segment.shape} cannot begin at a rate of 0")
            after = segment.to
            if after is None:
                after = default_end(segment.shape, before, max(unit, self._ends[index] - length), length)
            if segment.shape == "constant":
                after = before
            self._factors.append((before, after))
            # An empty segment has no effect, except that an empty warmup counts as finished, and so does the first one.
            if length > 0 or index == 0 or segment.shape == "warmup":
                before = after
        self.final = self._factors[-1][1] if self._length(len(segments) - 1) > 0 else before
        self.warmup_steps = self._ends[0] if segments[0].shape == "warmup" else 0

    @property
    def highest(self) -> float:
        """The largest factor at a border of two segments."""
        return max(max(pair) for pair in self._factors)

    def _length(self, index: int) -> int:
        return self._ends[index] - (self._ends[index - 1] if index else 0)

    def factor(self, step: int, length: int = 1) -> float:
        """Return the factor of the peak learning rate in step number ``step`` (0-based).

        From ``total_steps`` on it is ``final``, which no step of the training uses.

        Args:
            length: in a schedule that counts tokens, those of the optimizer step that begins at token ``step``.

        Raises:
            ValueError: ``step`` is negative.
        """
        if step < 0:
            raise ValueError(f"step={step} must be at least 0")
        if step >= self.total_steps:
            return self.final
        index = bisect.bisect_right(self._ends, step)
        whole = self._length(index)
        place = step - (self._ends[index] - whole)
        if self._warms[index]:  # it reaches its end with the last step, and not behind it
            place = min(place + length, whole) - 1
        return self._curves[index](place, whole, *self._factors[index])


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
