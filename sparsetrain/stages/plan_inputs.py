"""Texts and tasks of planned runs: read once if they are prepared, never prepared here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from sparsetrain.data import Corpora, DataConfig, Task, TaskConfig, find_corpora, find_task
from sparsetrain.errors import UserError
from sparsetrain.optim import Budget, RunSchedule
from sparsetrain.runs.origin import Origin
from sparsetrain.stages.config import RunConfig

MOST_RATES = 100_000  # learning rates of a phase to evaluate when looking for the lowest and highest
CURVE = 60  # points of a curve

Find = Callable[[DataConfig], tuple[str, Corpora | None]]
"""Returns the key of the corpora of a run and, if they are prepared, the corpora."""


class Inputs:
    """A cache of corpora, tasks, origins and learning rates. It also remembers errors and raises them again.

    Args:
        find: returns the corpora; by default only prepared ones.
    """

    def __init__(self, find: Find = find_corpora) -> None:
        self._find = find
        self._corpora: dict[str, tuple[str, Corpora | None] | UserError] = {}
        self._tasks: dict[str, Task | UserError | None] = {}
        self._origins: dict[tuple[str, str | None], Origin] = {}
        self._factors: dict[str, list[tuple[float, float]]] = {}

    def corpora(self, config: DataConfig) -> tuple[str, Corpora | None]:
        """Return the key of the corpora of a run and, if they are prepared, the corpora.

        Raises:
            UserError: the text cannot be read.
        """
        key = repr({name: value for name, value in vars(config).items() if name != "context"})
        if key not in self._corpora:
            try:
                self._corpora[key] = self._find(config)
            except UserError as error:
                self._corpora[key] = error
        found = self._corpora[key]
        if isinstance(found, UserError):
            raise found
        return found

    def origin(self, corpora: Corpora, init_from: str | None) -> Origin:
        """Return `Origin.of_corpora` for a text and a run to start from."""
        key = (corpora.key, init_from)
        if key not in self._origins:
            self._origins[key] = Origin.of_corpora(corpora, init_from)
        return self._origins[key]

    def task(self, config: TaskConfig) -> Task | UserError | None:
        """Return a task, the error in its data, or None if the data would have to be downloaded."""
        key = repr(config)
        if key not in self._tasks:
            try:
                self._tasks[key] = find_task(config)
            except UserError as error:
                self._tasks[key] = error
        return self._tasks[key]

    def rates(self, config: RunConfig, budget: Budget) -> list[tuple[float, float]]:
        """Return the lowest and the highest base learning rate of each phase.

        Raises:
            UserError: the schedule does not fit the budget.
        """
        # Points of a sweep over the rate share their schedule.
        key = repr((config.schedule, replace(config.optimizer, lr=1.0), budget))
        if key not in self._factors:
            schedule = RunSchedule(config.schedule, budget, config.optimizer)
            self._factors[key] = []
            for phase in budget.phases:
                stride = max(1, phase.steps // MOST_RATES)
                steps = (*range(phase.first_step, phase.end_step, stride), phase.end_step - 1)
                factors = [schedule.factor(step) for step in steps]
                self._factors[key].append((min(factors), max(factors)))
        return [(config.optimizer.lr * low, config.optimizer.lr * high) for low, high in self._factors[key]]

    def curves(self, config: RunConfig, budget: Budget) -> dict[str, list[float]]:
        """Return the settings of the optimizer that change, by name, at `CURVE` steps from the first to the last.

        Raises:
            UserError: a schedule does not fit the budget.
        """
        schedule, last = RunSchedule(config.schedule, budget, config.optimizer), budget.total_steps - 1
        steps = sorted({round(last * point / (CURVE - 1)) for point in range(CURVE)})
        names = ("lr", *schedule.changing)
        found = {name: [schedule.value(config.optimizer, name, step) for step in steps] for name in names}
        if budget.in_tokens:
            found["batch_size"] = [float(budget.at(step).batch_size) for step in steps]
        return found
