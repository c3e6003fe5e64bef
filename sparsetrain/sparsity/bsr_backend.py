"""The backend ``bsr``: block patterns on a CPU, by the kernels of `sparsetrain.kernels.bsr`."""

from __future__ import annotations

import functools
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sparsetrain.sparsity.csr_backend import CsrBackend, _enough, _flat, _row_ptr, _rows, _scratch
from sparsetrain.sparsity.pattern import SparsityPattern

_DTYPES = (torch.float32, torch.bfloat16)
_MIN_BLOCK, _MAX_BLOCK = 4, 64  # those of the kernels, known without importing them


class _Kernels(NamedTuple):
    bsr: ModuleType
    blocks: ModuleType
    tile: int


@functools.cache
def _kernels() -> _Kernels:
    # When the first product is computed: importing the library is not to import a compiler.
    from sparsetrain.kernels import blocks, bsr, tiles

    return _Kernels(bsr, blocks, tiles.TILE)


class BsrBackend(CsrBackend):
    """Multiplies by the stored blocks only, four rows of a block at a time, on as many threads as torch has.

    Takes float32 and bfloat16 on a CPU, sums in float32, and keeps the input packed into tiles of tokens, all as the
    backend ``csr`` does. What is derived from a pattern takes about 8 bytes a block; the values are read in place.
    """

    name = "bsr"

    def refusal(self, dtype: torch.dtype, device: torch.device, pattern: SparsityPattern) -> str | None:
        if device.type != "cpu":
            return f"computes on a CPU; the input is on {device}"
        if dtype not in _DTYPES:
            return f"computes in float32 and bfloat16; the input has dtype {dtype}"
        if not all(_MIN_BLOCK <= side <= _MAX_BLOCK for side in pattern.block):
            sides = f"a side outside {_MIN_BLOCK} to {_MAX_BLOCK}"
            return f"computes block patterns; blocks of {pattern.block[0]}x{pattern.block[1]} have {sides}"
        return None

    def forward(
        self, x: Tensor, shared: Tensor, values: Tensor, pattern: SparsityPattern, keep: bool
    ) -> tuple[Tensor, Tensor]:
        kernels, threads, rows = _kernels(), torch.get_num_threads(), _rows(x)
        out_features, in_features = pattern.shape
        y = x.new_empty(len(rows), out_features)
        blocks = _blocks(pattern)
        if shared.numel():
            use, packed = 2, shared
        elif keep:
            use, packed = 1, self.kept(x, pattern)
        else:
            use, packed = 0, _scratch(threads, in_features, kernels.tile)
        stored = values.float().contiguous()
        scratch = _scratch(threads, kernels.bsr.PANEL, kernels.tile)
        multiply = kernels.bsr.multiply if x.dtype == torch.float32 else kernels.bsr.multiply_bfloat16
        multiply(
            threads,
            *(_flat(rows), _flat(y), rows.stride(0), out_features, len(rows), in_features, out_features),
            *(_flat(packed), use, blocks.height, blocks.width, blocks.panels, blocks.ends, blocks.index),
            *(_flat(stored), _flat(scratch)),
        )
        return y, packed if use == 1 else x.new_empty(0)

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
        kernels, threads, rows = _kernels(), torch.get_num_threads(), _rows(g)
        out_features, in_features = pattern.shape
        grad_x = g.new_empty(len(g), in_features) if need_x else g.new_empty(0)
        blocks = _blocks(pattern)
        # Without a gradient of the input the list of the transpose is not read, and so not built.
        turned = _turned(pattern) if need_x else blocks
        order = turned.index if turned.order is None else turned.order
        stored = values.float().contiguous()
        sums = _scratch(threads, pattern.nnz) if need_values else _scratch(0)
        if need_values and threads > 1:
            sums.zero_()  # a runtime may lend fewer threads than were asked for
        gradients = kernels.bsr.gradients if g.dtype == torch.float32 else kernels.bsr.gradients_bfloat16
        packed = _scratch(threads, 2, out_features, kernels.tile)
        scratch = _scratch(threads, kernels.bsr.PANEL, kernels.tile)
        gradients(
            threads,
            *(_flat(rows), _flat(grad_x), rows.stride(0), in_features, len(rows), in_features, out_features),
            *(_flat(packed), int(need_x), blocks.height, blocks.width),
            *(turned.panels, turned.ends, turned.index, order, _flat(stored), _flat(scratch)),
            *(int(need_values), _flat(kept), blocks.panels, blocks.ends, blocks.index, pattern.nnz, _flat(sums)),
        )
        if not need_values:
            return grad_x, values.new_empty(0)
        if threads == 1:
            return grad_x, sums[0].to(values.dtype)
        grad_values = _scratch(pattern.nnz)
        few = _enough(threads, pattern.nnz)
        kernels.bsr.add_parts(few, _flat(sums), threads, pattern.nnz, _flat(grad_values))
        return grad_x, grad_values.to(values.dtype)


def _blocks(pattern: SparsityPattern) -> Any:
    def build() -> Any:
        return _kernels().blocks.build_blocks(
            _row_ptr(pattern), pattern.col.numpy().copy(), pattern.shape, pattern.block
        )

    return pattern.derived("bsr", build)


def _turned(pattern: SparsityPattern) -> Any:
    def build() -> Any:
        return _kernels().blocks.build_turned(
            _row_ptr(pattern), pattern.col.numpy().copy(), pattern.shape, pattern.block
        )

    return pattern.derived("bsr_transposed", build)
