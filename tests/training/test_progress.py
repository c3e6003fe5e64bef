"""The progress of a run at 80 columns: no line is wider, none wraps, and the time left is always shown."""

from __future__ import annotations

import io
import re

import pytest
from rich.console import Console

from sparsetrain.data.display import Display
from sparsetrain.training.progress import ProgressBar

LONG = "density 0.25 (target 0.25)  R_s 0.31  overlap 0.92  noise scale 1234 (1000 to 1500)"


def shown(terminal: bool, title: str, width: int = 80) -> list[str]:
    """Return the lines that a run of 20,000 steps leaves on a console."""
    console = Console(file=io.StringIO(), width=width, force_terminal=terminal, color_system=None, legacy_windows=False)
    bar = ProgressBar(title, 20_000, console)
    bar.start()
    for step in (1, 10_000, 20_000):
        bar.update(step, 20_000, step / 20_000, 10.123, 2e-3, 123_400.0, 98.7e9, LONG)
        if terminal:
            bar.progress.refresh()
    bar.stop()
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "\n", console.file.getvalue())  # type: ignore[attr-defined]
    return [line for line in re.split(r"[\r\n]+", text) if line.strip()]


@pytest.mark.parametrize("title", ["pretrain s=0.75", "sparse-0.9375 finetune"])
def test_a_bar_fits_into_80_columns_with_its_time_left(title: str) -> None:
    lines = shown(True, title)
    assert lines
    assert max(map(len, lines)) <= 80
    for line in lines:
        assert line.startswith(title)
        assert "…" not in line
        assert re.search(r" \d+/20000 +(-:--:--|\d:\d\d:\d\d)", line)
    assert any("loss 10.123" in line for line in lines)
    assert any(LONG in line for line in shown(True, title, 250))


def test_lines_of_a_log_fit_into_80_columns_and_lose_nothing() -> None:
    lines = shown(False, "sparse-0.9375 finetune")
    assert max(map(len, lines)) <= 80
    assert len(shown(False, "sparse-0.9375 finetune", 250)) == 2  # the first step is no tenth of the run
    assert [line.startswith("    ") for line in lines].count(False) == 2
    whole = "  ".join(line.strip() for line in lines)
    assert whole == "  ".join(shown(False, "sparse-0.9375 finetune", 250))
    assert len(re.findall(r"ETA \d+s", whole)) == 2


def test_bars_of_a_preparation_fit_into_80_columns() -> None:
    console = Console(file=io.StringIO(), width=80, force_terminal=True, color_system=None)
    with Display(console, True) as display:
        report = display.task("near-duplicates")
        report(0.5)
        display._bars.refresh()
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "\n", console.file.getvalue())  # type: ignore[attr-defined]
    lines = [line for line in re.split(r"[\r\n]+", text) if "near" in line]
    assert max(map(len, lines)) <= 80
    assert re.search(r"near-duplicates .* 50% \d:\d\d:\d\d left (-:--:--|\d:\d\d:\d\d)", lines[-1])
