"""Plugins: files and modules outside the library that register rules, patterns, schedules, backends, tasks or sources.

A plugin is a Python file or an importable module that calls ``sparsetrain.register_rule`` or a similar function when
it is imported. The command line takes ``--plugin my_rule.py``. The variable ``SPARSETRAIN_PLUGINS`` names plugins for
every command and for the processes that a launcher starts. An installed package names its plugins by entry points of
the group ``sparsetrain.plugins``. A run directory never names a plugin, since reading a run must not execute code.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import os
import sys
from collections.abc import Callable, Iterable
from functools import partial
from importlib import metadata
from types import ModuleType

from sparsetrain.errors import UserError, described
from sparsetrain.files import typed_path

VARIABLE = "SPARSETRAIN_PLUGINS"
"""The environment variable that names plugins; its separator is the one of ``PATH``."""

GROUP = "sparsetrain.plugins"
"""The group of entry points by which an installed package names its plugins."""

_LOGGER = logging.getLogger(__name__)
_loaded: set[str] = set()


def name(plugins: Iterable[str]) -> None:
    """Add plugins to ``SPARSETRAIN_PLUGINS`` in the environment of this process, which its subprocesses inherit.

    Args:
        plugins: modules, or files that end with ``.py``; a path may be relative to the working directory.

    Raises:
        UserError: a name is empty, or a file does not exist.
    """
    plugins = list(plugins)
    if not all(plugins):
        raise UserError("--plugin='' is empty; give a Python file or a module")
    known = [plugin for plugin in os.environ.get(VARIABLE, "").split(os.pathsep) if plugin]
    for plugin in plugins:
        if plugin.endswith(".py"):
            path = typed_path(plugin, "--plugin").absolute()
            if not path.is_file():
                raise UserError(f"--plugin={plugin}: no such file")
            plugin = str(path)
        if plugin not in known:
            known.append(plugin)
    os.environ[VARIABLE] = os.pathsep.join(known)


def load() -> None:
    """Import every plugin that is named or installed, unless it was imported before.

    A broken plugin of an installed package is skipped with a warning, since it must not stop unrelated commands.

    Raises:
        UserError: a plugin of ``SPARSETRAIN_PLUGINS`` does not exist or raises when it is imported.
    """
    for plugin in os.environ.get(VARIABLE, "").split(os.pathsep):
        if plugin:
            _load(plugin, partial(_import, plugin))
    if GROUP in _loaded:
        return  # the search for installed packages takes milliseconds
    _loaded.add(GROUP)
    for entry in metadata.entry_points(group=GROUP):
        try:
            _load(f"{entry.name} = {entry.value}", entry.load)
        except UserError as error:
            _LOGGER.warning("%s", error)


def _load(plugin: str, read: Callable[[], object]) -> None:
    if plugin in _loaded:
        return
    _loaded.add(plugin)  # before the import, which may look up a name and so call `load` again
    try:
        read()
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # also `SystemExit`, which would end the command without a word
        importing = ("<frozen", __file__, importlib.__file__, str(metadata.__file__))
        raise UserError(f"plugin {plugin}: {described(error, importing)}") from error


def _import(plugin: str) -> ModuleType:
    if not plugin.endswith(".py"):
        return importlib.import_module(plugin)
    path = typed_path(plugin, VARIABLE)
    if not path.is_file():
        raise UserError("no such file")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if path.stem in sys.modules or spec is None or spec.loader is None:
        raise UserError(f"a module named {path.stem!r} is imported already; give the file another name")
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module  # dataclasses look the module up by its name
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[path.stem]
        raise
    return module
