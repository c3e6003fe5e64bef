"""The source ``file``: documents in the user's files of text, JSON lines or Parquet."""

from __future__ import annotations

import contextlib
import glob
import importlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from sparsetrain.data.checksums import sha256_once
from sparsetrain.data.sources.base import Document, Fields, Source, content_id, pick_field
from sparsetrain.data.sources.registry import FILE, SourceConfig, register_source
from sparsetrain.errors import UserError, nearest
from sparsetrain.files import typed_path
from sparsetrain.reading import parse_json

_CUT_CHARACTERS = 1000
_READERS = (".txt", ".jsonl", ".parquet")


@contextlib.contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Turn an error of the file system into a `UserError` that names the file."""
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or type(error).__name__}") from error


def _raw_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Yield the lines of a file, each with the offset of its first byte."""
    offset = 0
    with _readable(path), path.open("rb") as stream:
        for raw in stream:
            yield offset, raw
            offset += len(raw)


def _decoded(path: Path, offset: int, raw: bytes) -> str:
    """Return a line as text; a byte-order mark at the start of the file is no part of it."""
    try:
        text = raw.decode()
    except UnicodeDecodeError as error:
        place = offset + error.start
        raise UserError(f"{path} is not UTF-8: byte 0x{raw[error.start]:02x} at offset {place}") from error
    return text.removeprefix("\ufeff") if offset == 0 else text


def _lines(path: Path) -> Iterator[str]:
    """Yield the lines of a text without their ends."""
    for offset, raw in _raw_lines(path):
        line = _decoded(path, offset, raw)
        if line.endswith("\n"):
            line = line.removesuffix("\n").removesuffix("\r")
        yield line


def split_text(text: str) -> list[str]:
    """Cut plain text into documents.

    Blank lines separate documents. In a text without blank lines, each line is a document. A text of a single line is
    cut at white space into documents of about 1000 characters.
    """
    return list(_pieces(lambda: iter(text.split("\n"))))


def _pieces(lines: Callable[[], Iterator[str]]) -> Iterator[str]:
    """Yield the documents of `split_text`; ``lines`` yields the lines anew at each call, so that none is kept."""
    paragraphs = 0
    several = False  # whether the first paragraph has more than one line
    for number, _ in _paragraph_lines(lines()):
        if number > 1:
            paragraphs = number
            break
        several, paragraphs = paragraphs > 0, number
    if paragraphs == 0:
        return
    if paragraphs == 1:
        for _, line in _paragraph_lines(lines()):
            pieces = [line] if several else _cut(line.strip())
            yield from (piece.strip() for piece in pieces if piece.strip())
        return
    held: list[str] = []
    last = 1
    for number, line in _paragraph_lines(lines()):
        if number > last:
            yield "\n".join(held).strip()
            held, last = [], number
        held.append(line)
    yield "\n".join(held).strip()


def _paragraph_lines(lines: Iterator[str]) -> Iterator[tuple[int, str]]:
    """Yield the lines that are not blank, each with the number of its paragraph, from 1."""
    number, blank = 0, True
    for line in lines:
        if not line.strip():
            blank = True
            continue
        number += blank
        blank = False
        yield number, line


