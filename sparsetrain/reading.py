"""Readers for JSON, JSON lines, YAML and CSV that validate what they read; the library reads such files only here.

A file may be damaged, truncated, written by another program, or malicious. Each reader returns exactly the content of
the file, or raises a `UserError` that names the file, the line if there is one, what was found and what is allowed. It
allocates at most a small multiple of the file's size. These limits hold for every file:

- The text is UTF-8, with or without a byte-order mark. A lone surrogate, which UTF-8 cannot represent, is refused.
- A document has at most `MAX_BYTES`, YAML at most `MAX_YAML_BYTES`, a line of JSON lines at most `MAX_LINE_BYTES`, and
  a CSV cell at most the 131,072 characters that the standard library allows.
- Values are nested at most `MAX_DEPTH` deep, and YAML aliases expand to at most `MAX_NODES` values.
- A name occurs once in a mapping, and a column once in a table.
- Numbers are finite unless the caller allows others. An integer has at most `MAX_DIGITS` digits, so that it can be
  converted to a float.

A type describes what a value must be: ``check(value, dict[str, list[float]], "file.json")``. See `check`.
"""

from __future__ import annotations

import csv
import io
import json
import math
import re
import reprlib
import stat
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from sparsetrain.errors import UserError
from sparsetrain.shapes import check

MAX_BYTES = 64 << 20
MAX_YAML_BYTES = 256 << 10
MAX_LINE_BYTES = 64 << 20
MAX_DEPTH = 100
MAX_NODES = 100_000
MAX_DIGITS = 300

_SURROGATE = re.compile("[\ud800-\udfff]")
_ESCAPED_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


class _Unreadable(ValueError):
    """A value cannot be read; the message gives the reason, without the name of the file."""


# ----------------------------------------------------------------------------------------------------- bytes and text


def read_bytes(path: Path, max_bytes: int = MAX_BYTES) -> bytes:
    """Return the content of a regular file of at most ``max_bytes``.

    Raises:
        UserError: there is no such file; it is a directory, a pipe or a device; it is larger; or it is unreadable.
    """
    try:
        status = path.stat()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except ValueError:
        raise UserError(f"cannot read {str(path)!r}: a file name cannot contain a NUL byte") from None
    if not stat.S_ISREG(status.st_mode):
        raise UserError(f"{path} is {'a directory' if stat.S_ISDIR(status.st_mode) else 'not a regular file'}")
    size = status.st_size
    if size <= max_bytes:
        try:
            with path.open("rb") as stream:
                content = stream.read()  # given a size, it would allocate that much for the smallest file
        except OSError as error:
            raise UserError(f"cannot read {path}: {error.strerror}") from None
        size = len(content)  # the file may have grown
    if size > max_bytes:
        raise UserError(f"{path} has {size} bytes; at most {max_bytes} are read")
    return content


def read_text(path: Path, max_bytes: int = MAX_BYTES) -> str:
    """Return the text of a UTF-8 file, without its byte-order mark.

    Raises:
        UserError: see `read_bytes`; or the file is not UTF-8.
    """
    return decode(read_bytes(path, max_bytes), str(path))


def decode(content: bytes, where: str) -> str:
    """Return UTF-8 bytes as text, without a byte-order mark; ``where`` names them in the error.

    Raises:
        UserError: the bytes are not UTF-8.
    """
    try:
        return content.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise UserError(f"{where} is not UTF-8 at byte {error.start}") from None


# ----------------------------------------------------------------------------------------------------- JSON


def read_json(path: Path, shape: Any = Any, *, finite: bool = True, max_bytes: int = MAX_BYTES) -> Any:
    """Return the value of a JSON file.

    Args:
        path: the file.
        shape: the type that the value must have, see `check`.
        finite: refuse NaN and infinite numbers.
        max_bytes: maximum size of the file.

    Raises:
        UserError: there is no such file, it is not JSON within the limits of this module, or has another shape.
    """
    return parse_json(read_text(path, max_bytes), str(path), shape, finite=finite)


def parse_json(content: str | bytes, where: str, shape: Any = Any, *, finite: bool = True) -> Any:
    """Return the value of JSON text; ``where`` names it in the error, for example a file and a line.

    Raises:
        UserError: it is not JSON within the limits of this module, or has another shape.
    """
    text = decode(content, where) if isinstance(content, bytes) else content
    try:
        value = json.loads(
            text,
            object_pairs_hook=_object,
            parse_int=_integer,
            parse_float=_finite if finite else float,
            parse_constant=_finite if finite else float,
        )
    except RecursionError:
        raise UserError(f"{where} nests values more than {MAX_DEPTH} deep") from None
    except _Unreadable as error:
        raise UserError(f"{where}: {error}") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{where} is not valid JSON: {error}") from None
    # The full check is rarely needed: the number of brackets bounds the depth, and a surrogate appears as an escape.
    if text.count("[") + text.count("{") > MAX_DEPTH or _ESCAPED_SURROGATE.search(text) or _SURROGATE.search(text):
        _check_nested(value, where)
    return check(value, shape, where)


