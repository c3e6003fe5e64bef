"""The three contractions with a block-sparse matrix on a GPU, in Triton: ``x @ W.T``, ``g @ W`` and ``g.T @ x``.

Legend: N rows (tokens), K in_features, M out_features, W the matrix ``[M, K]`` with nb stored blocks of ``bh x bw``,
``values`` their elements ``[nb * bh * bw]``, block after block in row-major order, each block row-major inside.

One idea serves all block sizes: the stored columns of a block row, laid end to end, are one dense contraction. A tile
of it that the tensor cores take at once (16 to 64 terms) is filled from as many blocks as it needs: four of width 4 or
a quarter of one of width 64, so only the end of a row is padding. Only the side of a block that is not contracted is
padded to 16, the least that a tensor core takes, which costs arithmetic of blocks lower than 16 but no memory traffic.

Every element of a result is summed by one program in a fixed order, so that the same input gives the same bits.
Sums are float32 for all types of inputs; float32 inputs are multiplied as float32 ("ieee"), never as TF32: as exact
and as slow as torch's own default. 16-bit inputs run on the tensor cores.

This module imports triton, so it must be imported late. With ``TRITON_INTERPRET=1`` in the environment before that,
its kernels run on a CPU, slowly, through numpy.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MIN_BLOCK, MAX_BLOCK = 4, 64

# The least side of a tile of tl.dot.
_LEAST = 16
# The weight gradient sums over tokens. With fewer tiles of weights than this its tokens are cut into chunks, one
# program each: about four programs for each of the 132 multiprocessors of a large card. A constant rather than a
# question to the device, so that the order of a sum does not depend on the card.
_PROGRAMS = 512


@dataclass(frozen=True)
class Side:
    """The stored blocks as the rows of one matrix: W itself, or its transpose.

    Args:
        ptr: int32 ``[block rows + 1]``: block row r has the entries ``ptr[r]:ptr[r + 1]`` of the two others.
        index: int32 ``[nb]``: the block column of each.
        order: int32 ``[nb]``: where in ``values`` each is stored; None if that is the order of ``index``.
        longest: the largest number of blocks in a block row.
    """

    ptr: Tensor
    index: Tensor
    order: Tensor | None
    longest: int


@dataclass(frozen=True)
class Layout:
    """What the kernels need to know of a block pattern; built by `layout` once a pattern: at most 16 bytes a block.

    Args:
        shape: ``(M, K)``. block: ``(bh, bw)``. rows, columns: W and its transpose.
        tile_row, tile_place: int32 ``[tiles]``: the weight gradient's tiles, as the block row and the place among the
            tiles of that row; a tile is ``tile_width`` stored columns wide and one block row high.
    """

    shape: tuple[int, int]
    block: tuple[int, int]
    rows: Side
    columns: Side
    tile_row: Tensor
    tile_place: Tensor
    tile_width: int


def layout(row_ptr: Tensor, col: Tensor, shape: tuple[int, int], block: tuple[int, int]) -> Layout:
    """Return the `Layout` of the pattern with these indices, on their device; it waits for the device once.

    Args:
        row_ptr: integers ``[M / bh + 1]``. col: integers ``[nb]``, increasing inside a block row.
        shape: ``(M, K)``. block: ``(bh, bw)``, which divides the shape, each from 4 to 64.
    """
    (height, width), (bh, bw) = shape, block
    counts = row_ptr[1:] - row_ptr[:-1]
    row_of = torch.repeat_interleave(torch.arange(height // bh, device=col.device), counts)
    # Stable, so that the blocks of a block column keep the order of their rows: part of being deterministic.
    order = torch.argsort(col, stable=True)
    # Found by search, where counting would be an atomic addition on a GPU.
    ptr_t = torch.searchsorted(col[order], torch.arange(width // bw + 1, device=col.device, dtype=col.dtype))
    longest, longest_t = torch.stack([counts.max(), ptr_t.diff().max()]).tolist()
    # Copies, since the indices may be written over while kernels read them.
    rows = Side(row_ptr.to(torch.int32, copy=True), col.to(torch.int32, copy=True), None, longest)
    columns = Side(ptr_t.to(torch.int32), row_of[order].to(torch.int32), order.to(torch.int32), longest_t)

    tile_width = min(128 if bh <= 32 else 64, _fit(longest * bw))
    tiles = (counts * bw + tile_width - 1) // tile_width
    tile_row = torch.repeat_interleave(torch.arange(height // bh, device=col.device), tiles)
    place = torch.arange(len(tile_row), device=col.device) - (tiles.cumsum(0) - tiles)[tile_row]
    return Layout(shape, block, rows, columns, tile_row.to(torch.int32), place.to(torch.int32), tile_width)


def matmul(x: Tensor, values: Tensor, layout: Layout) -> Tensor:
    """Return ``x @ W.T``, ``[N, M]`` in the type of ``x``.

    Args:
        x: ``[N, K]`` of any strides. values: ``[nb * bh * bw]``, contiguous. Both of one type among `DTYPES`, on the
            device of the layout; nothing is checked here.
    """
    (height, _), (bh, bw) = layout.shape, layout.block
    return _run_product(x, values, layout.rows, height, out=(bh, bw), contracted=(bw, 1))


def matmul_t(g: Tensor, values: Tensor, layout: Layout) -> Tensor:
    """Return ``g @ W``, ``[N, K]`` in the type of ``g``.

    Args:
        g: ``[N, M]`` of any strides. values: as in `matmul`.
    """
    (_, width), (bh, bw) = layout.shape, layout.block
    return _run_product(g, values, layout.columns, width, out=(bw, 1), contracted=(bh, bw))


def sampled(g: Tensor, x: Tensor, layout: Layout) -> Tensor:
    """Return the stored elements of ``g.T @ x``, ``[nb * bh * bw]`` in the type of ``x``.

    Args:
        g: ``[N, M]``. x: ``[N, K]``. Both of any strides, of one type among `DTYPES`, on the device of the layout.
    """
    (bh, bw), tokens, tiles = layout.block, x.shape[0], len(layout.tile_row)
    nnz = len(layout.rows.index) * bh * bw
    block_t = min(_depth(x.dtype), _fit(tokens))
    # A chunk is at least four steps of the loop long, so that the sum over chunks stays a small part of the work.
    chunks = max(1, min(_PROGRAMS // max(1, tiles), triton.cdiv(tokens, 4 * block_t)))
    chunk = triton.cdiv(triton.cdiv(tokens, chunks), block_t) * block_t
    chunks = max(1, triton.cdiv(tokens, max(1, chunk)))
    out = torch.empty(chunks, nnz, dtype=stored(x.dtype) if chunks == 1 else torch.float32, device=x.device)
    if tiles:
        block_o = _fit(bh)
        with on_device_of(x):
            _sampled[(tiles, chunks)](
                *(g, x, out, layout.rows.ptr, layout.rows.index, layout.tile_row, layout.tile_place),
                *(tokens, chunk, nnz, *g.stride(), *x.stride()),
                bh=bh,
                bw=bw,
                run=_run_length(bw),
                widen=_widens(x.dtype),
                block_t=block_t,
                block_o=block_o,
                block_n=layout.tile_width,
                **_options(x.dtype, block_o, layout.tile_width, block_t),
            )
    return (out[0] if chunks == 1 else out.sum(0)).to(x.dtype)


def _run_product(
    x: Tensor, values: Tensor, side: Side, features: int, out: tuple[int, int], contracted: tuple[int, int]
) -> Tensor:
    """Launch `_product`; ``out`` and ``contracted`` are (size, stride) of the two sides of a stored block."""
    tokens, rows = x.shape[0], len(side.ptr) - 1
    y = torch.empty(tokens, features, dtype=stored(x.dtype), device=x.device)
    if tokens:
        block_t, block_o = min(128, _fit(tokens)), _fit(out[0])
        block_k = min(_depth(x.dtype), _fit(side.longest * contracted[0]))
        with on_device_of(x):
            _product[(rows * triton.cdiv(tokens, block_t),)](
                *(x, values, y, side.ptr, side.index, side.index if side.order is None else side.order),
                *(tokens, rows, features, *x.stride()),
                ordered=side.order is not None,
                out=out[0],
                out_stride=out[1],
                contracted=contracted[0],
                contracted_stride=contracted[1],
                run=min(_run_length(contracted[0]), block_k),
                widen=_widens(x.dtype),
                block_t=block_t,
                block_o=block_o,
                block_k=block_k,
                **_options(x.dtype, block_t, block_o, block_k),
            )
    return y.to(x.dtype)


# -- the choice of tiles ---------------------------------------------------------------------------------------------
# By rule, not by timing: a tuner would make the bits of a result depend on the clock, and the first step slow.


def _fit(size: int) -> int:
    """Return the least power of two that holds ``size``, within what tl.dot takes."""
    return max(_LEAST, triton.next_power_of_2(max(1, size)))


def _depth(dtype: torch.dtype) -> int:
    """Return how many terms a step contracts: 128 bytes of a row, one line of the cache."""
    return 32 if dtype == torch.float32 else 64


def _options(dtype: torch.dtype, high: int, wide: int, deep: int) -> dict[str, Any]:
    """Return how to run a program whose every step multiplies ``[high, deep]`` by ``[deep, wide]`` elements.

    A thread holds at most 64 float32 sums, or 32 beside the operands of float32 arithmetic, which has no tensor core
    to keep them, and loads at most about eight pieces of 16 bytes a step: more than either spills registers. Loads run
    two steps ahead of the arithmetic. Fusion is spelled out because its default differs between versions of Triton,
    and 3.9 warns of that.
    """
    sums = 32 if dtype == torch.float32 else 64
    needed = max(high * wide // (32 * sums), (high + wide) * deep * dtype.itemsize // (32 * 8 * 16), 1)
    return {"num_warps": min(8, 1 << (needed.bit_length() - 1)), "num_stages": 3, "enable_fp_fusion": True}


def _run_length(size: int) -> int:
    """Return the largest power of two that divides ``size``, the number of neighbours that one load can take."""
    return size & -size


def _widens(dtype: torch.dtype) -> bool:
    """Return whether a kernel must turn its inputs to float32 before it multiplies them.

    Triton's interpreter holds bfloat16 as uint16 and multiplies those integers (seen in 3.9.0). A product of two
    bfloat16 numbers is exact in float32, so this changes no result, and the speed of the interpreter is not the point.
    """
    return INTERPRETED and dtype == torch.bfloat16


def stored(dtype: torch.dtype) -> torch.dtype:
    """Return the type in which a kernel writes results of ``dtype``.

    The interpreter also cuts bfloat16 off where a GPU rounds to nearest, so that torch has to round for it.
    """
    return torch.float32 if _widens(dtype) else dtype


def on_device_of(tensor: Tensor) -> Any:
    # Triton launches on the current device, which need not be the tensor's.
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


# -- the kernels -----------------------------------------------------------------------------------------------------
# Not specialised to the count of tokens: text of another length must not mean another compilation.


@triton.jit(do_not_specialize=["tokens"])
def _product(
    x: tl.tensor,
    values: tl.tensor,
    y: tl.tensor,
    ptr: tl.tensor,
    index: tl.tensor,
    order: tl.tensor,
    tokens: tl.tensor,
    rows: tl.tensor,
    features: tl.tensor,
    stride_t: tl.tensor,
    stride_k: tl.tensor,
    ordered: tl.constexpr,
    out: tl.constexpr,
    out_stride: tl.constexpr,
    contracted: tl.constexpr,
    contracted_stride: tl.constexpr,
    run: tl.constexpr,
    widen: tl.constexpr,
    block_t: tl.constexpr,
    block_o: tl.constexpr,
    block_k: tl.constexpr,
) -> None:
    """Write ``y[t, row * out + o] = sum over k of x[t, column(k)] * value(k, o)`` for a tile of tokens t, one row."""
    program = tl.program_id(0)
    # Neighbouring programs take the same tokens: their rows of x stay in the L2 cache while W streams by.
    row = program % rows
    t = (program // rows).to(tl.int64) * block_t + tl.arange(0, block_t)
    o = tl.arange(0, block_o)
    start = tl.load(ptr + row)
    terms = (tl.load(ptr + row + 1) - start) * contracted
    sums = tl.full((block_t, block_o), 0.0, tl.float32)
    for first in range(0, terms, block_k):
        k = first + tl.arange(0, block_k)
        entry = start + k // contracted
        inside = k % contracted
        column = tl.load(index + entry, mask=k < terms, other=0) * contracted + inside
        # True by construction, and what the compiler cannot know of an index from memory: without it every load of x
        # is of a single element.
        column = tl.max_contiguous(tl.multiple_of(column, run), run)
        if ordered:
            entry = tl.load(order + entry, mask=k < terms, other=0)
        # Products beyond the last term are zero times zero: an infinity elsewhere cannot reach them.
        left = tl.load(
            x + t[:, None] * stride_t + column[None, :].to(tl.int64) * stride_k,
            mask=(t < tokens)[:, None] & (k < terms)[None, :],
            other=0.0,
        )
        place = entry.to(tl.int64) * (out * contracted) + inside * contracted_stride
        right = tl.load(
            values + place[:, None] + o[None, :] * out_stride,
            mask=(k < terms)[:, None] & (o < out)[None, :],
            other=0.0,
        )
        if widen:
            left, right = left.to(tl.float32), right.to(tl.float32)
        sums = tl.dot(left, right, sums, input_precision="ieee")
    tl.store(
        y + t[:, None] * features + (row * out + o)[None, :],
        sums.to(y.dtype.element_ty),
        mask=(t < tokens)[:, None] & (o < out)[None, :],
    )


@triton.jit(do_not_specialize=["tokens", "chunk"])
def _sampled(
    g: tl.tensor,
    x: tl.tensor,
    out: tl.tensor,
    ptr: tl.tensor,
    index: tl.tensor,
    tile_row: tl.tensor,
    tile_place: tl.tensor,
    tokens: tl.tensor,
    chunk: tl.tensor,
    nnz: tl.tensor,
    g_stride_t: tl.tensor,
    g_stride_m: tl.tensor,
    x_stride_t: tl.tensor,
    x_stride_k: tl.tensor,
    bh: tl.constexpr,
    bw: tl.constexpr,
    run: tl.constexpr,
    widen: tl.constexpr,
    block_t: tl.constexpr,
    block_o: tl.constexpr,
    block_n: tl.constexpr,
) -> None:
    """Write, for one chunk of the tokens, the sums ``g[t, m] * x[t, k]`` at the stored columns k of a tile."""
    tile = tl.program_id(0)
    part = tl.program_id(1)
    row = tl.load(tile_row + tile)
    # A number of tiles times a constant, and not the column itself from memory: the compiler sees how it is aligned.
    n = tl.load(tile_place + tile) * block_n + tl.arange(0, block_n)
    start = tl.load(ptr + row)
    terms = (tl.load(ptr + row + 1) - start) * bw
    entry = start + n // bw
    column = tl.load(index + entry, mask=n < terms, other=0) * bw + n % bw
    column = tl.max_contiguous(tl.multiple_of(column, run), run)
    o = tl.arange(0, block_o)
    sums = tl.full((block_o, block_n), 0.0, tl.float32)
    begin = part * chunk
    end = tl.minimum(begin + chunk, tokens)
    for first in range(begin, end, block_t):
        t = (first + tl.arange(0, block_t)).to(tl.int64)
        left = tl.load(
            g + t[None, :] * g_stride_t + (row * bh + o)[:, None].to(tl.int64) * g_stride_m,
            mask=(t < end)[None, :] & (o < bh)[:, None],
            other=0.0,
        )
        right = tl.load(
            x + t[:, None] * x_stride_t + column[None, :].to(tl.int64) * x_stride_k,
            mask=(t < end)[:, None] & (n < terms)[None, :],
            other=0.0,
        )
        if widen:
            left, right = left.to(tl.float32), right.to(tl.float32)
        sums = tl.dot(left, right, sums, input_precision="ieee")
    place = entry.to(tl.int64) * (bh * bw) + n % bw
    tl.store(
        out + part.to(tl.int64) * nnz + o[:, None] * bw + place[None, :],
        sums.to(out.dtype.element_ty),
        mask=(o < bh)[:, None] & (n < terms)[None, :],
    )


# Whether the kernels run on a CPU through Triton's interpreter, as the environment said when triton was imported.
INTERPRETED = not isinstance(_product, triton.JITFunction)
