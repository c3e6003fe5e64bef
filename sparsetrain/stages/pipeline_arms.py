"""The arms of a pipeline: every combination of the values of settings, and of named choices of several settings."""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from sparsetrain.errors import UserError, nearest
from sparsetrain.optim import LENGTHS
from sparsetrain.stages.kinds import KINDS, known_settings

SPARSITY = "sparsity.sparsity"

_SETTINGS = {name for kind in KINDS.values() for name in known_settings(kind)}
_SECTIONS = {
    "model",
    *(
        each.name
        for kind in KINDS.values()
        for each in dataclasses.fields(kind)
        if each.default_factory is not dataclasses.MISSING and dataclasses.is_dataclass(each.default_factory())
    ),
}
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.+-]*")
_EXAMPLE = "{NAME: {SETTING: VALUE}}"

Settings = tuple[tuple[str, Any], ...]


@dataclass(frozen=True)
class Arm:
    """One arm, or its part that one entry of ``pipeline.arms`` determines.

    Args:
        name: its name in directories and reports: dense, sparse-0.75, the name of a choice, or the last part of a
            setting with its value; joined by ``_`` if the arm has several.
        settings: what differs from the pipeline's settings, as (dotted name, value) pairs.
    """

    name: str
    settings: Settings = field(compare=False)


def arms_of(section: Mapping[str, Any]) -> list[Arm]:
    """Return the arms of a section ``pipeline.arms``; without any, a single one called ``run``.

    Raises:
        UserError: an entry is no list of values of a setting and no set of named choices, or two arms have one name.
    """
    found: dict[str, Arm] = {}
    for chosen in itertools.product(*(_choices(str(name), values) for name, values in section.items())):
        arm = Arm("_".join(each.name for each in chosen) or "run", tuple(pair for c in chosen for pair in c.settings))
        if len(dict(arm.settings)) < len(arm.settings):
            twice = next(name for name, _ in arm.settings if [key for key, _ in arm.settings].count(name) > 1)
            raise UserError(f"pipeline.arms: {arm.name}: two entries set {twice}; one of them must not")
        before = found.setdefault(arm.name, arm)
        if before.settings != arm.settings:
            raise UserError(f"pipeline.arms: two arms would be called {arm.name}; rename a choice")
    return list(found.values())


def canonical_arms(section: Mapping[str, Any]) -> dict[str, Any]:
    """Return a section ``pipeline.arms`` in its canonical form: each value once, and sparsities as floats.

    Raises:
        UserError: see `arms_of`.
    """
    arms_of(section)
    found: dict[str, Any] = {}
    for name, values in section.items():
        choices = _choices(str(name), values)
        if isinstance(values, Mapping):
            found[str(name)] = {choice.name: dict(choice.settings) for choice in choices}
        else:
            found[str(name)] = list(dict.fromkeys(value for choice in choices for _, value in choice.settings))
    return found


def set_setting(values: dict[str, Any], name: str, value: Any) -> None:
    """Set a dotted name in nested plain settings; a length replaces a length given in another unit."""
    *sections, last = name.split(".")
    for section in sections:
        values[section] = dict(values.get(section) or {})
        values = values[section]
    if sections == ["budget"] and last in LENGTHS:
        values |= dict.fromkeys(LENGTHS)
    values[last] = value


def _choices(name: str, values: Any) -> list[Arm]:
    """Return the choices of an entry of ``pipeline.arms``, each as the part of the arms that have it."""
    if isinstance(values, Mapping):
        return list(_named(name, values))
    _check_setting(name, f"pipeline.arms: {name}")
    if not isinstance(values, list | tuple) or not values:
        raise UserError(f"pipeline.arms: {name}={values} must be a list of values, or choices such as {_EXAMPLE}")
    found = []
    for value in values:
        if isinstance(value, list | tuple | Mapping):
            raise UserError(f"pipeline.arms: {name}={value} must be a single value; give it a name: {_EXAMPLE}")
        if "/" in str(value) or "\\" in str(value):
            raise UserError(f"pipeline.arms: {name}={value} contains a slash, which a directory name cannot")
        settings = _settled(name, value, "pipeline.arms")
        found.append(Arm(_part(name, settings[1]), (settings,)))
    return found


def _named(name: str, choices: Mapping[Any, Any]) -> Iterator[Arm]:
    where = f"pipeline.arms: {name}"
    if not choices:
        raise UserError(f"{where} has no choice; it must be a list of values, or choices such as {_EXAMPLE}")
    for label, settings in choices.items():
        if not isinstance(label, str) or not _NAME.fullmatch(label):
            raise UserError(
                f"{where}: the name {label!r:.60} of a choice must be letters, digits and any of _ . + -, as in a name "
                "of a directory"
            )
        if not isinstance(settings, Mapping):
            raise UserError(f"{where}: {label}={settings!r:.60} must be settings by dotted names, such as {_EXAMPLE}")
        for key in settings:
            _check_setting(str(key), f"{where}: {label}: {key}")
        yield Arm(label, tuple(_settled(str(key), value, f"{where}: {label}") for key, value in settings.items()))


def _check_setting(name: str, where: str) -> None:
    first = name.partition(".")[0]
    if first not in _SETTINGS:
        raise UserError(f"{where} is not a setting{nearest(first, _SETTINGS)}")
    if name in _SECTIONS:
        raise UserError(f"{where} is a section; name one of its settings, such as {SPARSITY}")


def _settled(name: str, value: Any, where: str) -> tuple[str, Any]:
    """Return a setting and its value as arms hold it: a sparsity is a float."""
    if name != SPARSITY:
        return name, value
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise UserError(f"{where}: {name}={value} must be a number")
    return name, float(value)


def _part(name: str, value: Any) -> str:
    if name == SPARSITY:
        return f"sparse-{value:g}" if value else "dense"
    return f"{name.rpartition('.')[2]}-{value:g}" if isinstance(value, float) else f"{name.rpartition('.')[2]}-{value}"
