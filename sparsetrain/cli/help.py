"""What the command line prints about settings: ``VERB --help``, and the answers to ``--cfg`` and ``--info``."""

from __future__ import annotations

import dataclasses
import functools
import re
import textwrap
from collections.abc import Iterator
from typing import Any, get_args, get_type_hints

import yaml
from omegaconf import OmegaConf

from sparsetrain.cli import folders
from sparsetrain.cli.arguments import Arguments
from sparsetrain.cli.checks import as_typed, check
from sparsetrain.cli.compose import compose, defaults, flat, groups, own_choices, plain, run_hydra
from sparsetrain.cli.overrides import check_moved, keys_of
from sparsetrain.cli.quoting import text_settings, with_interpolation
from sparsetrain.cli.resolve import prefer_typed_length
from sparsetrain.cli.schema import alternatives, schema_of, union
from sparsetrain.cli.stages import prefer_typed_arms
from sparsetrain.cli.verbs import find
from sparsetrain.errors import UserError
from sparsetrain.runs.recorded import complete, entries


def describe(verb: str) -> str:
    """Return the help of a verb: its groups with their choices, and each setting with its default and meaning."""
    lines = ["groups (group=choice):"]
    files = own_choices(groups(verb))
    for name, choices in groups(verb).items():
        choices = [f"{choice}*" if choice in files.get(name, ()) else choice for choice in choices]
        lines += textwrap.wrap(", ".join(choices), 120, initial_indent=f"  {name:18} ", subsequent_indent=" " * 21)
    if files:
        lines.append(f"  * a file of your own{folders.note()}")
    lines += ["", "settings (key=value) with their defaults:"]
    kinds, hidden = _settled_sections(find(verb).kind()), set()
    for section, kind in kinds.items():
        own = {entry.name for entry in dataclasses.fields(kind)}
        hidden |= {f"{section}.{name}" for name in union(kind) if name not in own}
    for name, value in flat(defaults(verb)).items():
        if name in hidden:
            continue
        lines += [f"  {name} = {_shown(value)}"] if not _has_entries(value) else [f"  {name} =", *_entries(value)]
        section, _, last = name.rpartition(".")
        for choice, kind in alternatives(kinds[section]).items() if section in kinds else ():
            usual = ", ".join(f"{key}={_shown(plain)}" for key, plain in complete({}, kind).items() if key != last)
            first = f"    {last}={choice}: " + ("" if usual else "no other setting")
            lines += textwrap.wrap(usual, 120, initial_indent=first, subsequent_indent=" " * 6) or [first]
    lines += ["", "what the settings mean:"]
    for path, kind in _sections(verb, find(verb).kind()):
        lines += [f"  {path or verb}:", *(f"    {line}".rstrip() for line in (kind.__doc__ or "").split("\n"))]
    return "\n".join(lines)


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


def _shown(value: Any) -> str:
    if OmegaConf.is_config(value):
        return str(OmegaConf.to_container(value))
    return "null" if value is None else str(value)


def _has_entries(value: Any) -> bool:
    return OmegaConf.is_list(value) and any(map(OmegaConf.is_dict, value))


def _entries(listed: Any) -> list[str]:
    """Return the lines that show a list of sections, such as the stages of a pipeline."""
    plain = [OmegaConf.to_container(entry) for entry in listed]
    lines = [yaml.safe_dump(entry, default_flow_style=True, sort_keys=False, width=1 << 16) for entry in plain]
    return [f"    - {line.strip()}" for line in lines]


def _sections(path: str, kind: type) -> list[tuple[str, type]]:
    """Return the dataclasses whose docstrings explain the settings of a configuration, each once with its path."""
    found: dict[type, str] = {kind: path}
    named = {entry.name: entry.metadata["section"] for entry in dataclasses.fields(kind) if "section" in entry.metadata}
    for name, hint in get_type_hints(kind).items():
        for arm in _inner(named.get(name, hint)):
            if isinstance(arm, type) and dataclasses.is_dataclass(arm):
                for inner_path, inner in _sections(name, arm):
                    found.setdefault(inner, inner_path)
                for choice, inner in alternatives(arm).items():
                    found.setdefault(inner, f"{name} of {choice}")
    return [(where, section) for section, where in found.items()]


def _inner(hint: Any) -> Iterator[Any]:
    """Yield a type hint and, recursively, its arguments."""
    yield hint
    for part in get_args(hint):
        yield from _inner(part)


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
