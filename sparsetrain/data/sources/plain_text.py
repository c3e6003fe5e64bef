"""Plain text: a file that is one document, byte for byte, or that a separator or blank lines cut into several."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator
from pathlib import Path

from sparsetrain.data.sources.base import Document, content_id
from sparsetrain.errors import UserError

BLANK_LINE = "blank_line"
"""The separator that stands for `split_text`."""

_CUT_CHARACTERS = 1000
_BLOCK = 1 << 14  # bytes that are read at a time
_ESCAPES = {"n": "\n", "r": "\r", "t": "\t", "f": "\f", "v": "\v", "\\": "\\"}


def separator_of(given: str) -> str:
    r"""Return the text of a separator as a user types it, with ``\n``, ``\r``, ``\t``, ``\f``, ``\v`` and ``\\``.

    Raises:
        UserError: it is empty, or a backslash begins something else.
    """
    if not isinstance(given, str) or not given:
        raise UserError(
            f"data.separator={given!r:.60} must be {BLANK_LINE}, a text that stands between documents, or null"
        )
    for found in re.finditer(r"\\(.?)", given, re.DOTALL):
        if found[1] not in _ESCAPES:
            raise UserError(
                f"data.separator={given:.60}: {found[0]} is no escape; allowed are \\n, \\r, \\t, \\f, \\v, and "
                "\\\\ for a backslash"
            )
    return re.sub(r"\\(.)", lambda found: _ESCAPES[found[1]], given, flags=re.DOTALL)


def read_text(path: Path, separator: str | None) -> Iterator[Document]:
    """Yield the documents of a file of plain text, without those of white space alone.

    Args:
        path: the file.
        separator: None for one document, `BLANK_LINE`, or the text between documents, which belongs to none of them.

    Raises:
        UserError: the file cannot be read or is not UTF-8; or, unless `BLANK_LINE` cuts it, it has a NUL byte.
    """
    if separator == BLANK_LINE:
        texts = _pieces(lambda: _lines(path))
    else:
        pieces = _whole(path) if separator is None else _separated(path, separator.encode())
        texts = (text for text in (_text(path, offset, raw) for offset, raw in pieces) if text.strip())
    for text in texts:
        yield Document(content_id(text), text)


@contextlib.contextmanager
def readable(path: Path) -> Iterator[None]:
    """Turn an error of the file system into a `UserError` that names the file."""
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or type(error).__name__}") from error


def decoded(path: Path, offset: int, raw: bytes) -> str:
    """Return a part of a file as text; ``offset`` is the place of its first byte, for the error."""
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        place = offset + error.start
        raise UserError(f"{path} is not UTF-8: byte 0x{raw[error.start]:02x} at offset {place}") from error


# ------------------------------------------------------------------------------------------------ byte for byte


def _whole(path: Path) -> Iterator[tuple[int, bytes]]:
    with readable(path):
        yield 0, path.read_bytes()


def _separated(path: Path, mark: bytes) -> Iterator[tuple[int, bytes]]:
    """Yield the parts of a file between separators with their offsets; no more than one part and a block is held."""
    held, offset, searched = bytearray(), 0, 0
    with readable(path), path.open("rb") as stream:
        while block := stream.read(_BLOCK):
            held += block
            while (place := held.find(mark, searched)) >= 0:
                yield offset, bytes(held[:place])
                del held[: place + len(mark)]
                offset, searched = offset + place + len(mark), 0
            searched = max(0, len(held) - len(mark) + 1)
    yield offset, bytes(held)


def _text(path: Path, offset: int, raw: bytes) -> str:
    """Return a document; nothing of it is changed, also no byte-order mark and no line end."""
    if (place := raw.find(0)) >= 0:
        raise UserError(f"{path} is no text: it has a NUL byte at offset {offset + place}")
    return decoded(path, offset, raw)


# ------------------------------------------------------------------------------------------------ by blank lines


def raw_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Yield the lines of a file, each with the offset of its first byte."""
    offset = 0
    with readable(path), path.open("rb") as stream:
        for raw in stream:
            yield offset, raw
            offset += len(raw)


def decoded_line(path: Path, offset: int, raw: bytes) -> str:
    """Return a line as text; a byte-order mark at the start of the file is no part of it."""
    text = decoded(path, offset, raw)
    return text.removeprefix("\ufeff") if offset == 0 else text


def _lines(path: Path) -> Iterator[str]:
    """Yield the lines of a text without their ends."""
    for offset, raw in raw_lines(path):
        line = decoded_line(path, offset, raw)
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
