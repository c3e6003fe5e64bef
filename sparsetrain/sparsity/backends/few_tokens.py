"""The product of few tokens and a sparse matrix, by `sparsetrain.kernels.few_tokens` and `few_tokens_blocks`.

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


class _Kernels(NamedTuple):
    few_tokens: ModuleType
    layout: ModuleType
    blocks: ModuleType
    backward: ModuleType
    arguments: ModuleType


@functools.cache
def _kernels() -> _Kernels:
    # Imported late: importing the library must not import a compiler.
    from sparsetrain.kernels import few_tokens, few_tokens_backward, few_tokens_blocks, few_tokens_layout
    from sparsetrain.kernels.simd import arguments

    return _Kernels(few_tokens, few_tokens_layout, few_tokens_blocks, few_tokens_backward, arguments)


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
    arrays = {"x": wide, "y": y, "values": stored}
    if tokens > 1 or pattern.block != (1, 1):
        # Of its own in each call: several threads of Python may make the same one.
        arrays |= {name: scratch(threads * size) for name, size in _sizes(pattern).items()}
    calls = pattern.derived("few_tokens_calls", dict)
    call = calls.get(key := (threads, tokens, stored.dtype))
    if call is None:
        call = calls[key] = _bound(threads, tokens, arrays, pattern)
    call(*[array.data_ptr() for array in arrays.values()])
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


def _bound(threads: int, tokens: int, arrays: dict[str, Tensor], pattern: SparsityPattern) -> Callable[..., None]:
    """Return the call of a kernel that takes the addresses of these arrays, whose sizes follow from the pattern."""
    kernels, narrow = _kernels(), arrays["values"].dtype == torch.bfloat16
    given: dict[str, Any] = {**arrays, "values": arrays["values"].detach()}
    if pattern.block != (1, 1):
        several = kernels.blocks.several_bfloat16 if narrow else kernels.blocks.several
        return several.bound(threads, tuple(arrays), tokens=tokens, **given, **_blocks(pattern))
    given |= _columns(pattern).arguments
    if tokens == 1:
        one = kernels.few_tokens.one_bfloat16 if narrow else kernels.few_tokens.one
        return one.bound(threads, tuple(arrays), **given)
    several = kernels.few_tokens.several_bfloat16 if narrow else kernels.few_tokens.several
    return several.bound(threads, tuple(arrays), tokens=tokens, **given)


def _sizes(pattern: SparsityPattern) -> dict[str, int]:
    """Return the floats of scratch that a thread needs for several tokens."""
    kernels = _kernels()
    panel = (kernels.few_tokens if pattern.block == (1, 1) else kernels.blocks).PANEL
    return {"packed": (pattern.shape[1] + 16) * MOST, "scratch": (panel + 16) * MOST}


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
