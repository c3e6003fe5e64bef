"""What the command line says about the settings of a verb: their help, and the answers to ``--cfg`` and ``--info``."""

from __future__ import annotations

import dataclasses
import functools
import re
import textwrap
from collections.abc import Iterator
from typing import Any, get_args, get_type_hints

import yaml
from omegaconf import OmegaConf

from sparsetrain.cli.checks import as_typed, check
from sparsetrain.cli.compose import compose, defaults, flat, groups, plain, run_hydra, schema_of
from sparsetrain.cli.overrides import check_moved, keys_of
from sparsetrain.cli.quoting import text_settings, with_interpolation
from sparsetrain.cli.resolve import choose_length
from sparsetrain.cli.stages import choose_arms
from sparsetrain.cli.verbs import find
from sparsetrain.cli.words import Words
from sparsetrain.errors import UserError
from sparsetrain.models import ModelConfig


def describe(verb: str) -> str:
    """Return the groups of a verb with their choices, and every setting with its default and its type."""
    lines = ["groups (group=choice):"]
    for name, choices in groups(verb).items():
        lines += textwrap.wrap(", ".join(choices), 120, initial_indent=f"  {name:18} ", subsequent_indent=" " * 21)
    lines += ["", "settings (key=value) with their defaults:"]
    for name, value in flat(defaults(verb)).items():
        lines += [f"  {name} = {_shown(value)}"] if not _has_entries(value) else [f"  {name} =", *_entries(value)]
    lines += ["", "what the settings mean:"]
    for path, kind in _sections(verb, find(verb).kind()):
        lines += [f"  {path or verb}:", *(f"    {line}".rstrip() for line in (kind.__doc__ or "").split("\n"))]
    return "\n".join(lines)


def _shown(value: Any) -> str:
    if OmegaConf.is_config(value):
        return str(OmegaConf.to_container(value))
    return "null" if value is None else str(value)


def _has_entries(value: Any) -> bool:
    return OmegaConf.is_list(value) and any(map(OmegaConf.is_dict, value))


def _entries(listed: Any) -> list[str]:
    """Return the lines of a list whose entries have settings of their own."""
    plain = [OmegaConf.to_container(entry) for entry in listed]
    lines = [yaml.safe_dump(entry, default_flow_style=True, sort_keys=False, width=1 << 16) for entry in plain]
    return [f"    - {line.strip()}" for line in lines]


def _sections(path: str, kind: type) -> list[tuple[str, type]]:
    """Return the dataclasses of a configuration whose documentation explains its settings, each once."""
    found: dict[type, str] = {kind: path}
    for name, hint in get_type_hints(kind).items():
        for arm in (ModelConfig,) if name == "model" else _inner(hint):
            if isinstance(arm, type) and dataclasses.is_dataclass(arm):
                for inner_path, inner in _sections(name, arm):
                    found.setdefault(inner, inner_path)
    return [(where, section) for section, where in found.items()]


def _inner(hint: Any) -> Iterator[Any]:
    """Yield a type hint and all that it is made of."""
    yield hint
    for part in get_args(hint):
        yield from _inner(part)


def show(verb: str, words: Words) -> None:
    """Print what is asked about the configuration."""
    overrides = as_typed(verb, words.overrides, words.multirun)
    check(verb, overrides, sweep=words.multirun)
    if words.options.get("--cfg") != "job" or words.multirun:
        run_hydra(verb, words.options, overrides, lambda _tree: None)
        return
    # Not Hydra's own answer: in it, a text with `${` would stand as OmegaConf needs it.
    shown: Any = _as_typed_text(verb, overrides, resolve="--resolve" in words.options)
    package = words.options.get("--package", "_global_")
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
    """Writes text in quotes also where only OmegaConf, which follows YAML 1.2, would read it as a number."""


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    number = re.fullmatch(r"[-+]?[\d_.]+(?:[eE][-+]?\d+)?", text)
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="'" if number else None)


_Dumper.add_representer(str, _text)


def _as_typed_text(verb: str, overrides: list[str], resolve: bool) -> dict[str, Any]:
    """Return the configuration as a file would hold it, but text as it was typed; ``resolve`` the interpolations."""
    values = plain(compose(verb, overrides), resolve)
    choose_length(values, keys_of(overrides))
    choose_arms(values, overrides)
    settings = text_settings(schema_of(verb))
    for key in settings.keys() & keys_of(overrides):
        *sections, name = key.split(".")
        section: Any = functools.reduce(dict.__getitem__, sections, values)
        if not resolve and isinstance(section[name], str):
            section[name] = with_interpolation(section[name])
    return values
