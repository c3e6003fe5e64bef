"""``config.yaml``: the settings of a run and the facts that identify it, read with the names of settings of today.

Format 1 has no ``format`` and no ``kind``; format 2 has both at its top. In format 3, plain text is cut into documents
by ``data.separator``; before, blank lines cut it. A file contains all settings, including those
at their defaults. A missing key therefore belongs to a newer setting and gets the schema's default. When a default
changes, the format number increases and the old default goes into `DEFAULTS_OF_FORMAT`.
"""

from __future__ import annotations

import functools
import reprlib
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, NamedTuple, get_args, get_type_hints

from sparsetrain.errors import UserError
from sparsetrain.reading import read_yaml
from sparsetrain.runs.former import cut_by_blank_lines, densities_in_phases, stages_of_pipeline, without_other_rules
from sparsetrain.runs.layout import CONFIG
from sparsetrain.settings import settled

FORMAT = 3
KINDS = {"pipeline": "pipeline", "n_tokens": "prompt", "task": "finetune", "check": "coord-check"}
"""For format 1: a key that only one kind of run has, to the kind. They are checked in this order."""

FACTS = ("corpus", "source", "task_fingerprint", "donor")
"""Facts beside the settings: the content of the text, of the weights to start from, of the task, and of a donor."""

# Settings of format 1 and their new names; the name of a section renames its remaining settings.
RENAMED = {
    "schedule.steps": "budget.steps",
    "schedule.tokens": "budget.tokens",
    "stage.flops": "budget.flops",
    "stage.epochs": "budget.epochs",
    "stage.batch_size": "budget.batch_size",
    "stage": "loop",
}
_LENGTHS = ("steps", "tokens", "flops", "epochs")  # in format 1 the first one that was set counted

DEFAULTS_OF_FORMAT: dict[int, dict[str, Any]] = {1: {}}
"""Defaults that were different in a format: {format: {dotted key: value}}."""

REMOVED: dict[str, Any] = {}
"""Removed settings, each with the value that corresponds to the current behaviour; any other value is a difference."""


@dataclass(frozen=True)
class Recorded:
    """A run as its directory records it, or as this process is about to record it.

    Args:
        kind: ``pretrain``, ``adapt``, ``finetune``, ``prompt``, ``evaluate``, ``pipeline`` or ``coord-check``.
        schema: the dataclass of the settings.
        values: the settings as nested plain values, under the names of the schema.
        facts: the known ones of `FACTS`; older versions recorded fewer.
        format: format of the file.
        directory: the directory that it was read from; None if it is not written yet.
    """

    kind: str
    schema: type
    values: dict[str, Any]
    facts: dict[str, str | None]
    format: int = FORMAT
    directory: Path | None = None

    def plain(self) -> dict[str, Any]:
        """Return the content of ``config.yaml``."""
        return {"format": self.format, "kind": self.kind, **self.values, **self.facts}


def read_recorded(directory: Path, schema: type) -> Recorded:
    """Return what a run directory records, in any format, under the names of ``schema``.

    Raises:
        UserError: there is no run, or its file is unreadable, incomplete or of a later version.
    """
    return recorded_of(read_config(directory), schema, directory)


def read_config(directory: Path) -> dict[str, Any]:
    """Return the content of ``config.yaml`` without converting it.

    Raises:
        UserError: there is no run, or the file is unreadable.
    """
    path = directory / CONFIG
    if not path.exists():
        raise UserError(f"{directory} is not a run directory: it has no {CONFIG}")
    try:
        content = read_yaml(path)
    except UserError as error:
        raise UserError(f"{path} cannot be read: {str(error).removeprefix(str(path)).lstrip(' ,:')}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} holds no configuration")
    return content


def recorded_of(content: Mapping[str, Any], schema: type, directory: Path) -> Recorded:
    """Return the record for the content of a ``config.yaml``.

    Raises:
        UserError: the format is newer, or an entry is missing or has another type.
    """
    path, written = directory / CONFIG, content.get("format", 1)
    if isinstance(written, bool) or not isinstance(written, int) or written < 1:
        raise UserError(f"{path}: format={reprlib.repr(written)} must be a whole number of at least 1")
    if written > FORMAT:
        raise UserError(f"{path}: format={written} is of a later version of sparsetrain; this one reads up to {FORMAT}")
    kind = content.get("kind", next((KINDS[key] for key in KINDS if key in content), "pretrain"))
    if written > 1:
        for name in ("kind", *FACTS[:2]):  # the first and the last entries of a complete file
            if name not in content:
                raise UserError(f"{path} is incomplete: it has no {name}")
    facts = {name: content[name] for name in FACTS if name in content}
    for name, value in {"kind": kind, **facts}.items():
        if not isinstance(value, str) and (value is not None or name == "kind"):
            raise UserError(f"{path}: {name}={reprlib.repr(value)} must be text")
    values = {key: value for key, value in content.items() if key not in ("format", "kind", *FACTS)}
    return Recorded(str(kind), schema, modernise(values, schema, written), facts, written, directory)


