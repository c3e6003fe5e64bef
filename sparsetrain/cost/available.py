"""The memory that a process can still allocate: on the machine, in its control group, under its limits, or on a GPU.

Swap does not count. A training step touches all of its memory, so a step that swaps is slower by orders of magnitude.
"""

from __future__ import annotations

import os
import resource
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

_NO_LIMIT = 1 << 60  # control groups of version 1 write about 2^63 where there is no limit


@dataclass(frozen=True)
class Available:
    """The bytes that this process can still allocate, and the name of the limit."""

    bytes: int
    limit: str


def available_memory(device: torch.device | None = None, root: Path = Path("/")) -> Available:
    """Return the available memory under the tightest limit.

    On a CPU, the limits are ``MemAvailable`` of the machine (all of its memory if the system does not report it), the
    control groups of the process (versions 1 and 2, every level; file cache counts as free), ``RLIMIT_AS`` and
    ``RLIMIT_DATA``. On a GPU, the available memory is the driver's free memory plus memory that torch reserved but does
    not use.

    Args:
        device: None is the CPU.
        root: root of the file system with ``proc`` and ``sys``.
    """
    if device is not None and device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return Available(free + unused, "free on the GPU")
    found = [_machine(root), *_control_groups(root), *_limits(root)]
    return min(found, key=lambda entry: entry.bytes)


def _machine(root: Path) -> Available:
    for line in _read(root / "proc/meminfo").splitlines():
        name, _, value = line.partition(":")
        if name == "MemAvailable":
            return Available(int(value.split()[0]) * 1024, "available on this machine")
    return Available(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), "the memory of this machine")


def _control_groups(root: Path) -> Iterator[Available]:
    """Yield the memory left in each control group of the process. A container may see its own group as the root."""
    for line in _read(root / "proc/self/cgroup").splitlines():
        parts = line.split(":", 2)
        if len(parts) < 3 or (parts[1] and "memory" not in parts[1].split(",")):
            continue
        first = bool(parts[1])  # version 1 names the controller, version 2 does not
        mount = root / ("sys/fs/cgroup/memory" if first else "sys/fs/cgroup")
        names = ("memory.limit_in_bytes", "memory.usage_in_bytes") if first else ("memory.max", "memory.current")
        place = mount / parts[2].lstrip("/")
        for group in (place, *place.parents):
            most, used = (_number(_read(group / name)) for name in names)
            if most is not None and used is not None and most < _NO_LIMIT:
                yield Available(max(0, most - max(0, used - _cache(group))), "left of the control group's limit")
            if group == mount:
                break


def _cache(group: Path) -> int:
    """Return the bytes of file cache that count as used by a control group, although the kernel can drop them."""
    counts = dict.fromkeys(("inactive_file", "active_file", "total_inactive_file", "total_active_file"), 0)
    for line in _read(group / "memory.stat").splitlines():
        name, _, value = line.partition(" ")
        if name in counts:
            counts[name] = _number(value) or 0
    # Version 1 has separate totals that include the groups below; in version 2 every count includes them.
    return max(
        counts["inactive_file"] + counts["active_file"], counts["total_inactive_file"] + counts["total_active_file"]
    )


def _limits(root: Path) -> Iterator[Available]:
    sizes = [_number(word) for word in _read(root / "proc/self/statm").split()]
    page = os.sysconf("SC_PAGE_SIZE")
    # Pages of the whole address space, and of data and stack.
    for name, kind, place in (("RLIMIT_AS", resource.RLIMIT_AS, 0), ("RLIMIT_DATA", resource.RLIMIT_DATA, 5)):
        soft, _ = resource.getrlimit(kind)
        if soft != resource.RLIM_INFINITY:
            used = (sizes[place] or 0) * page if place < len(sizes) else 0
            yield Available(max(0, soft - used), f"left of {name}")


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError:  # not on this system, or not for this process
        return ""


def _number(text: str) -> int | None:
    text = text.strip()
    return int(text) if text.isdecimal() else None
