"""Tables of the user's: rows with named columns in a CSV, JSON lines or Parquet file, read one after the other.

These limits hold, besides those of `sparsetrain.reading`:

- CSV has a header line, and all rows have as many cells as it. Cells are text, exactly as they are written; a quoted
  cell may have commas, quotes (doubled) and line ends. A file ``.tsv`` has tabs between cells. In a file ``.csv`` these
  are commas or, if the header has no comma, the tabs or semicolons that it has. Lines may end as on any system.
- The rows of JSON lines are objects, which need not have the same keys. Their columns are the keys of all rows, in the
  order in which they first occur.
- A name of a column occurs once.
"""

from __future__ import annotations

import contextlib
import csv
import importlib
import io
import re
import reprlib
from abc import ABC, abstractmethod
from collections.abc import Generator, Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from sparsetrain.errors import UserError, nearest
from sparsetrain.files import typed_path
from sparsetrain.reading import MAX_LINE_BYTES, json_lines

SUFFIXES = (".csv", ".tsv", ".jsonl", ".parquet")
_BATCH = 1024  # rows of a Parquet file that are converted at a time
_SHOWN = 20  # most names of columns in an error


class Table(ABC):
    """The rows of a file, which can be read more than once and are never in memory together.

    Args:
        path: the file.
        setting: the name of the setting that gave the path, for errors.
    """

    unit = "line"
    """What the numbers of `rows` count."""

    def __init__(self, path: Path, setting: str) -> None:
        self.path, self.setting = path, setting

    @property
    @abstractmethod
    def columns(self) -> tuple[str, ...]:
        """The names of the columns, in the order of the file; raises `UserError` as `rows` does."""

    @abstractmethod
    def rows(self, columns: Sequence[str] | None = None) -> Iterator[tuple[int, dict[str, Any]]]:
        """Yield each row with its number in the file, see `where`.

        Args:
            columns: the columns that are used, at least; None for all. A row of JSON lines may lack some.

        Raises:
            UserError: the file is damaged or has no rows; the line names the place.
        """

    @cached_property
    def count(self) -> int:
        """The number of rows. To find it, every row is read and checked; raises `UserError` as `rows` does."""
        return sum(1 for _ in self.rows())

    def where(self, number: int) -> str:
        """Return the place of a row for an error: the line of the file on which it begins, or its number, from 1."""
        return f"{self.path}, {self.unit} {number}"

    def need(self, column: str, setting: str = "") -> None:
        """Raise `UserError` unless the table has a column.

        Args:
            setting: the setting that named the column, for the message.
        """
        if column not in self.columns:
            named = f"{setting}={column}: " if setting else ""
            shown = ", ".join(map(_shown, self.columns[:_SHOWN])) + (", …" if len(self.columns) > _SHOWN else "")
            hint = nearest(column, self.columns)
            raise UserError(f"{named}{self.path} has no column {reprlib.repr(column)}{hint}; it has {shown}")

    def _no_rows(self) -> UserError:
        return UserError(f"{self.setting}={self.path}: the file has no rows")


def open_table(path: str | Path, setting: str = "input") -> Table:
    """Return the table in a file; its suffix says the format.

    Args:
        path: the file.
        setting: the name of the setting that gave the path, for errors.

    Raises:
        UserError: there is no such file; it is empty, unreadable or no regular file; or its suffix is another one.
    """
    place = typed_path(path, setting)
    kind = kind_of(place, setting)
    if not place.exists():
        known = [file.name for file in place.parent.iterdir()] if place.parent.is_dir() else []
        raise UserError(f"{setting}={path}: no such file{nearest(place.name, known)}")
    if not place.is_file():
        raise UserError(f"{setting}={path} is {'a directory' if place.is_dir() else 'not a regular file'}")
    with _readable(place), place.open("rb") as stream:
        if not stream.read(1):
            raise UserError(f"{setting}={path}: the file is empty")
    return {".jsonl": JsonLinesTable, ".parquet": ParquetTable}.get(kind, CsvTable)(place, setting)


def kind_of(path: Path, setting: str) -> str:
    """Return the suffix of a file of a table, one of `SUFFIXES`; raises `UserError` for any other."""
    kind = path.suffix.lower()
    if kind not in SUFFIXES:
        raise UserError(f"{setting}={path}: {kind or 'a file without suffix'} is no table; allowed are {_listed()}")
    return kind


