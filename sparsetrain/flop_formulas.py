"""FLOP formulas of the library's own operations, for ``torch.utils.flop_counter``.

Torch's module of counters takes milliseconds to import, and most processes never count. So a formula waits here until
that module is imported, by whomever, and is registered before the first counter can be made.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

Formula = Callable[..., int]
"""Takes the arguments of an operation, with shapes in place of tensors, and ``out_shape``; returns FLOPs."""

DENSE: dict[str, Formula] = {}
"""FLOPs of operations that skip zeros, by name, if they did not skip them."""

_COUNTERS = "torch.utils.flop_counter"
_waiting: dict[str, Formula] = {}


def count_by(name: str, formula: Formula, dense: Formula | None = None) -> None:
    """Let torch's counter count an operation.

    Args:
        name: of the operation in the namespace ``sparsetrain``, which exists already.
        formula: its FLOPs.
        dense: its FLOPs if no zero were skipped; None if it skips none.
    """
    if dense is not None:
        DENSE[name] = dense
    if _COUNTERS in sys.modules:
        _register(name, formula)
        return
    if not _waiting:
        sys.meta_path.insert(0, _Finder())
    _waiting[name] = formula


def _register(name: str, formula: Formula) -> None:
    import torch
    from torch.utils.flop_counter import register_flop_formula

    register: Any = register_flop_formula
    register(getattr(torch.ops.sparsetrain, name))(formula)


class _Finder(MetaPathFinder):
    """Finds torch's module of counters, once, by the other finders, and has the formulas registered after its run."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != _COUNTERS:
            return None
        sys.meta_path.remove(self)
        for finder in sys.meta_path:
            spec = finder.find_spec(fullname, path, target) if hasattr(finder, "find_spec") else None
            if spec is not None and spec.loader is not None:
                spec.loader = _Registering(spec.loader)
                return spec
        return None


class _Registering(Loader):
    """Runs a module by its own loader, and then registers the formulas that wait."""

    def __init__(self, loader: Loader) -> None:
        self._loader = loader

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)  # its source, for tracebacks and inspection

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        while _waiting:
            _register(*_waiting.popitem())
