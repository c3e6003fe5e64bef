"""The clock of a stage outside of its loop."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager


class Stopwatch:
    """Measures the time that a stage spends outside its loop; the loop has its own clock, which survives a resume."""

    def __init__(self) -> None:
        self._started = time.monotonic()
        self._inside = 0.0

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Do not count the time spent in the block."""
        before = time.monotonic()
        try:
            yield
        finally:
            self._inside += time.monotonic() - before

    def seconds(self) -> float:
        return time.monotonic() - self._started - self._inside