def json_lines(
    lines: Iterable[bytes], where: str, shape: Any = Any, *, finite: bool = True, cut: bool = False
) -> Iterator[tuple[int, Any]]:
    """Yield the number, from 1, and the value of each line that is not blank.

    Args:
        lines: an open binary file, or its lines with their line ends.
        where: name of the file for errors.
        shape: the type that each value must have, see `check`.
        finite: refuse NaN and infinite numbers.
        cut: ignore a last line that has no line end and is not JSON, as a killed writer leaves it.

    Raises:
        UserError: a line is not JSON within the limits of this module, or has another shape; the message gives its
            number.
    """
    numbered = _bounded(lines, where) if isinstance(lines, io.BufferedIOBase | io.RawIOBase) else enumerate(lines, 1)
    for number, line in numbered:
        if number == 1:
            line = line.removeprefix(b"\xef\xbb\xbf")
        if not line.strip():
            continue
        place = f"{where}, line {number}"
        try:
            value = parse_json(line, place, finite=finite)
        except UserError:
            if cut and not line.endswith(b"\n"):
                return
            raise
        yield number, check(value, shape, place)


def read_json_lines(
    path: Path, shape: Any = Any, *, finite: bool = True, cut: bool = False, max_bytes: int = MAX_BYTES
) -> list[Any]:
    """Return the values of the lines of a file, see `json_lines`.

    Raises:
        UserError: see `read_bytes` and `json_lines`.
    """
    content = read_bytes(path, max_bytes)
    decode(content, str(path))  # an error then gives the position in the file
    lines = io.BytesIO(content)
    return [value for _, value in json_lines(lines, str(path), shape, finite=finite, cut=cut)]


def _bounded(stream: Any, where: str) -> Iterator[tuple[int, bytes]]:
    """Yield the numbered lines of a binary stream, reading no more of a line than its limit."""
    number = 0
    while line := stream.readline(MAX_LINE_BYTES + 1):
        number += 1
        if len(line) > MAX_LINE_BYTES:
            raise UserError(f"{where}, line {number} has more than {MAX_LINE_BYTES} bytes")
        yield number, line


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        raise _Unreadable(f"{_first_repeated([name for name, _ in pairs])} occurs twice in one object")
    return content


def _first_repeated(names: Iterable[str]) -> str:
    """Return the first name that occurs a second time, for an error."""
    seen: set[str] = set()
    for name in names:
        if name in seen:
            return reprlib.repr(name)
        seen.add(name)
    raise AssertionError("no name occurs twice")


def _integer(digits: str) -> int:
    if len(digits) > MAX_DIGITS:
        raise _Unreadable(f"an integer of {len(digits)} digits; at most {MAX_DIGITS} are read")
    return int(digits)


