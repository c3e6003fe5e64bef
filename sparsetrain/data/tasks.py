"""The tasks by name."""

from __future__ import annotations

from dataclasses import dataclass

from sparsetrain.data import medline, pubmedqa, section_roles
from sparsetrain.data.labelled import Example, Task
from sparsetrain.errors import UserError, check_choice

__all__ = ["Example", "Task", "TaskConfig", "find_task", "load_task"]

TASKS = ("section_roles", "pubmedqa")


@dataclass
class TaskConfig:
    """Which task, and how much of it.

    Args:
        name: ``section_roles`` (sentences of MEDLINE abstracts, five labels) or ``pubmedqa`` (three labels).
        path: for ``pubmedqa``, a directory with ``ori_pqal.json`` and ``test_ground_truth.json``; None: the hub.
        n_train: training examples at most; the same of the other splits. PubMedQA has 450, 50 and 500.
        seed: which examples those are; a larger number adds to the examples of a smaller one.
    """

    name: str = "section_roles"
    path: str | None = None
    n_train: int = 1000
    n_validation: int = 500
    n_test: int = 2000
    seed: int = 0

    def __post_init__(self) -> None:
        check_choice("task.name", self.name, TASKS)
        for field in ("n_train", "n_validation", "n_test"):
            if getattr(self, field) < 1:
                raise UserError(f"task.{field}={getattr(self, field)} is too small; the least is 1")
        if self.path is not None and self.name != "pubmedqa":
            raise UserError(f"task.path={self.path}: task {self.name} takes no path; only pubmedqa does")


def find_task(config: TaskConfig) -> Task | None:
    """Return the task if its data lie on this machine, else None: nothing is downloaded and nothing is written.

    Raises:
        UserError: data that are there and cannot be used, or a directory of them that is not there.
    """
    here = config.path is not None if config.name == "pubmedqa" else medline.is_parsed()
    return load_task(config) if here else None


def load_task(config: TaskConfig) -> Task:
    """Return the task; raises `UserError` if its data cannot be had."""
    counts = (config.n_train, config.n_validation, config.n_test)
    if config.name == "pubmedqa":
        return pubmedqa.load(config.path, *counts, config.seed)
    return section_roles.load(*counts, config.seed)
