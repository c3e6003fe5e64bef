"""The cells of a user's table that say what is right about a row: a label, several, a choice, or an answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sparsetrain.errors import UserError

SPLITS = {
    "train": "train",
    "training": "train",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
    "test": "test",
}
"""The names of splits, in any case."""

BY_COLUMN, BY_TEXT, BY_NUMBER = range(3)  # how a cell may name the right one of several choices
_LONGEST = 60  # characters of a cell in an error


def shown(value: object) -> str:
    """Return a cell for an error, on one line."""
    text = " ".join(repr(value).split())
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}…"


def cell_text(value: Any, where: str, what: str) -> str:
    """Return a cell as text without surrounding space; a whole number and a truth value count as text.

    Raises:
        UserError: it is empty, or of another type; the line begins with ``where``.
    """
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int):
        return str(value)
    if value is None or (isinstance(value, str) and not value.strip()):
        raise UserError(f"{where}: {what} is empty")
    if not isinstance(value, str):
        kind = "a list" if isinstance(value, list | tuple) else type(value).__name__
        raise UserError(f"{where}: {what} is {kind}, {shown(value)}; it must be text or a whole number")
    return value.strip()


def several(value: Any, separator: str | None, where: str, what: str) -> tuple[str, ...]:
    """Return the labels in a cell that holds a list of them or, with a separator, a text; an empty cell has none.

    Raises:
        UserError: the cell has another type, or a label twice; the line begins with ``where``.
    """
    if value is None:
        return ()
    if isinstance(value, str):
        if separator is None:
            raise UserError(
                f"{where}: {what}={shown(value)} is text; for kind=several_labels it must be a list of labels, or "
                "task.label_separator must say what stands between them"
            )
        parts: Sequence[Any] = [part for part in value.split(separator) if part.strip()]
    elif isinstance(value, list | tuple):
        parts = value
    else:
        raise UserError(f"{where}: {what}={shown(value)} must be a list of labels")
    labels = tuple(cell_text(part, where, f"a label in {what}") for part in parts)
    if len(set(labels)) < len(labels):
        raise UserError(f"{where}: {what}={shown(value)} has a label twice")
    return labels


def split_of_cell(value: Any, where: str, what: str) -> str:
    """Return the split that a cell names; raises `UserError` for any other text."""
    found = SPLITS.get(value.strip().lower()) if isinstance(value, str) else None
    if found is None:
        raise UserError(f"{where}: {what}={shown(value)} is no split; allowed are {', '.join(SPLITS)}")
    return found


def choices_of(row: Mapping[str, Any], columns: Sequence[str], where: str) -> tuple[str, ...]:
    """Return the choices of a row: of several columns, where the last ones may be empty, or of one that holds a list.

    Raises:
        UserError: there are fewer than two, one is empty or occurs twice; the line begins with ``where``.
    """
    if len(columns) == 1:
        found = row.get(columns[0])
        if not isinstance(found, list | tuple):
            raise UserError(
                f"{where}: task.choices=[{columns[0]}]: {shown(found)} is no list; name the list's column, or the "
                "column of each choice"
            )
        cells = list(found)
    else:
        cells = [row.get(column) for column in columns]
        while cells and (cells[-1] is None or (isinstance(cells[-1], str) and not cells[-1].strip())):
            cells.pop()
    choices = tuple(cell_text(cell, where, f"choice {number}") for number, cell in enumerate(cells, start=1))
    if len(choices) < 2:
        raise UserError(f"{where}: {len(choices)} choices; a multiple choice has at least two")
    if len(set(choices)) < len(choices):
        raise UserError(f"{where}: two of the choices {shown(choices)} are the same")
    return choices


def right_choice(
    cell: str, choices: Sequence[str], columns: Sequence[str]
) -> tuple[int | None, int | None, int | None]:
    """Return which choice a cell names by its column, by its text, and by its number from 0; None where by neither."""
    by_column = columns.index(cell) if len(columns) > 1 and cell in columns[: len(choices)] else None
    by_text = choices.index(cell) if cell in choices else None
    by_number = int(cell) if cell.isascii() and cell.isdigit() and int(cell) < len(choices) else None
    return by_column, by_text, by_number
