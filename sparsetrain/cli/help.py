"""What the command line prints about settings: ``VERB --help``, and the answers to ``--cfg`` and ``--info``."""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping, Sequence
from typing import Any

import yaml
from omegaconf import OmegaConf

from sparsetrain.cli import folders
from sparsetrain.cli.allowed import joined
from sparsetrain.cli.arguments import Arguments
from sparsetrain.cli.checks import as_typed, check
from sparsetrain.cli.compose import compose, defaults, groups, own_choices, plain, run_hydra
from sparsetrain.cli.entries import ENTRY, REQUIRED, Section, Setting, places, sections_of
from sparsetrain.cli.meanings import about, details, first_sentence
from sparsetrain.cli.meanings import plain as plain_text
from sparsetrain.cli.overrides import check_moved, keys_of
from sparsetrain.cli.quoting import text_settings, with_interpolation
from sparsetrain.cli.resolve import prefer_typed_length
from sparsetrain.cli.schema import alternatives, schema_of
from sparsetrain.cli.stages import prefer_typed_arms
from sparsetrain.cli.verbs import find, spoken
from sparsetrain.errors import UserError, nearest
from sparsetrain.runs.recorded import complete, entries
from sparsetrain.screen import NARROW, wrapped


def sections(verb: str) -> list[Section]:
    """Return the sections of a verb, the top level first, with the defaults that its configuration gives."""
    values: Any = OmegaConf.to_container(defaults(verb), resolve=True)
    return sections_of(find(verb).kind(), values)


def describe(verb: str, columns: int = NARROW) -> str:
    """Return the help of a verb: its groups with their choices, and its settings, the most used ones first.

    Each setting has its default, its type with what it allows, and the first sentence about it.

    Args:
        columns: width of the text.
    """
    found = sections(verb)
    named, common = places(found), find(verb).most_used
    settings = {setting.name: setting for section in found for setting in section.settings}
    lines = _groups(verb, columns)
    first = [settings[name] for name in common if name in settings]
    if first:
        lines += [*[""] * bool(lines), "most used settings (key=value), with their defaults:"]
        lines += [line for setting in first for line in _entry(setting, named, columns)]
    for section in found:
        rest = [setting for setting in section.settings if setting not in first]
        if rest:
            lines += [*[""] * bool(lines), *_heading(section, bool(first), columns)]
            lines += [line for setting in rest for line in _entry(setting, named, columns)]
    lines += ["", f"All about a section or a setting: sparsetrain {spoken(verb)} --help {_longest(found)}"]
    return "\n".join(lines)


def describe_topics(verb: str, topics: Sequence[str], columns: int = NARROW) -> str:
    """Return all that the docstrings say about sections and settings of a verb; ``all`` names all of them.

    Raises:
        UserError: the verb has no such section or setting.
    """
    found = sections(verb)
    named = places(found)
    known = [name for section in found for name in (section.path, *(setting.name for setting in section.settings))]
    lines: list[str] = []
    for topic in topics:
        key = topic.removesuffix(ENTRY)
        if topic != "all":
            _check_topic(verb, key, known)
        for section in found:
            inside = topic == "all" or f"{section.path}.".startswith((f"{key}.", f"{key}{ENTRY}"))
            if inside:
                lines += ["", section.path or verb]
                lines += [line for part in details(section.kind) for line in wrapped(part, columns, "  ")]
            for setting in section.settings:
                if inside or setting.name == key:
                    lines += ["", *_entry(setting, named, columns, whole=True)]
    return "\n".join(lines[1:])


def _check_topic(verb: str, key: str, known: Sequence[str]) -> None:
    """Raise `UserError` unless a verb has a section or a setting ``key``."""
    if key in known or any(name.startswith(f"{key}.") for name in known):
        return
    leaf = next((name for name in known if name.rpartition(".")[2] == key), None)
    hint = f" (did you mean '{leaf}'?)" if leaf else nearest(key, known)
    raise UserError(f"{verb} has no section or setting '{key}'{hint}")


def _longest(found: Sequence[Section]) -> str:
    """Return the name of the section that has most settings, as an example."""
    return max(found, key=lambda section: len(section.settings)).path or "all"


def _groups(verb: str, columns: int) -> list[str]:
    found = groups(verb)
    if not found:
        return []
    lines, wide = ["groups (group=choice):"], max(map(len, found))
    files = own_choices(found)
    for name, listed in found.items():
        marked = [f"{choice}*" if choice in files.get(name, ()) else choice for choice in listed]
        lines += wrapped(", ".join(marked), columns, f"  {name:{wide}}  ")
    return [*lines, *(wrapped(f"* a file of your own{folders.note()}", columns, "  ") if files else [])]


