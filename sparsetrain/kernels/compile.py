"""How a kernel is compiled and called: for this processor, once, kept on the disk, on any number of threads.

A kernel is a function of one argument, the address of a list of 64-bit words: numbers and addresses of arrays.
`Kernel` makes that list, and has the kernel run on the threads of the OpenMP runtime that torch has loaded, if there is
one: threads of our own would have to share the cores with torch's, which spin for milliseconds after each parallel
operation. Without such a runtime plain threads do it.

Numba's own cache looks at the file of the function alone; a kernel is made of several. Compiled code therefore lies in
a directory named after a hash of all kernel sources, the versions of Numba and the processor's features.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import threading
from array import array
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

import llvmlite
import numba
import numpy as np

from sparsetrain.cache import cache_directory
from sparsetrain.files import typed_path
from sparsetrain.machine import target_features, target_name

Function = TypeVar("Function", bound=Callable[..., Any])

CACHE = "SPARSETRAIN_KERNEL_CACHE"

# No bounds checks, no Python integers' division by zero. Without fast-math: sums keep the order they are written in.
_OPTIONS = {"error_model": "numpy", "boundscheck": False}
_CACHE_LOCK = threading.RLock()
_ENTRY = ctypes.CFUNCTYPE(None, ctypes.c_void_p)

# The first words of every kernel's list: two functions of the runtime, or part and parts where there is none.
HEADER = 4


def fingerprint(folder: Path | None = None) -> str:
    """Return 16 hexadecimal digits of what compiled code depends on: sources in ``folder``, compiler, processor."""
    built_with = f"{numba.__version__} {llvmlite.__version__} {target_name()} {target_features()}"
    digest = hashlib.blake2b(built_with.encode(), digest_size=8)
    for path in sorted((folder or Path(__file__).parent).glob("*.py")):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()


@functools.cache
def compiled_directory() -> Path:
    """Return where compiled kernels lie: below ``SPARSETRAIN_KERNEL_CACHE``, else the library's cache."""
    given = os.environ.get(CACHE)
    return (typed_path(given, CACHE).absolute() if given else cache_directory() / "kernels") / fingerprint()


@contextmanager
def _numba_cache() -> Iterator[bool]:
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


def part(function: Function) -> Function:
    """Make a function that is compiled as a part of the kernels that call it."""
    # Left to itself LLVM calls the large ones, with dozens of words on the stack: 30 cycles for every few nonzeros.
    return numba.njit(function, forceinline=True, **_OPTIONS)


def procedure(function: Function) -> Function:
    """Make a function that kernels call: for one that does much work a call, in several places."""
    return numba.njit(function, **_OPTIONS)


def compiled(function: Function) -> Function:
    """Make a function of arrays that is compiled when it is first called."""
    with _numba_cache() as writable:
        return numba.njit(function, cache=writable, nogil=True, **_OPTIONS)


class Kernel:
    """A kernel by its Python function; compiled, or read from the disk, when it is first called."""

    def __init__(self, function: Callable[[Any], None]) -> None:
        self._function = function
        self._lock = threading.Lock()
        self._compiled: Any = None
        self._entry: tuple[int, Callable[[int], None]] | None = None
        functools.update_wrapper(self, function)

    @property
    def compiled(self) -> Any:
        """Numba's object for the compiled function."""
        with self._lock:
            if self._compiled is None:
                with _numba_cache() as writable:
                    self._compiled = numba.cfunc("void(voidptr)", cache=writable, **_OPTIONS)(self._function)
        return self._compiled

    def __call__(self, threads: int, *arguments: Any) -> None:
        """Run all parts of the kernel, on at most ``threads`` threads.

        Args:
            arguments: integers, and torch tensors or contiguous numpy arrays, in the order in which the kernel reads
                them. They live until it returns.
        """
        words = [0] * HEADER
        for argument in arguments:
            if type(argument) is int:
                words.append(argument)
            elif type(argument) is np.ndarray:
                words.append(argument.__array_interface__["data"][0])
            else:
                words.append(argument.data_ptr())
        address, entry = self._entry or self._load()
        if threads > 1 and (runtime := openmp()) is not None:
            parallel, words[0], words[1] = runtime
            block = array("q", words)  # by name: an address keeps nothing alive
            parallel(address, block.buffer_info()[0], threads, 0)
            return
        if threads <= 1:
            words[3] = 1
            block = array("q", words)
            entry(block.buffer_info()[0])
            return
        blocks = [array("q", [0, 0, number, threads, *words[HEADER:]]) for number in range(threads)]
        pool = _pool(os.getpid(), threads - 1)
        others = [pool.submit(entry, block.buffer_info()[0]) for block in blocks[1:]]
        entry(blocks[0].buffer_info()[0])
        for other in others:
            other.result()

    def _load(self) -> tuple[int, Callable[[int], None]]:
        address = self.compiled.address
        self._entry = address, _ENTRY(address)
        return self._entry


# By process: the threads of a parent do not exist in its fork.
@functools.cache
def _pool(process: int, workers: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(workers, thread_name_prefix="sparsetrain")


@functools.cache
def openmp() -> tuple[Callable[..., None], int, int] | None:
    """Return an OpenMP runtime of this process, torch's if there are several: its entry and two function addresses.

    GNU's runtime has the entry ``GOMP_parallel``; those of LLVM and Intel have it too. None where there is no runtime,
    or on a system that does not say what is loaded.
    """
    try:
        maps = Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    paths = dict.fromkeys(line.split(maxsplit=5)[5] for line in maps.splitlines() if "omp" in line and ".so" in line)
    for path in sorted(paths, key=lambda name: "/torch/" not in name):
        with suppress(OSError, AttributeError):
            library = ctypes.CDLL(path)
            addresses = [
                ctypes.cast(getattr(library, name), ctypes.c_void_p).value or 0
                for name in ("omp_get_thread_num", "omp_get_num_threads")
            ]
            entry = library.GOMP_parallel
            entry.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
            entry.restype = None
            return entry, addresses[0], addresses[1]
    return None
