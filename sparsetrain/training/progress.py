"""The progress display: a bar on a terminal, or about ten lines in a log file."""

from __future__ import annotations

import time

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

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
        self.first_share = 0.0
        self.printed = 0
        self.more = ""
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
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
        numbers = (
            f"loss {loss:.3f}  lr {lr:.1e}  {tokens_per_second / 1e3:.1f}k tok/s  {flops_per_second / 1e9:.1f} GFLOP/s"
            + (f"  {self.more}" if self.more else "")
        )
        if self.live:
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
            say(self.console, f"{self.title}  {step}/{self.total}  {numbers}  ETA {left:.0f}s")
