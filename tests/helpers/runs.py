"""Comparison of runs by their files, and events at a chosen loss of a run."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sparsetrain.models import Transformer
from sparsetrain.runs.checkpoint import load_checkpoint
from sparsetrain.runs.metrics import TIMED, read_metrics

CLOCKS = ("seconds", "step_seconds")
"""What differs in the state of two checkpoints of the same run."""


def records(directory: Path) -> list[dict[str, Any]]:
    """Return the metrics of a run without timings."""
    found = read_metrics(directory / "metrics.jsonl")
    return [{key: value for key, value in record.items() if key not in TIMED} for record in found]


def tensors(directory: Path) -> dict[str, Tensor]:
    """Return all tensors of the newest checkpoint; names of optimizer state have a prefix."""
    last = load_checkpoint(directory / "checkpoints")
    return {**last.model, **{f"optimizer {name}": value for name, value in last.optimizer.tensors.items()}}


def assert_same_run(one: Path, other: Path) -> None:
    assert records(one) == records(other)
    first, second = tensors(one), tensors(other)
    assert first.keys() == second.keys()
    assert [name for name in first if not torch.equal(first[name], second[name])] == []


def on_loss(monkeypatch: pytest.MonkeyPatch, call: int, act: Callable[[Tensor], Tensor]) -> None:
    """Apply ``act`` to the result of the ``call``-th training loss from now on."""
    true_forward, calls = Transformer.forward, 0

    def forward(self: Transformer, tokens: Tensor, targets: Tensor | None = None, *rest: Any) -> Tensor:
        nonlocal calls
        value = true_forward(self, tokens, targets, *rest)
        if targets is None:
            return value
        calls += 1
        return act(value) if calls == call else value

    monkeypatch.setattr(Transformer, "forward", forward)


def send(number: int) -> Callable[[Tensor], Tensor]:
    def act(value: Tensor) -> Tensor:
        os.kill(os.getpid(), number)
        return value

    return act


def stop_after(patch: pytest.MonkeyPatch, step: int, accumulation: int = 1) -> None:
    """Send SIGTERM to the run in the middle of update ``step``, after which it saves and ends."""
    on_loss(patch, (step - 1) * accumulation + 1, send(signal.SIGTERM))