def _listed() -> str:
    return f"{', '.join(SUFFIXES[:-1])} and {SUFFIXES[-1]}"


class CsvTable(Table):
    """A table in comma-separated values; see the top of this file.

    Attributes:
        delimiter: the character between the cells.
        line_end: how the header line ends.
    """

    delimiter: str
    line_end: str

    @cached_property
    def columns(self) -> tuple[str, ...]:
        with contextlib.closing(self._lines()) as lines:
            first = next((line for line in lines if line.strip()), "")
        bare = re.sub('"[^"]*"', "", first)
        found = [mark for mark in (",", "\t", ";") if mark in bare]
        self.delimiter = "\t" if self.path.suffix.lower() == ".tsv" else (found or [","])[0]
        with contextlib.closing(self._cells()) as rows:
            _, header = next(rows, (0, []))
        if not header:
            raise UserError(f"{self.setting}={self.path}: the file is empty")
        self.line_end = "\r\n" if first.endswith("\r\n") else "\n"
        once(header, self.path)
        return tuple(header)

    def rows(self, columns: Sequence[str] | None = None) -> Iterator[tuple[int, dict[str, str]]]:
        names, empty = self.columns, True
        with contextlib.closing(self._cells()) as rows:
            next(rows)
            for number, cells in rows:
                if len(cells) != len(names):
                    raise UserError(
                        f"{self.where(number)}: {len(cells)} cells, but the header has {len(names)} columns; a cell "
                        f"with {self.delimiter!r} or a line end needs quotes around it"
                    )
                empty = False
                yield number, dict(zip(names, cells, strict=True))
        if empty:
            raise self._no_rows()

    def _cells(self) -> Generator[tuple[int, list[str]], None, None]:
        """Yield the cells of every line that is not blank, with the number of the line on which they begin."""
        with contextlib.closing(self._lines()) as lines:
            reader = csv.reader(lines, delimiter=self.delimiter, strict=True)
            while True:
                begins = reader.line_num + 1
                try:
                    cells = next(reader, None)
                except csv.Error as error:
                    raise self._not_csv(error, begins, reader.line_num) from None
                if cells is None:
                    return
                if cells:
                    yield begins, cells

    def _not_csv(self, error: csv.Error, begins: int, ends: int) -> UserError:
        if "field limit" in str(error):
            return UserError(
                f"{self.where(begins)}: a cell has more than {csv.field_size_limit():,} characters; a quote may not be "
                "closed, or use JSON lines or Parquet for longer texts"
            )
        until = f" to {ends}" if ends > begins else ""
        return UserError(f"{self.path}, line {begins}{until}: not valid CSV: {error}; a quote in a cell is doubled")

    def _lines(self) -> Generator[str, None, None]:
        """Yield the lines of the file with their ends, without a byte-order mark."""
        with _readable(self.path), self.path.open("rb") as raw:
            stream, number = io.TextIOWrapper(raw, encoding="utf-8-sig", newline=""), 0
            try:
                while line := stream.readline(MAX_LINE_BYTES):
                    number += 1
                    if len(line) == MAX_LINE_BYTES:
                        raise UserError(f"{self.where(number)} has more than {MAX_LINE_BYTES} characters")
                    if "\0" in line:
                        raise UserError(f"{self.where(number)} has a NUL byte, so the file is not text in UTF-8")
                    yield line
            except UnicodeDecodeError:
                raise self._not_utf8() from None

    def _not_utf8(self) -> UserError:
        offset = 0
        with _readable(self.path), self.path.open("rb") as stream:
            for number, line in enumerate(stream, start=1):
                try:
                    line.decode()
                except UnicodeDecodeError as error:
                    place = f"byte 0x{line[error.start]:02x} at offset {offset + error.start}"
                    return UserError(f"{self.where(number)} is not UTF-8: {place}")
                offset += len(line)
        return UserError(f"{self.path} is not UTF-8")


