"""Descriptions of the machine and of the code that a measurement was made with."""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import sparsetrain
from sparsetrain.machine import available_cores, processor

# Packages of the library whose code affects a measurement.
_MEASURED = ("kernels", "sparsity", "models", "parameterization", "bench")
_PACKAGES = ("torch", "numba", "numpy", "scipy", "sparselab", "sparseprop")
_VECTOR_FLAGS = ("avx2", "fma", "avx512f", "avx512_bf16", "amx_bf16", "amx_tile", "asimd", "sve", "bf16")


def describe_machine() -> dict[str, Any]:
    """Return processor, cores, caches, memory and versions as plain values."""
    cpu = processor()
    numbers = {"cpu family": cpu.family, "model": cpu.model, "stepping": cpu.stepping}
    return {
        "processor": cpu.label,
        # The name alone may stand for a whole family of processors, especially on virtual machines.
        "family": " ".join(f"{name} {number}" for name, number in numbers.items() if number),
        "cores": available_cores(),
        "vector_flags": [flag for flag in _VECTOR_FLAGS if flag in cpu.flags],
        "native_bf16": bool(cpu.flags & {"avx512_bf16", "amx_bf16", "bf16"}),
        "caches": _caches(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "versions": {name: version for name in _PACKAGES if (version := _version(name))},
    }


def code_fingerprint() -> str:
    """Return 16 hexadecimal digits that identify the sources that affect a measurement."""
    root = Path(sparsetrain.__file__).parent
    digest = hashlib.blake2b(digest_size=8)
    for part in _MEASURED:
        for path in sorted((root / part).rglob("*.py")):
            digest.update(str(path.relative_to(root)).encode() + path.read_bytes())
    return digest.hexdigest()


@contextmanager
def with_threads(count: int) -> Iterator[None]:
    """Set torch, and every OpenMP runtime that a peer has loaded, to ``count`` threads inside the block."""
    before = torch.get_num_threads()
    _set_threads(count)
    try:
        yield
    finally:
        _set_threads(before)


def _set_threads(count: int) -> None:
    torch.set_num_threads(count)
    try:
        maps = Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return
    loaded = {line.split(maxsplit=5)[5] for line in maps.splitlines() if "omp" in line and ".so" in line}
    for path in loaded:
        with suppress(OSError, AttributeError):
            ctypes.CDLL(path).omp_set_num_threads(count)


def _caches() -> dict[str, str]:
    """Return the caches of the first core, as ``{"L1 Data": "32K", ...}``."""
    found = {}
    for index in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        with suppress(OSError):
            level, kind, size = ((index / name).read_text().strip() for name in ("level", "type", "size"))
            found[f"L{level} {kind}"] = size
    return found


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
