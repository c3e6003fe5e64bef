"""A small sparse product: its pattern and tensors, the operator's arguments, and the dense product for comparison."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sparsetrain.sparsity import SparsityPattern, sparse_linear
from sparsetrain.sparsity.backends import layouts

K, M = 12, 10


def pattern_of(rows: int = M, columns: int = K, density: float = 0.4, seed: int = 0) -> SparsityPattern:
    mask = torch.rand(rows, columns, generator=torch.Generator().manual_seed(seed)) < density
    mask[0, 0] = True
    return SparsityPattern.from_mask(mask)


def inputs(pattern: SparsityPattern, *leading: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    """x, values and bias, which require gradients, and a gradient of the output."""
    rows, columns = pattern.shape
    made = [torch.randn(*shape, dtype=dtype) for shape in ((*leading, columns), (pattern.nnz,), (rows,))]
    g = torch.randn(*leading, rows, dtype=dtype).to(pattern.device)
    return *(tensor.to(pattern.device).requires_grad_() for tensor in made), g


def assert_matches_dense(pattern: SparsityPattern, x: Tensor, values: Tensor, bias: Tensor | None, g: Tensor) -> None:
    wanted = [tensor for tensor in (x, values, bias) if tensor is not None]
    ours = sparse_linear(x, values, pattern, bias)
    theirs = F.linear(x, pattern.scatter(values), bias)
    torch.testing.assert_close(ours, theirs)
    for mine, other in zip(torch.autograd.grad(ours, wanted, g), torch.autograd.grad(theirs, wanted, g), strict=True):
        torch.testing.assert_close(mine, other)


def arguments(pattern: SparsityPattern, x: Tensor, values: Tensor, backend: str = "masked") -> tuple[Any, ...]:
    shape, block = list(pattern.shape), list(pattern.block)
    return x, values, pattern.row_ptr, pattern.col, shape, block, backend, layouts.layout_id(pattern), True
