"""How a compiled kernel runs on several threads: those of torch's OpenMP runtime, or plain ones where there is none.

Threads of our own would have to share the cores with torch's, which spin for milliseconds after each parallel
operation.
"""

from __future__ import annotations

import ctypes
import functools
import os
from array import array
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

from sparsetrain.kernels.simd.arguments import HEADER

Entry = Callable[[int], None]  # takes the address of words
_ENTRY = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


def entry_at(address: int) -> Entry:
    """Return the compiled function at an address as a function of Python's; it runs without the interpreter's lock."""
    return _ENTRY(address)


def run(address: int, entry: Entry, words: array[int], threads: int) -> None:
    """Run a kernel on at most ``threads`` threads, and return when all are done.

    Args:
        address, entry: of the compiled function, and the function itself.
        words: its arguments behind a `HEADER`, which is written here.
    """
    if threads <= 1:
        entry(words.buffer_info()[0])
        return
    if (runtime := openmp()) is not None:
        parallel, words[0], words[1] = runtime
        parallel(address, words.buffer_info()[0], threads, 0)
        return
    blocks = [array("q", [0, 0, thread, threads, *words[HEADER:]]) for thread in range(threads)]
    pool = _pool(os.getpid(), threads - 1)
    others = [pool.submit(entry, block.buffer_info()[0]) for block in blocks[1:]]
    entry(blocks[0].buffer_info()[0])
    for other in others:
        other.result()


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
