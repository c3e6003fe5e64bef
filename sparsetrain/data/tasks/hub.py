"""The task ``hub``: rows with labels in a data set of the Hugging Face hub, through `datasets` (extra ``hf``)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from sparsetrain.data.sources.hub import load_rows
from sparsetrain.data.split import Split
from sparsetrain.data.tasks.base import Task
from sparsetrain.data.tasks.cells import SPLITS
from sparsetrain.data.tasks.labelled_rows import Rows, task_of
from sparsetrain.data.tasks.registry import OF_TABLES, TaskConfig, register_task
from sparsetrain.errors import UserError, check_choice

_OWN: tuple[Split, ...] = ("train", "validation", "test")


def _is_local(_config: TaskConfig) -> bool:
    return False


@register_task("hub", is_local=_is_local, settings=(*OF_TABLES, "hub_name", "hub_config", "hub_splits"))
def load(config: TaskConfig) -> Task:
    """Return the task of the rows of ``config.hub_name``, see `task_of`.

    Its splits are those of the data set, by their names or by ``config.hub_splits``. A data set with one split is
    divided as a file is.

    Raises:
        UserError: the data set cannot be loaded or used.
    """
    if config.hub_name is None:
        raise UserError("task.hub_name is missing: task=hub reads a data set of the hub, task.hub_name=OWNER/DATASET")
    data = load_rows(config.hub_name, config.hub_config, None, "give a local file as task=file task.path")
    place = f"hub data set {config.hub_name}"
    parts = _parts(config, data, place)
    columns = list(dict.fromkeys(name for rows in parts.values() for name in _columns(rows)))
    return task_of(config, Rows(place, columns, _rows(config, parts, place), _places(parts, place)))


def _parts(config: TaskConfig, data: Any, place: str) -> dict[Split | None, Any]:
    """Return the rows of each split that is used; None is the split of rows that are to be divided."""
    if not isinstance(data, Mapping):
        return {None: data}
    if config.hub_splits is not None:
        for ours, theirs in config.hub_splits.items():
            check_choice("task.hub_splits", ours, _OWN)
            check_choice(f"task.hub_splits.{ours}", theirs, data)
        named = dict(config.hub_splits)
    else:
        named = {SPLITS[theirs.lower()]: theirs for theirs in reversed(list(data)) if theirs.lower() in SPLITS}
    if set(named) == {"train"} or (not named and len(data) == 1):
        return {None: data[named.get("train", next(iter(data)))]}
    chosen: dict[Split | None, Any] = {ours: data[named[ours]] for ours in _OWN if ours in named}
    if "train" not in chosen or "test" not in chosen:
        raise UserError(
            f"{place}: its splits are {', '.join(data)}; say which to train on and to test with, "
            "task.hub_splits={train: ..., test: ...}"
        )
    return chosen


def _columns(rows: Any) -> list[str]:
    named = getattr(rows, "column_names", None)
    return list(named) if named else list(next(iter(rows), {}))


def _rows(
    config: TaskConfig, parts: Mapping[Split | None, Any], place: str
) -> Iterator[tuple[int, Mapping[str, Any], Split | None]]:
    where, number = _places(parts, place), 0
    for split, rows in parts.items():
        names = _label_names(rows, config.label_field)
        for row in rows:
            number += 1
            if names is not None and isinstance(label := row.get(config.label_field), int):
                if not 0 <= label < len(names):
                    raise UserError(
                        f"{where(number)}: {config.label_field}={label} is no label; the rows of this split may be "
                        "unlabelled, so use others with task.hub_splits"
                    )
                row = {**row, config.label_field: names[label]}
            yield number, row, split


def _places(parts: Mapping[Split | None, Any], place: str) -> Callable[[int], str]:
    """Return a function from the number of a row among all parts to its place."""

    def where(number: int) -> str:
        for split, rows in parts.items():
            if number <= len(rows):
                return f"{place}, {f'{split} ' if split else ''}row {number}"
            number -= len(rows)
        return place

    return where


def _label_names(rows: Any, column: str) -> list[str] | None:
    """Return the names of labels that a data set stores as numbers."""
    feature = (getattr(rows, "features", None) or {}).get(column)
    names = getattr(feature, "names", None)
    return None if names is None else list(names)
