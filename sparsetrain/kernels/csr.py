"""The three products of a training step with an unstructured sparse matrix W ``[rows, columns]``.

    Y = X W^T     one nonzero: one broadcast and the multiply-adds of 64 tokens, kept in registers for a whole run of
                  nonzeros of a row
    dX = G W      the same on the layout of W^T
    dW = G^T X    at the nonzeros only: eight of a row at a time, 64 or 128 tokens before their lanes are summed

Columns are cut into blocks, so that a tile of tokens by one block of columns stays in L1; a `csr_layout.Layout` holds
the nonzeros block by block and row by row. A thread takes a range of tiles. Where the tiles do not divide evenly among
the threads, each tile is cut into pieces, which are ranges of rows of the result; two threads may then pack the same
tile. The gradient of the values is summed over tokens inside a thread's share, and then over the shares in their order:
for one number of threads the bits of a result are always the same.
"""

from __future__ import annotations

from typing import Annotated

import numpy as np

from sparsetrain.kernels.csr_rows import TOGETHER, row_of_16, row_of_64, sums_of_row
from sparsetrain.kernels.simd.arguments import (
    Array,
    Int,
    Output,
    Team,
    bfloat16,
    computed,
    element_type,
    float32,
    int32,
    int64,
    step,
    uint16,
    unit,
    where,
)
from sparsetrain.kernels.simd.compile import inlined
from sparsetrain.kernels.simd.kernel import Kernel
from sparsetrain.kernels.simd.tiles import PIECES, TILE, add_to, clear, copy, cut, pack, tiles, unpack
from sparsetrain.kernels.simd.vectors import element
from sparsetrain.kernels.simd.words import share, sharers

# Rows of a tile of outputs (or of gradients) that are computed together: 512 of 64 tokens are 128 KB, which stay in L2
# while the blocks of columns pass.
PANEL = 512
# Pieces of a tile begin at multiples of as many features as are unpacked together, the side of a square transpose.
STEP = 16


@Kernel
def reorder_runs(
    team: Team,
    values: Annotated[Array, float32["== nonzeros"]],
    row_ptr: Annotated[Array, int64["== rows + 1"]],
    ends: Annotated[Array, int32["== chunks + 1"]],
    chunks: Int,
    rows: Int,
    nonzeros: Int,
    stored: Int,
    target: Annotated[Output, float32["== stored"]],
) -> None:
    """Bring values into the order of the layout of their own matrix."""
    first, last, _ = share(team, rows)
    for row in range(first, last):
        at, stop = row_ptr[row], row_ptr[row + 1]
        for chunk in range(row, chunks, rows):
            start, end = np.int64(ends[chunk]), np.int64(ends[chunk + 1])
            count = min(end - start, stop - at)
            copy(values, at, target, start, count)
            target[start + count : end] = 0.0  # the blanks behind the row's last nonzero, at most three
            at += count


@Kernel
def reorder(
    team: Team,
    values: Annotated[Array, float32["== nonzeros"]],
    order: Annotated[Array, int32["== stored"]],
    stored: Int,
    nonzeros: Int,
    target: Annotated[Output, float32["== stored"]],
) -> None:
    """Bring values into the order of a layout with ``order``; a blank, whose order is -1, is zero."""
    first, last, _ = share(team, stored)
    for place in range(first, last):
        at = np.int64(element(order, place))
        target[place] = element(values, at) if at >= 0 else np.float32(0.0)


def _multiply(
    team: Team,
    x: Annotated[Array, element_type["== tokens", "== columns"]],
    y: Annotated[Output, element_type["== tokens", "== rows"]],
    x_step: Annotated[Int, step["x"]],
    y_step: Annotated[Int, step["y"]],
    tokens: Int,
    columns: Annotated[Int, where["columns > 0"]],
    rows: Int,
    packed: Annotated[Output, float32["threads * (columns + 1) * TILE"]],
    width: Int,
    chunks: Annotated[Int, computed["rows * -(-columns // width)"]],
    ends: Annotated[Array, int32["== chunks + 1"]],
    offsets: Annotated[Array, uint16["== stored"], unit["width"]],
    stored: Int,
    values: Annotated[Array, float32["== stored"]],
    scratch: Annotated[Output, float32["threads * rows * TILE"]],
    pieces: Annotated[Int, PIECES],
) -> None:
    """Write ``Y = X W^T`` for the layout of W.

    Args:
        packed: scratch for a packed tile of x. scratch: for a tile of y, feature-major.
        width, chunks, ends, offsets, stored: of the layout. values: in its order.
        pieces: into which a tile is cut.
    """
    first, last, index = share(team, tiles(tokens) * pieces)
    base, made = index * (columns + 1) * TILE, index * rows * TILE
    while first < last:
        tile, piece = first // pieces, first % pieces
        after = min(pieces, piece + last - first)
        begin, stop = cut(rows, piece, pieces, STEP), cut(rows, after, pieces, STEP)
        pack_tile(x, tile * TILE, x_step, tokens - tile * TILE, columns, packed, base)
        present = min(TILE, tokens - tile * TILE)
        _tile(packed, base, present, width, chunks, ends, offsets, values, rows, begin, stop, scratch, made)
        unpack(scratch, made + begin * TILE, present, stop - begin, y, tile * TILE * y_step + begin, y_step)
        first += after - piece


