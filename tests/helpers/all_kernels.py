"""All kernels of the library, and their compilation by the processes that run the tests."""

from __future__ import annotations

import importlib
import pkgutil

from sparsetrain import kernels
from sparsetrain.kernels.simd.kernel import Kernel


def all_kernels() -> dict[str, Kernel]:
    """Return the kernels by the names of their declarations."""
    found = {}
    for module in pkgutil.walk_packages(kernels.__path__, "sparsetrain.kernels."):
        if "triton" not in module.name:
            things = vars(importlib.import_module(module.name)).values()
            found |= {thing.declaration.kernel: thing for thing in things if isinstance(thing, Kernel)}
    return found


def compile_share(worker: int, workers: int) -> None:
    """Load all kernels; each of ``workers`` processes begins at another one, and compiles what the cache lacks.

    Nearly every test needs some of the same kernels. Without this, each process would compile them for itself.
    """
    found = [kernel for _, kernel in sorted(all_kernels().items())]
    first = len(found) * worker // workers
    for kernel in found[first:] + found[:first]:
        assert kernel.compiled
