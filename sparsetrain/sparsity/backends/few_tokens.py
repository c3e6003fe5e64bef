"""The product of few tokens and a sparse matrix, by `sparsetrain.kernels.few_tokens` and its siblings.

Which of them is the fastest depends on the density: a bit of each weight, or 16 bits of each nonzero, say where the
nonzeros are.

Legend: N rows (tokens), K in_features, M out_features, nnz stored values.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sparsetrain.sparsity.backends import cpu
from sparsetrain.sparsity.backends.cpu import nothing, scratch, with_whole_rows
from sparsetrain.sparsity.patterns.pattern import SparsityPattern

MOST = 48  # tokens, as in the kernels, which would import a compiler
MOST_BACKWARD = 32  # tokens; with more the kernels for tiles of 64 were as fast or faster, see the log

# The density from which on a bit of each weight is faster than a column of each nonzero, by the number of tokens up to
# which it holds; measured with float32 on a Xeon with AVX-512, see the log.
BITMAP_FROM = {4: 0.25, 8: 0.45, 12: 0.7, 16: 0.95}


class _Kernels(NamedTuple):
    few_tokens: ModuleType
    bitmap: ModuleType
    layout: ModuleType
    blocks: ModuleType
    backward: ModuleType
    arguments: ModuleType


@functools.cache
def _kernels() -> _Kernels:
    # Imported late: importing the library must not import a compiler.
    from sparsetrain.kernels import (
        few_tokens,
        few_tokens_backward,
        few_tokens_bitmap,
        few_tokens_blocks,
        few_tokens_layout,
    )
    from sparsetrain.kernels.simd import arguments

    return _Kernels(few_tokens, few_tokens_bitmap, few_tokens_layout, few_tokens_blocks, few_tokens_backward, arguments)


def few_tokens(x: Tensor, values: Tensor, pattern: SparsityPattern) -> Tensor:
    """Return ``x @ W.T``, ``[N, K] -> [N, M]``, for N from 1 to `MOST`; values are read in place.

    Args:
        x, values: float32 or bfloat16; sums are in float32.
    """
    wide, stored = x, values
    if x.dtype != torch.float32:
        wide = x.float()
    if not wide.is_contiguous():
        wide = wide.contiguous()
    if not stored.is_contiguous():
        stored = stored.detach().contiguous()
    tokens, threads = x.shape[0], max(1, min(torch.get_num_threads(), pattern.nnz // cpu.NONZEROS_A_THREAD))
    y = wide.new_empty(tokens, pattern.shape[0])
    calls: dict[Any, _Call] = pattern.derived("few_tokens_calls", dict)
    call = calls.get(key := (threads, tokens, stored.dtype))
    if call is None:
        call = calls[key] = _bound(threads, {"x": wide, "y": y, "values": stored.detach()}, pattern)
    # Scratch of its own in each call: several threads of Python may make the same one.
    shared = [scratch(size) for size in call.scratch]
    call.run(wide.data_ptr(), y.data_ptr(), stored.data_ptr(), *[array.data_ptr() for array in shared])
    return y if x.dtype == torch.float32 else y.to(x.dtype)


def few_tokens_gradients(
    g: Tensor, x: Tensor, values: Tensor, pattern: SparsityPattern, need_x: bool, need_values: bool
) -> tuple[Tensor, Tensor]:
    """Return ``G W``, ``[N, K]``, and ``G^T X`` at the nonzeros of W, for N from 1 to `MOST` and single weights.

    Args:
        g, x, values: float32 or bfloat16; sums are in float32.
        need_x, need_values: which of the two are needed; the other one is empty.
    """
    kernels, (rows, columns), tokens = _kernels(), pattern.shape, g.shape[0]
    threads = max(1, min(torch.get_num_threads(), pattern.nnz // cpu.NONZEROS_A_THREAD))
    lanes = kernels.few_tokens.lanes_of(tokens)
    sums = scratch(threads * columns * MOST if need_x else 0)
    grad_values = scratch(pattern.nnz if need_values else 0)
    narrow, sharing = values.dtype == torch.bfloat16, torch.empty(1, dtype=torch.int64, device="cpu")
    gradients = kernels.backward.gradients_bfloat16 if narrow else kernels.backward.gradients
    gradients(
        threads,
        g=with_whole_rows(g.float()),
        x=with_whole_rows(x.float()) if need_values else nothing(torch.float32),
        tokens=tokens,
        need_dx=int(need_x),
        need_values=int(need_values),
        g_packed=scratch(threads * (rows + 16) * MOST),
        x_packed=scratch(threads * (columns + 16) * MOST if need_values else 0),
        dx=sums,
        values=values.detach().contiguous(),
        dvalues=grad_values,
        sharing=sharing,
        **_columns(pattern).arguments,
    )
    if not need_x:
        return g.new_empty(0), grad_values.to(values.dtype)
    shares = sums[: threads * columns * lanes].view(threads, columns, lanes)[:, :, :tokens]
    count = int(sharing)  # a runtime may lend fewer threads than were asked for
    grad_x = (shares[0] if count == 1 else shares[:count].sum(0)).t().contiguous()
    return grad_x.to(g.dtype), grad_values.to(values.dtype) if need_values else values.new_empty(0)


def index_bytes(pattern: SparsityPattern, tokens: int) -> int:
    """Return the bytes that say where the nonzeros are and that a product of float32 reads, for N from 1 to `MOST`."""
    if pattern.block != (1, 1):
        return 4 * len(pattern.col)
    if _by_bitmap(pattern.density, tokens, narrow=False):
        return 2 * pattern.shape[0] * -(-pattern.shape[1] // 16)
    return 2 * pattern.nnz


class _Call(NamedTuple):
    """A call of a kernel that takes the addresses of x, y, values and scratch, and the floats of each scratch array."""

    run: Callable[..., None]
    scratch: list[int]


def _bound(threads: int, arrays: dict[str, Tensor], pattern: SparsityPattern) -> _Call:
    """Return the call of the fastest kernel for such arrays."""
    kernels, tokens, narrow = _kernels(), len(arrays["x"]), arrays["values"].dtype == torch.bfloat16
    sizes: dict[str, int] = {}
    if pattern.block != (1, 1):
        kernel = kernels.blocks.several_bfloat16 if narrow else kernels.blocks.several
        given, sizes = {"tokens": tokens, **_blocks(pattern)}, _sizes(kernels.blocks, pattern)
    elif _by_bitmap(pattern.density, tokens, narrow):
        kernel = kernels.bitmap.product_bfloat16 if narrow else kernels.bitmap.product
        given = {"tokens": tokens, **_bitmap(pattern).arguments}
    elif tokens == 1:
        kernel = kernels.few_tokens.one_bfloat16 if narrow else kernels.few_tokens.one
        given = _columns(pattern).arguments
    else:
        kernel = kernels.few_tokens.several_bfloat16 if narrow else kernels.few_tokens.several
        given, sizes = {"tokens": tokens, **_columns(pattern).arguments}, _sizes(kernels.few_tokens, pattern)
    needed = [threads * size for size in sizes.values()]
    arrays |= {name: scratch(size) for name, size in zip(sizes, needed, strict=True)}
    return _Call(kernel.bound(threads, tuple(arrays), **arrays, **given), needed)


def _by_bitmap(density: float, tokens: int, narrow: bool) -> bool:
    """Return whether a bit of each weight is the faster way to a product, as it was measured."""
    kernels = _kernels()
    if tokens > kernels.bitmap.MOST or not (kernels.bitmap.SPREADS_BFLOAT16 if narrow else kernels.bitmap.SPREADS):
        return False
    return density >= next(least for most, least in BITMAP_FROM.items() if tokens <= most)


def _sizes(kernels: ModuleType, pattern: SparsityPattern) -> dict[str, int]:
    """Return the floats of scratch that a thread of a kernel for several tokens needs."""
    return {"packed": (pattern.shape[1] + 16) * MOST, "scratch": (kernels.PANEL + 16) * MOST}


def _blocks(pattern: SparsityPattern) -> dict[str, Any]:
    """Return what the kernel takes of the blocks of a pattern; the indices are copies, which nobody writes to."""

    def build() -> dict[str, Any]:
        buffer, bounds = _kernels().arguments.Buffer, pattern.row_ptr.numpy().copy()
        index = pattern.col.numpy().copy()
        sizes = {"columns": pattern.shape[1], "height": pattern.block[0], "width": pattern.block[1]}
        arrays = {"bounds": buffer(bounds, "bounds"), "index": buffer(index, "index")}
        return {**sizes, "block_rows": len(bounds) - 1, "blocks": len(index), **arrays}

    found: dict[str, Any] = pattern.derived("few_tokens_blocks", build)
    return found


def _columns(pattern: SparsityPattern) -> Any:
    def build() -> Any:
        return _kernels().layout.build_columns(pattern.row_ptr.numpy(), pattern.col.numpy(), pattern.shape[1])

    return pattern.derived("few_tokens", build)


def _bitmap(pattern: SparsityPattern) -> Any:
    def build() -> Any:
        return _kernels().layout.build_bitmap(pattern.row_ptr.numpy(), pattern.col.numpy(), pattern.shape[1])

    return pattern.derived("few_tokens_bitmap", build)
