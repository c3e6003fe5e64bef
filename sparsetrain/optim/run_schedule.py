"""The schedules of a whole run: of the learning rate, in which phases may have their own, and of other settings."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

from sparsetrain.errors import UserError
from sparsetrain.optim.budget import Budget, Phase
from sparsetrain.optim.optimizer import OptimizerConfig, set_factor
from sparsetrain.optim.schedule import Schedule, ScheduleConfig


def _per_step(tokens_per_step: int, tokens: float) -> float:
    return tokens / tokens_per_step


def _own(phase: Phase, config: ScheduleConfig, start: float | None) -> Schedule:
    try:
        return Schedule(config, phase.steps, partial(_per_step, phase.tokens_per_step), start)
    except UserError as error:
        raise UserError(f"budget.phases[{phase.index}]: {error}") from None


class RunSchedule:
    """The schedules of a run.

    That of the learning rate applies to all steps, except those of phases that have their own schedule.

    Args:
        config: schedule of the learning rate.
        budget: phases of the run.
        optimizer: the optimizer, whose ``schedules`` are those of its other settings.

    Raises:
        UserError: see `Schedule`; or a coefficient of a moving average would reach 1.
    """

    def __init__(self, config: ScheduleConfig, budget: Budget, optimizer: OptimizerConfig | None = None) -> None:
        self.budget = budget
        self.whole = Schedule(config, budget.total_steps, budget.steps_of_tokens)
        if config.continues:
            raise UserError("schedule.continues=true is for the schedule of a phase, budget.phases[].schedule")
        self.own: dict[int, Schedule] = {}
        for phase in budget.phases:
            if phase.schedule is not None:
                start = self._end(phase) if phase.schedule.continues else None
                self.own[phase.index] = _own(phase, phase.schedule, start)

        self.settings = {} if optimizer is None else _settings(optimizer, budget)

    def _end(self, phase: Phase) -> float:
        """Return the factor at which the phase before ``phase`` ends."""
        if phase.index == 0:
            raise UserError("budget.phases[0]: schedule.continues=true needs a phase before it")
        own = self.own.get(phase.index - 1)
        return self.whole.factor(phase.first_step) if own is None else own.final

    @property
    def total_steps(self) -> int:
        return self.budget.total_steps

    def factor(self, step: int) -> float:
        """Return the factor of the peak learning rate in optimizer step number ``step`` (0-based)."""
        phase = self.budget.at(step)
        own = self.own.get(phase.index)
        return self.whole.factor(step) if own is None else own.factor(step - phase.first_step)

    def apply(self, groups: Iterable[dict[str, Any]], step: int) -> float:
        """Give parameter groups the settings of optimizer step number ``step``; return the learning rate's factor."""
        groups = list(groups)
        factor = self.factor(step)
        set_factor(groups, "lr", factor)
        for name, schedule in self.settings.items():
            set_factor(groups, name, schedule.factor(step))
        return factor

    def value(self, optimizer: OptimizerConfig, name: str, step: int) -> float:
        """Return a setting before the parameterization scales it: ``lr``, or one of ``settings``."""
        factor = self.factor(step) if name == "lr" else self.settings[name].factor(step)
        value: float = getattr(optimizer, name)
        return value * factor


def _settings(optimizer: OptimizerConfig, budget: Budget) -> dict[str, Schedule]:
    found = {}
    for name, config in optimizer.schedules.given().items():
        key = f"optimizer.schedules.{name}"
        try:
            found[name] = Schedule(config, budget.total_steps, budget.steps_of_tokens)
        except UserError as error:
            raise UserError(f"{key}: {error}") from None
        value, most = getattr(optimizer, name), found[name].highest
        if name != "weight_decay" and value * most >= 1.0:
            raise UserError(f"{key}: optimizer.{name}={value} times {most:g} is {value * most:g}; it must stay below 1")
    return found