def modernise(values: Mapping[str, Any], schema: type, written: int = 1) -> dict[str, Any]:
    """Return settings of the format ``written``, converted to the names and the meaning of today."""
    found = dict(values)
    if written == 1:
        found = densities_in_phases(_renamed_sections(values, schema))
        found = stages_of_pipeline(found, lambda section: _renamed_sections(section, schema))
    if written < 3:
        found = cut_by_blank_lines(found)
    for number in range(written, FORMAT):
        for key, value in DEFAULTS_OF_FORMAT.get(number, {}).items():
            _fill(found, key.split("."), value)
    for key, value in REMOVED.items():
        _drop(found, key.split("."), value)
    found = without_other_rules(found)
    canonical = getattr(schema, "canonical", None)
    return found if canonical is None else canonical(found)


def renamed(key: str, schema: type) -> str:
    """Return the new name of a dotted setting of format 1, e.g. of a column in an older table."""
    section, _, name = key.rpartition(".")
    parts = section.split(".")
    if "budget" not in entries(schema) or parts[-1] not in ("schedule", "stage"):
        return key
    new = RENAMED.get(f"{parts[-1]}.{name}")
    if new is None:
        new = f"{RENAMED.get(parts[-1], parts[-1])}.{name}"
    return ".".join([*parts[:-1], new])


def _renamed_sections(values: Mapping[str, Any], schema: type) -> dict[str, Any]:
    known, found = entries(schema), {}
    for key, value in values.items():
        section = known[key].section if key in known else None
        inner = section is not None and isinstance(value, Mapping)
        found[key] = _renamed_sections(value, section) if section is not None and inner else value
    sections = [key for key in ("schedule", "stage") if isinstance(found.get(key), Mapping)]
    if "budget" not in known or not sections or "budget" in found:
        return found
    budget: dict[str, Any] = {}
    for section_name in sections:
        moved: dict[str, Any] = {}
        for name, value in found.pop(section_name).items():
            place, _, new = renamed(f"{section_name}.{name}", schema).rpartition(".")
            (budget if place == "budget" else moved)[new] = value
        found[RENAMED.get(section_name, section_name)] = moved
    counted = next((name for name in _LENGTHS if budget.get(name) is not None), None)
    budget |= {name: budget[name] if name == counted else None for name in _LENGTHS}
    return {**found, "budget": budget}


def _fill(values: dict[str, Any], path: list[str], value: Any) -> None:
    """Set the value at ``path`` if it is missing; do nothing if a section on the way is null."""
    for part in path[:-1]:
        inner = values.get(part, {})
        if not isinstance(inner, Mapping):
            return
        values[part] = values = dict(inner)
    values.setdefault(path[-1], value)


def _drop(values: dict[str, Any], path: list[str], value: Any) -> None:
    for part in path[:-1]:
        inner = values.get(part)
        if not isinstance(inner, Mapping):
            return
        values[part] = values = dict(inner)
    if path[-1] in values and values[path[-1]] == value:
        del values[path[-1]]


class Entry(NamedTuple):
    """A field of a schema.

    Args:
        default: default as a plain value; None if the field is required.
        section: dataclass of the field's values, if they have one.
        nullable: whether a null inside the section counts as a missing key.
    """

    default: Any
    section: type | None
    nullable: bool


@functools.cache
def entries(schema: type) -> dict[str, Entry]:
    """Return the fields of a dataclass by name.

    A field of type dict has a section if its metadata names a dataclass: ``metadata={"section": ModelConfig}``.
    """
    hints, found = get_type_hints(schema), {}
    for entry in fields(schema):
        hint, named = hints[entry.name], entry.metadata.get("section")
        arms = [hint, *get_args(hint), *(inner for arm in get_args(hint) for inner in get_args(arm))]
        section = named or next((arm for arm in arms if is_dataclass(arm)), None)
        default = None if entry.default is MISSING else entry.default
        if entry.default_factory is not MISSING:
            default = entry.default_factory()
        if is_dataclass(default) and not isinstance(default, type):
            default = asdict(default)
        elif isinstance(default, list):
            default = [asdict(item) if is_dataclass(item) else item for item in default]  # type: ignore[arg-type]
        found[entry.name] = Entry(default, section if isinstance(section, type) else None, named is not None)
    return found


def complete(values: Mapping[str, Any], schema: type, nullable: bool = False) -> dict[str, Any]:
    """Return nested plain values with missing ones set to the schema's defaults, in the schema's order.

    Keys that the schema does not have stay, after the others. Inside a section, a missing value gets the default of
    the field that holds the section, if that default gives one, and else the default of the section's dataclass.
    """
    schema, values = settled(schema, values)
    known, found = entries(schema), {}
    for name, entry in known.items():
        value = values.get(name)
        if name not in values or (nullable and value is None):
            value = entry.default
        elif isinstance(value, Mapping) and isinstance(entry.default, Mapping):
            value = _over(entry, value)
        found[name] = _completed(value, entry)
    return {**found, **{key: value for key, value in values.items() if key not in known}}


def _over(entry: Entry, value: Mapping[str, Any]) -> dict[str, Any]:
    """Return a section with what it lacks from the field's default, as far as the default is of the same class."""
    merged = {**entry.default, **value}
    if entry.section is None:
        return merged
    known = entries(settled(entry.section, merged)[0])
    return {key: item for key, item in merged.items() if key in value or key in known}


def _completed(value: Any, entry: Entry) -> Any:
    if entry.section is None:
        return value
    if isinstance(value, Mapping):
        return complete(value, entry.section, entry.nullable)
    if isinstance(value, list):
        return [complete(item, entry.section) if isinstance(item, Mapping) else item for item in value]
    return value
