"""The schedules of a whole run: of the learning rate, in which phases may have their own, and of other settings.

A schedule is a function of the steps of a run. Where the batch size is no number (`sparsetrain.optim.batch_size`), it
is one of the tokens seen: a share of a schedule is then a share of the tokens, a step has the factor that the schedule
has before the step's first token, and a step of a warmup that behind its last one. So no step has rate zero, and the
last step of linear-to-zero, with b of the D tokens, has the rate b / (D - w) for a warmup of w tokens.

In a step whose batch is b times as large as that of the first one, ``budget.lr_rule`` multiplies the learning rate
further, and ``budget.wd_rule`` the weight decay:

* ``sqrt``, sqrt(b): under Adam it keeps the covariance of the updates per token (arXiv 2205.10287, which also scales
  the betas; here ``optimizer.schedules`` may).
* ``linear``, b: under SGD it keeps the mean update per token (arXiv 1706.02677).
* ``tau``, b over the factor of the learning rate: it keeps lr * weight_decay / b, the decay per token, and so the
  timescale tau = B / (lr * weight_decay * D) of AdamW (arXiv 2505.13738): at a fixed rate weight decay is proportional
  to the batch size.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from typing import Any

from sparsetrain.errors import UserError, within
from sparsetrain.optim.budget import Budget, Phase
from sparsetrain.optim.optimizer import OptimizerConfig, set_factor
from sparsetrain.optim.schedule import Schedule, ScheduleConfig

_PLACES = 1024  # steps at which the largest decay is looked for, before those around the best of them


def _per_step(tokens_per_step: int, tokens: float) -> float:
    return tokens / tokens_per_step


class RunSchedule:
    """The schedules of a run.

    That of the learning rate applies to all steps, except those of phases that have their own schedule.

    Args:
        config: schedule of the learning rate.
        budget: phases of the run.
        optimizer: the optimizer, whose ``schedules`` are those of its other settings.

    Raises:
        UserError: see `Schedule`; a coefficient of a moving average would reach 1; or a length is in steps, and nobody
            knows their number.
    """

    def __init__(self, config: ScheduleConfig, budget: Budget, optimizer: OptimizerConfig | None = None) -> None:
        self.budget = budget
        self.whole = _whole(config, budget)
        if config.continues:
            raise UserError("schedule.continues=true is for the schedule of a phase, budget.phases[].schedule")
        self.own: dict[int, Schedule] = {}
        self._first = {phase.index: phase for phase in reversed(budget.phases)}  # the first part of each phase
        for index, phase in sorted(self._first.items()):
            if phase.schedule is not None:
                try:
                    start = self._end(phase) if phase.schedule.continues else None
                    self.own[index] = self._alone(phase, phase.schedule, start)
                except UserError as error:
                    raise within(f"budget.phases[{index}].schedule", "schedule", error) from None

        self.settings = {} if optimizer is None else _settings(optimizer, budget)

    def _alone(self, first: Phase, config: ScheduleConfig, start: float | None) -> Schedule:
        """Return the schedule of one phase, whose first part is ``first``."""
        parts = [part for part in self.budget.phases if part.index == first.index]
        if not self.budget.in_tokens:
            return Schedule(config, first.steps, partial(_per_step, first.tokens_per_step), start)
        own = replace(self.budget, phases=tuple(_from(part, first) for part in parts))
        return _whole(config, own, start)

    def _end(self, phase: Phase) -> float:
        """Return the factor at which the phase before ``phase`` ends."""
        if phase.index == 0:
            raise UserError("schedule.continues=true needs a phase before it")
        own = self.own.get(phase.index - 1)
        return self.whole.factor(*_place(self.budget, phase.first_step)) if own is None else own.final

    @property
    def total_steps(self) -> int:
        return self.budget.total_steps

    def scheduled(self, step: int) -> float:
        """Return the factor of the peak learning rate in optimizer step number ``step`` by the schedule alone."""
        phase, (place, length) = self.budget.at(step), _place(self.budget, step)
        own = self.own.get(phase.index)
        if own is None:
            return self.whole.factor(place, length)
        first = self._first[phase.index]
        return own.factor(place - (first.first_token if self.budget.in_tokens else first.first_step), length)

    def factor(self, step: int) -> float:
        """Return the factor of the peak learning rate in optimizer step number ``step`` (0-based)."""
        return self.scheduled(step) * self._of_batch(step)

    def _of_batch(self, step: int) -> float:
        """Return the factor of the learning rate that follows from the batch size of a step."""
        rule, larger = self.budget.config.lr_rule, self._larger(step)
        return math.sqrt(larger) if rule == "sqrt" else larger if rule == "linear" else 1.0

    def _larger(self, step: int) -> float:
        return self.budget.at(step).batch_size / self.budget.phases[0].batch_size

    def _decay(self, step: int) -> float:
        """Return the factor of weight decay in a step."""
        own = self.settings.get("weight_decay")
        factor = 1.0 if own is None else own.factor(*_place(self.budget, step))
        if self.budget.config.wd_rule == "tau":
            factor *= self._larger(step) / self._of_batch(step)
        return factor

    def peak(self) -> float:
        """Return the largest product of the factors of learning rate and weight decay.

        Where the batch changes, that of a step counts per token: it is multiplied by the mean batch over the step's. So
        ``tau = 1 / (lr weight_decay peak steps)`` is the timescale of the strongest decay, as a share of all tokens.
        """
        last, mean = self.total_steps - 1, self.budget.tokens / self.total_steps

        def product(step: int) -> float:
            return self.factor(step) * self._decay(step) * (mean / self.budget.at(step).tokens_per_step)

        stride = -(-self.total_steps // _PLACES)
        best = max((*range(0, last, stride), last), key=product)
        near = range(max(0, best - stride + 1), min(last, best + stride - 1) + 1)
        return max(map(product, near))

    @property
    def changing(self) -> list[str]:
        """The settings that may change, besides the learning rate."""
        decay = ["weight_decay"] if self.budget.config.wd_rule == "tau" else []
        return list(dict.fromkeys([*self.settings, *decay]))

    def apply(self, groups: Iterable[dict[str, Any]], step: int) -> float:
        """Give parameter groups the settings of optimizer step number ``step``; return the learning rate's factor."""
        groups = list(groups)
        factor = self.factor(step)
        set_factor(groups, "lr", factor)
        for name in self.changing:
            if name == "weight_decay":
                for group in groups:
                    group.setdefault("initial_weight_decay", group["weight_decay"])
            set_factor(groups, name, self._factor_of(name, step))
        return factor

    def _factor_of(self, name: str, step: int) -> float:
        return self._decay(step) if name == "weight_decay" else self.settings[name].factor(*_place(self.budget, step))

    def value(self, optimizer: OptimizerConfig, name: str, step: int) -> float:
        """Return a setting before the parameterization scales it: ``lr``, or one of ``changing``."""
        factor = self.factor(step) if name == "lr" else self._factor_of(name, step)
        value: float = getattr(optimizer, name)
        return value * factor


