"""A sparse layer for tests, and a check that two modules compute the same."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from sparsetrain.sparsity import SparseLinear

K, M = 16, 12


def layer(density: float = 0.4, seed: int = 0, **options: Any) -> SparseLinear:
    return SparseLinear(K, M, density=density, seed=seed, **options)


def assert_same_function(a: nn.Module, b: nn.Module, width: int = K) -> None:
    x = torch.randn(5, width)
    assert torch.equal(a(x), b(x))
