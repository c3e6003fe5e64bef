"""Difficult conditions for kernels: many threads or too few, strides, and poisoned memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from sparsetrain.kernels.simd import threads as running
from sparsetrain.sparsity.backends import cpu as cpu_backend


def fill_with_poison(patch: pytest.MonkeyPatch) -> None:
    """Fill every uninitialised tensor with NaN, or with an integer that is far too large."""

    def poisoned(*shape: Any, **options: Any) -> Tensor:
        poison = 1 << 40 if options.get("dtype") == torch.int64 else torch.nan
        return torch.full(shape[0] if isinstance(shape[0], tuple) else shape, poison, **options)

    patch.setattr(torch, "empty", poisoned)
    patch.setattr(Tensor, "new_empty", lambda self, *shape, **options: poisoned(*shape, **options))


def strided(matrix: Tensor, row_step: int, column_step: int, before: int) -> Tensor:
    """Return an equal matrix inside a larger one, which is NaN everywhere else."""
    rows, columns = matrix.shape
    wide = torch.full((rows * row_step, before + columns * column_step), torch.nan, dtype=matrix.dtype)
    return wide[::row_step, before::column_step].copy_(matrix)


@contextmanager
def work_for_every_thread() -> Iterator[None]:
    """Let small products use all threads of torch."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu_backend, "A_THREAD", 1)
        patch.setattr(cpu_backend, "NONZEROS_A_THREAD", 1)
        yield


def lend_at_most(threads: int, patch: pytest.MonkeyPatch) -> list[int]:
    """Make the runtime give at most ``threads`` threads; return a list to which each request's number is appended."""
    asked_for: list[int] = []
    runtime = running.openmp()
    assert runtime is not None
    run, *addresses = runtime

    def scarce(address: int, block: int, asked: int, flags: int) -> None:
        asked_for.append(asked)
        run(address, block, min(asked, threads), flags)

    patch.setattr(running, "openmp", lambda: (scarce, *addresses))
    return asked_for
