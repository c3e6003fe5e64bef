"""How kernels are compiled: for this processor, once, and kept on the disk.

Numba's own cache looks at the file of the function alone; a kernel is made of several. Compiled code therefore lies in
a directory named after a hash of all kernel sources, the versions of Numba and the processor's features.
"""

from __future__ import annotations

import functools
import hashlib
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

import llvmlite
import numba

from sparsetrain.cache import cache_directory
from sparsetrain.files import typed_path
from sparsetrain.machine import target_features, target_name

Function = TypeVar("Function", bound=Callable[..., Any])

CACHE = "SPARSETRAIN_KERNEL_CACHE"

# No bounds checks, no Python integers' division by zero. Without fast-math: sums keep the order they are written in.
OPTIONS = {"error_model": "numpy", "boundscheck": False}
_CACHE_LOCK = threading.RLock()


def fingerprint(folder: Path | None = None) -> str:
    """Return 16 hexadecimal digits of what compiled code depends on: sources in ``folder``, compiler, processor."""
    built_with = f"{numba.__version__} {llvmlite.__version__} {target_name()} {target_features()}"
    digest = hashlib.blake2b(built_with.encode(), digest_size=8)
    folder = folder or Path(__file__).parents[1]
    for path in sorted(folder.rglob("*.py")):
        digest.update(path.relative_to(folder).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()


@functools.cache
def compiled_directory() -> Path:
    """Return where compiled kernels lie: below ``SPARSETRAIN_KERNEL_CACHE``, else the library's cache."""
    given = os.environ.get(CACHE)
    return (typed_path(given, CACHE).absolute() if given else cache_directory() / "kernels") / fingerprint()


@contextmanager
def numba_cache() -> Iterator[bool]:
    """Point Numba's cache to our directory while a function is declared; yield whether it can be written to."""
    directory = compiled_directory()
    with suppress(OSError):
        directory.mkdir(parents=True, exist_ok=True)
    # One at a time: the setting is that of the whole process.
    with _CACHE_LOCK:
        before = numba.config.CACHE_DIR
        numba.config.CACHE_DIR = str(directory)
        try:
            yield os.access(directory, os.W_OK)
        finally:
            numba.config.CACHE_DIR = before


def inlined(function: Function) -> Function:
    """Make a function that is compiled into the kernels that call it."""
    # By default LLVM calls large ones and passes dozens of arguments on the stack: 30 cycles for every few nonzeros.
    return numba.njit(function, forceinline=True, **OPTIONS)


def procedure(function: Function) -> Function:
    """Make a function that kernels call: for much work a call, from several places."""
    return numba.njit(function, **OPTIONS)


def compiled(function: Function) -> Function:
    """Make a function of arrays that is compiled when it is first called."""
    with numba_cache() as writable:
        return numba.njit(function, cache=writable, nogil=True, **OPTIONS)
