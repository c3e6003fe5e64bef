"""A task from the rows of a user's table: its labels, its splits and its examples.

Rows without a column of splits are divided by group or, without groups, by text, so that copies share a split. The
division is a function of the groups or texts alone: neither ``task.seed`` nor the number of examples changes it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from sparsetrain.data.sources.base import clean_id, content_id
from sparsetrain.data.split import Split, position
from sparsetrain.data.tasks.base import Example, Task, take
from sparsetrain.data.tasks.cells import (
    BY_NUMBER,
    BY_TEXT,
    cell_text,
    choices_of,
    right_choice,
    several,
    shown,
    split_of_cell,
)
from sparsetrain.data.tasks.form import CUES, LABEL, NO_YES, Form, as_text
from sparsetrain.data.tasks.registry import TaskConfig
from sparsetrain.errors import UserError, nearest

_MOST_LABELS = 1000
_SPLITS: tuple[Split, ...] = ("train", "validation", "test")


class Rows(NamedTuple):
    """The rows of a table with labels.

    Args:
        place: the name of the table, for errors.
        columns: the names of its columns.
        rows: each row with its number, and with its split if the table itself says it.
        where: maps the number of a row to its place, for errors.
    """

    place: str
    columns: Sequence[str]
    rows: Iterable[tuple[int, Mapping[str, Any], Split | None]]
    where: Callable[[int], str]


class _Row(NamedTuple):
    """A row: ``truth`` is a label, a tuple of labels, a number of a choice, or an answer, as the kind says."""

    number: int
    id: str
    document: str
    group: str
    split: Split | None
    cells: tuple[Any, ...]
    truth: Any
    choices: tuple[str, ...]


def task_of(config: TaskConfig, table: Rows) -> Task:
    """Return the task of a table's rows.

    Raises:
        UserError: a column is missing, a cell cannot be used, there is only one label, a label of another split is on
            no training row, or a split has no row.
    """
    reading = _Reading(config, table)
    rows = list(reading.rows())
    reading.settle(rows)
    splits = _splits(rows, config, table.place, reading.kind in ("one_label", "several_labels"))
    labels = reading.labels(rows, splits)
    form = reading.form(labels)
    index = {label: number for number, label in enumerate(labels)}
    found: dict[Split, list[Example]] = {name: [] for name in _SPLITS}
    known = {row.group for row, split in zip(rows, splits, strict=True) if split == "train"}
    repeated = sum(row.group in known for row, split in zip(rows, splits, strict=True) if split == "test")
    rows.reverse()  # each row is let go of when its example is made, since there may be millions
    for split in splits:
        found[split].append(reading.example(rows.pop(), form, index, split))
    counts = {"train": config.n_train, "validation": config.n_validation, "test": config.n_test}
    drawn = {name: take(found[name], counts[name], config.seed) for name in _SPLITS}
    # The test rows stay in the order of the file, in which their predictions are read.
    chosen = {id(example) for example in drawn["test"]}
    return Task(
        *(config.name, form.labels, form.answers, drawn["train"], drawn["validation"]),
        *([example for example in found["test"] if id(example) in chosen], form.template, form.kind, form.length_rule),
        *(form.choices, form.separator, form.max_new_tokens, repeated),
    )


class _Reading:
    """How the rows of a table are read."""

    def __init__(self, config: TaskConfig, table: Rows) -> None:
        self.config, self.table = config, table
        self.kind = config.kind or ("multiple_choice" if config.choices else None)
        if config.label_separator is not None and self.kind is None:
            self.kind = "several_labels"
        self.label = self._column("label_field", config.label_field)
        self.split_column = self._optional("split_field", config.split_field, "split")
        self.id_column = self._optional("id_field", config.id_field, "id")
        self.group_column = self._optional("group_field", config.group_field, "group")
        if self.kind is None and f"{{{LABEL}}}" in (config.template or ""):
            self.kind = "several_labels"
        self.columns = self._probe(self.kind or "one_label").columns
        for name in self.columns:
            setting = "choices" if name in (config.choices or ()) else "template" if config.template else "text_field"
            self._column(setting, name)
        if self.label in self.columns:
            raise UserError(
                f"task.label_field={self.label}: the template has {{{self.label}}} too, so that a model would read the "
                "right answer"
            )
        self.texts = [name for name in self.columns if name not in (config.choices or ())]
        self._named = {0, 1, 2}  # how the cells of all rows name the right choice
        if config.label_separator is not None and self.kind != "several_labels":
            raise UserError(f"task.label_separator={config.label_separator!r} is for kind=several_labels alone")
        if config.labels is not None and self.kind in ("multiple_choice", "free_answer"):
            raise UserError(f"task.labels={config.labels}: kind={self.kind} has no labels")

    def _template(self, kind: str) -> str:
        if self.config.template is not None:
            # As a shell passes them on; a line end of YAML is one already.
            return self.config.template.replace("\\n", "\n").replace("\\t", "\t")
        return f"{{{self.config.text_field}}}{CUES[kind]}"

    def _probe(self, kind: str) -> Form:
        """Return a form whose labels are not known yet, which checks template and choices."""
        answers = {"one_label": ("0", "1"), "several_labels": NO_YES}.get(kind, ())
        choices = tuple(self.config.choices or ())
        return Form(self.config.name, ("0", "1"), answers, self._template(kind), kind, choices=choices)

    def _column(self, setting: str, name: str) -> str:
        if name not in self.table.columns:
            raise UserError(
                f"{self.table.place}: no column {shown(name)} (task.{setting}){nearest(name, self.table.columns)}; it "
                f"has {', '.join(map(repr, self.table.columns[:20]))}"
            )
        return name

    def _optional(self, setting: str, name: str | None, usual: str) -> str | None:
        if name is not None:
            return self._column(setting, name)
        return usual if usual in self.table.columns and usual != self.label else None

    def rows(self) -> Iterator[_Row]:
        """Yield the rows; raises `UserError` with the place of a cell that cannot be used."""
        shared: dict[Any, Any] = {}  # equal labels are kept once
        for count, (number, row, given) in enumerate(self.table.rows, start=1):
            where = self.table.where(number)
            if self.kind is None:
                self.kind = "several_labels" if isinstance(row.get(self.label), list | tuple) else "one_label"
            choices: tuple[str, ...] = ()
            if self.kind == "multiple_choice":
                choices = choices_of(row, self.config.choices or (), where)
            truth = self._truth(row.get(self.label), choices, where)
            cells = tuple(row.get(name) for name in self.texts)
            text = "\n".join(map(as_text, cells))
            name = None if self.id_column is None else row.get(self.id_column)
            name = None if name is None or name == "" else clean_id(name, where)
            document = group = content_id(text) if self.group_column is None else self._group(row, where)
            if self.group_column is None and name is not None:
                document = name
            split = given
            if self.split_column is not None:
                split = split_of_cell(row.get(self.split_column), where, self.split_column)  # type: ignore[assignment]
            yield _Row(
                *(number, str(count) if name is None else name, document, group, split, cells),
                *(shared.setdefault(truth, truth), choices),
            )

    def _group(self, row: Mapping[str, Any], where: str) -> str:
        assert self.group_column is not None
        value = row.get(self.group_column)
        if value is None or value == "":
            raise UserError(f"{where}: the group, {self.group_column}, is empty")
        return clean_id(value, where, "group")

    def _truth(self, cell: Any, choices: tuple[str, ...], where: str) -> Any:
        if self.kind == "several_labels":
            return several(cell, self.config.label_separator, where, self.label)
        if self.kind == "one_label" and isinstance(cell, list | tuple):
            raise UserError(
                f"{where}: {self.label}={shown(cell)} is a list; for several labels set task.kind=several_labels"
            )
        text = cell_text(cell, where, self.label)
        if self.kind != "multiple_choice":
            return text
        found = right_choice(text, choices, self.config.choices or ())
        self._named -= {way for way in self._named if found[way] is None}
        if not self._named:
            raise UserError(
                f"{where}: {self.label}={shown(text)} is none of the {len(choices)} choices; name the right one in all "
                "rows by its column, by its text, or by its number from 0"
            )
        return found

    def settle(self, rows: list[_Row]) -> None:
        """Settle what only all rows together say: whether there are any, how many labels, and how choices are named.

        Raises:
            UserError: there are no rows or too many labels, or texts and numbers name different choices.
        """
        if not rows:
            raise UserError(f"{self.table.place}: no rows")
        if self.kind in ("one_label", "several_labels"):
            labels = {label for row in rows for label in self._of(row)}
            if len(labels) > _MOST_LABELS:
                raise UserError(
                    f"{self.table.place}: {len(labels)} labels in {self.label}, in {len(rows)} rows; at most "
                    f"{_MOST_LABELS} are compared. For texts that are to be written set task.kind=free_answer"
                )
        if self.kind != "multiple_choice":
            return
        if {BY_TEXT, BY_NUMBER} <= self._named:
            for row in rows:
                if row.truth[BY_TEXT] != row.truth[BY_NUMBER]:
                    raise UserError(
                        f"{self.table.where(row.number)}: {self.label} may be the text of a choice or its number "
                        "from 0, which are different ones; name the right choice by its column"
                    )
        way = min(self._named)
        for number, row in enumerate(rows):
            rows[number] = row._replace(truth=row.truth[way])

    def labels(self, rows: Sequence[_Row], splits: Sequence[Split]) -> tuple[str, ...]:
        """Return the labels: those of the configuration, or all of the training rows, sorted.

        Raises:
            UserError: there is only one, or a row has one that is not allowed or that no training row has.
        """
        if self.kind == "free_answer":
            return ()
        if self.kind == "multiple_choice":
            named = self.config.choices or []
            most = max(len(row.choices) for row in rows)
            return tuple(named) if len(named) > 1 else tuple(str(number) for number in range(most))
        trained = dict.fromkeys(
            label for row, split in zip(rows, splits, strict=True) if split == "train" for label in self._of(row)
        )
        labels = tuple(sorted(trained) if self.config.labels is None else dict.fromkeys(self.config.labels))
        self._check_labels(labels)
        allowed = set(labels)
        for row, split in zip(rows, splits, strict=True):
            for label in self._of(row):
                if label not in allowed and self.config.labels is not None:
                    raise UserError(
                        f"{self.table.where(row.number)}: {self.label}={shown(label)} is not one of "
                        f"task.labels={self.config.labels}{nearest(label, labels)}"
                    )
                if label not in trained:
                    raise UserError(
                        f"{self.table.where(row.number)}: the label {shown(label)} of this {split} row is on no "
                        "training row"
                    )
        return labels

    def _of(self, row: _Row) -> tuple[str, ...]:
        found: tuple[str, ...] = row.truth if self.kind == "several_labels" else (row.truth,)
        return found

    def _check_labels(self, labels: tuple[str, ...]) -> None:
        place, column = self.table.place, self.label
        least = 1 if self.kind == "several_labels" else 2
        if len(labels) < least:
            named = f"only the label {shown(labels[0])}" if labels else "no label"
            raise UserError(f"{place}: the training rows have {named} in {column}; a task has at least {least}")

    def form(self, labels: tuple[str, ...]) -> Form:
        """Return the form of the task; raises `UserError` if the answers do not fit the labels."""
        config, kind = self.config, self.kind or "one_label"
        names = ("no", "yes") if kind == "several_labels" else labels if kind == "one_label" else ()
        given = config.answers or {}
        for name in given:
            if name not in names:
                raise UserError(
                    f"task.answers: {shown(name)} is no label{nearest(name, names)}; there are "
                    f"{', '.join(names[:20]) or 'none'}"
                )
        texts = (given.get(name, name) for name in names)
        answers = tuple(text if text[:1].isspace() else f" {text}" for text in texts)
        for number, answer in enumerate(answers):
            if answer in answers[:number]:
                raise UserError(f"task.answers: two labels have the answer {shown(answer)}")
        return Form(
            *(config.name, labels, answers, self._template(kind), kind, config.length_rule or "sum"),
            *(tuple(config.choices or ()), config.label_separator or "|", config.max_new_tokens),
        )

    def example(self, row: _Row, form: Form, index: Mapping[str, int], split: Split) -> Example:
        """Return the example of a row."""
        before, after = form.source(dict(zip(self.texts, row.cells, strict=True)), self.table.where(row.number))
        kind, truth = form.kind, row.truth
        return Example(
            row.id,
            before,
            label=index[truth] if kind == "one_label" else truth if kind == "multiple_choice" else 0,
            group=row.document,
            after=after,
            holds=frozenset(index[label] for label in truth) if kind == "several_labels" else frozenset(),
            choices=tuple(f" {choice}" for choice in row.choices),
            answer=f" {truth}" if kind == "free_answer" else "",
            text="\n".join(map(as_text, row.cells)) if split == "test" else "",
        )


def _splits(rows: Sequence[_Row], config: TaskConfig, place: str, labelled: bool) -> list[Split]:
    """Return the split of each row: as it is marked, or by its group.

    Without a row marked validation, a share of the rows marked train is used.

    Raises:
        UserError: rows are marked, but none train or none test; or there are too few to divide.
    """
    marked = [row.split for row in rows if row.split is not None]
    if not marked:
        drawn = _drawn(rows, {"test": config.test_fraction, "validation": config.validation_fraction}, place, labelled)
        return [drawn.get(row.group, "train") for row in rows]
    for name in ("train", "test"):
        if name not in marked:
            raise UserError(
                f"{place}: no row is marked {name}; mark some, or leave out the splits, and the rows are divided"
            )
    if "validation" in marked:
        return marked
    own = [row for row in rows if row.split == "train"]
    drawn = _drawn(own, {"validation": config.validation_fraction}, place, labelled)
    return [
        drawn.get(row.group, "train") if split == "train" else split for row, split in zip(rows, marked, strict=True)
    ]


def _drawn(rows: Sequence[_Row], shares: Mapping[Split, float], place: str, labelled: bool) -> dict[str, Split]:
    """Return the groups outside of training, with their splits.

    Groups come in the order of a hash. Each split takes the next ones until it has its share of the rows, at least one
    group. A group with more than a third of the rows stays in training, and so does one that is the last there to have
    a label, if the rows are ``labelled``.

    Raises:
        UserError: a split gets no row.
    """
    sizes: dict[str, int] = {}
    truths: dict[str, set[Any]] = {}
    for row in rows:
        sizes[row.group] = sizes.get(row.group, 0) + 1
        held = (row.truth if isinstance(row.truth, tuple) else [row.truth]) if labelled else []
        truths.setdefault(row.group, set()).update(held)
    left: dict[Any, int] = {}  # the groups that have a label and stay in training so far
    for group in truths.values():
        for truth in group:
            left[truth] = left.get(truth, 0) + 1
    order = iter(sorted(sizes, key=lambda group: (position(group, "own task"), group)))
    found: dict[str, Split] = {}
    for split, share in shares.items():
        wanted, taken = max(1, round(share * len(rows))), 0
        for name in order:
            if sizes[name] > len(rows) / 3 or any(left[truth] < 2 for truth in truths[name]):
                continue
            found[name] = split
            taken += sizes[name]
            for truth in truths[name]:
                left[truth] -= 1
            if taken >= wanted:
                break
        if not taken:
            raise UserError(
                f"{place}: {len(rows)} rows in {len(sizes)} groups or texts leave none for {split} beside one of each "
                "label to train on; give more, or mark the splits in a column"
            )
    return found
