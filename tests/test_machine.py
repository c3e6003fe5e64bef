"""The description of the processor, against listings of Linux and against other libraries on this machine."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from pathlib import Path

import pytest

from sparsetrain import machine
from sparsetrain.machine import Processor, machine_key, processor

X86 = """processor\t: 0
vendor_id\t: AuthenticAMD
cpu family\t: 25
model\t\t: 17
model name\t: AMD EPYC 9R14
stepping\t: 1
flags\t\t: fpu sse2 avx2 fma
bugs\t\t: sysret_ss_attrs

processor\t: 1
vendor_id\t: another
"""
ARM = """processor\t: 0
BogoMIPS\t: 2100.00
Features\t: fp asimd sve
CPU implementer\t: 0x41
"""


@pytest.fixture
def listing(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """Forget the processor before and after the test."""
    processor.cache_clear()
    yield monkeypatch
    monkeypatch.undo()
    processor.cache_clear()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (X86, Processor("AMD EPYC 9R14", "AuthenticAMD", "25", "17", "1", frozenset({"fpu", "sse2", "avx2", "fma"}))),
        (ARM, Processor(flags=frozenset({"fp", "asimd", "sve"}))),
        ("", Processor()),
        (None, Processor()),
    ],
)
def test_the_first_processor_of_a_listing(
    text: str | None, expected: Processor, listing: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    place = tmp_path / "cpuinfo"
    if text is not None:
        place.write_text(text)
    listing.setattr(machine, "Path", lambda name: place if name == "/proc/cpuinfo" else Path(name))
    assert processor() == expected
    assert processor().label == (expected.name or platform.processor() or platform.machine())


def test_the_key_of_a_machine_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    # A measured table is found under it again.
    monkeypatch.setattr(machine, "processor", lambda: Processor("A processor", flags=frozenset({"fma", "avx2"})))
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    assert machine_key() == "93b60545"


def test_the_system_and_the_compiler_agree() -> None:
    features = machine.target_features().split(",")
    for name in ("avx2", "fma", "avx512f"):  # only an x86 has them
        assert (name in processor().flags) <= (f"+{name}" in features)
    assert 1 <= machine.available_cores() <= machine.core_count()