multiply = Kernel(_multiply, "multiply", float32)
multiply_bfloat16 = Kernel(_multiply, "multiply_bfloat16", bfloat16)


@inlined
def pack_tile(source: Array, token: Int, step: Int, left: Int, features: Int, target: Array, to: Int) -> None:
    """Pack a tile of the at most 64 ``left`` tokens from ``token`` on.

    It has a feature more, all zero, that blanks point at.
    """
    pack(source, token * step, step, min(TILE, left), features, target, to)
    clear(target, to + features * TILE, to + (features + 1) * TILE)


@inlined
def _tile(
    x: Array,
    base: Int,
    present: Int,
    width: Int,
    chunks: Int,
    ends: Array,
    offsets: Array,
    values: Array,
    rows: Int,
    begin: Int,
    stop: Int,
    y: Array,
    made: Int,
) -> None:
    """Write rows ``begin`` to ``stop`` of the product of the packed tile at ``x[base]`` to the tile at ``y[made]``."""
    for top in range(begin, stop, PANEL):
        bottom = min(stop, top + PANEL)
        for block in range(chunks // rows):
            # The tile's columns of this block stay in L1 for all rows of the panel.
            at = base + block * width * TILE
            end = np.int64(element(ends, block * rows + top))
            for row in range(top, bottom):
                start = end
                end = np.int64(element(ends, block * rows + row + 1))
                to = made + row * TILE
                # A tile of few tokens takes 16 or 32 of its 64 lanes.
                if present > 32:
                    row_of_64(x, at, offsets, values, start, end, y, to, block == 0)
                else:
                    row_of_16(x, at, offsets, values, start, end, y, to, block == 0)
                    if present > 16:
                        row_of_16(x, at + 16, offsets, values, start, end, y, to + 16, block == 0)


def _gradients(
    team: Team,
    g: Annotated[Array, element_type["== tokens", "== rows"]],
    dx: Annotated[Output, element_type["== tokens if need_dx", "== columns if need_dx"]],
    x: Annotated[Array, element_type["== tokens if need_values", "== columns if need_values"]],
    g_step: Annotated[Int, step["g"]],
    dx_step: Annotated[Int, step["dx"]],
    x_step: Annotated[Int, step["x"]],
    tokens: Int,
    columns: Annotated[Int, where["columns > 0"]],
    rows: Int,
    need_dx: Annotated[Int, where["need_dx <= 1"]],
    need_values: Annotated[Int, where["need_values <= 1"]],
    g_packed: Annotated[Output, float32["threads * TOGETHER * (rows + 1) * TILE"]],
    t_width: Annotated[Int, computed["width"]],
    t_chunks: Annotated[Int, computed["columns * -(-rows // t_width)"]],
    t_ends: Annotated[Array, int32["== t_chunks + 1 if need_dx"]],
    t_offsets: Annotated[Array, uint16["== t_stored"], unit["width"]],
    t_stored: Int,
    t_values: Annotated[Array, float32["== t_stored if need_dx"]],
    scratch: Annotated[Output, float32["threads * TOGETHER * (columns + 1) * TILE"]],
    width: Int,
    chunks: Annotated[Int, computed["rows * -(-columns // width)"]],
    ends: Annotated[Array, int32["== chunks + 1"]],
    offsets: Annotated[Array, uint16["== stored"], unit["width"]],
    stored: Int,
    sums: Annotated[Output, float32["== threads * stored if need_values"]],
    pieces: Annotated[Int, PIECES],
    sharing: Annotated[Output, int64["== 1"]],
) -> None:
    """Write ``dX = G W`` and each thread's share of ``G^T X`` at the nonzeros of W, ``TOGETHER`` tiles at a time.

    Both products read a tile of G while it is in L2; neither G nor X is ever packed as a whole.

    Args:
        need_dx, need_values: 0 or 1; what is not needed is not touched, nor is what it alone is computed from.
        t_width, t_chunks, t_ends, t_offsets, t_stored, t_values: of the layout of the transpose of W, whose blocks are
            as wide as those of W. With a width of its own, the two could be exchanged.
        width, chunks, ends, offsets, stored: of the layout of W.
        scratch: for a tile of dX, and then for the packed tiles of x.
        sums: the gradient of the values by thread, in the order of the layout of W.
        pieces: into which ``TOGETHER`` tiles are cut.
        sharing: receives the number of threads that wrote sums.
    """
    first, last, index = share(team, (tiles(tokens) + TOGETHER - 1) // TOGETHER * pieces)
    g_tile, x_tile, own = (rows + 1) * TILE, (columns + 1) * TILE, index * stored
    g_base, x_base = index * TOGETHER * g_tile, index * TOGETHER * x_tile
    if index == 0:
        sharing[0] = sharers(team)
    if need_values:
        clear(sums, own, own + stored)  # also where this thread has no work, since all shares are added up
    while first < last:
        tile, piece = first // pieces * TOGETHER, first % pieces
        after = min(pieces, piece + last - first)
        first += after - piece
        many = min(TOGETHER, tiles(tokens) - tile)
        left, right = cut(columns, piece, pieces, STEP), cut(columns, after, pieces, STEP)
        for one in range(many):
            at, token = g_base + one * g_tile, (tile + one) * TILE
            pack_tile(g, token, g_step, tokens - token, rows, g_packed, at)
            if need_dx:
                present = min(TILE, tokens - token)
                _tile(
                    *(g_packed, at, present, t_width, t_chunks, t_ends, t_offsets, t_values),
                    *(columns, left, right, scratch, x_base),
                )
                unpack(scratch, x_base + left * TILE, present, right - left, dx, token * dx_step + left, dx_step)
        if need_values:
            for one in range(many):
                token = (tile + one) * TILE
                pack_tile(x, token, x_step, tokens - token, columns, scratch, x_base + one * x_tile)
            sum_tiles(
                *(g_packed, g_base, g_tile, scratch, x_base, x_tile, many),
                *(rows, cut(rows, piece, pieces, 1), cut(rows, after, pieces, 1)),
                *(width, chunks, ends, offsets, sums, own),
            )


gradients = Kernel(_gradients, "gradients", float32)
gradients_bfloat16 = Kernel(_gradients, "gradients_bfloat16", bfloat16)


@inlined
def sum_tiles(
    g: Array,
    g_at: Int,
    g_tile: Int,
    x: Array,
    x_at: Int,
    x_tile: Int,
    many: Int,
    rows: Int,
    begin: Int,
    stop: Int,
    width: Int,
    chunks: Int,
    ends: Array,
    offsets: Array,
    sums: Array,
    own: Int,
) -> None:
    """Add to ``sums[own:]`` the inner products at the nonzeros of rows ``begin`` to ``stop`` over ``many`` tiles."""
    for top in range(begin, stop, PANEL):
        bottom = min(stop, top + PANEL)
        for block in range(chunks // rows):
            # x of this block stays in L1; a row of g is 256 bytes a tile and is read once for each block.
            at = x_at + block * width * TILE
            end = np.int64(element(ends, block * rows + top))
            for row in range(top, bottom):
                start = end
                end = np.int64(element(ends, block * rows + row + 1))
                line = g_at + row * TILE
                sums_of_row(x, at, x_tile, g, line, g_tile, many, offsets, start, end, sums, own)


@Kernel
def add_shares(
    team: Team,
    sums: Annotated[Array, float32["== shares", "== stored"]],
    sums_step: Annotated[Int, step["sums"]],
    sharing: Annotated[Array, int64["== 1"]],
    stored: Int,
    row_ptr: Annotated[Array, int64["== rows + 1"]],
    ends: Annotated[Array, int32["== chunks + 1"]],
    chunks: Int,
    rows: Int,
    target: Annotated[Output, float32["== nonzeros"]],
    nonzeros: Int,
    shares: Int,
) -> None:
    """Add up the threads' shares of a gradient, and bring it into the order of the pattern.

    Args:
        sums: a row for each share. sharing: the number of shares that were written, at most ``shares``.
    """
    count = min(sharing[0], shares)
    first, last, _ = share(team, rows)
    for row in range(first, last):
        to, end = row_ptr[row], row_ptr[row + 1]
        for chunk in range(row, chunks, rows):
            start = np.int64(ends[chunk])
            length = min(np.int64(ends[chunk + 1]) - start, end - to)  # without the blanks
            copy(sums, start, target, to, length)
            for more in range(1, count):
                add_to(sums, more * sums_step + start, target, to, length)
            to += length
