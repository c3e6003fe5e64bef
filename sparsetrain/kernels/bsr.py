"""The three products of a training step with a matrix W ``[rows, columns]`` of dense blocks.

    Y = X W^T     four rows of a block and 24 tokens (64 with AVX-512) are held in registers for a run of a row's blocks
    dX = G W      the same on the list of blocks of W^T; the values are read where they are, rows as columns
    dW = G^T X    at the blocks only: three rows by four columns, 128 tokens before their lanes are summed

Four rows share each load of tokens, so the FMA ports bind and not the load ports. Tiles of
tokens, threads and the order of sums are those of `csr`; a `bsr_layout.Blocks` says where the blocks are. Blocks have
sides from 4 to 64; their values are stored block after block, each row-major.
"""

from __future__ import annotations

from typing import Annotated

import numpy as np

from sparsetrain.kernels.bsr_layout import MAX_BLOCK, MIN_BLOCK
from sparsetrain.kernels.bsr_rows import (
    four_rows,
    four_rows_of_24,
    four_rows_of_64,
    one_by_few,
    one_row,
    three_by_four,
    two_by_four,
)
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
    where,
)
from sparsetrain.kernels.simd.compile import inlined
from sparsetrain.kernels.simd.kernel import Kernel
from sparsetrain.kernels.simd.tiles import PIECES, TILE, add_to, clear, copy, cut, pack, tiles, unpack
from sparsetrain.kernels.simd.vectors import NATIVE_LANES, element
from sparsetrain.kernels.simd.words import share, sharers

# Rows of a tile of outputs (or of gradients) that are computed together: 512 of 64 tokens are 128 KB and stay in L2
# while the panels of columns pass. With one panel, outputs are complete after it and are unpacked 64 rows (16 KB) at a
# time, while they are in L1.
PANEL, DONE = 512, 64
# Columns of a run of blocks: every four rows of a block read their tile again, so it is 16 KB, half of L1.
RUN = 64
# Columns of a strip of a block: every two or three rows of the weight gradient read its tiles again. Two tiles of 16
# columns are 8 KB, which leaves L1 room for the rows of g.
STRIP = 16
# A lower block has too few rows for the groups of the weight gradient; a higher one would not fit into a panel.
_HEIGHT = where[f"{MIN_BLOCK} <= height <= {MAX_BLOCK} and rows % height == 0"]
_WIDTH = where[f"{MIN_BLOCK} <= width <= {MAX_BLOCK} and columns % width == 0"]


