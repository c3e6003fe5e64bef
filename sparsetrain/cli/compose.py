"""Composition of Hydra configurations: where the files are, and the schemas that they are checked against."""

from __future__ import annotations

import dataclasses
import functools
import os
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from importlib import import_module
from itertools import chain
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import hydra
import yaml
from hydra import initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException

import sparsetrain
from sparsetrain import plugins
from sparsetrain.cli.overrides import moved_within
from sparsetrain.cli.resolvers import register_resolvers
from sparsetrain.cli.verbs import find
from sparsetrain.errors import UserError, nearest
from sparsetrain.models import ModelConfig
from sparsetrain.sparsity.evolution.base import RULES

# These find the unknown key or group in a message of Hydra or OmegaConf, which may have several lines.
_UNKNOWN = (
    re.compile(r"Key '[^']*' not in .*?full_key: (\S+)", re.DOTALL),
    re.compile(r"Could not override '([^']+)'"),
)


_WITH_ALTERNATIVES: dict[str, type] = {}  # sections whose class follows from one of their settings, by name


def config_directory() -> Path:
    """Return the directory of the configuration files: ``sparsetrain/conf`` if installed, ``conf`` in a checkout."""
    package = Path(sparsetrain.__file__).parent
    installed = package / "conf"
    return installed if installed.is_dir() else package.parent / "conf"


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
        _WITH_ALTERNATIVES[kind.__name__] = kind
    for name, hint in union(kind).items():
        if name not in known:
            members.append((name, hint | None, dataclasses.field(default=None)))
    for entry in dataclasses.fields(kind):
        hint = ModelConfig if entry.name == "model" else hints[entry.name]
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


@functools.cache
def _store(name: str, node: type) -> None:
    """Store a schema in Hydra once; a launcher that pickles it may bring back an equal class that is another object."""
    ConfigStore.instance().store(name=name, node=node)


def register(verb: str) -> None:
    """Register the schema of a verb with Hydra, and the resolvers with OmegaConf."""
    _store(f"{verb}_schema", schema_of(verb))
    register_resolvers()


def groups(verb: str, folders: Iterable[Path] = ()) -> dict[str, list[str]]:
    """Return the configuration groups of a verb with their options; null is one where it is the default.

    Args:
        folders: directories to search besides the library's own.
    """
    members = yaml.safe_load((config_directory() / f"{verb}.yaml").read_text(encoding="utf-8"))["defaults"]
    entries = [next(iter(entry.items())) for entry in members if isinstance(entry, dict)]
    added = list(folders)
    return {
        name: sorted({*options(name), *(option for folder in added for option in options(name, folder))})
        + ([] if default else ["null"])
        for name, default in entries
        if not name.startswith("override")
    }


def options(group: str, folder: Path | None = None) -> list[str]:
    """Return the names of the files of a group."""
    return sorted(path.stem for path in ((folder or config_directory()) / group).glob("*.yaml"))


def compose(verb: str, overrides: list[str], hydras: bool = False) -> DictConfig:
    """Return the configuration of a verb as Hydra composes it; ``hydras`` keeps Hydra's own settings in it.

    Raises:
        UserError: Hydra or OmegaConf refuse it, or a file uses a renamed key; one line.
    """
    register(verb)
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(str(config_directory().absolute()), version_base="1.3"):
            return hydra.compose(verb, overrides, return_hydra_config=hydras)
    except (HydraException, OmegaConfBaseException) as error:
        raise refused(error) from None


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


def defaults(verb: str) -> DictConfig:
    """Return the configuration of a verb without overrides. It is cached: do not change it."""
    return _defaults(verb, schema_of(verb))


@functools.cache
def _defaults(verb: str, _schema: type) -> DictConfig:
    return compose(verb, [])


def run_hydra(verb: str, given: Mapping[str, str], overrides: list[str], job: Callable[[Any], Any]) -> None:
    """Run Hydra's own command line with the options ``given``; it calls ``job`` with each configuration."""
    register(verb)
    # Otherwise Hydra replaces the error of a job with a page of its own.
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")
    launch = hydra.main(version_base="1.3", config_path=str(config_directory().absolute()), config_name=verb)
    options = chain.from_iterable([name, value] if value else [name] for name, value in given.items())
    before, sys.argv = sys.argv, [f"sparsetrain {verb}", *options, *overrides]
    try:
        launch(job)()
    except (HydraException, OmegaConfBaseException) as error:
        raise refused(error) from None
    finally:
        sys.argv = before


def plain(tree: DictConfig, resolve: bool) -> dict[str, Any]:
    """Return a configuration as nested dicts of plain values, with interpolations resolved if ``resolve``.

    Raises:
        UserError: an interpolation cannot be resolved.
    """
    try:
        values = OmegaConf.to_container(tree, resolve=resolve)
    except OmegaConfBaseException as error:
        raise UserError(one_line(error)) from None
    assert isinstance(values, dict)
    return {str(key): value for key, value in values.items()}


def flat(tree: DictConfig, prefix: str = "") -> dict[str, Any]:
    """Return ``{"optimizer.lr": 0.002, ...}`` for a composed configuration."""
    leaves: dict[str, Any] = {}
    for key in tree:
        name, value = str(key), tree[key]
        if OmegaConf.is_dict(value) and len(value) > 0:
            leaves |= flat(value, f"{prefix}{name}.")
        else:
            leaves[f"{prefix}{name}"] = value
    return leaves


def refused(error: BaseException) -> UserError:
    """Return an error of Hydra or OmegaConf as one line; for a renamed key it says only the new name."""
    line = one_line(error)
    for pattern in _UNKNOWN:
        found = pattern.search(str(error))
        new = moved_within(found[1]) if found else None
        if new is not None:
            place = re.match(r"In '[^']*': ", line)
            return UserError(f"{place[0] if place else ''}{new}")
    unknown = re.search(r"Key '[^']*' not in '(\w+)'", line)
    if unknown and unknown[1] in _WITH_ALTERNATIVES:
        known = ", ".join(alternatives(_WITH_ALTERNATIVES[unknown[1]]))
        return UserError(f"{line}: none of {known} has this setting; --plugin FILE.py loads others")
    return UserError(line + _near(error))


def _near(error: BaseException | None) -> str:
    """Return a hint at the nearest setting of the section if OmegaConf refuses an unknown one, else an empty text."""
    while error is not None:
        kind, key = getattr(error, "object_type", None), getattr(error, "key", None)
        if isinstance(error, ConfigKeyError) and dataclasses.is_dataclass(kind):
            return nearest(str(key), [entry.name for entry in dataclasses.fields(kind)])
        error = error.__cause__
    return ""


def one_line(error: BaseException) -> str:
    """Return the message of an error of Hydra or OmegaConf and of its causes as one line, innermost cause last."""
    parts = [str(getattr(error, "full_key", None) or "")]
    cause: BaseException | None = error
    while cause is not None:
        first, *more = str(cause).splitlines() or [""]
        # This heading is Hydra's; OmegaConf's message follows in the next line.
        heading = re.fullmatch(r"(In '[^']*': )\w+ raised while composing config:", first)
        said = f"{heading[1]}{more[0]}" if heading and more else first
        parts.append(said.removeprefix("UserError raised while resolving interpolation: "))
        cause = cause.__cause__
    return ": ".join(dict.fromkeys(filter(None, parts)))
