"""Fixtures for the tests of stages."""

from __future__ import annotations

import io
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from sparsetrain.runs.result import RunResult, finished
from sparsetrain.stages import PretrainConfig, pretrain

Configure = Callable[..., Any]
Phases = list[dict[str, Any]]
Train = Callable[..., RunResult]


@pytest.fixture
def tiny(configure: Configure) -> Configure:
    """Return the configuration of a very small run: ``tiny(phases, {"schedule": ...}, run_dir=...)``."""

    def make(
        phases: Phases | None, changes: dict[str, Any] | None = None, kind: type = PretrainConfig, **top: Any
    ) -> Any:
        given = {
            "model": {"d_model": 16, "n_layers": 1, "n_heads": 2, "max_context": 32},
            "data.context": 16,
            "budget": {"steps": 12, "batch_size": 4},
            "loop.checkpoint_every": 0,
            **(changes or {}),
        }
        if phases is not None:
            in_tokens = any("tokens" in phase for phase in phases)
            length = {name: value for name, value in given["budget"].items() if not (in_tokens and name == "steps")}
            given["budget"] = {**length, "phases": phases}
        return configure(kind, given, **top)

    return make


@pytest.fixture
def train(tiny: Configure, tmp_path: Path) -> Train:
    """Train a very small run in the folder ``name``: ``train(name, phases, changes)``."""
    return lambda name, *settings: pretrain(tiny(*settings, run_dir=tmp_path / name), Console(file=io.StringIO()))


@pytest.fixture
def sparse(trained: Callable[..., Path], tmp_path: Path) -> RunResult:
    """A finished pre-training at 75 % sparsity, in a directory of the test's own."""
    done = finished(shutil.copytree(trained(), tmp_path / "sparse"))
    assert done is not None
    return done


@pytest.fixture(autouse=True)
def _no_threads_left() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)
