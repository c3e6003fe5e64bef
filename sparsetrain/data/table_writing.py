"""A table of the user's, written again with columns added: all its columns, rows and values stay, in their order.

A file of the same format keeps what the input has: CSV its cells and the marks between them, JSON lines the keys and
values of each object, Parquet the types of its columns and its metadata. Between formats, values change as little as
the formats allow:

- in CSV, a value that is no text is written as JSON, and one that is missing or null is an empty cell;
- in JSON lines, a value that JSON does not have is written as text, such as a date, and a number that is not finite is
  null;
- in Parquet, the cells of CSV are text. A column of JSON lines is boolean, integer or float if all its values are, and
  otherwise text.
"""

from __future__ import annotations

import csv
import importlib
import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparsetrain.data.tables import CsvTable, ParquetTable, Table, arrow, kind_of
from sparsetrain.errors import UserError
from sparsetrain.files import whole_file

_GROUP = 16_384  # rows of a row group of a Parquet file
_MARKS = {".tsv": "\t", ".csv": ","}

Values = Iterable[Sequence[Any]]
"""For each row of a table, the values of the added columns."""


@dataclass(frozen=True)
class Added:
    """A column that is added.

    Args:
        name: its name.
        kind: ``text``; ``number``, a float or None; or ``texts``, a list of texts.
        separator: in CSV, what is between the texts of a list.
    """

    name: str
    kind: str = "text"
    separator: str = "|"


def write_table(path: Path, table: Table, added: Sequence[Added], values: Values) -> None:
    """Write a table with columns added, whole or not at all; the suffix of ``path`` says the format.

    Rows are read, and values taken, as they are written, so that neither are ever in memory together.

    Args:
        path: the file; it may be that of the table.
        table: the rows.
        added: the columns, whose names the table does not have.
        values: for each row, in order, a value for each added column.

    Raises:
        UserError: the table has a column of an added name, a row cannot be read, or the file cannot be written.
    """
    kind = kind_of(path, "output")
    for column in added:
        if column.name in table.columns:
            raise UserError(f"{table.setting}={table.path} has a column {column.name!r} already")
    write = {".jsonl": _write_json_lines, ".parquet": _write_parquet}.get(kind, _write_csv)
    size = table.path.stat().st_size if table.path.is_file() else 0
    with whole_file(path, size) as temporary:
        write(temporary, kind, table, added, values)


def _joined(table: Table, values: Values) -> Iterator[tuple[dict[str, Any], Sequence[Any]]]:
    """Yield each row with its added values; raises `UserError` if the file has other rows than before."""
    source = iter(values)
    for _, row in table.rows():
        more = next(source, None)
        if more is None:
            raise _changed(table)
        yield row, more
    if next(source, None) is not None:
        raise _changed(table)


def _changed(table: Table) -> UserError:
    return UserError(f"{table.path} changed while it was read")


# ----------------------------------------------------------------------------------------------------- CSV


def _write_csv(path: Path, kind: str, table: Table, added: Sequence[Added], values: Values) -> None:
    columns, mark, end = table.columns, _MARKS[kind], "\n"
    if isinstance(table, CsvTable):
        end = table.line_end
        mark = mark if kind == ".tsv" or table.path.suffix.lower() == ".tsv" else table.delimiter
    with path.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.writer(_Lines(stream.write, end), delimiter=mark)
        writer.writerow([*columns, *(column.name for column in added)])
        for row, more in _joined(table, values):
            cells = [as_cell(row.get(name)) for name in columns]
            writer.writerow([*cells, *(_added_cell(*pair) for pair in zip(added, more, strict=True))])


class _Lines:
    """Gives the rows of a csv writer another end, so that the writer quotes cells with any kind of line end."""

    def __init__(self, write: Callable[[str], object], end: str) -> None:
        self._write, self._end = write, end

    def write(self, row: str) -> None:
        self._write(row.removesuffix("\r\n") + self._end)


def as_cell(value: Any) -> str:
    """Return a value as the text of a cell, see the top of this file."""
    if isinstance(value, str):
        return value
    return "" if value is None else json.dumps(value, ensure_ascii=False, default=_as_text)


def _added_cell(column: Added, value: Any) -> str:
    if column.kind == "texts":
        return column.separator.join(value)
    return "" if value is None else str(value)  # of a float, the shortest text that gives it back


