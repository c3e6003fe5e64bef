"""Tables of what evaluations measured beside their losses: ``positions.csv`` and ``probes.csv``.

They lie beside the ``results.csv`` of arms. A row belongs to an arm, a stage and a seed, and has the keys of one entry
of the list of that name in the stage's ``result.json``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_type_hints

from sparsetrain.errors import UserError
from sparsetrain.reading import read_csv
from sparsetrain.report.run_files import PositionRow, ProbeRow, table_cell
from sparsetrain.report.sweep import write_rows
from sparsetrain.report.tables import Sheet, mean_cell, spread
from sparsetrain.report.text import ABSENT, scalar
from sparsetrain.shapes import check

Row = dict[str, Any]
Run = tuple[str, str, int]
"""What a row belongs to: arm, stage and seed."""

_RUN = ("arm", "stage", "seed")
_TEXTS = ("arm", "stage", "corpus", "kind")
_SHOWN = 4  # columns of a sheet


@dataclass(frozen=True)
class Kind:
    """One of these tables.

    Args:
        name: of the list in a result, and of the file.
        shape: of a row, without its run.
        keys: the columns that tell the rows of a run apart; the last of them goes across a sheet.
        value: the column that is measured.
        factor, digits: what a sheet multiplies it by, and the digits that it shows.
        title: of the sheet.
        unit: of the sheet's numbers.
    """

    name: str
    shape: type
    keys: tuple[str, ...]
    value: str
    factor: float
    digits: int
    title: str
    unit: str

    @property
    def file(self) -> str:
        return f"{self.name}.csv"


POSITIONS = Kind(
    "positions",
    PositionRow,
    ("corpus", "scale", "length"),
    "loss",
    *(1.0, 3),
    "Loss by length",
    "In nats per token, by the tokens of a context.",
)
PROBES = Kind(
    "probes",
    ProbeRow,
    ("kind", "scale", "size"),
    "accuracy",
    *(100.0, 1),
    "Probes",
    "Accuracy in %, by the size of a probe.",
)
KINDS = (POSITIONS, PROBES)


def of_result(kind: Kind, result: Mapping[str, Any], run: Run, where: str) -> list[Row]:
    """Return the rows of a checked ``result.json``; a value that is a list or a mapping has no column.

    Raises:
        UserError: two rows have the same keys.
    """
    numbers = _numbers(kind)
    rows = []
    for entry in result.get(kind.name) or []:
        plain = {
            str(name): table_cell(value) if name in numbers and isinstance(value, str) else value
            for name, value in entry.items()
            if not isinstance(value, list | dict)
        }
        rows.append(dict(zip(_RUN, run, strict=True)) | plain)
    _check_apart(kind, rows, where)
    return rows


def read_beside(path: Path) -> dict[str, list[Row]]:
    """Return the rows of each table that lies beside a ``results.csv``, by the name of its kind.

    Raises:
        UserError: a table is no CSV, lacks a column, has a cell that is not valid for its column, or two rows of a run
            with the same keys.
    """
    return {kind.name: _read(kind, path.with_name(kind.file)) for kind in KINDS if path.with_name(kind.file).exists()}


def _read(kind: Kind, path: Path) -> list[Row]:
    numbers = _numbers(kind)
    rows = []
    for number, cells in enumerate(read_csv(path, _RUN), start=1):
        row = {name: table_cell(text) if name in numbers else text or None for name, text in cells.items()}
        where = f"{path}, row {number}"
        check({name: row[name] for name in _RUN[:2]}, dict[str, str], where)
        check({"seed": row["seed"]}, dict[str, int], where)
        rows.append(check(row, kind.shape, where))
    _check_apart(kind, rows, str(path))
    return rows


def _numbers(kind: Kind) -> set[str]:
    """Return the columns whose cells are numbers, though a scale may also be text, such as ``dynamic``."""
    return {*get_type_hints(kind.shape), "seed"} - set(_TEXTS)


def _check_apart(kind: Kind, rows: Sequence[Row], where: str) -> None:
    seen = set()
    for row in rows:
        key = tuple(row.get(name) for name in (*_RUN, *kind.keys))
        if key in seen:
            said = ", ".join(f"{name}={row[name]!r:.60}" for name in (*_RUN, *kind.keys) if row.get(name) is not None)
            raise UserError(f"{where}: {kind.name} has two rows of {said}")
        seen.add(key)


def join_measured(tables: Iterable[Mapping[str, list[Row]]]) -> dict[str, list[Row]]:
    """Return the union of tables by kind; a run that occurs in several has the rows of the first."""
    found: dict[str, list[Row]] = {}
    for table in tables:
        for name, rows in table.items():
            known = {run_of(row) for row in found.get(name, [])}
            kept = [row for row in rows if run_of(row) not in known]
            if kept:
                found.setdefault(name, []).extend(kept)
    return found


def run_of(row: Row) -> Run:
    """Return what a row belongs to."""
    return row["arm"], row["stage"], row["seed"]


def write_measured(kind: Kind, rows: Sequence[Row], path: Path) -> None:
    """Write a table; its columns are arm, stage, seed and the keys of all rows."""
    columns = list(dict.fromkeys([*_RUN, *(name for row in rows for name in row)]))
    write_rows([{name: row.get(name) for name in columns} for row in rows], path, columns)


def samples(kind: Kind, rows: Sequence[Row]) -> dict[tuple[Any, ...], dict[int, float]]:
    """Return what was measured by seed, for each arm, stage and values of the keys, in the order of the rows."""
    found: dict[tuple[Any, ...], dict[int, float]] = {}
    for row in rows:
        key = (row["arm"], row["stage"], *(row.get(name) for name in kind.keys))
        of = found.setdefault(key, {})
        if row[kind.value] is not None:
            of[row["seed"]] = row[kind.value]
    return found


def measured_sheet(kind: Kind, rows: Sequence[Row], arms: Sequence[str]) -> Sheet:
    """Return the means over seeds with their intervals: a row for each arm, stage and key, and a column for each size.

    Args:
        kind: the table.
        rows: its rows.
        arms: in the order of display.
    """
    found = samples(kind, rows)
    across = sorted({key[-1] for key in found}, key=order_of)
    shown = [across[index] for index in spread(range(len(across)), _SHOWN)]
    varied = [place for place in range(1, len(kind.keys) + 1) if len({key[place] for key in found}) > 1]
    lines = sorted(
        dict.fromkeys(key[:-1] for key in found), key=lambda line: arms.index(line[0]) if line[0] in arms else len(arms)
    )
    body = []
    for line in lines:
        name = ", ".join([line[0], *(_said(kind, place, line[place]) for place in varied)])
        cells = (mean_cell(list(found.get((*line, each), {}).values()), kind.factor, kind.digits) for each in shown)
        body.append((name, *cells))
    note = f"{kind.unit} Brackets: 95 %, Student's t over seeds."
    if len(shown) < len(across):
        note += f" {len(shown)} of {len(across)} columns; {kind.file} has all."
    return Sheet(kind.title, ("arm", *(ABSENT if each is None else scalar(each) for each in shown)), tuple(body), note)


def order_of(value: Any) -> tuple[int, float, str]:
    """Return where a value stands among numbers, texts and None: by size, then by letter, then last."""
    if value is None:
        return 2, 0.0, ""
    return (0, float(value), "") if isinstance(value, int | float) else (1, 0.0, str(value))


def _said(kind: Kind, place: int, value: Any) -> str:
    """Return the value at a place of a line: of stages, corpora and kinds the name alone."""
    name = ("stage", *kind.keys)[place - 1]
    return scalar(value) if name in _TEXTS else f"{name} {scalar(value)}"
