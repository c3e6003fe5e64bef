"""The tasks by name, and the settings that say which one to load."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import overload

from sparsetrain.data.tasks.base import Task
from sparsetrain.errors import UserError
from sparsetrain.registry import Registry


@dataclass
class TaskConfig:
    """Which task, and how much of it.

    Args:
        name: ``section_roles`` (sentences of MEDLINE abstracts, five labels), ``pubmedqa`` (three labels), or a
            registered task.
        path: for ``pubmedqa``, a directory with ``ori_pqal.json`` and ``test_ground_truth.json``; None: the hub.
        n_train: training examples at most; the same of the other splits. PubMedQA has 450, 50 and 500.
        seed: which examples those are; a larger number adds to the examples of a smaller one.

    Raises:
        UserError: an unknown name, a number below 1, or a path for a task that takes none.
    """

    name: str = "section_roles"
    path: str | None = None
    n_train: int = 1000
    n_validation: int = 500
    n_test: int = 2000
    seed: int = 0

    def __post_init__(self) -> None:
        TASKS.check(self.name)
        for field in ("n_train", "n_validation", "n_test"):
            if getattr(self, field) < 1:
                raise UserError(f"task.{field}={getattr(self, field)} is too small; the least is 1")
        if self.path is not None and not TASKS[self.name].takes_path:
            taking = ", ".join(name for name in TASKS if TASKS[name].takes_path)
            raise UserError(f"task.path={self.path}: task {self.name} takes no path; a path is for {taking}")


Loader = Callable[[TaskConfig], Task]


def _always(_config: TaskConfig) -> bool:
    return True


@dataclass(frozen=True)
class TaskKind:
    """What is registered for a task; see `register_task`."""

    load: Loader
    takes_path: bool = False
    is_local: Callable[[TaskConfig], bool] = _always
    ids: str | None = None


TASKS: Registry[TaskKind] = Registry("task", "task.name")
"""The names that ``task.name`` accepts."""


@overload
def register_task(
    name: str,
    *,
    takes_path: bool = False,
    is_local: Callable[[TaskConfig], bool] = _always,
    ids: str | None = None,
) -> Callable[[Loader], Loader]: ...


@overload
def register_task(
    name: str,
    loader: Loader,
    *,
    takes_path: bool = False,
    is_local: Callable[[TaskConfig], bool] = _always,
    ids: str | None = None,
) -> Loader: ...


def register_task(
    name: str,
    loader: Loader | None = None,
    *,
    takes_path: bool = False,
    is_local: Callable[[TaskConfig], bool] = _always,
    ids: str | None = None,
) -> Loader | Callable[[Loader], Loader]:
    """Make a labelled task available as ``task.name=NAME``; without ``loader``, return a decorator that does so.

    ```python
    from sparsetrain.data import Example, Task, take

    @sparsetrain.register_task("parity")
    def parity(config):
        numbers = [Example(str(n), f"{n} is", n % 2) for n in range(1000)]
        return Task(
            name="parity",
            labels=("even", "odd"),
            answers=(" even", " odd"),
            train=take(numbers[:600], config.n_train, config.seed),
            validation=take(numbers[600:800], config.n_validation, config.seed),
            test=take(numbers[800:], config.n_test, config.seed),
        )
    ```

    Args:
        name: the name, see `Registry.register`.
        loader: maps the ``task`` section of the configuration to the task. Each split has at most the number of
            examples that the section gives, and the same section gives the same examples. Data that cannot be had
            raise `UserError`.
        takes_path: whether ``task.path`` may be given.
        is_local: tells from the section whether the data lie on this machine, so that the loader downloads nothing.
            ``sparsetrain plan`` loads no other task.
        ids: what `Example.document` is, such as ``"PMID"``; see `register_source`.

    Returns:
        ``loader``, or the decorator, which returns what it decorates.

    Raises:
        UserError: the name is malformed or taken.
    """
    if loader is None:
        return lambda decorated: register_task(name, decorated, takes_path=takes_path, is_local=is_local, ids=ids)
    kind = TaskKind(loader, takes_path, is_local, ids)
    TASKS.register(name, kind, replace=name in TASKS.names() and TASKS[name] == kind)
    return loader


def find_task(config: TaskConfig) -> Task | None:
    """Return the task if its data lie on this machine, else None: nothing is downloaded and nothing is written.

    Raises:
        UserError: data that are there and cannot be used, or a directory of them that is not there.
    """
    return load_task(config) if TASKS[config.name].is_local(config) else None


def load_task(config: TaskConfig) -> Task:
    """Return the task; raises `UserError` if its data cannot be had, or cannot be trained on."""
    task = TASKS[config.name].load(config)
    if task.name != config.name:
        raise UserError(f"task.name={config.name}: its loader returned a task of another name, {task.name!r}")
    task.check()
    return task