def _multiply(
    team: Team,
    x: Annotated[Array, element_type["== tokens", "== columns"]],
    y: Annotated[Output, element_type["== tokens", "== rows"]],
    x_step: Annotated[Int, step["x"]],
    y_step: Annotated[Int, step["y"]],
    tokens: Int,
    columns: Annotated[Int, where["columns > 0"]],
    rows: Int,
    packed: Annotated[Output, float32["threads * columns * TILE"]],
    height: Annotated[Int, _HEIGHT],
    width: Annotated[Int, _WIDTH],
    panels: Annotated[Int, where["panels > 0"]],
    ends: Annotated[Array, int32["== rows // height * panels + 1"]],
    blocks: Annotated[Array, int32["== stored"]],
    stored: Int,
    values: Annotated[Array, float32["== stored * height * width"]],
    scratch: Annotated[Output, float32["threads * PANEL * TILE"]],
    pieces: Annotated[Int, PIECES],
) -> None:
    """Write ``Y = X W^T``.

    Args:
        packed: scratch for a packed tile of x. scratch: for a panel of a tile of y, feature-major.
        height, width: of a block. panels, ends, blocks, stored: which blocks there are, see `bsr_layout.Blocks`.
        pieces: into which a tile is cut.
    """
    at_least = max(1, 16 // height)
    first, last, index = share(team, tiles(tokens) * pieces)
    base, made = index * columns * TILE, index * PANEL * TILE
    while first < last:
        token, piece = first // pieces * TILE, first % pieces
        after = min(pieces, piece + last - first)
        first += after - piece
        present = min(TILE, tokens - token)
        pack(x, token * x_step, x_step, present, columns, packed, base)
        _tile(
            *(packed, base, present, height, width, panels, ends, blocks, blocks, False, values),
            *(cut(rows // height, piece, pieces, at_least), cut(rows // height, after, pieces, at_least)),
            *(scratch, made, y, token * y_step, y_step),
        )


multiply = Kernel(_multiply, "multiply", float32)
multiply_bfloat16 = Kernel(_multiply, "multiply_bfloat16", bfloat16)


@inlined
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
    # Of a tile that is not full, only the vectors of 16 tokens that have a token.
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
                        # 64 tokens as one group with AVX-512, else as 24, 24 and 16; a part of a tile by 16s.
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
    g_packed: Annotated[Output, float32["threads * 2 * rows * TILE"]],
    height: Annotated[Int, _HEIGHT],
    width: Annotated[Int, _WIDTH],
    t_panels: Int,
    t_ends: Annotated[Array, int32["== columns // width * t_panels + 1 if need_dx"]],
    t_blocks: Annotated[Array, int32["== stored if need_dx"]],
    t_order: Annotated[Array, int32["== stored if need_dx"]],
    stored: Int,
    values: Annotated[Array, float32["== nonzeros"]],
    scratch: Annotated[Output, float32["threads * PANEL * TILE"]],
    x_packed: Annotated[Output, float32["threads * 2 * columns * TILE if need_values"]],
    panels: Annotated[Int, where["panels > 0"]],
    ends: Annotated[Array, int32["== rows // height * panels + 1"]],
    blocks: Annotated[Array, int32["== stored"]],
    nonzeros: Annotated[Int, computed["stored * height * width"]],
    sums: Annotated[Output, float32["== threads * nonzeros if need_values"]],
    pieces: Annotated[Int, PIECES],
    sharing: Annotated[Output, int64["== 1"]],
) -> None:
    """Write ``dX = G W`` and each thread's share of ``G^T X`` at the blocks of W, two tiles of tokens at a time.

    Both products read a tile of G while it is in L2; neither G nor X is ever packed as a whole.

    Args:
        need_dx, need_values: 0 or 1; what is not needed is not touched, nor is what it alone is computed from.
        height, width: of the blocks of W. panels, ends, blocks, stored: which blocks W has, see `bsr_layout.Blocks`.
        t_panels, t_ends, t_blocks, t_order: which blocks the transpose of W has.
        scratch: for a panel of a tile of dX, feature-major.
        sums: the gradient of the values by thread.
        pieces: into which two tiles are cut.
        sharing: receives the number of threads that wrote sums.
    """
    at_least = max(1, 16 // width)
    first, last, thread = share(team, (tiles(tokens) + 1) // 2 * pieces)
    g_tile, x_tile = rows * TILE, columns * TILE
    g_base, x_base = 2 * thread * g_tile, 2 * thread * x_tile
    # Each thread has its own packed tiles, panel and sums, so that no two write to one cache line but at the edges.
    made, own = thread * PANEL * TILE, thread * nonzeros
    if thread == 0:
        sharing[0] = sharers(team)
    if need_values:
        clear(sums, own, own + nonzeros)
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
                    *(g_packed, at, present, width, height, t_panels, t_ends, t_blocks, t_order, True, values),
                    *(cut(columns // width, piece, pieces, at_least), cut(columns // width, after, pieces, at_least)),
                    *(scratch, made, dx, token * dx_step, dx_step),
                )
        if need_values:
            for half in range(many):
                token = (2 * pair + half) * TILE
                present = min(TILE, tokens - token)
                pack(x, token * x_step, x_step, present, columns, x_packed, x_base + half * x_tile)
            sum_tiles(
                *(g_packed, g_base, g_tile, x_packed, x_base, x_tile, many),
                *(height, width, panels, ends, blocks),
                *(cut(rows // height, piece, pieces, 1), cut(rows // height, after, pieces, 1), sums, own),
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
                    # The tail: up to three columns beyond a multiple of four.
                    if whole < width:
                        for i in range(height):
                            one_by_few(
                                *(g, line + i * TILE, g_tile, x, at + whole * TILE, x_tile, many),
                                *(sums, to + i * width + whole, width - whole),
                            )


@Kernel
def add_shares(
    team: Team,
    sums: Annotated[Array, float32["== nonzeros * shares"]],
    sharing: Annotated[Array, int64["== 1"]],
    nonzeros: Int,
    target: Annotated[Output, float32["== nonzeros"]],
    shares: Int,
) -> None:
    """Add up the threads' shares of a gradient, in their order.

    Args:
        sums: ``[shares, nonzeros]``. sharing: the number of shares that were written, at most ``shares``.
    """
    count = min(sharing[0], shares)
    first, last, _ = share(team, nonzeros)
    # By threads over places, not shares: each place is read from all shares by one thread, in their order.
    copy(sums, first, target, first, last - first)
    for more in range(1, count):
        add_to(sums, more * nonzeros + first, target, first, last - first)