def _finite(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise _Unreadable(f"{reprlib.repr(digits)} is not a finite number")
    return value


def _check_nested(value: Any, where: str, *, finite: bool = False) -> None:
    """Refuse deep nesting, lone surrogates, and values that JSON does not have; the check does not recurse."""
    level, depth = [value], 0
    while level:
        depth += 1
        if depth > MAX_DEPTH and any(isinstance(entry, dict | list) for entry in level):
            raise UserError(f"{where} nests values more than {MAX_DEPTH} deep")
        below: list[Any] = []
        for entry in level:
            if isinstance(entry, dict):
                for name, inner in entry.items():
                    if not isinstance(name, str):
                        raise UserError(f"{where}: the name {reprlib.repr(name)} must be text")
                    below += (name, inner)
            elif isinstance(entry, list):
                below += entry
            elif isinstance(entry, str):
                if not entry.isascii() and _SURROGATE.search(entry):
                    raise UserError(f"{where}: {reprlib.repr(entry)} contains a lone surrogate (half a character)")
            elif isinstance(entry, float):
                if finite and not math.isfinite(entry):
                    raise UserError(f"{where}: {entry} is not a finite number")
            elif isinstance(entry, int):
                if entry.bit_length() > math.log2(10) * MAX_DIGITS:
                    raise UserError(f"{where}: an integer of more than {MAX_DIGITS} digits")
            elif entry is not None:
                raise UserError(f"{where}: {reprlib.repr(entry)} is not text, number, true, false, null or list")
        level = below


# ----------------------------------------------------------------------------------------------------- YAML


def read_yaml(path: Path, shape: Any = Any, *, finite: bool = False, max_bytes: int = MAX_YAML_BYTES) -> Any:
    """Return the value of a YAML file that contains only what JSON has: mappings with text keys, lists and scalars.

    The parser's events are checked before any value is created: tags are refused, and so are aliases that expand to
    more than `MAX_NODES` values in total, or that refer to a value that contains them.

    Args:
        path: the file.
        shape: the type that the value must have, see `check`.
        finite: refuse NaN and infinite numbers.
        max_bytes: maximum size of the file.

    Raises:
        UserError: there is no such file, it is not YAML within the limits of this module, or has another shape.
    """
    return parse_yaml(read_text(path, max_bytes), str(path), shape, finite=finite)


def parse_yaml(text: str, where: str, shape: Any = Any, *, finite: bool = False) -> Any:
    """Return the value of a YAML text within the limits of `read_yaml`; ``where`` is its name in messages.

    Raises:
        UserError: see `read_yaml`.
    """
    import yaml

    try:
        _check_events(yaml.parse(text, Loader=yaml.SafeLoader))
        value = yaml.safe_load(text)
    except _Unreadable as error:
        raise UserError(f"{where}{error}") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f", line {mark.line + 1}" if mark else ""
        raise UserError(f"{where}{place} is not valid YAML: {error.problem or error.context}") from None
    except (yaml.YAMLError, ValueError, OverflowError, RecursionError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{where} is not valid YAML: {reason}") from None
    _check_nested(value, where, finite=finite)
    return check(value, shape, where)


def _check_events(events: Iterable[Any]) -> None:
    """Refuse tags, repeated names, deep nesting, and aliases that expand too far."""
    import yaml

    sizes: dict[str, int | None] = {}  # anchor -> number of values; None while its value is still being read
    open_values: list[tuple[str | None, int, set[str] | None]] = []  # anchor, nodes before it, names of a mapping
    nodes, entries = 0, [0]
    for event in events:
        where = f", line {event.start_mark.line + 1}"
        if isinstance(event, yaml.SequenceEndEvent | yaml.MappingEndEvent):
            anchor, before, _ = open_values.pop()
            entries.pop()
            if anchor is not None:
                sizes[anchor] = nodes - before
            continue
        if not isinstance(event, yaml.NodeEvent):
            continue
        tag = getattr(event, "tag", None)  # an alias has none
        if tag is not None:
            raise _Unreadable(f"{where}: the tag {reprlib.repr(tag)} is not allowed")
        names = open_values[-1][2] if open_values else None
        if names is not None and entries[-1] % 2 == 0 and isinstance(event, yaml.ScalarEvent):
            if event.value in names and event.value != "<<":
                raise _Unreadable(f"{where}: {reprlib.repr(event.value)} occurs twice in one mapping")
            names.add(event.value)
        entries[-1] += 1
        before = nodes
        if isinstance(event, yaml.AliasEvent):
            size = sizes.get(str(event.anchor), 0)  # the parser itself refuses an alias without an anchor
            if size is None:
                raise _Unreadable(f"{where}: the alias {reprlib.repr(event.anchor)} refers to a value that contains it")
            nodes += size
        else:
            nodes += 1
            if event.anchor is not None:
                sizes[event.anchor] = 1 if isinstance(event, yaml.ScalarEvent) else None
        if isinstance(event, yaml.CollectionStartEvent):
            open_values.append((event.anchor, before, set() if isinstance(event, yaml.MappingStartEvent) else None))
            entries.append(0)
        if len(open_values) > MAX_DEPTH:
            raise _Unreadable(f"{where} nests values more than {MAX_DEPTH} deep")
        if nodes > MAX_NODES:
            raise _Unreadable(f"{where}: more than {MAX_NODES} values with aliases expanded")


# ----------------------------------------------------------------------------------------------------- CSV


def read_csv(path: Path, columns: Sequence[str] = (), max_bytes: int = MAX_BYTES) -> list[dict[str, str]]:
    """Return the rows of a table with a header line of column names; cells are text.

    Args:
        path: the file.
        columns: required columns; others are allowed.
        max_bytes: maximum size of the file.

    Raises:
        UserError: there is no such file, it is not CSV within the limits of this module, a column is missing or occurs
            twice, or a row has more or fewer cells than there are columns.
    """
    text = read_text(path, max_bytes)
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    rows: list[dict[str, str]] = []
    try:
        header = next(reader, [])
        missing = [name for name in columns if name not in header]
        if missing:
            raise UserError(f"{path} has no column {missing[0]}")
        twice = (
            [name for number, name in enumerate(header) if name in header[:number]] if len(header) < 1000 else header
        )
        if twice:
            raise UserError(f"{path}: the column {reprlib.repr(twice[0])} occurs twice, or there are too many columns")
        for cells in reader:
            if not cells:
                continue  # a blank line
            if len(cells) != len(header):
                raise UserError(
                    f"{path}, line {reader.line_num} has {len(cells)} cells, but the table has {len(header)} columns"
                )
            rows.append(dict(zip(header, cells, strict=True)))
    except csv.Error as error:
        raise UserError(f"{path}, line {reader.line_num} is not valid CSV: {error}") from None
    return rows
