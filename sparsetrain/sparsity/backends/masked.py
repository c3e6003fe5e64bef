"""The backend ``masked``: any pattern on any device, by dense products."""

from __future__ import annotations

import functools
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

from sparsetrain.sparsity.backends.base import Backend, register_backend
from sparsetrain.sparsity.backends.cpu import enough
from sparsetrain.sparsity.patterns.pattern import SparsityPattern

_SMALL = 1 << 14  # in a matrix of fewer elements torch's indexing is faster than a call of a kernel


@functools.cache
def _kernels() -> ModuleType:
    # Imported late: importing the library must not import a compiler.
    from sparsetrain.kernels import scatter

    return scatter


@register_backend("masked")
class MaskedBackend(Backend):
    """Writes the values into a dense matrix and computes densely: right on every device, and saves no time.

    The dense matrix is kept for the backward pass, which costs the memory of the dense layer and no more.
    """

    def matmul(self, x: Tensor, values: Tensor, pattern: SparsityPattern) -> Tensor:
        return F.linear(x, scattered(values, pattern))

    def matmul_t(self, g: Tensor, values: Tensor, pattern: SparsityPattern) -> Tensor:
        return g @ scattered(values, pattern)

    def sampled(self, g: Tensor, x: Tensor, pattern: SparsityPattern) -> Tensor:
        return _gathered(g.t() @ x, pattern)

    def forward(self, x: Tensor, values: Tensor, pattern: SparsityPattern, keep: bool) -> tuple[Tensor, Tensor]:
        dense = scattered(values, pattern)
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
    """Return whether a kernel moves such values; if not, torch does, by positions that take 8 bytes a nonzero."""
    on_cpu = values.device.type == pattern.device.type == "cpu"
    return on_cpu and values.itemsize in (2, 4) and pattern.shape[0] * pattern.shape[1] >= _SMALL


def scattered(values: Tensor, pattern: SparsityPattern) -> Tensor:
    """Return what `SparsityPattern.scatter` does, without a graph."""
    if _by_kernel(values, pattern):
        return _moved("scatter", "values", values, values.new_empty(pattern.shape), pattern)
    pattern.keep_positions()
    return pattern.scatter(values)


def _gathered(dense: Tensor, pattern: SparsityPattern) -> Tensor:
    """Return what `SparsityPattern.gather` does, without a graph."""
    if _by_kernel(dense, pattern):
        return _moved("gather", "dense", dense, dense.new_empty(pattern.nnz), pattern)
    pattern.keep_positions()
    return pattern.gather(dense)


def _moved(name: str, source: str, given: Tensor, target: Tensor, pattern: SparsityPattern) -> Tensor:
    """Return ``target`` after the kernel ``name`` has filled it from ``given``, its argument ``source``."""
    (rows, columns), (bh, bw) = pattern.shape, pattern.block
    row_ptr, col = _indices(pattern)
    kernel = getattr(_kernels(), name if given.itemsize == 4 else f"{name}16")
    arrays = {source: given.contiguous(), "dense" if source == "values" else "values": target}
    kernel(
        enough(torch.get_num_threads(), rows * columns),
        row_ptr=row_ptr,
        col=col,
        rows=rows // bh,
        columns=columns,
        bh=bh,
        bw=bw,
        blocks=len(col),
        **arrays,
    )
    return target


def _indices(pattern: SparsityPattern) -> tuple[Tensor, Tensor]:
    """Return copies of row_ptr and col that nobody can write into while a kernel reads them: 4 bytes a nonzero."""
    return pattern.derived("copied", lambda: (pattern.row_ptr.clone(), pattern.col.clone()))
