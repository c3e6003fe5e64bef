"""What the tests of stages have in common."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from sparsetrain.stages import (
    PretrainConfig,
    RunResult,
    pretrain,
)

Configure = Callable[..., Any]


@pytest.fixture
def sparse(configure: Configure, tmp_path: Path, screen: Console) -> RunResult:
    """A finished pre-training at 75 % sparsity."""
    return pretrain(configure(PretrainConfig, run_dir=tmp_path / "sparse"), screen)


@pytest.fixture(autouse=True)
def _no_threads_left() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)
