"""What a value that was read from a file must be, said by a type and checked by msgspec.

    class Cell(TypedDict):
        density: Fraction
        tokens: Count
        note: NotRequired[str | None]

    check(json.loads(text), dict[str, Cell], "table.json")

The types are those of the annotations that mypy reads, so that a field is declared once.
"""

from __future__ import annotations

import re
import reprlib
import sys
from bisect import bisect_left
from collections.abc import Mapping
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from sparsetrain.errors import UserError

INT64 = 2**63 - 1
_LARGEST = sys.float_info.max

Count = Annotated[int, Meta(ge=0, le=INT64)]
Positive = Annotated[int, Meta(ge=1, le=INT64)]
Fraction = Annotated[float, Meta(ge=0.0, le=1.0)]
NonNegative = Annotated[float, Meta(ge=0.0, le=_LARGEST)]

_WORDS = {"int": "a whole number", "float": "a number", "str": "text", "bool": "true or false", "array": "a list"}
_WORDS["null"] = "null"
_MAPPING = "a mapping"
_BOUNDS = {">=": "at least", "<=": "at most", ">": "above", "<": "below"}
_BOUNDED = re.compile(r"Expected `(int|float)` ([<>]=?) (\S+)")
_MISSING = re.compile(r"Object missing required field `(\w+)`")
_STEP = re.compile(r"\.(\w+)|\[(\d+|\.\.\.)\]")

_Place = tuple[list[str | int], Any]


def check(value: Any, shape: Any, where: str) -> Any:
    """Return ``value`` if it has the shape, as it is.

    Shapes are the types that `msgspec.convert` knows. An int is a float too, and a bool is neither; further keys of a
    ``TypedDict`` are allowed. A plain ``float`` may be infinite or NaN; a bounded one may not.

    Raises:
        UserError: another shape; the line begins with ``where`` and the path of the field.
    """
    try:
        msgspec.convert(value, shape)
    except msgspec.ValidationError as error:
        raise refused(error, value, shape, where) from None
    return value


def refused(
    error: msgspec.ValidationError, document: Any, shape: Any, where: str = "", place: str = "", mapping: str = _MAPPING
) -> UserError:
    """Return the error of msgspec in words: which field of ``document`` has which value, and what is allowed.

    Args:
        where: the file of the document; begins the line.
        place: the path of the document in it; begins the path of the field.
        mapping: what a mapping is called, for example ``"a section of settings"``.
    """
    said, _, at = str(error).partition(" - at ")
    keys, value = _place(document, shape, at)
    name = place + "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in keys)
    name = name.removeprefix(".")
    prefix = f"{where}: " if where else ""
    if found := _MISSING.match(said):
        return UserError(f"{prefix}{name}{'.' if name else ''}{found[1]} is missing")
    allowed = "a mapping whose names are text" if at.startswith("`key`") else _allowed(said, mapping)
    if not name:
        return UserError(f"{where} holds {reprlib.repr(value)}, which must be {allowed}")
    return UserError(f"{prefix}{name}={reprlib.repr(value)} must be {allowed}")


def _allowed(said: str, mapping: str) -> str:
    words = _WORDS | {"object": mapping}
    if found := _BOUNDED.match(said):
        kind, sign, bound = found.groups()
        if kind == "float":
            bound = f"{float(bound):g}"
        if bound == f"{_LARGEST:g}":
            return "a finite number"
        return f"{words[kind]} {'of ' if '=' in sign else ''}{_BOUNDS[sign]} {bound}"
    if found := re.match(r"Expected `(\w+)` of length (?:([<>]=?) )?(\d+)", said):
        return f"{words[found[1]]} of length {_BOUNDS[found[2]] + ' ' if found[2] else ''}{found[3]}"
    if found := re.match(r"Expected `str` matching regex '\^?(.*?)(\\\\Z)?'", said):
        return f"text of the form {found[1]}"
    if found := re.match(r"Expected `([\w |]+)`", said):
        return " or ".join(words[kind] for kind in found[1].split(" | "))
    if said == "Number out of range":
        return f"a number of at most {_LARGEST:g}"
    return f"something else: {said}"


def _place(document: Any, shape: Any, at: str) -> _Place:
    """Return the keys that lead to the refused value, and the value. msgspec gives ``$.cells[...][0]``."""
    keys: list[str | int] = []
    value = document
    for name, index in _STEP.findall(at):
        key = name or (_refused_key(document, shape, keys, value, at) if index == "..." else int(index))
        if index == "...":  # without the entries beside it, which may be refused for the same reason further down
            document = _with(document, keys, {key: value[key]})
        keys.append(key)
        value = value[key]
    return keys, value


def _refused_key(document: Any, shape: Any, keys: list[str | int], mapping: Mapping[str, Any], at: str) -> str:
    """Return the key of the first refused entry of ``mapping``: msgspec names no key of a dict."""
    entries = list(mapping.items())

    def refused(count: int) -> bool:
        try:
            msgspec.convert(_with(document, keys, dict(entries[:count])), shape)
        except msgspec.ValidationError as error:
            return str(error).endswith(at)
        return False

    return entries[bisect_left(range(1, len(entries) + 1), True, key=refused)][0]


def _with(document: Any, keys: list[str | int], value: Any) -> Any:
    """Return ``document`` with another value at the place that ``keys`` lead to."""
    if not keys:
        return value
    changed = dict(document) if isinstance(document, Mapping) else list(document)
    changed[keys[0]] = _with(document[keys[0]], keys[1:], value)  # type: ignore[index]
    return changed
