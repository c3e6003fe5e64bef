"""The three products of a training step with an unstructured sparse matrix W ``[rows, columns]``.

    Y = X W^T     one nonzero: one broadcast and the multiply-adds of 64 tokens, kept in registers for a whole run of
                  nonzeros of a row
    dX = G W      the same on the layout of W^T
    dW = G^T X    at the nonzeros only: eight of a row at a time, 64 or 128 tokens before their lanes are summed

Columns are cut into blocks of which a tile of tokens stays in L1; a `layout.Layout` holds the nonzeros block by block,
row by row. A thread takes a range of tiles of tokens; where tiles do not go round evenly, each is cut into as many
pieces as it takes, ranges of rows of what is computed, and two threads may pack the same tile. The gradient of the
values is summed in the order of tokens inside a part and then in the order of parts: for one number of threads the bits
of a result are always the same.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from sparsetrain.kernels.compile import Kernel, part
from sparsetrain.kernels.register_rows import TOGETHER, row_of_16, row_of_64, sums_of_row
from sparsetrain.kernels.simd import element
from sparsetrain.kernels.tiles import TILE, Array, Int, add_to, clear, copy, cut, pack, tiles, unpack
from sparsetrain.kernels.words import floats, ints, longs, number, share, sharers, shorts

# Rows whose tile of outputs (or of gradients) is worked on at a time: 128 KB, a part of L2.
PANEL = 512
# Features that are unpacked at a time: pieces of a tile begin at multiples.
STEP = 16


@Kernel
def gather_runs(words: Any) -> None:
    """Bring values into the order of the layout of their own matrix.

    Words: values float32 ``[nnz]``, row_ptr int64 ``[rows + 1]``, ends, chunks, rows, target float32 ``[stored]``.
    """
    values, row_ptr, ends = floats(words, 4), longs(words, 5), ints(words, 6)
    chunks, rows, target = number(words, 7), number(words, 8), floats(words, 9)
    first, last, _ = share(words, rows)
    for row in range(first, last):
        at, stop = row_ptr[row], row_ptr[row + 1]
        for chunk in range(row, chunks, rows):
            start, end = np.int64(ends[chunk]), np.int64(ends[chunk + 1])
            count = min(end - start, stop - at)
            copy(values, at, target, start, count)
            target[start + count : end] = 0.0
            at += count


@Kernel
def gather(words: Any) -> None:
    """Bring values into the order of a layout with ``order``.

    Words: values float32 ``[nnz]``, order int32 ``[stored]``, stored, target float32 ``[stored]``.
    """
    values, order, target = floats(words, 4), ints(words, 5), floats(words, 7)
    first, last, _ = share(words, number(words, 6))
    for place in range(first, last):
        at = np.int64(element(order, place))
        target[place] = element(values, at) if at >= 0 else np.float32(0.0)


@Kernel
def multiply(words: Any) -> None:
    """Write ``X W^T`` for the layout of W; see `_multiply` for the words."""
    _multiply(words, floats(words, 4), floats(words, 5))


@Kernel
def multiply_bfloat16(words: Any) -> None:
    """The same for X and Y in bfloat16, passed as uint16."""
    _multiply(words, shorts(words, 4), shorts(words, 5))


@part
def _multiply(words: Any, x: Array, y: Array) -> None:
    """Write ``Y = X W^T``.

    Words: x ``[tokens, columns]``, y ``[tokens, rows]``, the distances of their rows, tokens, columns, rows; a packed
    tile of x, scratch ``[parts, columns + 1, 64]``; width, chunks, ends, offsets and values of the layout; scratch
    ``[parts, rows, 64]``; pieces of a tile.
    """
    x_step, y_step, tokens = number(words, 6), number(words, 7), number(words, 8)
    columns, rows, packed = number(words, 9), number(words, 10), floats(words, 11)
    width, chunks, ends, offsets = number(words, 12), number(words, 13), ints(words, 14), shorts(words, 15)
    values, scratch, pieces = floats(words, 16), floats(words, 17), number(words, 18)
    first, last, index = share(words, tiles(tokens) * pieces)
    base, made = index * (columns + 1) * TILE, index * rows * TILE
    while first < last:
        tile, piece = first // pieces, first % pieces
        after = min(pieces, piece + last - first)
        begin, stop = cut(rows, piece, pieces, STEP), cut(rows, after, pieces, STEP)
        _pack_tile(x, tile, x_step, tokens, columns, packed, base)
        present = min(TILE, tokens - tile * TILE)
        _tile(packed, base, present, width, chunks, ends, offsets, values, rows, begin, stop, scratch, made)
        unpack(scratch, made + begin * TILE, present, stop - begin, y, tile * TILE * y_step + begin, y_step)
        first += after - piece


@part
def _pack_tile(source: Array, tile: Int, step: Int, tokens: Int, features: Int, target: Array, to: Int) -> None:
    """Pack one tile of a matrix, with the feature more, all zero, that blanks point at."""
    token = tile * TILE
    pack(source, token * step, step, min(TILE, tokens - token), features, target, to)
    clear(target, to + features * TILE, to + (features + 1) * TILE)


@part
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
            at = base + block * width * TILE
            end = np.int64(element(ends, block * rows + top))
            for row in range(top, bottom):
                start = end
                end = np.int64(element(ends, block * rows + row + 1))
                to = made + row * TILE
                if present > 32:
                    row_of_64(x, at, offsets, values, start, end, y, to, block == 0)
                else:
                    row_of_16(x, at, offsets, values, start, end, y, to, block == 0)
                    if present > 16:
                        row_of_16(x, at + 16, offsets, values, start, end, y, to + 16, block == 0)


@Kernel
def gradients(words: Any) -> None:
    """Write the gradient of the input and each part's share of that of the values; see `_gradients` for the words."""
    _gradients(words, floats(words, 4), floats(words, 5), floats(words, 6))


