"""The backend ``bsr``: block patterns on a CPU, by the kernels of `sparsetrain.kernels.bsr`."""

from __future__ import annotations

import functools
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sparsetrain.sparsity.backends.cpu import (
    TILE,
    CpuBackend,
    enough,
    in_float32,
    pieces,
    scratch,
    with_whole_rows,
    workers,
)
from sparsetrain.sparsity.patterns.pattern import SparsityPattern

_MIN_BLOCK, _MAX_BLOCK = 4, 64  # those of the kernels, known without importing them


class _Kernels(NamedTuple):
    bsr: ModuleType
    blocks: ModuleType


@functools.cache
def _kernels() -> _Kernels:
    # When the first product is computed: importing the library is not to import a compiler.
    from sparsetrain.kernels import blocks, bsr

    return _Kernels(bsr, blocks)


class BsrBackend(CpuBackend):
    """Multiplies by the stored blocks only, four rows of a block at a time.

    What is derived from a pattern takes about 10 to 14 bytes a block; the values are read in place.
    """

    name = "bsr"

    def unsuited(self, pattern: SparsityPattern) -> str | None:
        if not all(_MIN_BLOCK <= side <= _MAX_BLOCK for side in pattern.block):
            sides = f"a side outside {_MIN_BLOCK} to {_MAX_BLOCK}"
            return f"computes block patterns; blocks of {pattern.block[0]}x{pattern.block[1]} have {sides}"
        return None

    def forward(self, x: Tensor, values: Tensor, pattern: SparsityPattern, keep: bool) -> tuple[Tensor, Tensor]:
        bsr, threads, rows = _kernels().bsr, workers(x.shape[0], pattern), with_whole_rows(x)
        tokens, (out_features, in_features) = x.shape[0], pattern.shape
        y = x.new_empty(tokens, out_features)
        blocks = _blocks(pattern)
        multiply = bsr.multiply if x.dtype == torch.float32 else bsr.multiply_bfloat16
        multiply(
            threads,
            *(rows, y, rows.stride(0), out_features, tokens, in_features, out_features),
            *(scratch(threads, in_features, TILE), blocks.height, blocks.width, blocks.panels, blocks.ends),
            *(blocks.index, in_float32(values), scratch(threads, bsr.PANEL, TILE)),
            pieces(tokens, 1, threads),
        )
        return y, x.new_empty(0)

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
        bsr, threads, rows = _kernels().bsr, workers(g.shape[0], pattern), with_whole_rows(g)
        inputs = with_whole_rows(x.to(g.dtype)) if need_values else rows
        tokens, (out_features, in_features) = g.shape[0], pattern.shape
        grad_x = g.new_empty(tokens, in_features) if need_x else g.new_empty(0)
        blocks = _blocks(pattern)
        # Without a gradient of the input the list of the transpose is not read, and so not built.
        turned = _turned(pattern) if need_x else blocks
        order = turned.index if turned.order is None else turned.order
        sums = scratch(threads, pattern.nnz) if need_values else scratch(0)
        lent = torch.empty(1, dtype=torch.int64, device="cpu")
        gradients = bsr.gradients if g.dtype == torch.float32 else bsr.gradients_bfloat16
        gradients(
            threads,
            *(rows, grad_x, inputs, rows.stride(0), in_features, inputs.stride(0), tokens, in_features, out_features),
            *(int(need_x), int(need_values), scratch(threads, 2, out_features, TILE), blocks.height, blocks.width),
            *(turned.panels, turned.ends, turned.index, order, in_float32(values), scratch(threads, bsr.PANEL, TILE)),
            *(scratch(threads, 2 * int(need_values), in_features, TILE), blocks.panels, blocks.ends),
            *(blocks.index, pattern.nnz, sums, pieces(tokens, 2, threads), lent),
        )
        if not need_values:
            return grad_x, values.new_empty(0)
        if threads == 1:
            return grad_x, sums[0].to(values.dtype)
        grad_values = scratch(pattern.nnz)
        bsr.add_parts(enough(threads, pattern.nnz), sums, lent, pattern.nnz, grad_values)
        return grad_x, grad_values.to(values.dtype)


def _blocks(pattern: SparsityPattern) -> Any:
    def build() -> Any:
        return _kernels().blocks.build_blocks(
            pattern.row_ptr.numpy(), pattern.col.numpy().copy(), pattern.shape, pattern.block
        )

    return pattern.derived("bsr", build)


def _turned(pattern: SparsityPattern) -> Any:
    def build() -> Any:
        return _kernels().blocks.build_turned(
            pattern.row_ptr.numpy(), pattern.col.numpy().copy(), pattern.shape, pattern.block
        )

    return pattern.derived("bsr_transposed", build)
