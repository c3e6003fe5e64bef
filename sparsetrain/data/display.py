"""Progress bars of slow preparations, such as a corpus: one bar per step, with the time that is left."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

Report = Callable[[float], None]


class Display:
    """One progress bar per step, shown only if enabled and on a terminal."""

    def __init__(self, console: Console, enabled: bool) -> None:
        from rich.progress import (  # slow to import
            BarColumn,
            Progress,
            TaskProgressColumn,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )

        columns = (TextColumn("{task.description:>16}"), BarColumn(24), TaskProgressColumn(), TimeElapsedColumn())
        # The steps take an even time per byte, so the mean speed of the last minutes tells how long the rest takes.
        left = (TextColumn("left"), TimeRemainingColumn())
        shown = enabled and console.is_terminal
        self._bars = Progress(
            *columns, *left, console=console, disable=not shown, transient=True, speed_estimate_period=120
        )

    def __enter__(self) -> Display:
        self._bars.start()
        return self

    def __exit__(self, *details: object) -> None:
        self._bars.stop()

    def task(self, name: str) -> Report:
        """Add a bar and return a function that sets it to a share from 0 to 1."""
        bar = self._bars.add_task(name, total=None)
        return lambda share: self._bars.update(bar, total=1.0, completed=share)
