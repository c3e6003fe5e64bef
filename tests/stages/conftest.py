"""What the tests of stages have in common."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from sparsetrain.runs.result import RunResult, finished


@pytest.fixture
def sparse(trained: Callable[..., Path], tmp_path: Path) -> RunResult:
    """A finished pre-training at 75 % sparsity, in a directory that belongs to the test."""
    done = finished(shutil.copytree(trained(), tmp_path / "sparse"))
    assert done is not None
    return done


@pytest.fixture(autouse=True)
def _no_threads_left() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)
