"""Settings: dataclasses built from nested plain values, strictly; an error names the setting by its dotted path."""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from types import UnionType
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin, get_type_hints

import msgspec
from msgspec import Meta

from sparsetrain.errors import UserError, nearest, within
from sparsetrain.shapes import INT64, refused

T = TypeVar("T")


def settled(schema: type, values: Mapping[str, Any]) -> tuple[type, Mapping[str, Any]]:
    """Return the dataclass of settings, where it follows from the settings themselves, and the settings that count.

    Such a section has a class method ``settle``, as `sparsetrain.sparsity.config.EvolutionConfig` has.
    """
    settle = getattr(schema, "settle", None)
    return (schema, values) if settle is None else settle(values)


def build(kind: type[T], values: Mapping[str, Any], path: str = "") -> T:
    """Return the dataclass ``kind`` from nested plain values.

    Sections are built here, since msgspec ignores unknown keys of a dataclass and cannot choose its class by a value;
    msgspec checks and converts all other values.

    Raises:
        UserError: a key is unknown or missing, or a value is refused; the message names the setting.
    """
    kind, values = settled(kind, values)
    hints, known = _hints(kind), {f.name: f for f in fields(kind)}  # type: ignore[arg-type]
    arguments = {}
    for key, value in values.items():
        if key not in known and not hasattr(kind, "settle"):  # a class with `settle` checks its own keys
            raise UserError(f"{path}{key} is no setting{nearest(str(key), known)}")
        arguments[str(key)] = _converted(hints.get(key, Any), value, f"{path}{key}")
    for name, entry in known.items():
        if name not in arguments and entry.default is MISSING and entry.default_factory is MISSING:
            raise UserError(f"{path}{name} is missing")
    try:
        return kind(**arguments)
    except UserError as error:
        # A section of several places names the first of them, and one that is also used alone only its own field.
        if (usual := getattr(kind, "SECTION", None)) is not None and str(error).startswith(usual):
            raise within(path.removesuffix("."), usual, error) from None
        named = re.match(r"(\w+)=", str(error))
        raise (UserError(f"{path}{error}") if named and named[1] in known else error) from None


@functools.cache
def _hints(kind: Any) -> dict[str, Any]:
    return get_type_hints(kind)


def _converted(hint: Any, value: Any, place: str) -> Any:
    """Return ``value`` converted to a type hint; ``place`` is the name of the setting.

    Raises:
        UserError: ``value`` does not have the type of the hint.
    """
    for arm in get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,):
        if is_dataclass(arm):
            assert isinstance(arm, type)
            if isinstance(value, arm):
                return value
            if isinstance(value, Mapping):
                return build(arm, value, f"{place}.")
        elif get_origin(arm) is list and is_dataclass(item := get_args(arm)[0]) and isinstance(value, list | tuple):
            return [_converted(item, inner, f"{place}[{index}]") for index, inner in enumerate(value)]
    bounded = _bounded(hint)
    try:
        return msgspec.convert(value, bounded)
    except msgspec.ValidationError as error:
        raise refused(error, value, bounded, place=place, mapping="a section of settings") from None


@functools.cache
def _bounded(hint: Any) -> Any:
    """Return a type hint whose integers must fit into 64 bits, as numbers of steps and tokens must on disk."""
    if hint is int:
        return Annotated[int, Meta(ge=-INT64, le=INT64)]
    if get_origin(hint) in (Union, UnionType):
        return Union[tuple(map(_bounded, get_args(hint)))]  # noqa: UP007  # the number of arms is not known here
    if get_origin(hint) is list:
        return list[_bounded(get_args(hint)[0])]  # type: ignore[misc]
    return hint
