"""Validation of values from files: a Python type declares the shape, and msgspec checks it.

    class Cell(TypedDict):
        density: Fraction
        tokens: Count
        note: NotRequired[str | None]

    check(json.loads(text), dict[str, Cell], "table.json")

mypy reads the same annotations, so a field is declared once.
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

_TYPE_NAMES = {"int": "a whole number", "float": "a number", "str": "text", "bool": "true or false", "array": "a list"}
_TYPE_NAMES["null"] = "null"
_MAPPING = "a mapping"
_BOUNDS = {">=": "at least", "<=": "at most", ">": "above", "<": "below"}
_BOUNDED = re.compile(r"Expected `(int|float)` ([<>]=?) (\S+)")
_MISSING = re.compile(r"Object missing required field `(\w+)`")
_STEP = re.compile(r"\.(\w+)|\[(\d+|\.\.\.)\]")

_Place = tuple[list[str | int], Any]


def check(value: Any, shape: Any, where: str) -> Any:
    """Return ``value`` unchanged if it has the shape.

    A float may be given as an int; a bool is neither. A ``TypedDict`` may have further keys. A plain ``float`` may be
    infinite or NaN; a bounded one may not.

    Args:
        value: a value read from a file.
        shape: a type that `msgspec.convert` supports.
        where: the name of the file.

    Raises:
        UserError: the value has another shape; the line begins with ``where`` and the path of the field.
    """
    try:
        msgspec.convert(value, shape)
    except msgspec.ValidationError as error:
        raise refused(error, value, shape, where) from None
    return value


def refused(
    error: msgspec.ValidationError, document: Any, shape: Any, where: str = "", place: str = "", mapping: str = _MAPPING
) -> UserError:
    """Return a `UserError` for an error of msgspec: the field, its value, and the allowed values.

    Args:
        error: the error.
        document: the refused value.
        shape: the type that it was checked against.
        where: the file of the document, which begins the line.
        place: the path of the document in the file, which begins the path of the field.
        mapping: the noun for a mapping, for example ``"a section of settings"``.
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
    names = _TYPE_NAMES | {"object": mapping}
    if found := _BOUNDED.match(said):
        kind, sign, bound = found.groups()
        if kind == "float":
            bound = f"{float(bound):g}"
        if bound == f"{_LARGEST:g}":
            return "a finite number"
        return f"{names[kind]} {'of ' if '=' in sign else ''}{_BOUNDS[sign]} {bound}"
    if found := re.match(r"Expected `(\w+)` of length (?:([<>]=?) )?(\d+)", said):
        return f"{names[found[1]]} of length {_BOUNDS[found[2]] + ' ' if found[2] else ''}{found[3]}"
    if found := re.match(r"Expected `str` matching regex '\^?(.*?)(\\\\Z)?'", said):
        return f"text of the form {found[1]}"
    if found := re.match(r"Expected `([\w |]+)`", said):
        return " or ".join(names[kind] for kind in found[1].split(" | "))
    if said == "Number out of range":
        return f"a number of at most {_LARGEST:g}"
    return f"something else: {said}"


def _place(document: Any, shape: Any, at: str) -> _Place:
    """Return the path of the refused value as a list of keys, and the value; msgspec gives ``$.cells[...][0]``."""
    keys: list[str | int] = []
    value = document
    for name, index in _STEP.findall(at):
        key = name or (_refused_key(document, shape, keys, value, at) if index == "..." else int(index))
        if index == "...":  # drop the other entries, since they may be refused deeper down for the same reason
            document = _with(document, keys, {key: value[key]})
        keys.append(key)
        value = value[key]
    return keys, value


def _refused_key(document: Any, shape: Any, keys: list[str | int], mapping: Mapping[str, Any], at: str) -> str:
    """Return the key of the first refused entry of ``mapping``, which msgspec does not name."""
    entries = list(mapping.items())

    def refused(count: int) -> bool:
        try:
            msgspec.convert(_with(document, keys, dict(entries[:count])), shape)
        except msgspec.ValidationError as error:
            return str(error).endswith(at)
        return False

    return entries[bisect_left(range(1, len(entries) + 1), True, key=refused)][0]


def _with(document: Any, keys: list[str | int], value: Any) -> Any:
    """Return a copy of ``document`` with ``value`` at the path ``keys``."""
    if not keys:
        return value
    changed = dict(document) if isinstance(document, Mapping) else list(document)
    changed[keys[0]] = _with(document[keys[0]], keys[1:], value)  # type: ignore[index]
    return changed
