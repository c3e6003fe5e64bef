"""The registry of tasks, and the settings of a task."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import overload

from sparsetrain.data.tasks.base import Task
from sparsetrain.errors import UserError
from sparsetrain.registry import Registry


@dataclass
class TaskConfig:
    """The task and the number of its examples.

    Args:
        name: ``section_roles`` (sentences of MEDLINE abstracts, five labels), ``pubmedqa`` (three labels), or a
            registered task.
        path: for ``pubmedqa``, a directory with ``ori_pqal.json`` and ``test_ground_truth.json``; None is the hub.
        n_train: largest number of training examples; PubMedQA has 450.
        n_validation: largest number of validation examples; PubMedQA has 50.
        n_test: largest number of test examples; PubMedQA has 500.
        seed: draws the examples; with the same seed, the examples of a smaller number are part of a larger one's.

    Raises:
        UserError: the name is unknown, a number is below 1, or the task takes no path.
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
    """The registry's entry of a task; `register_task` explains the fields."""

    load: Loader
    takes_path: bool = False
    is_local: Callable[[TaskConfig], bool] = _always
    ids: str | None = None


TASKS: Registry[TaskKind] = Registry("task", "task.name", {"load": ("config",), "is_local": ("config",)})
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
            examples that the section gives, and the same section gives the same examples. It raises `UserError` if
            the data are not available.
        takes_path: whether ``task.path`` may be given.
        is_local: maps the section to whether the data are on this machine, so that the loader downloads nothing.
            ``sparsetrain plan`` loads only such tasks.
        ids: the kind of id of `Example.document`, such as ``"PMID"``; see `register_source`.

    Returns:
        ``loader``, or the decorator, which returns the decorated function.

    Raises:
        UserError: the name is malformed or taken, or ``loader`` or ``is_local`` is no function of one argument.
    """
    if loader is None:
        return lambda decorated: register_task(name, decorated, takes_path=takes_path, is_local=is_local, ids=ids)
    kind = TaskKind(loader, takes_path, is_local, ids)
    TASKS.register(name, kind, replace=name in TASKS.names() and TASKS[name] == kind)
    return loader


def find_task(config: TaskConfig) -> Task | None:
    """Return the task if its data are on this machine, else None; nothing is downloaded or written.

    Raises:
        UserError: the data on this machine cannot be used, or their directory does not exist.
    """
    return load_task(config) if TASKS[config.name].is_local(config) else None


def load_task(config: TaskConfig) -> Task:
    """Return the task; raises `UserError` if its data are not available or cannot be used."""
    task = TASKS[config.name].load(config)
    if task.name != config.name:
        raise UserError(f"task.name={config.name}: its loader returned a task of another name, {task.name!r}")
    task.check()
    return task
