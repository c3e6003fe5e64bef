"""The learning-rate schedule of a whole run, in which phases may have their own schedules."""

from __future__ import annotations

from functools import partial

from sparsetrain.errors import UserError
from sparsetrain.optim.budget import Budget, Phase
from sparsetrain.optim.schedule import Schedule, ScheduleConfig


def _per_step(tokens_per_step: int, tokens: float) -> float:
    return tokens / tokens_per_step


def _own(phase: Phase, config: ScheduleConfig) -> Schedule:
    try:
        return Schedule(config, phase.steps, partial(_per_step, phase.tokens_per_step))
    except UserError as error:
        raise UserError(f"budget.phases[{phase.index}]: {error}") from None


class RunSchedule:
    """The schedule of a run. It applies to all steps, except those of phases that have their own schedule.

    Args:
        config: schedule of the run.
        budget: phases of the run.

    Raises:
        UserError: see `Schedule`.
    """

    def __init__(self, config: ScheduleConfig, budget: Budget) -> None:
        self.budget = budget
        self.whole = Schedule(config, budget.total_steps, budget.steps_of_tokens)
        self.own = {phase.index: _own(phase, phase.schedule) for phase in budget.phases if phase.schedule is not None}

    @property
    def total_steps(self) -> int:
        return self.budget.total_steps

    def factor(self, step: int) -> float:
        """Return the factor of the peak learning rate in optimizer step number ``step`` (0-based)."""
        phase = self.budget.at(step)
        own = self.own.get(phase.index)
        return self.whole.factor(step) if own is None else own.factor(step - phase.first_step)
