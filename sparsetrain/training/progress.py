"""The progress display: a bar on a terminal, or about ten lines in a log file."""

from __future__ import annotations

import time

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from sparsetrain.screen import say

LINES_PER_RUN = 10


class ProgressBar:
    """Shows steps, time left, loss, learning rate, tokens per second and model FLOP/s of one run.

    On a terminal it is a live bar; otherwise it prints about ten lines per run.
    """

    def __init__(self, title: str, total: int, console: Console) -> None:
        self.title, self.total, self.console = title, total, console
        self.live = console.is_terminal
        self.started: float | None = None
        self.first_step = 0
        self.printed = 0
        self.more = ""
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[numbers]}"),
            console=console,
            transient=True,
        )
        self.task = self.progress.add_task(title, total=total, numbers="")

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
        loss: float,
        lr: float,
        tokens_per_second: float,
        flops_per_second: float,
        more: str = "",
    ) -> None:
        """Show the state after ``step`` steps; the text ``more`` stays until the next one."""
        self.more = more or self.more
        numbers = (
            f"loss {loss:.3f}  lr {lr:.1e}  {tokens_per_second / 1e3:.1f}k tok/s  {flops_per_second / 1e9:.1f} GFLOP/s"
            + (f"  {self.more}" if self.more else "")
        )
        if self.live:
            self.progress.update(self.task, completed=step, numbers=numbers)
            return
        now = time.monotonic()
        if self.started is None:
            self.started, self.first_step = now, step
        due = step * LINES_PER_RUN // self.total
        if due > self.printed or step == self.total:
            self.printed = due
            done = step - self.first_step
            left = (now - self.started) / done * (self.total - step) if done else 0.0
            say(self.console, f"{self.title}  {step}/{self.total}  {numbers}  ETA {left:.0f}s")
