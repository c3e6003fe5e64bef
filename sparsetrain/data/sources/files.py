"""The source ``file``: documents in the user's files of plain text, JSON lines or Parquet."""

from __future__ import annotations

import glob
import os
from collections.abc import Callable, Iterator
from pathlib import Path

from sparsetrain.data.checksums import sha256_once
from sparsetrain.data.sources.base import Document, Fields, Source, pick_field
from sparsetrain.data.sources.plain_text import BLANK_LINE, decoded_line, raw_lines, read_text, readable, separator_of
from sparsetrain.data.sources.registry import FILE, SourceConfig, register_source
from sparsetrain.data.tables import ParquetTable
from sparsetrain.errors import UserError, nearest
from sparsetrain.files import typed_path
from sparsetrain.reading import parse_json

_READERS = (".txt", ".jsonl", ".parquet")  # what is read of a directory
_TABLES = (".csv", ".tsv", ".xls", ".xlsx")  # of which the rows would be meant, not the text


def _read_jsonl(path: Path, fields: Fields) -> Iterator[Document]:
    for number, (offset, raw) in enumerate(raw_lines(path), start=1):
        line = decoded_line(path, offset, raw)
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            row = parse_json(line, "the line", finite=False)
        except UserError as error:
            raise UserError(f"{where}: not JSON ({error})") from error
        if not isinstance(row, dict):
            raise UserError(f"{where}: a JSON {type(row).__name__}, not an object with a field {fields.text!r}")
        document = fields.document(row, where)
        if document is not None:
            yield document


def _read_parquet(path: Path, fields: Fields) -> Iterator[Document]:
    table = ParquetTable(path, "data.path")
    names = dict.fromkeys(table.columns)
    pick_field(names, fields.text, str(path))
    if fields.group is not None:
        pick_field(names, fields.group, str(path), "group_field")
    used = [name for name in (fields.text, fields.group, "id") if name in names]
    for number, row in table.rows(used):
        document = fields.document(row, table.where(number))
        if document is not None:
            yield document


def _reason(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]


_Reader = Callable[[Path, Fields], Iterator[Document]]
_ROWS: dict[str, _Reader] = {".jsonl": _read_jsonl, ".parquet": _read_parquet}


def find_files(path: str) -> tuple[list[Path], int]:
    """Return the data files of a path, sorted, and the number of empty ones that were left out.

    A directory gives its files, and those of its subdirectories, with a suffix ``.txt``, ``.jsonl`` or ``.parquet``. A
    file or a glob pattern may have any other suffix too, such as ``.md`` or ``.py``, and is then plain text.

    Raises:
        UserError: there is no file, a file named alone is empty, all are empty, or one is unreadable or a table such as
            ``.csv``.
    """
    try:
        files = _matching(path)
        for file in files:
            _check_file(file)
        full = [file for file in files if file.stat().st_size > 0]
    except (OSError, ValueError, RuntimeError) as error:  # a name too long or with a zero byte, an unknown user
        if isinstance(error, UserError):
            raise
        raise UserError(f"path={path}: cannot be read ({_reason(error)})") from error
    if not full:
        named = (
            f"path={files[0]}: the file is empty"
            if len(files) == 1
            else f"path={path}: all {len(files)} files are empty"
        )
        raise UserError(named)
    return full, len(files) - len(full)


def _matching(path: str) -> list[Path]:
    place = typed_path(path, "data.path")
    if place.is_dir():
        files = sorted(file for file in place.rglob("*") if file.suffix.lower() in _READERS and file.is_file())
        if not files:
            raise UserError(
                f"path={path}: no {', '.join(_READERS)} file in this directory; for other files of plain text, give a "
                "pattern such as DIRECTORY/**/*.md"
            )
    elif place.exists():
        files = [place]
    else:
        files = sorted(Path(name) for name in glob.glob(str(place), recursive=True) if Path(name).is_file())
        if not files:
            known = [file.name for file in place.parent.iterdir()] if place.parent.is_dir() else []
            raise UserError(f"path={path}: no such file{nearest(place.name, known)}")
    return files


def _check_file(file: Path) -> None:
    if file.suffix.lower() in _TABLES:
        raise UserError(
            f"path={file}: cannot read {file.suffix}; allowed are {', '.join(_READERS)} and other files of plain text"
        )
    if not file.is_file():
        raise UserError(f"path={file}: no regular file")
    if not os.access(file, os.R_OK):
        raise UserError(f"path={file}: no permission to read it")


class LocalFiles(Source):
    """The documents of files of plain text, ``.jsonl`` and ``.parquet``; `find_files` explains ``path`` and its errors.

    Args:
        path: a file, a directory or a glob pattern.
        fields: the fields of rows that become documents.
        separator: how plain text is cut into documents, see `read_text`; with escapes, see `separator_of`.
    """

    licence = "as given by the owner of the files"

    def __init__(self, path: str, fields: Fields | None = None, separator: str | None = None) -> None:
        self.path = path
        self.fields = fields or Fields()
        self.files, self._empty = find_files(path)
        self._separator = separator if separator in (None, BLANK_LINE) else separator_of(separator)
        is_text = any(file.suffix.lower() not in _ROWS for file in self.files)
        self._cut: dict[str, object] = {}
        if is_text and separator != BLANK_LINE:  # corpora that are cut by blank lines keep their identity
            self._cut = {"text": "whole"} if separator is None else {"separator": self._separator}
        self.long_documents = bool(self._cut)
        if not is_text and separator not in (None, BLANK_LINE):
            raise UserError(f"data.separator={separator!r:.60} cuts plain text, and path={path} has none")

    def identity(self) -> dict[str, object]:
        """Return size and sha256 of each file, so that the identity depends on content, not on places."""
        files = []
        for file in self.files:
            with readable(file):
                files.append({"bytes": file.stat().st_size, "sha256": sha256_once(file)})
        return {"files": files, **self.fields.identity(), **self._cut}

    def documents(self) -> Iterator[Document]:
        """Yield the documents, file by file; raises `UserError` with the file and the line or row of an error."""
        for file in self.files:
            reader = _ROWS.get(file.suffix.lower())
            yield from read_text(file, self._separator) if reader is None else reader(file, self.fields)

    def note(self) -> dict[str, object]:
        """Return the file names, and the number of empty files that were left out."""
        return {"files": [file.name for file in self.files], **({"empty_files": self._empty} if self._empty else {})}

    def size_estimate(self) -> int:
        """Return the size of the files in bytes."""
        return sum(file.stat().st_size for file in self.files if file.is_file())


@register_source(FILE, needs={"path": "a .txt, .jsonl or .parquet file, a directory or a pattern"})
def _files(config: SourceConfig) -> LocalFiles:
    assert config.path is not None  # `SourceConfig` checks the needs
    return LocalFiles(config.path, config.fields, config.separator)
