"""The learning rate over a whole run, whose phases may have schedules of their own."""

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
    """The schedule of a run: its own over all steps, and in phases with a schedule of theirs, that one.

    Args:
        config: the run's. budget: its phases.

    Raises:
        UserError: as `Schedule`.
    """

    def __init__(self, config: ScheduleConfig, budget: Budget) -> None:
        self.budget = budget
        self.whole = Schedule(config, budget.total_steps, budget.steps_of_tokens)
        self.own = {phase.index: _own(phase, phase.schedule) for phase in budget.phases if phase.schedule is not None}

    @property
    def total_steps(self) -> int:
        return self.budget.total_steps

    def factor(self, step: int) -> float:
        """Return what the peak learning rate is multiplied by in update number ``step`` (0-based)."""
        phase = self.budget.at(step)
        own = self.own.get(phase.index)
        return self.whole.factor(step) if own is None else own.factor(step - phase.first_step)
