"""Learning-rate schedules as pure functions of the update number.

The convention, for T updates of which w are warmup, with t = 0 .. T-1 the number of the update:

    warmup   t < w     (t + 1) / w                   so that no update has rate 0 and update w - 1 has the peak
    decay    t >= w    1 - (1 - final) * f           linear, with f = (t - w) / (T - w)
                       final + (1 - final) * (1 + cos(pi * f)) / 2      cosine

f is 0 at the first update after the warmup and would be 1 at t = T, which is never applied: the last update of
linear-to-zero ("Straight to Zero", arXiv 2502.15938: eta * (T - t) / (T - w)) has the rate eta / (T - w), and no
update is spent at rate zero. Likewise the last update of a 10x decay is one step short of a tenth of the peak.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from sparsetrain.errors import UserError, check_choice


# A curve maps (final, remaining) to the factor, with remaining = 1 - f = (T - t) / (T - w): in this form linear to
# zero is exact to the last bit, and every curve is exactly 1 at the peak.
def _linear(final: float, remaining: float) -> float:
    return final + (1.0 - final) * remaining


def _cosine(final: float, remaining: float) -> float:
    return final + (1.0 - final) * 0.5 * (1.0 - math.cos(math.pi * remaining))


def _constant(final: float, remaining: float) -> float:
    return 1.0


@dataclass(frozen=True)
class _Shape:
    """How a named schedule decays: its curve, where it ends by default, and whether the user may move the end."""

    curve: Callable[[float, float], float]
    final: float
    final_is_free: bool


_SHAPES = {
    "linear_to_zero": _Shape(_linear, 0.0, final_is_free=False),
    "linear_10x": _Shape(_linear, 0.1, final_is_free=True),
    "cosine": _Shape(_cosine, 0.1, final_is_free=True),
    "constant": _Shape(_constant, 1.0, final_is_free=False),
}

SCHEDULES = tuple(_SHAPES)
"""The names that `ScheduleConfig` accepts."""


@dataclass
class ScheduleConfig:
    """How long to train and how the learning rate moves meanwhile.

    Args:
        name: one of `SCHEDULES`. ``linear_to_zero`` (D2Z), ``linear_10x`` (to a tenth of the peak, or to
            ``final``), ``cosine`` (to ``final``, a tenth by default), ``constant`` (after the warmup).
        steps: number of optimizer updates. At most one of ``steps`` and ``tokens`` may be set.
        tokens: number of training tokens; `total_steps` turns it into updates.
        warmup: fraction of all updates that warm up linearly, in [0, 1), rounded to the nearest update.
        warmup_steps: number of warmup updates; takes the place of ``warmup``.
        final: the rate that the decay heads for, as a fraction of the peak, in [0, 1]; for ``linear_10x`` and
            ``cosine`` only.

    Raises:
        UserError: a field is out of range, or two fields contradict each other.
    """

    name: str = "linear_to_zero"
    steps: int | None = None
    tokens: int | None = None
    warmup: float = 0.1
    warmup_steps: int | None = None
    final: float | None = None

    def __post_init__(self) -> None:
        check_choice("schedule.name", self.name, SCHEDULES)
        if self.steps is not None and self.tokens is not None:
            raise UserError(f"schedule.steps={self.steps} and schedule.tokens={self.tokens}: set only one of them")
        for field in ("steps", "tokens"):
            value = getattr(self, field)
            if value is not None and value < 1:
                raise UserError(f"schedule.{field}={value} must be at least 1")
        if not 0.0 <= self.warmup < 1.0:
            raise UserError(f"schedule.warmup={self.warmup} must be a fraction of the steps, at least 0 and below 1")
        if self.warmup_steps is not None and self.warmup_steps < 0:
            raise UserError(f"schedule.warmup_steps={self.warmup_steps} must be at least 0")
        if self.final is None:
            return
        if not _SHAPES[self.name].final_is_free:
            free = ", ".join(name for name, shape in _SHAPES.items() if shape.final_is_free)
            raise UserError(f"schedule.final={self.final} has no meaning for {self.name}; it is for {free}")
        if not 0.0 <= self.final <= 1.0:
            raise UserError(f"schedule.final={self.final} must be a fraction of the peak, between 0 and 1")

    def total_steps(self, tokens_per_step: int) -> int:
        """Return the number of updates: ``steps``, or as many as it takes to see ``tokens`` (rounded up).

        Args:
            tokens_per_step: tokens in one update, over all devices and accumulated micro-batches.

        Raises:
            UserError: neither ``steps`` nor ``tokens`` is set.
            ValueError: ``tokens_per_step`` is not positive.
        """
        if tokens_per_step < 1:
            raise ValueError(f"tokens_per_step={tokens_per_step} must be at least 1")
        if self.steps is not None:
            return self.steps
        if self.tokens is None:
            raise UserError("the length of the training is not set: set schedule.steps or schedule.tokens")
        return -(-self.tokens // tokens_per_step)


class Schedule:
    """The multiplier of the peak learning rate, as a pure function of the update number.

    Args:
        config: the shape of the schedule.
        total_steps: T, the number of updates, usually ``config.total_steps(tokens_per_step)``.

    Raises:
        UserError: ``warmup_steps`` leaves no update after the warmup.
        ValueError: ``total_steps`` is not positive.
    """

    def __init__(self, config: ScheduleConfig, total_steps: int) -> None:
        if total_steps < 1:
            raise ValueError(f"total_steps={total_steps} must be at least 1")
        shape = _SHAPES[config.name]
        self.total_steps = total_steps
        self.final = shape.final if config.final is None else config.final
        self._curve = shape.curve
        if config.warmup_steps is None:
            # Half rounds up, so that 10% of 5 updates is one; at least one update is left at or after the peak.
            self.warmup_steps = min(math.floor(config.warmup * total_steps + 0.5), total_steps - 1)
        elif config.warmup_steps < total_steps:
            self.warmup_steps = config.warmup_steps
        else:
            raise UserError(
                f"schedule.warmup_steps={config.warmup_steps} must be below the {total_steps} steps of the training"
            )

    def factor(self, step: int) -> float:
        """Return what the peak learning rate is multiplied by in update number ``step`` (0-based).

        From ``total_steps`` on it is ``final``, a value that no update of the training uses.

        Raises:
            ValueError: ``step`` is negative.
        """
        if step < 0:
            raise ValueError(f"step={step} must be at least 0")
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        remaining = max(self.total_steps - step, 0) / (self.total_steps - self.warmup_steps)
        return self._curve(self.final, remaining)
