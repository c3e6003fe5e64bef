"""The backend ``csr``: unstructured sparsity on a CPU, by the kernels of `sparsetrain.kernels.csr`."""

from __future__ import annotations

import functools
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sparsetrain.sparsity.backends.base import register_backend
from sparsetrain.sparsity.backends.cpu import (
    TILE,
    CpuBackend,
    enough,
    in_float32,
    nothing,
    pieces,
    scratch,
    with_whole_rows,
    workers,
)
from sparsetrain.sparsity.backends.few_tokens import MOST, MOST_BACKWARD, few_tokens, few_tokens_gradients
from sparsetrain.sparsity.patterns.pattern import SparsityPattern


class _Kernels(NamedTuple):
    by_example: ModuleType
    csr: ModuleType
    csr_layout: ModuleType


@functools.cache
def _kernels() -> _Kernels:
    # Imported late: importing the library must not import a compiler.
    from sparsetrain.kernels import by_example, csr, csr_layout

    return _Kernels(by_example, csr, csr_layout)


@register_backend("csr")
class CsrBackend(CpuBackend):
    """Multiplies by the nonzeros only: one FMA for each nonzero and token.

    The index structures derived from a pattern take 8 bytes a nonzero beside its own 4.
    """

    tuned_with = (1, 1)

    def unsuited(self, pattern: SparsityPattern) -> str | None:
        if pattern.block != (1, 1):
            return f"computes unstructured patterns; this one has blocks of {pattern.block[0]}x{pattern.block[1]}"
        return None

    def forward(self, x: Tensor, values: Tensor, pattern: SparsityPattern, keep: bool) -> tuple[Tensor, Tensor]:
        if 1 <= x.shape[0] <= MOST:
            return few_tokens(x, values, pattern), x.new_empty(0)
        csr, threads = _kernels().csr, workers(x.shape[0], pattern)
        tokens, (out_features, in_features) = x.shape[0], pattern.shape
        y = x.new_empty(tokens, out_features)
        layout = _layout(pattern)
        ordered, nonzeros = scratch(layout.stored), pattern.nnz
        few = enough(threads, nonzeros)
        csr.reorder_runs(few, values=in_float32(values), nonzeros=nonzeros, target=ordered, **layout.runs)
        multiply = csr.multiply if x.dtype == torch.float32 else csr.multiply_bfloat16
        multiply(
            threads,
            x=with_whole_rows(x),
            y=y,
            tokens=tokens,
            columns=in_features,
            rows=out_features,
            packed=scratch(threads, in_features + 1, TILE),
            values=ordered,
            scratch=scratch(threads, out_features, TILE),
            pieces=pieces(tokens, 1, threads),
            **layout.arguments,
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
        if 1 <= g.shape[0] <= MOST_BACKWARD:
            return few_tokens_gradients(g, x, values, pattern, need_x, need_values)
        csr, threads, rows = _kernels().csr, workers(g.shape[0], pattern), with_whole_rows(g)
        tokens, (out_features, in_features) = g.shape[0], pattern.shape
        grad_x = g.new_empty(tokens, in_features) if need_x else g.new_empty(0)
        layout = turned = _layout(pattern)
        ordered = sums = scratch(0)
        if need_x:
            turned = _turned(pattern)
            ordered, stored = scratch(turned.stored), turned.stored
            csr.reorder(
                enough(threads, stored),
                values=in_float32(values),
                nonzeros=pattern.nnz,
                order=turned.places,
                stored=stored,
                target=ordered,
            )
        if need_values:
            sums = scratch(threads, layout.stored)
        sharing = torch.empty(1, dtype=torch.int64, device="cpu")
        gradients = csr.gradients if g.dtype == torch.float32 else csr.gradients_bfloat16
        gradients(
            threads,
            g=rows,
            dx=grad_x if need_x else nothing(g.dtype),
            x=with_whole_rows(x.to(g.dtype)) if need_values else nothing(g.dtype),
            tokens=tokens,
            columns=in_features,
            rows=out_features,
            need_dx=int(need_x),
            need_values=int(need_values),
            g_packed=scratch(threads, csr.TOGETHER, out_features + 1, TILE),
            t_values=ordered,
            scratch=scratch(threads, csr.TOGETHER, in_features + 1, TILE),
            sums=sums,
            pieces=pieces(tokens, csr.TOGETHER, threads),
            sharing=sharing,
            **turned.turned_arguments,
            **layout.arguments,
        )
        if not need_values:
            return grad_x, values.new_empty(0)
        return grad_x, _total(sums, threads, sharing, pattern).to(values.dtype)

    def by_example(self, threads: int, pattern: SparsityPattern, **arguments: Any) -> Tensor:
        csr, kernels, layout = _kernels().csr, _kernels().by_example, _layout(pattern)
        gradients = kernels.csr_gradients if arguments["g"].dtype == torch.float32 else kernels.csr_gradients_bfloat16
        sums = scratch(threads, layout.stored)
        gradients(
            threads,
            g_packed=scratch(threads, csr.TOGETHER, arguments["rows"] + 1, TILE),
            x_packed=scratch(threads, csr.TOGETHER, arguments["columns"] + 1, TILE),
            part=scratch(threads, layout.stored),
            sums=sums,
            **arguments,
            **layout.arguments,
        )
        return _total(sums, threads, arguments["sharing"], pattern)


def _total(sums: Tensor, threads: int, sharing: Tensor, pattern: SparsityPattern) -> Tensor:
    """Return the sum of the threads' shares of a gradient, in the order of the pattern, float32 ``[nnz]``."""
    total, nonzeros = scratch(pattern.nnz), pattern.nnz
    _kernels().csr.add_shares(
        enough(threads, nonzeros),
        sums=sums,
        shares=threads,
        sharing=sharing,
        target=total,
        nonzeros=nonzeros,
        **_layout(pattern).runs,
    )
    return total


def _layout(pattern: SparsityPattern) -> Any:
    def build() -> Any:
        return _kernels().csr_layout.build_layout(pattern.row_ptr.numpy(), pattern.col.numpy(), pattern.shape[1])

    return pattern.derived("csr", build)


def _turned(pattern: SparsityPattern) -> Any:
    def build() -> Any:
        return _kernels().csr_layout.build_transposed(pattern.row_ptr.numpy(), pattern.col.numpy(), pattern.shape[1])

    return pattern.derived("csr_transposed", build)
