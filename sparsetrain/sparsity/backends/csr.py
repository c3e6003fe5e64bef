"""The backend ``csr``: unstructured sparsity on a CPU, by the kernels of `sparsetrain.kernels.csr`."""

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


class _Kernels(NamedTuple):
    csr: ModuleType
    layout: ModuleType


@functools.cache
def _kernels() -> _Kernels:
    # When the first sparse product is computed: importing the library is not to import a compiler.
    from sparsetrain.kernels import csr, layout

    return _Kernels(csr, layout)


class CsrBackend(CpuBackend):
    """Multiplies by the nonzeros only: one FMA an element of the weight.

    The index structures derived from a pattern take 8 bytes a nonzero beside its own 4.
    """

    name = "csr"

    def unsuited(self, pattern: SparsityPattern) -> str | None:
        if pattern.block != (1, 1):
            return f"computes unstructured patterns; this one has blocks of {pattern.block[0]}x{pattern.block[1]}"
        return None

    def forward(self, x: Tensor, values: Tensor, pattern: SparsityPattern, keep: bool) -> tuple[Tensor, Tensor]:
        csr, threads, rows = _kernels().csr, workers(x.shape[0], pattern), with_whole_rows(x)
        tokens, (out_features, in_features) = x.shape[0], pattern.shape
        y = x.new_empty(tokens, out_features)
        layout = _layout(pattern)
        ordered, plain = scratch(layout.stored), in_float32(values)
        few = enough(threads, pattern.nnz)
        csr.gather_runs(few, plain, layout.row_ptr, layout.ends, layout.chunks, out_features, ordered)
        multiply = csr.multiply if x.dtype == torch.float32 else csr.multiply_bfloat16
        multiply(
            threads,
            *(rows, y, rows.stride(0), out_features, tokens, in_features, out_features),
            *(scratch(threads, in_features + 1, TILE), *layout.words, ordered, scratch(threads, out_features, TILE)),
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
        csr, threads, rows = _kernels().csr, workers(g.shape[0], pattern), with_whole_rows(g)
        inputs = with_whole_rows(x.to(g.dtype)) if need_values else rows
        tokens, (out_features, in_features) = g.shape[0], pattern.shape
        grad_x = g.new_empty(tokens, in_features) if need_x else g.new_empty(0)
        layout = turned = _layout(pattern)
        ordered = sums = scratch(0)
        if need_x:
            turned = _turned(pattern)
            ordered, plain = scratch(turned.stored), in_float32(values)
            csr.gather(enough(threads, turned.stored), plain, turned.order, turned.stored, ordered)
        if need_values:
            sums = scratch(threads, layout.stored)
        lent = torch.empty(1, dtype=torch.int64, device="cpu")
        gradients = csr.gradients if g.dtype == torch.float32 else csr.gradients_bfloat16
        gradients(
            threads,
            *(rows, grad_x, inputs, rows.stride(0), in_features, inputs.stride(0), tokens, in_features, out_features),
            *(int(need_x), int(need_values), scratch(threads, csr.TOGETHER, out_features + 1, TILE)),
            *(*turned.words, ordered, scratch(threads, csr.TOGETHER, in_features + 1, TILE)),
            *(*layout.words, layout.stored, sums, pieces(tokens, csr.TOGETHER, threads), lent),
        )
        if not need_values:
            return grad_x, values.new_empty(0)
        grad_values = scratch(pattern.nnz)
        csr.add_parts(
            enough(threads, pattern.nnz),
            *(sums, lent, layout.stored, layout.row_ptr, layout.ends, layout.chunks, out_features, grad_values),
        )
        return grad_x, grad_values.to(values.dtype)


def _layout(pattern: SparsityPattern) -> Any:
    def build() -> Any:
        return _kernels().layout.build_layout(pattern.row_ptr.numpy(), pattern.col.numpy(), pattern.shape[1])

    return pattern.derived("csr", build)


def _turned(pattern: SparsityPattern) -> Any:
    def build() -> Any:
        return _kernels().layout.build_transposed(pattern.row_ptr.numpy(), pattern.col.numpy(), pattern.shape[1])

    return pattern.derived("csr_transposed", build)