def _cut(text: str) -> list[str]:
    pieces = []
    start = 0
    while len(text) - start > _CUT_CHARACTERS:
        end = start + _CUT_CHARACTERS
        # Search the second half for a space. Text in a script without spaces is cut at the full length.
        space = max(text.rfind(mark, start + _CUT_CHARACTERS // 2, end) for mark in (" ", "\t", "\u3000"))
        if space > 0:
            end = space
        pieces.append(text[start:end])
        start = end
    pieces.append(text[start:])
    return pieces


def _read_text(path: Path, fields: Fields) -> Iterator[Document]:
    del fields  # plain text has none
    for text in _pieces(lambda: _lines(path)):
        yield Document(content_id(text), text)


def _read_jsonl(path: Path, fields: Fields) -> Iterator[Document]:
    for number, (offset, raw) in enumerate(_raw_lines(path), start=1):
        line = _decoded(path, offset, raw)
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
    try:
        parquet = importlib.import_module("pyarrow.parquet")
    except ImportError as error:
        raise UserError(f"reading {path} needs pyarrow: pip install 'sparsetrain[parquet]'") from error
    row_number = 0
    for rows in _parquet_rows(parquet, path, fields):
        for row in rows:
            row_number += 1
            document = fields.document(row, f"{path}, row {row_number}")
            if document is not None:
                yield document


def _parquet_rows(parquet: Any, path: Path, fields: Fields) -> Iterator[list[dict[str, Any]]]:
    """Yield the rows of a Parquet file in batches, with the columns of ``fields`` and, if present, ``id``."""
    # pyarrow raises its own errors, and built-in ones for the file system, for decoding and for numbers out of range.
    kinds = (importlib.import_module("pyarrow").ArrowException, OSError, ValueError, OverflowError, MemoryError)
    try:
        # The checksums of pages are optional in a Parquet file; they are compared if it has them.
        table = parquet.ParquetFile(path, page_checksum_verification=True)
        names, count = table.schema_arrow.names, table.metadata.num_rows
    except kinds as error:
        raise UserError(f"{path} is not a Parquet file: {_reason(error)}") from error
    with table:
        pick_field(dict.fromkeys(names), fields.text, str(path))
        if fields.group is not None:
            pick_field(dict.fromkeys(names), fields.group, str(path), "group_field")
        wanted = dict.fromkeys(name for name in (fields.text, fields.group, "id") if name is not None)
        if twice := [name for name in wanted if names.count(name) > 1]:
            raise UserError(f"{path}: the column {twice[0]} occurs twice")
        columns = [name for name in wanted if name in names]
        number = 0
        try:
            batches = table.iter_batches(batch_size=1024, columns=columns)
            while (batch := next(batches, None)) is not None:
                rows = batch.to_pylist()
                number += len(rows)
                yield rows
        except kinds as error:
            raise UserError(f"{path} is damaged behind row {number}: {_reason(error)}") from error
        if number != count:  # pyarrow raises no error if a column ends early
            raise UserError(f"{path} is damaged: it has {number} rows, and its footer says {count}")


def _reason(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]


def _reader(path: Path) -> Callable[[Path, Fields], Iterator[Document]]:
    return {".jsonl": _read_jsonl, ".parquet": _read_parquet}.get(path.suffix.lower(), _read_text)


def find_files(path: str) -> list[Path]:
    """Return the data files of a path, a directory (with its subdirectories) or a glob pattern, sorted.

    Raises:
        UserError: there is no file, or a file is empty, unreadable or has a suffix other than ``.txt``, ``.jsonl`` and
            ``.parquet``.
    """
    try:
        files = _matching(path)
        for file in files:
            _check_file(file)
    except (OSError, ValueError, RuntimeError) as error:  # a name too long or with a zero byte, an unknown user
        if isinstance(error, UserError):
            raise
        raise UserError(f"path={path}: cannot be read ({_reason(error)})") from error
    return files


def _matching(path: str) -> list[Path]:
    place = typed_path(path, "data.path")
    if place.is_dir():
        files = sorted(file for file in place.rglob("*") if file.suffix.lower() in _READERS and file.is_file())
        if not files:
            raise UserError(f"path={path}: no {', '.join(_READERS)} file in this directory")
    elif place.exists():
        files = [place]
    else:
        files = sorted(Path(name) for name in glob.glob(str(place), recursive=True) if Path(name).is_file())
        if not files:
            known = [file.name for file in place.parent.iterdir()] if place.parent.is_dir() else []
            raise UserError(f"path={path}: no such file{nearest(place.name, known)}")
    return files


def _check_file(file: Path) -> None:
    if file.suffix.lower() not in _READERS:
        raise UserError(
            f"path={file}: cannot read {file.suffix or 'a file without suffix'}; allowed are {', '.join(_READERS)}"
        )
    if not file.is_file():
        raise UserError(f"path={file}: no regular file")
    if file.stat().st_size == 0:
        raise UserError(f"path={file}: the file is empty")
    if not os.access(file, os.R_OK):
        raise UserError(f"path={file}: no permission to read it")


class LocalFiles(Source):
    """The documents of ``.txt``, ``.jsonl`` and ``.parquet`` files; `find_files` explains ``path`` and its errors."""

    licence = "as given by the owner of the files"

    def __init__(self, path: str, fields: Fields | None = None) -> None:
        self.path = path
        self.fields = fields or Fields()
        self.files = find_files(path)

    def identity(self) -> dict[str, object]:
        """Return size and sha256 of each file, so that the identity depends on content, not on places."""
        files = []
        for file in self.files:
            with _readable(file):
                files.append({"bytes": file.stat().st_size, "sha256": sha256_once(file)})
        return {"files": files, **self.fields.identity()}

    def documents(self) -> Iterator[Document]:
        """Yield the documents, file by file; raises `UserError` with the file and the line or row of an error."""
        for file in self.files:
            yield from _reader(file)(file, self.fields)

    def note(self) -> dict[str, object]:
        """Return the file names."""
        return {"files": [file.name for file in self.files]}

    def size_estimate(self) -> int:
        """Return the size of the files in bytes."""
        return sum(file.stat().st_size for file in self.files if file.is_file())


@register_source(FILE, needs={"path": "a .txt, .jsonl or .parquet file or a directory"})
def _files(config: SourceConfig) -> LocalFiles:
    assert config.path is not None  # `SourceConfig` checks the needs
    return LocalFiles(config.path, config.fields)
