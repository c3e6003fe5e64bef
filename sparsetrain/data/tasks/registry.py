"""The registry of tasks, and the settings of a task."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, overload

from sparsetrain.data.split import check_fractions
from sparsetrain.data.tasks.base import Task
from sparsetrain.data.tasks.form import KINDS, LENGTH_RULES
from sparsetrain.errors import UserError, check_choice
from sparsetrain.registry import Registry


@dataclass
class TaskConfig:
    """The task and the number of its examples.

    Args:
        name: ``file`` (rows of a table in ``path``), ``hub`` (rows of ``hub_name``), ``section_roles`` (sentences of
            MEDLINE abstracts, five labels), ``pubmedqa`` (three labels), or a registered task.
        path: for ``file``, a ``.csv``, ``.tsv``, ``.jsonl`` or ``.parquet`` file; for ``pubmedqa``, a directory with
            ``ori_pqal.json`` and ``test_ground_truth.json``, where None is the hub.
        n_train: largest number of training examples; null takes all. PubMedQA has 450.
        n_validation: largest number of validation examples; null takes all. PubMedQA has 50.
        n_test: largest number of test examples; null takes all. PubMedQA has 500.
        seed: draws the examples; with the same seed, the examples of a smaller number are part of a larger one's.
        text_field: column of the text, for the template that is used without ``template``.
        label_field: column of the label: a name, several names, the right choice, or the text of a free answer.
        split_field: column with train, validation or test; null takes ``split``, if there is such a column.
        id_field: column of the ids of rows; null takes ``id``, if there is such a column, or else numbers the rows.
        group_field: column of the groups, whose rows share a split; null takes ``group``, if there is such a column.
        template: what the model reads, with ``{column}`` for the text of a column; ``\\n`` ends a line.
        kind: one_label, several_labels, multiple_choice or free_answer; null is several_labels where labels are lists
            or ``label_separator`` is given, multiple_choice where ``choices`` are, and else one_label.
        labels: the labels that are allowed, in their order; null takes all labels of training rows, sorted.
        answers: the text that stands for a label, behind a space; without one it is the label.
        length_rule: how log-likelihoods of answers compare: their sum, or divided by tokens (token) or bytes (byte);
            null takes the task's own, mostly the sum.
        label_separator: the text between the labels of a cell, for several labels.
        choices: columns of the choices of a multiple choice, or the one column that holds lists of them.
        validation_fraction: share of the rows to validate with, where none is marked.
        test_fraction: share of the rows to test with, where there is no column of splits.
        max_new_tokens: for free answers, the most tokens of an answer.
        hub_name: for ``hub``, the data set, OWNER/DATASET.
        hub_config: for ``hub``, the configuration of the data set.
        hub_splits: for ``hub``, the data set's own name of train, validation or test.
        subset: for ``pubmedqa``, ``labelled``, or ``artificial``, which is trained on ``ori_pqaa.json``.

    Raises:
        UserError: the name is unknown, a number is out of range, or the task does not take a setting.
    """

    name: str = "section_roles"
    path: str | None = None
    n_train: int | None = 1000
    n_validation: int | None = 500
    n_test: int | None = 2000
    seed: int = 0
    text_field: str = "text"
    label_field: str = "label"
    split_field: str | None = None
    id_field: str | None = None
    group_field: str | None = None
    template: str | None = None
    kind: str | None = None
    labels: list[str] | None = None
    answers: dict[str, str] | None = None
    length_rule: str | None = None
    label_separator: str | None = None
    choices: list[str] | None = None
    validation_fraction: float = 0.1
    test_fraction: float = 0.2
    max_new_tokens: int = 32
    hub_name: str | None = None
    hub_config: str | None = None
    hub_splits: dict[str, str] | None = None
    subset: str | None = None

    def __post_init__(self) -> None:
        TASKS.check(self.name)
        for field in ("n_train", "n_validation", "n_test", "max_new_tokens"):
            value = getattr(self, field)
            if value is not None and value < 1:
                raise UserError(f"task.{field}={value} is too small; the least is 1")
        if self.length_rule is not None:
            check_choice("task.length_rule", self.length_rule, LENGTH_RULES)
        if self.path is not None and not TASKS[self.name].takes_path:
            taking = ", ".join(name for name in TASKS if TASKS[name].takes_path)
            raise UserError(f"task.path={self.path}: task {self.name} takes no path; a path is for {taking}")
        self._check_settings()

    def _check_settings(self) -> None:
        taken = TASKS[self.name].settings
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name in SPECIAL and field.name not in taken and value != field.default:
                taking = ", ".join(name for name in TASKS if field.name in TASKS[name].settings)
                raise UserError(f"task.{field.name}={value}: task {self.name} does not take it; it is for {taking}")
        try:
            check_fractions(self.validation_fraction, self.test_fraction)
        except UserError as error:
            raise UserError(f"task.{error}") from None
        if self.kind is not None:
            check_choice("task.kind", self.kind, KINDS)

    @staticmethod
    def renamed(values: Mapping[str, Any], name: str | None) -> dict[str, Any]:
        """Return plain settings, without what is special to their task if ``name`` is another task's."""
        dropped = {"path", *SPECIAL} if name is not None and name != values.get("name") else set()
        return {key: value for key, value in values.items() if key not in dropped}


OF_TABLES = (
    *("text_field", "label_field", "split_field", "id_field", "group_field", "template", "kind", "labels", "answers"),
    *("label_separator", "choices", "validation_fraction", "test_fraction", "max_new_tokens"),
)
"""The settings of a task that is read from a table of the user's."""

SPECIAL = (*OF_TABLES, "hub_name", "hub_config", "hub_splits", "subset")
"""The settings that only some tasks take."""


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
    settings: tuple[str, ...] = ()


TASKS: Registry[TaskKind] = Registry("task", "task.name", {"load": ("config",), "is_local": ("config",)})
"""The names that ``task.name`` accepts."""


@overload
def register_task(
    name: str,
    *,
    takes_path: bool = False,
    is_local: Callable[[TaskConfig], bool] = _always,
    ids: str | None = None,
    settings: Collection[str] = (),
) -> Callable[[Loader], Loader]: ...


@overload
def register_task(
    name: str,
    loader: Loader,
    *,
    takes_path: bool = False,
    is_local: Callable[[TaskConfig], bool] = _always,
    ids: str | None = None,
    settings: Collection[str] = (),
) -> Loader: ...


def register_task(
    name: str,
    loader: Loader | None = None,
    *,
    takes_path: bool = False,
    is_local: Callable[[TaskConfig], bool] = _always,
    ids: str | None = None,
    settings: Collection[str] = (),
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
        settings: the settings of `SPECIAL` that the task takes, such as ``text_field``.

    Returns:
        ``loader``, or the decorator, which returns the decorated function.

    Raises:
        UserError: the name is malformed or taken, or ``loader`` or ``is_local`` is no function of one argument.
    """
    if loader is None:
        more: dict[str, Any] = {"takes_path": takes_path, "is_local": is_local, "ids": ids, "settings": settings}
        return lambda decorated: register_task(name, decorated, **more)
    kind = TaskKind(loader, takes_path, is_local, ids, tuple(settings))
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
    if config.length_rule is not None and config.length_rule != task.length_rule:
        task = replace(task, length_rule=config.length_rule)
    task.check()
    return task