class JsonLinesTable(Table):
    """A table of JSON objects, one on each line."""

    @cached_property
    def _scanned(self) -> tuple[tuple[str, ...], int]:
        names: dict[str, None] = {}
        count = 0
        for _, row in self.rows():
            count += 1
            if not row.keys() <= names.keys():
                names.update(dict.fromkeys(row))
        return tuple(names), count

    @property
    def columns(self) -> tuple[str, ...]:
        return self._scanned[0]

    @cached_property
    def count(self) -> int:
        return self._scanned[1]

    def rows(self, columns: Sequence[str] | None = None) -> Iterator[tuple[int, dict[str, Any]]]:
        empty = True
        with _readable(self.path), self.path.open("rb") as stream:
            for number, row in json_lines(stream, str(self.path)):
                if not isinstance(row, dict):
                    raise UserError(f"{self.where(number)}: {reprlib.repr(row)} is not a JSON object, {{...}}")
                empty = False
                yield number, row
        if empty:
            raise self._no_rows()


class ParquetTable(Table):
    """A table in a Parquet file; its values are Python's for the types of its columns."""

    unit = "row"

    @cached_property
    def columns(self) -> tuple[str, ...]:
        with self.opened() as file:
            names: list[str] = file.schema_arrow.names
        once(names, self.path)
        return tuple(names)

    @cached_property
    def count(self) -> int:
        with self.opened() as file:
            return int(file.metadata.num_rows)

    def rows(self, columns: Sequence[str] | None = None) -> Iterator[tuple[int, dict[str, Any]]]:
        used = None if columns is None else [name for name in self.columns if name in columns]
        number = 0
        for batch in self.batches(used):
            with self._decoding(number):
                rows = batch.to_pylist()
            for row in rows:
                number += 1
                yield number, row

    def batches(self, columns: Sequence[str] | None = None) -> Iterator[Any]:
        """Yield the rows as ``pyarrow.RecordBatch`` of at most 1024; raises `UserError` as `rows` does."""
        if not self.count:
            raise self._no_rows()
        once(self.columns, self.path)
        number = 0
        with self.opened() as file:
            found = file.iter_batches(batch_size=_BATCH, columns=columns)
            while True:
                with self._decoding(number):
                    batch = next(found, None)
                if batch is None:
                    break
                number += len(batch)
                yield batch
        if number != self.count:  # pyarrow raises no error if a column ends early
            raise UserError(f"{self.path} is damaged: it has {number} rows, and its footer says {self.count}")

    @contextlib.contextmanager
    def opened(self) -> Iterator[Any]:
        """Yield the open ``pyarrow.parquet.ParquetFile``.

        Raises:
            UserError: pyarrow is not installed, or the file is no Parquet file.
        """
        parquet, errors = arrow(f"reading {self.path}")
        try:
            # The checksums of pages are optional in a Parquet file; they are compared if it has them.
            file = parquet.ParquetFile(self.path, page_checksum_verification=True)
        except errors as error:
            raise UserError(f"{self.path} is not a Parquet file: {_reason(error)}") from error
        with file:
            yield file

    @contextlib.contextmanager
    def _decoding(self, number: int) -> Iterator[None]:
        try:
            yield
        except arrow("")[1] as error:
            raise UserError(f"{self.path} is damaged behind row {number}: {_reason(error)}") from error


def arrow(purpose: str) -> tuple[Any, tuple[type[BaseException], ...]]:
    """Return the module ``pyarrow.parquet`` and the errors that it raises; raises `UserError` if it is missing.

    These are its own errors, and built-in ones for the file system, for decoding and for numbers out of range.
    """
    try:
        parquet = importlib.import_module("pyarrow.parquet")
    except ImportError as error:
        raise UserError(f"{purpose} needs pyarrow: pip install 'sparsetrain[parquet]'") from error
    own = importlib.import_module("pyarrow").ArrowException
    return parquet, (own, OSError, ValueError, OverflowError, MemoryError)


def once(columns: Iterable[str], path: Path) -> None:
    """Raise `UserError` if a name of a column of the table in ``path`` occurs twice."""
    seen: set[str] = set()
    for name in columns:
        if name in seen:
            raise UserError(f"{path}: the column {reprlib.repr(name)} occurs twice")
        seen.add(name)


@contextlib.contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or type(error).__name__}") from error


def _shown(name: str) -> str:
    return reprlib.repr(name)[1:-1]


def _reason(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
