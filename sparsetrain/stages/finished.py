"""Handling of a run that is already finished."""

from __future__ import annotations

from rich.console import Console

from sparsetrain.runs.result import RunResult
from sparsetrain.screen import say
from sparsetrain.training.state import Diverged


def skipped(done: RunResult, console: Console) -> RunResult:
    """Print that a run is already done and return its result.

    Raises:
        Diverged: the run ended by diverging, and would do so again.
    """
    if done.values.get("status") == "diverged":
        raise Diverged(f"{done.values.get('message')} (as recorded in {done.directory}; delete it to try again)")
    say(console, f"{done.values.get('stage', 'stage')}: already done in {done.directory}")
    return done
