"""Runs a function on a module of another library when that library is imported, without importing it.

transformers and peft are optional and slow to import, so `import sparsetrain` must not import them. What they have to
know of sparse layers is told to them when they are imported themselves, before or after sparsetrain.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

Action = Callable[[ModuleType], None]


class _Finder(MetaPathFinder):
    """Finds no module itself: it lets the other finders find a waited-for module, and acts after its execution."""

    def __init__(self) -> None:
        self.actions: dict[str, Action] = {}

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in self.actions:
            return None
        for finder in sys.meta_path:
            find = getattr(finder, "find_spec", None)
            spec = find(fullname, path, target) if find is not None and finder is not self else None
            if spec is not None and spec.loader is not None:
                spec.loader = _Loader(spec.loader, self.actions[fullname])
                return spec
        return None


class _Loader(Loader):
    """The loader of a module, which acts after it has executed the module."""

    def __init__(self, inner: Any, action: Action) -> None:
        self.inner, self.action = inner, action

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        made: ModuleType | None = self.inner.create_module(spec)
        return made

    def exec_module(self, module: ModuleType) -> None:
        if module.__spec__ is not None:
            module.__spec__.loader = self.inner
        module.__loader__ = self.inner
        self.inner.exec_module(module)
        self.action(module)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)


_finder = _Finder()


def when_imported(name: str, action: Action) -> None:
    """Call ``action`` with the module ``name`` after it has been imported: now, if it has been already.

    Each module has one action.
    """
    _finder.actions[name] = action
    if _finder not in sys.meta_path:
        sys.meta_path.insert(0, _finder)
    module = sys.modules.get(name)
    if module is not None and not getattr(module.__spec__, "_initializing", False):
        action(module)
