"""What a value that was read from a file must be, said by a type.

    class Cell(TypedDict):
        density: Annotated[float, Range(0.0, 1.0)]
        tokens: Count
        note: NotRequired[str | None]

    check(json.loads(text), dict[str, Cell], "table.json")

The types are those of the annotations that mypy reads, so that a shape is written once.
"""

from __future__ import annotations

import math
import reprlib
import types
import typing
from dataclasses import dataclass
from typing import Annotated, Any, Literal, NotRequired

from sparsetrain.errors import UserError

INT64 = 2**63 - 1


@dataclass(frozen=True)
class Range:
    """The numbers from ``low`` to ``high``, both included; ``finite`` refuses NaN and infinity."""

    low: float = -math.inf
    high: float = math.inf
    finite: bool = True

    def __str__(self) -> str:
        if self.high < math.inf:
            return f" in [{self.low:g}, {self.high:g}]"
        return f" of at least {self.low:g}" if self.low > -math.inf else ""

    def holds(self, value: float) -> bool:
        if not math.isfinite(value):
            return not self.finite
        return self.low <= value <= self.high


Count = Annotated[int, Range(0, INT64)]
Positive = Annotated[int, Range(1, INT64)]
Fraction = Annotated[float, Range(0.0, 1.0)]
AnyFloat = Annotated[float, Range(finite=False)]


def check(value: Any, shape: Any, where: str) -> Any:
    """Return ``value`` if it has the shape, as it is.

    Shapes are ``Any``, ``None``, ``str``, ``bool``, ``int`` (no bool, of 64 bits), ``float`` (finite, or an int),
    ``list``, ``dict``, ``list[shape]``, ``tuple[shape, shape]`` (a list of that length), ``dict[str, shape]``,
    ``Literal``, unions, ``Annotated[shape, Range(low, high)]``, and a ``TypedDict``, of which the keys without
    ``NotRequired`` must be there and further ones may be.

    Raises:
        UserError: another shape; ``where`` and the path of the field begin the line.
    """
    found = _differs(value, shape, "")
    if found is not None:
        path, inner, allowed = found
        name = path.removeprefix(".")
        at = f"{where}: {name}={reprlib.repr(inner)}" if name else f"{where} holds {reprlib.repr(inner)}, which"
        raise UserError(f"{at} {allowed}")
    return value


_Difference = tuple[str, Any, str] | None
_WORDS = {str: "text", bool: "true or false", list: "a list", dict: "a mapping", type(None): "null"}


def _differs(value: Any, shape: Any, path: str, bounds: Range | None = None) -> _Difference:
    """Return the path of the first value that differs, the value, and what it must be."""
    if shape is Any or shape is object:
        return None
    origin, arguments = typing.get_origin(shape), typing.get_args(shape)
    if origin is Annotated:
        return _differs(value, arguments[0], path, arguments[1])
    if origin is NotRequired:
        return _differs(value, arguments[0], path)
    if origin is Literal:
        fits = any(type(value) is type(option) and value == option for option in arguments)
        return None if fits else (path, value, f"must be one of {', '.join(map(str, arguments))}")
    if origin in (typing.Union, types.UnionType):
        return _differs_from_all(value, arguments, path)
    if typing.is_typeddict(shape):
        return _differs_in_field(value, shape, path)
    if origin in (list, tuple, dict):
        return _differs_inside(value, origin, arguments, path)
    if shape in (int, float):
        return _differs_as_number(value, shape, path, bounds or Range())
    kind = type(None) if shape is None else shape
    return None if isinstance(value, kind) else (path, value, f"must be {_WORDS[kind]}")


def _differs_from_all(value: Any, shapes: tuple[Any, ...], path: str) -> _Difference:
    """Return the difference that lies deepest: that of the alternative which was meant."""
    found = []
    for shape in shapes:
        difference = _differs(value, shape, path)
        if difference is None:
            return None
        found.append(difference)
    inside = [difference for difference in found if difference[0] != path]
    if inside:
        return inside[0]
    return path, value, "must be " + " or ".join(difference[2].removeprefix("must be ") for difference in found)


def _differs_in_field(value: Any, shape: Any, path: str) -> _Difference:
    if not isinstance(value, dict):
        return path, value, "must be a mapping"
    for name, kind in typing.get_type_hints(shape, include_extras=True).items():
        if name in value:
            if (difference := _differs(value[name], kind, f"{path}.{name}")) is not None:
                return difference
        elif typing.get_origin(kind) is not NotRequired:
            return path, value, f"must have {name!r}"
    return None


def _differs_inside(value: Any, kind: Any, arguments: tuple[Any, ...], path: str) -> _Difference:
    if kind is dict:
        if not isinstance(value, dict):
            return path, value, "must be a mapping"
        pairs = [(f"{path}.{name}", inner, arguments[1]) for name, inner in value.items()]
    elif not isinstance(value, list):
        return path, value, "must be a list"
    elif kind is tuple and len(value) != len(arguments):
        return path, value, f"must be a list of {len(arguments)}"
    else:
        shapes = arguments if kind is tuple else arguments * len(value)
        pairs = [(f"{path}[{number}]", *pair) for number, pair in enumerate(zip(value, shapes, strict=True))]
    return next((found for place, inner, shape in pairs if (found := _differs(inner, shape, place)) is not None), None)


def _differs_as_number(value: Any, kind: type, path: str, bounds: Range) -> _Difference:
    whole = isinstance(value, int) and not isinstance(value, bool)
    name = "a whole number" if kind is int else "a number" if not bounds.finite else "a finite number"
    fits = whole if kind is int else whole or isinstance(value, float)
    if fits and whole and not -INT64 <= value <= INT64 and kind is int:
        fits = False
    return None if fits and bounds.holds(value) else (path, value, f"must be {name}{bounds}")
