"""The texts and tasks of runs that are planned: what lies ready is read, each once, and nothing is made."""

from __future__ import annotations

from collections.abc import Callable

from sparsetrain.data import Corpus, DataConfig, PackedSamples, Task, TaskConfig, find_prepared, find_task
from sparsetrain.errors import UserError
from sparsetrain.optim import Budget, RunSchedule
from sparsetrain.runs.origin import Origin
from sparsetrain.stages.config import RunConfig

MOST_RATES = 100_000  # updates of a phase whose learning rates are looked at one by one

Find = Callable[[DataConfig], tuple[str, Corpus | None]]
"""Returns the name of a corpus and, if it is prepared, the corpus."""


class Inputs:
    """What runs are made from. A mistake is remembered too, and raised again for the next run with it.

    Args:
        find: where a corpus comes from; by default it is one that is prepared already.
    """

    def __init__(self, find: Find = find_prepared) -> None:
        self._find = find
        self._corpora: dict[str, tuple[str, Corpus | None] | UserError] = {}
        self._tasks: dict[str, Task | UserError | None] = {}
        self._origins: dict[tuple[str, str | None], Origin] = {}
        self._factors: dict[str, list[tuple[float, float]]] = {}

    def corpus(self, config: DataConfig) -> tuple[str, Corpus | None]:
        """Return the name of a corpus and, if it is there, the corpus.

        Raises:
            UserError: a text that cannot be read.
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

    def origin(self, corpus: Corpus, init_from: str | None) -> Origin:
        """Return `Origin.of_corpus`."""
        key = (corpus.directory.name, init_from)
        if key not in self._origins:
            self._origins[key] = Origin.of_corpus(corpus, init_from)
        return self._origins[key]

    def task(self, config: TaskConfig) -> Task | UserError | None:
        """Return a task, what is wrong with its data, or None if they would have to be downloaded."""
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
            UserError: a schedule that does not fit the budget.
        """
        key = repr((config.schedule, budget))  # points of a sweep over the rate share their schedule
        if key not in self._factors:
            schedule = RunSchedule(config.schedule, budget)
            self._factors[key] = []
            for phase in budget.phases:
                stride = max(1, phase.steps // MOST_RATES)
                steps = (*range(phase.first_step, phase.end_step, stride), phase.end_step - 1)
                factors = [schedule.factor(step) for step in steps]
                self._factors[key].append((min(factors), max(factors)))
        return [(config.optimizer.lr * low, config.optimizer.lr * high) for low, high in self._factors[key]]


def samples_per_epoch(corpus: Corpus, config: RunConfig) -> Callable[[int], int]:
    """Return a function from a context to the samples of a pass; it raises `UserError` for a text that is shorter."""
    return lambda context: PackedSamples(corpus.train, context, config.samples_seed, "pretrain").samples_per_epoch
