"""Verbs as Python functions: ``st.pretrain(data="notes.txt", steps=200)``.

The keywords become the words of a command, so a call and its command have the same defaults, presets and checks, and
make the same run.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterator, Mapping
from typing import Any

from hydra.core.override_parser.types import Quote, QuotedString
from omegaconf import OmegaConf
from rich.console import Console

from sparsetrain import plugins, stages
from sparsetrain.cli.compose import defaults, flat, groups
from sparsetrain.cli.entries import of_other_verbs
from sparsetrain.cli.overrides import OPEN
from sparsetrain.cli.resolve import load
from sparsetrain.errors import UserError, nearest

VALUE_OF = {"sparsity": "sparsity.sparsity", "data": "data.path"}
"""What a number or a text stands for where the name of a preset could be, too."""


def call(verb: str, settings: Mapping[str, Any] | None, given: Mapping[str, Any], quiet: bool = False) -> Any:
    """Run a verb with settings by dotted name and by keyword, and return its result.

    Args:
        quiet: print nothing.

    Raises:
        UserError: a setting is unknown, ambiguous, given twice or refused.
    """
    config = load(verb, words(verb, settings, given))
    run = getattr(stages, verb)
    return run(config) if verb == "generate" else run(config, Console(file=io.StringIO()) if quiet else None)


def words(verb: str, settings: Mapping[str, Any] | None, given: Mapping[str, Any]) -> list[str]:
    """Return the words behind ``sparsetrain VERB`` that stand for settings; presets come first.

    Raises:
        UserError: a setting is unknown, ambiguous or given twice.
    """
    plugins.load()
    presets, values = dict[str, str](), dict[str, Any]()
    for name, value in [*(settings or {}).items(), *given.items()]:
        if not isinstance(name, str):
            raise UserError(f"{verb}: the name of a setting must be text, not {name!r}")
        for key, inner, preset in _settings(verb, name, value):
            if key in (presets if preset else values):
                raise UserError(f"{verb}: {key} is given twice")
            (presets if preset else values)[key] = inner
    return [f"{key}={choice}" for key, choice in presets.items()] + [
        f"{key}={_typed(value)}" for key, value in values.items()
    ]


def _settings(verb: str, name: str, value: Any) -> Iterator[tuple[str, Any, bool]]:
    """Yield the settings that a keyword stands for: dotted name, value, and whether it is the choice of a preset."""
    known, tree = groups(verb), flat(defaults(verb))
    if isinstance(value, str) and value in known.get(name, ()):
        yield name, value, True
    elif isinstance(value, Mapping) and _is_section(verb, name):
        for key, inner in value.items():
            yield from _settings(verb, f"{name}.{key}", inner)
    elif name in VALUE_OF and VALUE_OF[name] in tree and isinstance(value, str | int | float | os.PathLike):
        yield VALUE_OF[name], value, False
    else:
        yield _full(verb, name, tree), value, False


def _is_section(verb: str, name: str) -> bool:
    node = OmegaConf.select(defaults(verb), name, default=None)
    return name not in OPEN and (OmegaConf.is_dict(node) or (node is None and name in groups(verb)))


def _full(verb: str, name: str, tree: Mapping[str, Any]) -> str:
    """Return the dotted name of a setting that may be given by its last part alone, as ``lr`` for ``optimizer.lr``.

    Raises:
        UserError: the verb has no such setting, or several.
    """
    if "." in name or name in defaults(verb) or name in groups(verb):
        return name  # the command line knows whether it exists
    found = [key for key in tree if key.rpartition(".")[2] == name]
    depth = min((key.count(".") for key in found), default=0)
    found = [key for key in found if key.count(".") == depth]
    if len(found) == 1:
        return found[0]
    if found:
        raise UserError(f"{verb}: {name} could be {' or '.join(found)}; give it as {{'{found[0]}': ...}}")
    hint = of_other_verbs(name) or nearest(name, [*defaults(verb), *(key.rpartition(".")[2] for key in tree)])
    raise UserError(f"{verb} has no setting '{name}'{hint}")


def _typed(value: Any) -> str:
    """Return a value as Hydra's grammar writes it."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str | os.PathLike):
        return str(QuotedString(os.fspath(value), Quote.single).with_quotes())
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{key}:{_typed(inner)}" for key, inner in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ",".join(map(_typed, value)) + "]"
    if isinstance(value, int | float):
        return repr(value)
    if callable(getattr(value, "item", None)):  # a number of NumPy or torch
        return _typed(value.item())
    raise UserError(f"{value!r:.60} is no value of a setting: give text, a number, a list or a dict")
