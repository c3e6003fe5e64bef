"""The backend ``masked``: any pattern on any device, by dense products."""

from __future__ import annotations

import functools
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

from sparsetrain.sparsity.cpu_backend import enough
from sparsetrain.sparsity.ops import Backend
from sparsetrain.sparsity.pattern import SparsityPattern

_SMALL = 1 << 14  # elements of a matrix for which calling a kernel of ours takes longer than torch's indexing


@functools.cache
def _kernels() -> ModuleType:
    # When the first large matrix is spread: importing the library is not to import a compiler.
    from sparsetrain.kernels import spread

    return spread


class MaskedBackend(Backend):
    """Writes the values into a dense matrix and computes densely: right on every device, and saves no time.

    The dense matrix is kept for the backward pass, which costs the memory of the dense layer and no more.
    """

    name = "masked"

    def matmul(self, x: Tensor, values: Tensor, pattern: SparsityPattern) -> Tensor:
        return F.linear(x, _spread(values, pattern))

    def matmul_t(self, g: Tensor, values: Tensor, pattern: SparsityPattern) -> Tensor:
        return g @ _spread(values, pattern)

    def sampled(self, g: Tensor, x: Tensor, pattern: SparsityPattern) -> Tensor:
        return _collect(g.t() @ x, pattern)

    def forward(self, x: Tensor, values: Tensor, pattern: SparsityPattern, keep: bool) -> tuple[Tensor, Tensor]:
        dense = _spread(values, pattern)
        return F.linear(x, dense), dense if keep else x.new_empty(0)

    def kept(self, x: Tensor, pattern: SparsityPattern) -> Tensor:
        return x.new_empty(pattern.shape)

    def backward(
        self,
        g: Tensor,
        x: Tensor,
        values: Tensor,
        kept: Tensor,
        pattern: SparsityPattern,
        need_x: bool,
        need_values: bool,
    ) -> tuple[Tensor, Tensor]:
        return (
            g @ kept if need_x else g.new_empty(0),
            self.sampled(g, x, pattern) if need_values else values.new_empty(0),
        )


def _by_kernel(values: Tensor, pattern: SparsityPattern) -> bool:
    """Whether a kernel moves such values; else the pattern does, by positions that are kept: 8 bytes a nonzero."""
    on_cpu = values.device.type == pattern.device.type == "cpu"
    if on_cpu and values.itemsize in (2, 4) and pattern.shape[0] * pattern.shape[1] >= _SMALL:
        return True
    pattern.keep_positions()
    return False


def _spread(values: Tensor, pattern: SparsityPattern) -> Tensor:
    """Return what `SparsityPattern.scatter` does, without a graph."""
    if not _by_kernel(values, pattern):
        return pattern.scatter(values)
    kernel = _kernels().spread if values.itemsize == 4 else _kernels().spread16
    dense = values.new_empty(pattern.shape)
    kernel(_threads(pattern), values.contiguous(), dense, *_indices(pattern))
    return dense


def _collect(dense: Tensor, pattern: SparsityPattern) -> Tensor:
    """Return what `SparsityPattern.gather` does, without a graph."""
    if not _by_kernel(dense, pattern):
        return pattern.gather(dense)
    kernel = _kernels().collect if dense.itemsize == 4 else _kernels().collect16
    values = dense.new_empty(pattern.nnz)
    kernel(_threads(pattern), dense.contiguous(), values, *_indices(pattern))
    return values


def _threads(pattern: SparsityPattern) -> int:
    return enough(torch.get_num_threads(), pattern.shape[0] * pattern.shape[1])


def _indices(pattern: SparsityPattern) -> tuple[Tensor, Tensor, int, int, int, int]:
    return pattern.row_ptr, pattern.col, pattern.shape[0] // pattern.block[0], pattern.shape[1], *pattern.block