def _place(budget: Budget, step: int) -> tuple[int, int]:
    """Return where a step begins in a schedule, and its length: in tokens or in steps."""
    return (budget.tokens_at(step), budget.at(step).tokens_per_step) if budget.in_tokens else (step, 1)


def _from(part: Phase, first: Phase) -> Phase:
    """Return a part of a phase with its steps and tokens counted from the phase's beginning."""
    return replace(
        part,
        first_step=part.first_step - first.first_step,
        end_step=part.end_step - first.first_step,
        first_token=part.first_token - first.first_token,
    )


def _whole(config: ScheduleConfig, budget: Budget, start: float | None = None) -> Schedule:
    """Return a schedule over all steps, or all tokens, of a budget."""
    if not budget.in_tokens:
        return Schedule(config, budget.total_steps, budget.steps_of_tokens, start)
    segments = config.expanded()
    for segment in segments:
        if segment.steps is not None and budget.config.led is not None:
            raise UserError(
                f"schedule: a length of {segment.steps} steps, with budget.batch_size led by gns, is an unknown number "
                "of tokens; give share or tokens"
            )
    if budget.config.led is None:
        Schedule(config, budget.total_steps, budget.steps_of_tokens, start)  # refuses what the steps do not allow
    measured = [
        segment if segment.steps is None else replace(segment, steps=None, tokens=budget.tokens_at(segment.steps))
        for segment in segments
    ]
    in_tokens = ScheduleConfig(segments=measured, continues=config.continues)
    return Schedule(in_tokens, budget.scheduled_tokens, float, start, budget.phases[0].tokens_per_step)


def _settings(optimizer: OptimizerConfig, budget: Budget) -> dict[str, Schedule]:
    found = {}
    for name, config in optimizer.schedules.given().items():
        key = f"optimizer.schedules.{name}"
        try:
            found[name] = _whole(config, budget)
        except UserError as error:
            raise within(key, "schedule.segments", error) from None
        value, most = getattr(optimizer, name), found[name].highest
        if name != "weight_decay" and value * most >= 1.0:
            raise UserError(f"{key}: optimizer.{name}={value} times {most:g} is {value * most:g}; it must stay below 1")
    return found
