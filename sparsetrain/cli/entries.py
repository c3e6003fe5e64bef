"""The settings of a verb, section by section, each with its type, what it allows, its default and its meaning."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, get_args, get_origin, get_type_hints

from sparsetrain.cli import allowed
from sparsetrain.cli.meanings import meaning
from sparsetrain.cli.schema import alternatives
from sparsetrain.cli.verbs import find, spoken, with_settings
from sparsetrain.runs.recorded import complete
from sparsetrain.sparsity.evolution.base import RULES
from sparsetrain.stages.config import PATHS, RUNS

ENTRY = "[]"  # behind the name of a list, for the settings of its entries
REQUIRED = object()
"""The default of a setting that has none."""

_NAMES = {int: "integer", float: "number", str: "text", bool: "true or false", dict: "section", list: "list"}
_MANY = {int: "integers", float: "numbers", str: "texts"}
_DUMMIES = {int: 1, float: 0.5, str: "a"}  # for required settings, so that the checks of the others are reached
_COPY = "as "  # a docstring that refers to another class


@dataclass(frozen=True)
class Setting:
    """A setting as a command line names it.

    Args:
        name: its dotted name; ``budget.phases[].share`` is that of an entry of a list.
        kind: the dataclass that holds it.
        hint: its type.
        default: its default as a plain value, or `REQUIRED`.
        values: the plain values of its section.
        meaning: what the docstring says about it, with its marks; ``""`` if it says nothing.
        inner: the dataclasses that its value, or an entry of its value, may be.
        only: for a setting of some rules of evolution alone, the names of the rules.
    """

    name: str
    kind: type
    hint: Any
    default: Any
    values: Mapping[str, Any]
    meaning: str
    inner: tuple[type, ...] = ()
    only: tuple[str, ...] = ()

    @property
    def key(self) -> str:
        """The last part of the name."""
        return self.name.rpartition(".")[2]

    def type(self, places: Mapping[type, str]) -> str:
        """Return its type with the choices or the range that its check allows; ``places`` name the sections."""
        named = next((each.metadata.get("type") for each in dataclasses.fields(self.kind) if each.name == self.key), "")
        kinds = [named] if named else [_described(arm, places) for arm in allowed.arms(self.hint)]
        if _is_path(self.name):
            kinds = ["path" if kind == "text" else kind for kind in kinds]
        limits = allowed.limits(self.kind, self.values, self.key, self.hint)
        kinds = [f"{kind} {limits}" if limits and kind in ("integer", "number") else kind for kind in kinds]
        null = ["null"] * (type(None) in get_args(self.hint) or (self.default is None and not named))
        if found := allowed.choices(self.kind, self.values, self.key, self.hint):
            return f"{allowed.joined(kinds)}: {allowed.joined([*found, *null])}"
        return allowed.joined([*kinds, *null])


@dataclass(frozen=True)
class Section:
    """A section of settings, or the settings of the entries of a list.

    Args:
        path: its dotted name; ``""`` is the top level.
        kind: its dataclass.
        settings: its settings, without those of inner sections.
    """

    path: str
    kind: type
    settings: list[Setting] = field(default_factory=list)


def places(found: list[Section]) -> dict[type, str]:
    """Return the name of the first section of each dataclass."""
    return {section.kind: section.path for section in reversed(found)}


def names(kind: type) -> set[str]:
    """Return the dotted names of all settings and sections of a dataclass."""
    found = sections_of(kind, complete({}, kind))
    return {section.path for section in found} | {setting.name for section in found for setting in section.settings}


def of_other_verbs(key: str) -> str:
    """Return ``"; it is one of prompt"`` for a setting or section of verbs, or ``""`` if no verb has it."""
    verbs = [spoken(verb) for verb in with_settings() if key in names(find(verb).kind())]
    return f"; it is one of {', '.join(verbs)}" if verbs else ""


def sections_of(kind: type, values: Mapping[str, Any]) -> list[Section]:
    """Return the sections of a configuration, the top level first, with ``values`` as defaults."""
    found = list(_walk(kind, "", values))
    queue = [*found]
    while queue:
        inner: dict[type, list[str]] = {}
        for section in queue:
            for setting in section.settings:
                for each in setting.inner:
                    inner.setdefault(each, []).append(setting.name + ENTRY * _in_list(setting.hint))
        known = {section.kind for section in found}
        # A dataclass is shown once, at the place with the shortest name.
        queue = [
            each
            for kind, named in inner.items()
            if kind not in known
            for each in _walk(kind, min(named, key=lambda name: (name.count("."), len(name))), {})
        ]
        found += queue
    return found


def _walk(kind: type, path: str, values: Mapping[str, Any]) -> Iterator[Section]:
    """Yield the section at ``path`` and the sections in it."""
    required = {
        entry.name: _DUMMIES.get(get_type_hints(kind)[entry.name])
        for entry in dataclasses.fields(kind)
        if entry.default is entry.default_factory is dataclasses.MISSING and values.get(entry.name) is None
    }
    given, values = values, {**complete({}, kind), **values, **required}
    here, below = Section(path, kind), list[Section]()
    for name, hint, inner in _fields(kind):
        dotted, value = f"{path}.{name}" if path else name, values.get(name)
        optional = value is None and not path  # a group can fill it
        if inner and not _in_list(hint) and (isinstance(value, Mapping) or optional):
            below += _walk(inner[0], dotted, value or {})
            if value is not None:
                continue
        default = value if name not in required else given.get(name, REQUIRED)
        here.settings.append(Setting(dotted, kind, hint, default, values, meaning(kind, name), inner))
    here.settings.extend(_of_rules(kind, path, here.settings))
    yield here
    yield from below


def _fields(kind: type) -> Iterator[tuple[str, Any, tuple[type, ...]]]:
    """Yield the name and the type of each field of a dataclass, and the dataclasses that its value may hold."""
    hints = get_type_hints(kind)
    for entry in dataclasses.fields(kind):
        hint = entry.metadata.get("section", hints[entry.name])
        inner = [each for arm in allowed.arms(hint) for each in (arm, *get_args(arm)) if dataclasses.is_dataclass(each)]
        yield entry.name, hint, tuple(each for each in inner if isinstance(each, type))


def _in_list(hint: Any) -> bool:
    return any(get_origin(arm) is list and dataclasses.is_dataclass(get_args(arm)[0]) for arm in allowed.arms(hint))


def _of_rules(kind: type, path: str, common: list[Setting]) -> Iterator[Setting]:
    """Yield the settings of the classes that a section may have, each once for equal defaults and meanings."""
    taken = {setting.key for setting in common}
    merged: dict[tuple[str, str], list[tuple[str, Setting]]] = {}
    for rule, section in alternatives(kind).items():
        values = complete({"rule": rule}, section)
        documented: Any = RULES[rule]
        for name, hint, inner in _fields(section):
            if name not in taken:
                said = meaning(documented, name)
                setting = Setting(f"{path}.{name}", section, hint, values[name], values, said, inner)
                merged.setdefault((name, repr(values[name])), []).append((rule, setting))
    for listed in merged.values():
        rules, settings = zip(*listed, strict=True)
        clear = [each for each in settings if each.meaning and not each.meaning.startswith(_COPY)]
        yield dataclasses.replace((clear or settings)[0], only=rules)


def _described(hint: Any, names: Mapping[type, str]) -> str:
    """Return a type in words; a dataclass is the section with its name."""
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        place = names.get(hint, "")
        return f"section {place}" if place else "section"
    origin, items = get_origin(hint) or hint, get_args(hint)
    if origin is list and items:
        return f"list of {_plural(items[0], names)}"
    return _NAMES.get(origin, "any value")


def _plural(hint: Any, names: Mapping[type, str]) -> str:
    if get_origin(hint) is list:
        return f"lists of {_plural(get_args(hint)[0], names)}"
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return f"sections {names.get(hint, '')}".rstrip()
    return _MANY.get(hint, "values")


def _is_path(name: str) -> bool:
    parts = name.split(".")
    return name in RUNS or any(
        len(place) == len(parts) and all(one in ("*", other) for one, other in zip(place, parts, strict=True))
        for place in PATHS
    )
