"""Available memory, from files in the formats of Linux."""

from __future__ import annotations

import os
import resource
from pathlib import Path

import pytest
import torch
from fresh import Fresh

from sparsetrain.cost.available import Available, available_memory

GIB = 1 << 30


def tree(root: Path, files: dict[str, str]) -> Path:
    """Write a few files of ``/proc`` and ``/sys`` below ``root`` and return it."""
    for name, text in {"proc/meminfo": f"MemTotal: 99 kB\nMemAvailable: {64 * GIB >> 10} kB\n", **files}.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def test_the_machine_says_what_it_has(tmp_path: Path) -> None:
    """Without limits, ``MemAvailable`` counts."""
    assert available_memory(root=tree(tmp_path, {})) == Available(64 * GIB, "available on this machine")


def test_a_machine_that_says_nothing_has_all_of_its_memory(tmp_path: Path) -> None:
    """Without ``/proc``, the pages of the machine are counted."""
    whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert available_memory(root=tmp_path).bytes == whole


@pytest.mark.parametrize("place", ["job/step", "job", ""])
def test_every_control_group_of_version_2_above_the_process_counts(place: str, tmp_path: Path) -> None:
    """The limit may be set at any level, ``max`` means no limit, and file cache counts as free."""
    group = "/".join(part for part in ("sys/fs/cgroup", place) if part)
    files = {
        "proc/self/cgroup": "0::/job/step\n",
        "sys/fs/cgroup/job/step/memory.max": "max\n",
        "sys/fs/cgroup/job/step/memory.current": "5\n",
        f"{group}/memory.max": f"{8 * GIB}\n",
        f"{group}/memory.current": f"{5 * GIB}\n",
        f"{group}/memory.stat": f"anon {3 * GIB}\ninactive_file {GIB}\nactive_file {GIB}\n",
    }
    assert available_memory(root=tree(tmp_path, files)) == Available(5 * GIB, "left of the control group's limit")


def test_a_control_group_of_version_1_counts_beside_others(tmp_path: Path) -> None:
    """The memory controller is found among other controllers; a container sees its group as the root of the mount."""
    files = {
        "proc/self/cgroup": "9:cpu,cpuacct:/x\n4:memory:/docker/abc\n0::/\n",
        "sys/fs/cgroup/memory/memory.limit_in_bytes": f"{4 * GIB}\n",
        "sys/fs/cgroup/memory/memory.usage_in_bytes": f"{3 * GIB}\n",
        "sys/fs/cgroup/memory/memory.stat": f"inactive_file 0\ntotal_inactive_file {GIB}\n",
    }
    assert available_memory(root=tree(tmp_path, files)).bytes == 2 * GIB
    (tmp_path / "sys/fs/cgroup/memory/memory.limit_in_bytes").write_text("9223372036854771712\n")
    assert available_memory(root=tmp_path).bytes == 64 * GIB


def test_what_is_read_here_is_what_the_machine_has() -> None:
    """The answer is above zero and at most all of the memory."""
    found = available_memory(torch.device("cpu"))
    assert 0 < found.bytes <= os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="the system does not tell the size of a process")
def test_a_limit_of_the_address_space_counts_less_what_is_used(fresh: Fresh) -> None:
    """Under RLIMIT_AS, `mmap` succeeds just below the answer and fails just above it."""
    code = (
        "import mmap, resource; from sparsetrain.cost.available import available_memory as left\n"
        f"resource.setrlimit(resource.RLIMIT_AS, ({12 * GIB}, {12 * GIB}))\n"
        "found = left(); print(found.limit); size = found.bytes; mmap.mmap(-1, size - (64 << 20)).close()\n"
        "try: mmap.mmap(-1, size + (64 << 20))\n"
        "except OSError: print('refused')"
    )
    done = fresh.run(code)
    if "available on" in done.stdout or "control group" in done.stdout:
        pytest.skip("there is less memory here than the limit")
    assert done.stdout.split("\n")[:2] == ["left of RLIMIT_AS", "refused"], done.stderr


def test_this_process_has_no_limit_that_was_not_set() -> None:
    """An unlimited address space adds no limit."""
    if resource.getrlimit(resource.RLIMIT_AS)[0] == resource.RLIM_INFINITY:
        assert "RLIMIT_AS" not in available_memory().limit