def _heading(section: Section, others: bool, columns: int) -> list[str]:
    if not section.path:
        return ["other settings:" if others else "settings (key=value), with their defaults:"]
    where = "each entry of " * section.path.endswith(ENTRY) + section.path.removesuffix(ENTRY)
    return wrapped(about(section.kind), columns, f"{where}: ", "  ")


def _entry(setting: Setting, named: Mapping[type, str], columns: int, whole: bool = False) -> list[str]:
    """Return the lines about a setting: name and default, type, and the first sentence or all of its meaning."""
    only = f"; with rule={joined(setting.only)}" if setting.only else ""
    head = f"  {setting.name} = "
    if isinstance(setting.default, list) and any(isinstance(each, Mapping) for each in setting.default):
        lines = wrapped(f"{setting.type(named)}{only}", columns, head, " " * 8)
        lines += _listed(setting.default, columns)
    else:
        lines = wrapped(f"{_shown(setting.default)}  {setting.type(named)}{only}", columns, head, " " * 8)
    meaning = plain_text(setting.meaning if whole else first_sentence(setting.meaning))
    return [*lines, *(wrapped(meaning, columns, " " * 6) if meaning else [])]


def _listed(entries: Sequence[Any], columns: int) -> list[str]:
    """Return the lines that show a list of sections, such as the stages of a pipeline."""
    return [line for entry in entries for line in wrapped(_flow(entry), columns, " " * 8 + "- ")]


def _shown(value: Any) -> str:
    """Return a default as it is typed on a command line."""
    if value is REQUIRED:
        return "(required)"
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    if isinstance(value, list | tuple | Mapping):
        return _flow(value)
    return str(value) or "''"


def _flow(value: Any) -> str:
    """Return a list or a section in one line of YAML."""
    shown = list(value) if isinstance(value, tuple) else value
    text = yaml.safe_dump(shown, default_flow_style=True, sort_keys=False, width=1 << 16, allow_unicode=True)
    return text.removesuffix("...\n").strip()


def _settled_sections(kind: type, prefix: str = "") -> dict[str, type]:
    """Return the sections whose class follows from one of their settings, by dotted names."""
    found: dict[str, type] = {}
    for name, entry in entries(kind).items():
        if entry.section is not None and isinstance(entry.default, dict):
            if alternatives(entry.section):
                found[f"{prefix}{name}"] = entry.section
            else:
                found |= _settled_sections(entry.section, f"{prefix}{name}.")
    return found


def show(verb: str, arguments: Arguments) -> None:
    """Print the answer to ``--cfg``, ``--info``, ``--package`` or ``--hydra-help``."""
    overrides = as_typed(verb, arguments.overrides, arguments.multirun)
    check(verb, overrides, sweep=arguments.multirun)
    if arguments.options.get("--cfg") != "job" or arguments.multirun:
        if not arguments.multirun:
            compose(verb, overrides)  # raises in one line what Hydra's own command line would not
        run_hydra(verb, arguments.options, overrides, lambda _tree: None)
        return
    # Hydra's own answer would show a text with `${` in the escaped form that OmegaConf needs.
    shown: Any = _as_typed_text(verb, overrides, resolve="--resolve" in arguments.options)
    package = arguments.options.get("--package", "_global_")
    check_moved(package)
    for part in package.split(".") if package != "_global_" else ():
        if not isinstance(shown, dict) or part not in shown:
            raise UserError(f"--package={package}: {verb} has no such section")
        shown = shown[part]
    if not isinstance(shown, dict | list):
        print(shown)
        return
    if package != "_global_":
        print(f"# @package {package}")
    print(yaml.dump(shown, Dumper=_Dumper, default_flow_style=False, allow_unicode=True, sort_keys=False), end="")


class _Dumper(yaml.SafeDumper):
    """Quotes a text that YAML 1.1 reads as text but OmegaConf, which follows YAML 1.2, as a number."""


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    number = re.fullmatch(r"[-+]?[\d_.]+(?:[eE][-+]?\d+)?", text)
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="'" if number else None)


_Dumper.add_representer(str, _text)


def _as_typed_text(verb: str, overrides: list[str], resolve: bool) -> dict[str, Any]:
    """Return the configuration with text as it was typed, and with interpolations resolved if ``resolve``."""
    values = plain(compose(verb, overrides), resolve)
    prefer_typed_length(values, keys_of(overrides))
    prefer_typed_arms(values, overrides)
    for name, kind in _settled_sections(find(verb).kind()).items():
        *above, last = name.split(".")
        place: Any = functools.reduce(dict.__getitem__, above, values)
        place[last] = complete(place[last], kind)
    settings = text_settings(schema_of(verb))
    for key in settings.keys() & keys_of(overrides):
        *sections, name = key.split(".")
        section: Any = functools.reduce(dict.__getitem__, sections, values)
        if not resolve and isinstance(section[name], str):
            section[name] = with_interpolation(section[name])
    return values
