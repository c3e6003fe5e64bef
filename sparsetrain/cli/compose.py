"""Composition of Hydra configurations from the files of ``conf/``, the files of a user, and overrides."""

from __future__ import annotations

import dataclasses
import functools
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import hydra
import yaml
from hydra import initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from omegaconf import MISSING, BooleanNode, DictConfig, FloatNode, IntegerNode, OmegaConf
from omegaconf.errors import OmegaConfBaseException

import sparsetrain
from sparsetrain.cli import folders, sources
from sparsetrain.cli.overrides import searching
from sparsetrain.cli.refusals import refused
from sparsetrain.cli.resolvers import register_resolvers
from sparsetrain.cli.schema import schema_of
from sparsetrain.errors import UserError


def config_directory() -> Path:
    """Return the directory of the configuration files: ``sparsetrain/conf`` if installed, ``conf`` in a checkout."""
    package = Path(sparsetrain.__file__).parent
    installed = package / "conf"
    return installed if installed.is_dir() else package.parent / "conf"


@functools.cache
def _store(name: str, node: type) -> None:
    """Store a schema in Hydra once; a launcher that pickles it may bring back an equal class that is another object."""
    ConfigStore.instance().store(name=name, node=node)


def register(verb: str) -> None:
    """Register the schema of a verb and the reader of files with Hydra, and the resolvers with OmegaConf."""
    _store(f"{verb}_schema", schema_of(verb))
    register_resolvers()
    sources.use()


def groups(verb: str, added: Iterable[Path] = ()) -> dict[str, list[str]]:
    """Return the configuration groups of a verb with their choices; null is one where it is the default.

    The files of the user's directories count (see `folders`), and so do the groups that only they have.

    Args:
        added: directories to search besides the library's own and the user's.
    """
    members = yaml.safe_load((config_directory() / f"{verb}.yaml").read_text(encoding="utf-8"))["defaults"]
    entries = [next(iter(entry.items())) for entry in members if isinstance(entry, dict)]
    usual = {name: default for name, default in entries if not name.startswith("override")}
    usual |= dict.fromkeys(own_groups(verb))
    own = own_choices(usual, [*folders.places(), *added])
    sections = set(defaults(verb)) if own else ()
    return {
        name: sorted({*options(name), *own.get(name, ())})
        + ([] if default or (name in sections and not options(name)) else ["null"])
        for name, default in usual.items()
    }


def own_choices(names: Iterable[str], places: Iterable[Path] | None = None) -> dict[str, dict[str, Path]]:
    """Return the choices of groups that lie in a user's directories, and for each its directory."""
    searched = folders.places() if places is None else list(places)
    found = {
        name: {choice: place for place in reversed(searched) for choice in folders.options_in(place, name)}
        for name in names
    }
    return {name: choices for name, choices in found.items() if choices}


def own_groups(verb: str) -> list[str]:
    """Return the groups that only the user's directories have: folders whose names are no setting with a value."""
    if not (places := folders.places()):
        return []
    names = {name for place in places for name in folders.folders_in(place)}
    names -= {path.name for path in config_directory().iterdir() if path.is_dir()} | {"hydra"}
    tree = defaults(verb)
    return sorted(name for name in names if name not in tree or OmegaConf.is_dict(tree[name]))


def options(group: str) -> list[str]:
    """Return the names of the library's files of a group."""
    return folders.options_in(config_directory(), group)


def compose(verb: str, overrides: list[str], hydras: bool = False) -> DictConfig:
    """Return the configuration of a verb as Hydra composes it; ``hydras`` keeps Hydra's own settings in it.

    Raises:
        UserError: Hydra or OmegaConf refuse it, or a file uses a renamed key; one line.
    """
    return _compose(verb, overrides, folders.places(), hydras)


def _compose(verb: str, overrides: list[str], places: Sequence[Path], hydras: bool = False) -> DictConfig:
    register(verb)
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(str(config_directory().absolute()), version_base="1.3"):
            return hydra.compose(verb, searching(overrides, places), return_hydra_config=hydras)
    except (HydraException, OmegaConfBaseException, RecursionError, ValueError) as error:
        # Hydra raises `ValueError` for a malformed defaults list.
        raise refused(error, schema_of(verb)) from None


def defaults(verb: str) -> DictConfig:
    """Return the configuration of a verb without overrides. It is cached: do not change it."""
    return _defaults(verb, schema_of(verb))


@functools.cache
def _defaults(verb: str, _schema: type) -> DictConfig:
    return _compose(verb, [], ())


def run_hydra(verb: str, given: Mapping[str, str], overrides: list[str], job: Callable[[Any], Any]) -> None:
    """Run Hydra's own command line with the options ``given``; it calls ``job`` with each configuration."""
    register(verb)
    # Otherwise Hydra replaces the error of a job with a page of its own.
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")
    launch = hydra.main(version_base="1.3", config_path=str(config_directory().absolute()), config_name=verb)
    asked = chain.from_iterable([name, value] if value else [name] for name, value in given.items())
    before, sys.argv = sys.argv, [f"sparsetrain {verb}", *asked, *searching(overrides, folders.places())]
    try:
        launch(job)()
    except (HydraException, OmegaConfBaseException) as error:
        raise refused(error, schema_of(verb)) from None
    finally:
        sys.argv = before


def plain(tree: DictConfig, resolve: bool) -> dict[str, Any]:
    """Return a configuration as nested dicts of plain values, with interpolations resolved if ``resolve``.

    Raises:
        UserError: an interpolation cannot be resolved, or, if ``resolve``, a value is missing.
    """
    try:
        values = OmegaConf.to_container(tree, resolve=resolve)
    except OmegaConfBaseException as error:
        raise refused(error, OmegaConf.get_type(tree) or dict) from None
    assert isinstance(values, dict)
    if resolve and (missing := next(_missing(tree), None)) is not None:
        raise UserError(f"{missing} is missing")
    return {str(key): value for key, value in values.items()}


def _missing(tree: Any, prefix: str = "") -> Iterator[str]:
    """Yield the dotted names of settings without a value, such as a required one of an entry of a list.

    OmegaConf marks them with ``???``, which may also be the text of a setting.
    """
    for key in tree if OmegaConf.is_dict(tree) else range(len(tree)):
        node = tree._get_node(key)
        name = f"{prefix.removesuffix('.')}[{key}]" if isinstance(key, int) else f"{prefix}{key}"
        if OmegaConf.is_config(node):
            if not (node._is_none() or node._is_interpolation() or node._is_missing()):
                yield from _missing(node, f"{name}.")
        elif node._is_missing():
            section: Any = OmegaConf.get_type(tree)
            entries = (
                {entry.name: entry for entry in dataclasses.fields(section)}
                if dataclasses.is_dataclass(section)
                else {}
            )
            required = str(key) in entries and entries[str(key)].default in (dataclasses.MISSING, MISSING)
            if required or isinstance(node, IntegerNode | FloatNode | BooleanNode):
                yield name


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
