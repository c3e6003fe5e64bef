"""The processor, as the system, torch and the compiler of the kernels describe it."""

from __future__ import annotations

import functools
import hashlib
import os
import platform
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Processor:
    """The first processor, as ``/proc/cpuinfo`` describes it; an unknown field is empty.

    Args:
        name: the name of the model. A virtual machine may give the name of a whole product line.
        vendor: ``AuthenticAMD``, ``GenuineIntel``, ...
        family: the vendor's number, as text.
        model: the vendor's number, as text.
        stepping: the vendor's number, as text.
        flags: the names of instruction sets and other features, as Linux writes them.
    """

    name: str = ""
    vendor: str = ""
    family: str = ""
    model: str = ""
    stepping: str = ""
    flags: frozenset[str] = frozenset()

    @property
    def label(self) -> str:
        """The name of the processor for a reader; the architecture if the system gives no name."""
        return self.name or platform.processor() or platform.machine()


@functools.cache
def processor() -> Processor:
    """Return the system's description of the processor."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").split("\n\n")[0]
    except OSError:
        return Processor()
    pairs = (line.split(":", 1) for line in text.splitlines() if ":" in line)
    info = {key.strip(): value.strip() for key, value in pairs}
    return Processor(
        name=info.get("model name", ""),
        vendor=info.get("vendor_id", ""),
        family=info.get("cpu family", ""),
        model=info.get("model", ""),
        stepping=info.get("stepping", ""),
        flags=frozenset(info.get("flags", info.get("Features", "")).split()),  # "Features" on ARM
    )


def core_count() -> int:
    """Return the number of hardware threads of the machine."""
    return os.cpu_count() or 1


def available_cores() -> int:
    """Return the number of hardware threads that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else core_count()


def machine_key() -> str:
    """Return eight hexadecimal digits that identify the processor and its number of cores, for stored timings."""
    text = f"{platform.machine()} {processor().name} {' '.join(sorted(processor().flags))} {core_count()}"
    return hashlib.blake2b(text.encode(), digest_size=4).hexdigest()


def torch_simd() -> str:
    """Return the vector instructions that torch uses: ``AVX512``, ``AVX2``, ``DEFAULT``, ..."""
    import torch  # imported here, since the kernels import this file and do not need torch

    return torch.backends.cpu.get_cpu_capability()


def target_name() -> str:
    """Return the name of the processor that kernels are compiled for, as LLVM writes it: ``znver4``, ``x86-64``, ..."""
    import numba  # slow to import
    from llvmlite import binding

    return str(numba.config.CPU_NAME or binding.get_host_cpu_name())


def target_features() -> str:
    """Return the features of the processor that kernels are compiled for, as LLVM writes them: ``+avx2,-sse4a,...``."""
    import numba
    from llvmlite import binding

    configured = numba.config.CPU_FEATURES
    return binding.get_host_cpu_features().flatten() if configured is None else configured