def _as_text(value: Any) -> str:
    return value.decode("utf-8", "backslashreplace") if isinstance(value, bytes) else str(value)


# ----------------------------------------------------------------------------------------------------- JSON lines


def _write_json_lines(path: Path, kind: str, table: Table, added: Sequence[Added], values: Values) -> None:
    del kind
    names = [column.name for column in added]
    with path.open("w", encoding="utf-8", newline="") as stream:
        for row, more in _joined(table, values):
            content = {**row, **dict(zip(names, more, strict=True))}
            try:
                line = json.dumps(content, ensure_ascii=False, allow_nan=False, default=_as_text)
            except ValueError:
                line = json.dumps(_finite(content), ensure_ascii=False, default=_as_text)
            stream.write(f"{line}\n")


def _finite(value: Any) -> Any:
    """Return a value with null for the numbers in it that are not finite."""
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


# ----------------------------------------------------------------------------------------------------- Parquet


def _write_parquet(path: Path, kind: str, table: Table, added: Sequence[Added], values: Values) -> None:
    del kind
    parquet, (refused, *_) = arrow(f"writing {path.name}")
    pa = importlib.import_module("pyarrow")
    types = {"text": pa.string(), "number": pa.float64(), "texts": pa.list_(pa.string())}
    new = [pa.field(column.name, types[column.kind]) for column in added]
    groups = _stored(pa, table) if isinstance(table, ParquetTable) else _converted(pa, table)
    schema = next(groups)
    for field in new:
        schema = schema.append(field)
    source = iter(values)
    with parquet.ParquetWriter(path, schema) as writer:
        for group in groups:
            rows = [more for _, more in zip(range(len(group)), source, strict=False)]
            if len(rows) < len(group):
                raise _changed(table)
            columns = [pa.array([row[place] for row in rows], field.type) for place, field in enumerate(new)]
            try:
                writer.write_table(pa.Table.from_arrays([*group.columns, *columns], schema=schema))
            except refused as error:
                raise UserError(f"cannot write {path.name}: {str(error).splitlines()[0][:200]}") from error
    if next(source, None) is not None:
        raise _changed(table)


def _stored(pa: Any, table: ParquetTable) -> Iterator[Any]:
    """Yield the schema of a Parquet file, then its rows in groups as ``pyarrow.Table``."""
    with table.opened() as file:
        yield file.schema_arrow
    held, rows = [], 0
    for batch in table.batches():
        held.append(batch)
        rows += len(batch)
        if rows >= _GROUP:
            yield pa.Table.from_batches(held)
            held, rows = [], 0
    if held:
        yield pa.Table.from_batches(held)


def _converted(pa: Any, table: Table) -> Iterator[Any]:
    """Yield a schema for the rows of another format, then these rows in groups as ``pyarrow.Table``."""
    kinds = dict.fromkeys(table.columns, "text") if isinstance(table, CsvTable) else _kinds(table)
    types = {"bool": pa.bool_(), "int": pa.int64(), "float": pa.float64(), "text": pa.string(), "null": pa.string()}
    schema = pa.schema([(name, types[kinds[name]]) for name in table.columns])
    yield schema
    held: list[dict[str, Any]] = []
    for _, row in table.rows():
        held.append({name: _typed(row.get(name), kinds[name]) for name in table.columns})
        if len(held) == _GROUP:
            yield pa.Table.from_pylist(held, schema=schema)
            held = []
    if held:
        yield pa.Table.from_pylist(held, schema=schema)


def _typed(value: Any, kind: str) -> Any:
    if value is None:
        return None
    return as_cell(value) if kind == "text" else float(value) if kind == "float" else value


def _kinds(table: Table) -> dict[str, str]:
    """Return the kind of each column of JSON lines: ``bool``, ``int``, ``float``, ``text``, or ``null`` (no value)."""
    found = dict.fromkeys(table.columns, "null")
    for _, row in table.rows():
        for name, value in row.items():
            kind = _kind(value)
            if kind != found[name] and kind != "null":
                both = {kind, found[name]}
                found[name] = kind if "null" in both else "float" if both == {"int", "float"} else "text"
    return found


def _kind(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, int) and not isinstance(value, bool) and not -(1 << 63) <= value < 1 << 63:
        return "text"
    known = {bool: "bool", int: "int", float: "float"}
    return known.get(type(value), "text")