@Kernel
def gradients_bfloat16(words: Any) -> None:
    """The same for G, dX and X in bfloat16, passed as uint16."""
    _gradients(words, shorts(words, 4), shorts(words, 5), shorts(words, 6))


@part
def _gradients(words: Any, g: Array, dx: Array, x: Array) -> None:
    """Write ``dX = G W`` and ``G^T X`` at the nonzeros of W, ``TOGETHER`` tiles of tokens at a time.

    Both products read a tile of G while it is in L2; neither G nor X is ever packed as a whole.

    Words: g ``[tokens, rows]``, dx and x ``[tokens, columns]``, the distances of their rows, tokens, columns, rows;
    need of dx, 0 or 1; need of the values' gradient; packed g, scratch ``[parts, TOGETHER, rows + 1, 64]``; width,
    chunks, ends, offsets and values of the layout of the transpose of W; a tile of dx and then packed x, scratch
    ``[parts, TOGETHER, columns + 1, 64]``; width, chunks, ends, offsets and stored of the layout of W; sums
    ``[parts, stored]``, in the order of that layout; pieces of ``TOGETHER`` tiles; int64 ``[1]``, to which the number
    of parts is written.
    """
    g_step, dx_step, x_step, tokens = number(words, 7), number(words, 8), number(words, 9), number(words, 10)
    columns, rows, need_dx, need_values = number(words, 11), number(words, 12), number(words, 13), number(words, 14)
    g_packed, t_width, t_chunks = floats(words, 15), number(words, 16), number(words, 17)
    t_ends, t_offsets, t_values = ints(words, 18), shorts(words, 19), floats(words, 20)
    scratch, width, chunks = floats(words, 21), number(words, 22), number(words, 23)
    ends, offsets, stored, sums = ints(words, 24), shorts(words, 25), number(words, 26), floats(words, 27)
    pieces, lent = number(words, 28), longs(words, 29)
    first, last, index = share(words, (tiles(tokens) + TOGETHER - 1) // TOGETHER * pieces)
    g_tile, x_tile, own = (rows + 1) * TILE, (columns + 1) * TILE, index * stored
    g_base, x_base = index * TOGETHER * g_tile, index * TOGETHER * x_tile
    if index == 0:
        lent[0] = sharers(words)
    if need_values:
        clear(sums, own, own + stored)
    while first < last:
        tile, piece = first // pieces * TOGETHER, first % pieces
        after = min(pieces, piece + last - first)
        first += after - piece
        many = min(TOGETHER, tiles(tokens) - tile)
        left, right = cut(columns, piece, pieces, STEP), cut(columns, after, pieces, STEP)
        for one in range(many):
            at, token = g_base + one * g_tile, (tile + one) * TILE
            _pack_tile(g, tile + one, g_step, tokens, rows, g_packed, at)
            if need_dx:
                present = min(TILE, tokens - token)
                _tile(
                    *(g_packed, at, present, t_width, t_chunks, t_ends, t_offsets, t_values),
                    *(columns, left, right, scratch, x_base),
                )
                unpack(scratch, x_base + left * TILE, present, right - left, dx, token * dx_step + left, dx_step)
        if need_values:
            for one in range(many):
                _pack_tile(x, tile + one, x_step, tokens, columns, scratch, x_base + one * x_tile)
            _sums(
                *(g_packed, g_base, g_tile, scratch, x_base, x_tile, many),
                *(rows, cut(rows, piece, pieces, 1), cut(rows, after, pieces, 1)),
                *(width, chunks, ends, offsets, sums, own),
            )


@part
def _sums(
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
            at = x_at + block * width * TILE
            end = np.int64(element(ends, block * rows + top))
            for row in range(top, bottom):
                start = end
                end = np.int64(element(ends, block * rows + row + 1))
                line = g_at + row * TILE
                sums_of_row(x, at, x_tile, g, line, g_tile, many, offsets, start, end, sums, own)


@Kernel
def add_parts(words: Any) -> None:
    """Add up the parts of a gradient and bring it into the order of the pattern.

    Words: sums ``[parts, stored]``, number of parts int64 ``[1]``, stored, row_ptr int64 ``[rows + 1]``, ends, chunks,
    rows, target float32 ``[nnz]``.
    """
    sums, count, stored, row_ptr = floats(words, 4), longs(words, 5)[0], number(words, 6), longs(words, 7)
    ends, chunks, rows, target = ints(words, 8), number(words, 9), number(words, 10), floats(words, 11)
    first, last, _ = share(words, rows)
    for row in range(first, last):
        to, end = row_ptr[row], row_ptr[row + 1]
        for chunk in range(row, chunks, rows):
            start = np.int64(ends[chunk])
            length = min(np.int64(ends[chunk + 1]) - start, end - to)
            copy(sums, start, target, to, length)
            for more in range(1, count):
                add_to(sums, more * stored + start, target, to, length)
            to += length
