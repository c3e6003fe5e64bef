"""The progress display: a bar on a terminal, or about ten lines in a log file."""

from __future__ import annotations

import time
from collections.abc import Sequence

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from sparsetrain.screen import say

LINES_PER_RUN = 10
_BAR, _NARROW_BAR = 24, 10  # columns of the bar, on a wide terminal and on one of less than `_WIDE` columns
_WIDE = 110
_LEFT = len("0:00:00")


class ProgressBar:
    """Shows steps, time left, loss, learning rate, tokens per second and model FLOP/s of one run.

    On a terminal it is a live bar; otherwise it prints about ten lines per run. Neither is wider than the console: a
    bar leaves out the last numbers that do not fit, and a line continues in the next one, which is indented.
    """

    def __init__(self, title: str, total: int, console: Console) -> None:
        self.title, self.total, self.console = title, total, console
        self.live = console.is_terminal
        self.started: float | None = None
        self.first_share = 0.0
        self.printed = 0
        self.more = ""
        self.bar = _BAR if console.width >= _WIDE else _NARROW_BAR
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=self.bar),
            TextColumn("{task.fields[steps]}"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[numbers]}"),
            console=console,
            transient=True,
        )
        self.task = self.progress.add_task(title, total=1.0, numbers="", steps=f"0/{total}")

    def start(self) -> None:
        """Show the bar if the output is a terminal."""
        if self.live:
            self.progress.start()

    def stop(self) -> None:
        """Remove the bar."""
        if self.live:
            self.progress.stop()

    def update(
        self,
        step: int,
        total: int,
        share: float,
        loss: float,
        lr: float,
        tokens_per_second: float,
        flops_per_second: float,
        more: str = "",
    ) -> None:
        """Show the state after ``step`` of ``total`` steps.

        The time left follows from the share of the tokens, since a step may have more of them than another.

        Args:
            share: of the run's tokens that was seen, in [0, 1].
            more: a text that stays until the next one.
        """
        self.total = total
        self.more = more or self.more
        speed = (f"{tokens_per_second / 1e3:.1f}k tok/s", f"{flops_per_second / 1e9:.1f} GFLOP/s")
        parts = [f"loss {loss:.3f}", f"lr {lr:.1e}", *speed, *filter(None, self.more.split("  "))]
        if self.live:
            taken = len(self.title) + self.bar + len(f"{step}/{total}") + _LEFT
            numbers = _rows(parts, self.console.width - taken - len("    "))[0]  # a space between columns
            self.progress.update(self.task, completed=share, numbers=numbers, steps=f"{step}/{total}")
            return
        now = time.monotonic()
        if self.started is None:
            self.started, self.first_share = now, share
        due = int(share * LINES_PER_RUN)
        if due > self.printed or step == self.total:
            self.printed = due
            done = share - self.first_share
            left = (now - self.started) / done * (1.0 - share) if done else 0.0
            first = f"{self.title}  {step}/{self.total}"
            for row in _rows([first, *parts, f"ETA {left:.0f}s"], self.console.width, " " * 4):
                say(self.console, row)


def _rows(parts: Sequence[str], width: int, indent: str = "") -> list[str]:
    """Return ``parts`` as rows of at most ``width`` columns, the first without the indent; a part stays whole."""
    rows = [parts[0]]
    for part in parts[1:]:
        if len(rows[-1]) + len("  ") + len(part) <= width:
            rows[-1] += f"  {part}"
        else:
            rows.append(f"{indent}{part}")
    return rows
