"""Schemas of settings: plain dataclasses that OmegaConf checks keys and types of a configuration against."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from importlib import import_module
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

from sparsetrain import plugins
from sparsetrain.cli.verbs import find
from sparsetrain.sparsity.evolution.base import RULES

WITH_ALTERNATIVES: dict[str, type] = {}
"""Sections whose class follows from one of their settings, by name."""


def schema(kind: type) -> type:
    """Return a plain dataclass with the fields of ``kind``, for OmegaConf to check keys and types against.

    A field without a default becomes optional: the checks of ``kind`` itself run later, when all values are known.
    A section whose class follows from one of its settings gets the fields of all its classes here, all optional.
    """
    return _schema(kind, RULES.things())


@functools.cache
def _schema(kind: type, rules: Any) -> type:
    """Return what `schema` does, made anew when other rules of evolution are registered."""
    hints = get_type_hints(kind)
    members: list[tuple[str, Any, Any]] = []
    known = {entry.name for entry in dataclasses.fields(kind)}
    if alternatives(kind):
        WITH_ALTERNATIVES[kind.__name__] = kind
    for name, hint in union(kind).items():
        if name not in known:
            members.append((name, hint | None, dataclasses.field(default=None)))
    for entry in dataclasses.fields(kind):
        hint = entry.metadata.get("section", hints[entry.name])
        arms = set(get_args(hint)) - {type(None)} if get_origin(hint) is UnionType else set()
        if len(arms) > 1 and (str in arms or any(map(dataclasses.is_dataclass, arms))):
            # A number or a section: OmegaConf knows no such type. A number or a word: as text, 2 would become '2'.
            hint = Any
        if any(get_origin(arm) is dict for arm in arms):
            hint = Any  # OmegaConf cannot merge names into a mapping that is null
        if isinstance(hint, type) and dataclasses.is_dataclass(hint):
            section = schema(hint)
            members.append((entry.name, section, dataclasses.field(default_factory=_section(entry, hint, section))))
        elif entry.default is dataclasses.MISSING and entry.default_factory is dataclasses.MISSING:
            members.append((entry.name, hint | None, dataclasses.field(default=None)))
        elif entry.default is not dataclasses.MISSING:
            members.append((entry.name, hint, dataclasses.field(default=entry.default)))
        else:
            members.append((entry.name, hint, dataclasses.field(default_factory=entry.default_factory)))
    made = dataclasses.make_dataclass(kind.__name__, members)
    # A launcher pickles the class into other processes. It must do so by name, which `__getattr__` resolves: a copy
    # by content would hold another object in place of `dataclasses.MISSING`.
    made.__module__, made.__qualname__ = __name__, f"{kind.__module__.replace('.', '/')}:{kind.__qualname__}"
    return made


def __getattr__(name: str) -> type:
    """Return the schema whose ``__qualname__`` is ``name``; unpickling looks it up here."""
    module, colon, kind = name.partition(":")
    if not colon:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    plugins.load()  # in a process of a launcher: they add settings
    return schema(getattr(import_module(module.replace("/", ".")), kind))


def _section(entry: dataclasses.Field[Any], kind: type, section: type) -> Callable[[], Any]:
    """Return a factory for a section, with the defaults of the verb where it overrides those of the section."""
    here = None if entry.default_factory is dataclasses.MISSING else entry.default_factory()
    if not isinstance(here, kind):
        return section
    usual = kind()
    names = [each.name for each in dataclasses.fields(kind)]
    return functools.partial(
        section, **{name: getattr(here, name) for name in names if getattr(here, name) != getattr(usual, name)}
    )


def schema_of(verb: str) -> type:
    """Return the schema of the settings of a verb."""
    return schema(find(verb).kind())


def union(kind: type) -> dict[str, Any]:
    """Return the types of the settings of all classes that a section may have, by name; nothing for a plain section."""
    found: dict[str, Any] = {}
    for alternative in alternatives(kind).values():
        hints = get_type_hints(alternative)
        for entry in dataclasses.fields(alternative):
            hint = hints[entry.name] if _is_simple(hints[entry.name]) else Any
            found[entry.name] = hint if found.get(entry.name, hint) == hint else Any
    return found


def alternatives(kind: type) -> dict[str, type]:
    """Return the classes of a section whose class follows from one of its settings, by the value of that setting."""
    found: dict[str, type] = getattr(kind, "alternatives", dict)()
    return found


def _is_simple(hint: Any) -> bool:
    """Whether OmegaConf can check a type: a number, text, a truth value, or a list of them or of sections."""
    items = get_args(hint) if get_origin(hint) is list else (hint,)
    return all(item in (int, float, str, bool) or dataclasses.is_dataclass(item) for item in items)
