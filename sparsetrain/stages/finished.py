"""What a stage does with a run that was done before."""

from __future__ import annotations

from rich.console import Console

from sparsetrain.runs.result import RunResult
from sparsetrain.screen import say
from sparsetrain.training.state import Diverged


def skipped(done: RunResult, console: Console) -> RunResult:
    """Say that a run was done before and return its result.

    Raises:
        Diverged: that is how it ended, and how it would again.
    """
    if done.values.get("status") == "diverged":
        raise Diverged(f"{done.values.get('message')} (as recorded in {done.directory}; delete it to try again)")
    say(console, f"{done.values.get('stage', 'stage')}: already done in {done.directory}")
    return done
