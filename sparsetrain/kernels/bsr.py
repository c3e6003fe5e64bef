"""The three products of a training step with a matrix W ``[rows, columns]`` of dense blocks.

    Y = X W^T     four rows of a block and 24 tokens (64 with AVX-512) are held in registers for a run of a row's blocks
    dX = G W      the same on the list of blocks of W^T; the values are read where they are, rows as columns
    dW = G^T X    at the blocks only: three rows by four columns, 128 tokens before their lanes are summed

Four rows share each load of tokens, so the multiply-adds and not the loads are what the processor waits for. Tiles of
tokens, threads and the order of sums are those of `csr`; a `blocks.Blocks` says where the blocks are. Blocks have sides
from 4 to 64; their values are stored block after block, each row-major.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from sparsetrain.kernels.compile import Kernel, part
from sparsetrain.kernels.register_blocks import (
    four_rows,
    four_rows_of_24,
    four_rows_of_64,
    one_by_few,
    one_row,
    three_by_four,
    two_by_four,
)
from sparsetrain.kernels.simd import NATIVE_LANES, element
from sparsetrain.kernels.tiles import TILE, Array, Int, add_to, clear, copy, cut, pack, tiles, unpack
from sparsetrain.kernels.words import floats, ints, longs, number, share, sharers, shorts

# Rows whose tile of outputs (or of gradients) is worked on at a time: 128 KB, a part of L2. Where there is one panel of
# columns, outputs are done after it, and are unpacked by 16 KB while they are in L1.
PANEL, DONE = 512, 64
# Columns of a run of blocks, whose tile is read again for every four rows: 16 KB, half of L1.
RUN = 64
# Columns of a block whose tiles of tokens are read again for every two rows of the weight gradient: 8 KB.
STRIP = 16


@Kernel
def multiply(words: Any) -> None:
    """Write ``X W^T``; see `_multiply` for the words."""
    _multiply(words, floats(words, 4), floats(words, 5))


@Kernel
def multiply_bfloat16(words: Any) -> None:
    """The same for X and Y in bfloat16, passed as uint16."""
    _multiply(words, shorts(words, 4), shorts(words, 5))


@part
def _multiply(words: Any, x: Array, y: Array) -> None:
    """Write ``Y = X W^T``.

    Words: x ``[tokens, columns]``, y ``[tokens, rows]``, the distances of their rows, tokens, columns, rows; a packed
    tile of x, scratch ``[parts, columns, 64]``; height, width, panels, ends and index of the blocks; values; scratch
    ``[parts, 512, 64]``; pieces of a tile.
    """
    x_step, y_step, tokens = number(words, 6), number(words, 7), number(words, 8)
    columns, rows, packed = number(words, 9), number(words, 10), floats(words, 11)
    height, width, panels = number(words, 12), number(words, 13), number(words, 14)
    ends, blocks, values, scratch = ints(words, 15), ints(words, 16), floats(words, 17), floats(words, 18)
    pieces, step = number(words, 19), max(1, 16 // height)
    first, last, index = share(words, tiles(tokens) * pieces)
    base, made = index * columns * TILE, index * PANEL * TILE
    while first < last:
        token, piece = first // pieces * TILE, first % pieces
        after = min(pieces, piece + last - first)
        first += after - piece
        present = min(TILE, tokens - token)
        pack(x, token * x_step, x_step, present, columns, packed, base)
        _tile(
            *(packed, base, present, height, width, panels, ends, blocks, blocks, False, values),
            *(cut(rows // height, piece, pieces, step), cut(rows // height, after, pieces, step)),
            *(scratch, made, y, token * y_step, y_step),
        )


@part
def _tile(
    x: Array,
    base: Int,
    present: Int,
    height: Int,
    width: Int,
    panels: Int,
    ends: Array,
    index: Array,
    order: Array,
    turned: bool,
    values: Array,
    begin: Int,
    after: Int,
    y: Array,
    made: Int,
    target: Array,
    to_target: Int,
    step: Int,
) -> None:
    """Write the product of one packed tile at ``x[base]`` to the rows at ``target[to_target]``, through ``y[made]``.

    That of block rows ``begin`` to ``after``; other features of a row are left as they are.
    """
    whole = height // 4 * 4
    slices, run = (present + 15) // 16 * 16, max(1, RUN // width)
    at_once = max(1, (DONE if panels == 1 else PANEL) // height)
    for top in range(begin, after, at_once):
        bottom = min(after, top + at_once)
        for panel in range(panels):
            for row in range(top, bottom):
                start = np.int64(element(ends, row * panels + panel))
                end = np.int64(element(ends, row * panels + panel + 1))
                to = made + (row - top) * height * TILE
                if panel == 0 and start == end:
                    clear(y, to, to + height * TILE)
                while start < end:
                    stop = min(end, start + run)
                    # Outputs are written, not added to, by the first run of a row's first panel.
                    first = panel == 0 and start == np.int64(element(ends, row * panels))
                    for line in range(0, whole, 4):
                        token: Int = np.int64(0)
                        if NATIVE_LANES == 16 and slices == TILE:
                            four_rows_of_64(
                                *(x, base, height, width, index, order, turned, values),
                                *(start, stop, line, y, to + line * TILE, first),
                            )
                            token = slices
                        while slices == TILE and token < 48:
                            four_rows_of_24(
                                *(x, base + token, height, width, index, order, turned, values),
                                *(start, stop, line, y, to + line * TILE + token, first),
                            )
                            token += 24
                        while token < slices:
                            four_rows(
                                *(x, base + token, height, width, index, order, turned, values),
                                *(start, stop, line, y, to + line * TILE + token, first),
                            )
                            token += 16
                    for line in range(whole, height):
                        one_row(
                            *(x, base, height, width, index, order, turned, values),
                            *(start, stop, line, y, to + line * TILE, first),
                        )
                    start = stop
        unpack(y, made, present, (bottom - top) * height, target, to_target + top * height, step)


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
    """Write the gradient of the input and ``G^T X`` at the blocks of W, two tiles of tokens at a time.

    Both products read a tile of G while it is in L2; neither G nor X is ever packed as a whole.

    Words: g ``[tokens, rows]``, dx and x ``[tokens, columns]``, the distances of their rows, tokens, columns, rows;
    need of dx, 0 or 1; need of the values' gradient; packed g, scratch ``[parts, 2, rows, 64]``; height and width of
    the blocks of W; panels, ends, index and order of the blocks of the transpose; values; scratch ``[parts, 512, 64]``;
    packed x, scratch ``[parts, 2, columns, 64]``; panels, ends and index of the blocks of W; nnz; sums
    ``[parts, nnz]``; pieces of two tiles; int64 ``[1]``, to which the number of parts is written.
    """
    g_step, dx_step, x_step, tokens = number(words, 7), number(words, 8), number(words, 9), number(words, 10)
    columns, rows, need_dx, need_values = number(words, 11), number(words, 12), number(words, 13), number(words, 14)
    g_packed, height, width = floats(words, 15), number(words, 16), number(words, 17)
    t_panels, t_ends, t_index, t_order = number(words, 18), ints(words, 19), ints(words, 20), ints(words, 21)
    values, scratch, x_packed = floats(words, 22), floats(words, 23), floats(words, 24)
    panels, ends, index, nnz = number(words, 25), ints(words, 26), ints(words, 27), number(words, 28)
    sums, pieces, lent, step = floats(words, 29), number(words, 30), longs(words, 31), max(1, 16 // width)
    first, last, part_index = share(words, (tiles(tokens) + 1) // 2 * pieces)
    g_tile, x_tile = rows * TILE, columns * TILE
    g_base, x_base = 2 * part_index * g_tile, 2 * part_index * x_tile
    made, own = part_index * PANEL * TILE, part_index * nnz
    if part_index == 0:
        lent[0] = sharers(words)
    if need_values:
        clear(sums, own, own + nnz)
    while first < last:
        pair, piece = first // pieces, first % pieces
        after = min(pieces, piece + last - first)
        first += after - piece
        many = 1 if (2 * pair + 1) * TILE >= tokens else 2
        for half in range(many):
            token = (2 * pair + half) * TILE
            present = min(TILE, tokens - token)
            at = g_base + half * g_tile
            pack(g, token * g_step, g_step, present, rows, g_packed, at)
            if need_dx:
                _tile(
                    *(g_packed, at, present, width, height, t_panels, t_ends, t_index, t_order, True, values),
                    *(cut(columns // width, piece, pieces, step), cut(columns // width, after, pieces, step)),
                    *(scratch, made, dx, token * dx_step, dx_step),
                )
        if need_values:
            for half in range(many):
                token = (2 * pair + half) * TILE
                present = min(TILE, tokens - token)
                pack(x, token * x_step, x_step, present, columns, x_packed, x_base + half * x_tile)
            _sums(
                *(g_packed, g_base, g_tile, x_packed, x_base, x_tile, many),
                *(height, width, panels, ends, index),
                *(cut(rows // height, piece, pieces, 1), cut(rows // height, after, pieces, 1), sums, own),
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
    height: Int,
    width: Int,
    panels: Int,
    ends: Array,
    index: Array,
    begin: Int,
    after: Int,
    sums: Array,
    own: Int,
) -> None:
    """Add to ``sums[own:]`` the inner products in block rows ``begin`` to ``after`` over one or two tiles."""
    size = height * width
    at_once = max(1, PANEL // height)
    whole = width // 4 * 4
    for top in range(begin, after, at_once):
        bottom = min(after, top + at_once)
        for panel in range(panels):
            for row in range(top, bottom):
                line = g_at + row * height * TILE
                chunk = row * panels + panel
                for block in range(np.int64(element(ends, chunk)), np.int64(element(ends, chunk + 1))):
                    at, to = x_at + np.int64(element(index, block)) * width * TILE, own + block * size
                    for strip in range(0, whole, STRIP):
                        i: Int = np.int64(0)
                        while i < height:
                            # Threes as far as no single row is left over.
                            three = i + 4 != height and i + 3 <= height
                            for j in range(strip, min(whole, strip + STRIP), 4):
                                if three:
                                    three_by_four(
                                        *(g, line + i * TILE, g_tile, x, at + j * TILE, x_tile, many),
                                        *(sums, to + i * width + j, width),
                                    )
                                else:
                                    two_by_four(
                                        *(g, line + i * TILE, g_tile, x, at + j * TILE, x_tile, many),
                                        *(sums, to + i * width + j, width),
                                    )
                            i += 3 if three else 2
                    if whole < width:
                        for i in range(height):
                            one_by_few(
                                *(g, line + i * TILE, g_tile, x, at + whole * TILE, x_tile, many),
                                *(sums, to + i * width + whole, width - whole),
                            )


@Kernel
def add_parts(words: Any) -> None:
    """Add up the parts of a gradient, in their order.

    Words: sums ``[parts, nnz]``, number of parts int64 ``[1]``, nnz, target float32 ``[nnz]``.
    """
    sums, count, nnz, target = floats(words, 4), longs(words, 5)[0], number(words, 6), floats(words, 7)
    first, last, _ = share(words, nnz)
    copy(sums, first, target, first, last - first)
    for more in range(1, count):
        add_to(sums, more * nnz + first, target, first, last - first)
