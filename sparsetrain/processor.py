"""Information about the processor from the operating system."""

from __future__ import annotations

import functools
from pathlib import Path


@functools.cache
def cpuinfo() -> dict[str, str]:
    """Return the first processor's entries in ``/proc/cpuinfo`` (``model name``, ``flags``, ...); empty without it."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").split("\n\n")[0]
    except OSError:
        return {}
    pairs = (line.split(":", 1) for line in text.splitlines() if ":" in line)
    return {key.strip(): value.strip() for key, value in pairs}


def cpu_flags() -> set[str]:
    """Return the names of the processor's instruction sets and other features, as Linux spells them."""
    info = cpuinfo()
    return set(info.get("flags", info.get("Features", "")).split())
