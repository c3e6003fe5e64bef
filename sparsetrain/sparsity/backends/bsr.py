"""The backend ``bsr``: block patterns on a CPU, by the kernels of `sparsetrain.kernels.bsr`."""

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
from sparsetrain.sparsity.backends.few_tokens import MOST, few_tokens
from sparsetrain.sparsity.patterns.pattern import SparsityPattern

_MIN_BLOCK, _MAX_BLOCK = 4, 64  # as in the kernels, which would import a compiler


class _Kernels(NamedTuple):
    by_example: ModuleType
    bsr: ModuleType
    bsr_layout: ModuleType


@functools.cache
def _kernels() -> _Kernels:
    # Imported late: importing the library must not import a compiler.
    from sparsetrain.kernels import bsr, bsr_layout, by_example

    return _Kernels(by_example, bsr, bsr_layout)


@register_backend("bsr")
class BsrBackend(CpuBackend):
    """Multiplies by the stored blocks only, four rows of a block at a time.

    What is derived from a pattern takes about 10 to 14 bytes a block; the values are read in place.
    """

    tuned_with = (16, 16)

    def unsuited(self, pattern: SparsityPattern) -> str | None:
        if not all(_MIN_BLOCK <= side <= _MAX_BLOCK for side in pattern.block):
            sides = f"a side outside {_MIN_BLOCK} to {_MAX_BLOCK}"
            return f"computes block patterns; blocks of {pattern.block[0]}x{pattern.block[1]} have {sides}"
        return None

    def forward(self, x: Tensor, values: Tensor, pattern: SparsityPattern, keep: bool) -> tuple[Tensor, Tensor]:
        if 1 <= x.shape[0] <= MOST:
            return few_tokens(x, values, pattern), x.new_empty(0)
        bsr, threads = _kernels().bsr, workers(x.shape[0], pattern)
        tokens, (out_features, in_features) = x.shape[0], pattern.shape
        y = x.new_empty(tokens, out_features)
        multiply = bsr.multiply if x.dtype == torch.float32 else bsr.multiply_bfloat16
        multiply(
            threads,
            x=with_whole_rows(x),
            y=y,
            tokens=tokens,
            columns=in_features,
            rows=out_features,
            packed=scratch(threads, in_features, TILE),
            values=in_float32(values),
            scratch=scratch(threads, bsr.PANEL, TILE),
            pieces=pieces(tokens, 1, threads),
            **_blocks(pattern).arguments,
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
        tokens, (out_features, in_features), nonzeros = g.shape[0], pattern.shape, pattern.nnz
        grad_x = g.new_empty(tokens, in_features) if need_x else g.new_empty(0)
        blocks = _blocks(pattern)
        # Without a gradient of the input the blocks of the transpose are not read, so they are not built.
        turned = _turned(pattern) if need_x else blocks
        sums = scratch(threads, nonzeros) if need_values else scratch(0)
        sharing = torch.empty(1, dtype=torch.int64, device="cpu")
        gradients = bsr.gradients if g.dtype == torch.float32 else bsr.gradients_bfloat16
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
            g_packed=scratch(threads, 2, out_features, TILE),
            values=in_float32(values),
            scratch=scratch(threads, bsr.PANEL, TILE),
            x_packed=scratch(threads, 2 * int(need_values), in_features, TILE),
            sums=sums,
            pieces=pieces(tokens, 2, threads),
            sharing=sharing,
            **turned.turned_arguments,
            **blocks.arguments,
        )
        if not need_values:
            return grad_x, values.new_empty(0)
        return grad_x, _total(sums, threads, sharing).to(values.dtype)

    def by_example(self, threads: int, pattern: SparsityPattern, **arguments: Any) -> Tensor:
        kernels = _kernels().by_example
        gradients = kernels.bsr_gradients if arguments["g"].dtype == torch.float32 else kernels.bsr_gradients_bfloat16
        sums = scratch(threads, pattern.nnz)
        gradients(
            threads,
            g_packed=scratch(threads, 2, arguments["rows"], TILE),
            x_packed=scratch(threads, 2, arguments["columns"], TILE),
            part=scratch(threads, pattern.nnz),
            sums=sums,
            **arguments,
            **_blocks(pattern).arguments,
        )
        return _total(sums, threads, arguments["sharing"])


def _total(sums: Tensor, threads: int, sharing: Tensor) -> Tensor:
    """Return the sum of the threads' shares ``[threads, nnz]`` of a gradient, float32 ``[nnz]``."""
    if threads == 1:
        return sums[0]
    nonzeros = sums.shape[1]
    total = scratch(nonzeros)
    _kernels().bsr.add_shares(
        enough(threads, nonzeros), sums=sums, shares=threads, sharing=sharing, nonzeros=nonzeros, target=total
    )
    return total


def _blocks(pattern: SparsityPattern) -> Any:
    def build() -> Any:
        return _kernels().bsr_layout.build_blocks(
            pattern.row_ptr.numpy(), pattern.col.numpy().copy(), pattern.shape, pattern.block
        )

    return pattern.derived("bsr", build)


def _turned(pattern: SparsityPattern) -> Any:
    def build() -> Any:
        return _kernels().bsr_layout.build_turned(
            pattern.row_ptr.numpy(), pattern.col.numpy().copy(), pattern.shape, pattern.block
        )

    return pattern.derived("bsr_transposed", build)
