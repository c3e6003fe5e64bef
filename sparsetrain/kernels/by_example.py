"""The gradient of the values of a sparse matrix, ``dW = G^T X``, and the squared norm of each example's part of it.

An example is a run of consecutive tokens, such as a sequence, and ``dW`` is the sum of their parts. A part exists at
the stored positions only and in one buffer of a thread: it is squared while it is added to the thread's share, so norms
cost a pass over nnz floats an example, beside the multiply-adds of its tokens. Threads take whole examples; if these do
not divide evenly, each is cut into pieces, which are ranges of rows of the matrix.

The tiles of the last tokens of an example are filled up by zeros. A share is one of `csr.add_shares` and
`bsr.add_shares`.
"""

from __future__ import annotations

from typing import Annotated

import numpy as np

from sparsetrain.kernels import bsr, csr
from sparsetrain.kernels.bsr_layout import MAX_BLOCK, MIN_BLOCK
from sparsetrain.kernels.csr_rows import TOGETHER
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
from sparsetrain.kernels.simd.kernel import Kernel
from sparsetrain.kernels.simd.tiles import PIECES, TILE, add_and_square, clear, cut, pack, tiles
from sparsetrain.kernels.simd.vectors import element
from sparsetrain.kernels.simd.words import share, sharers

_EXAMPLES = where["examples > 0 and tokens % examples == 0"]
_STRETCH = 64 * TILE  # elements of a sum that stay in the cache while the examples are added


@Kernel
def add_parts(
    team: Team,
    parts: Annotated[Array, float32["== examples * count"]],
    examples: Annotated[Int, where["examples > 0"]],
    total: Annotated[Output, float32["== count"]],
    count: Int,
    fresh: Int,
    squares: Annotated[Output, float32["== threads", "== examples"]],
    squares_step: Annotated[Int, step["squares"]],
) -> None:
    """Add the examples' parts of a dense gradient, and add the sum of the squares of each to ``squares``, by thread.

    Args:
        parts: one after another. fresh: 0 adds to what ``total`` has, 1 writes it anew.
    """
    first, last, index = share(team, tiles(count))
    end = min(count, last * TILE)
    for start in range(first * TILE, end, _STRETCH):
        size = min(_STRETCH, end - start)
        if fresh != 0:
            clear(total, start, start + size)
        for example in range(examples):
            squares[index * squares_step + example] += add_and_square(
                parts, example * count + start, total, start, size
            )


def _csr_gradients(
    team: Team,
    g: Annotated[Array, element_type["== tokens", "== rows"]],
    x: Annotated[Array, element_type["== tokens", "== columns"]],
    g_step: Annotated[Int, step["g"]],
    x_step: Annotated[Int, step["x"]],
    tokens: Int,
    examples: Annotated[Int, _EXAMPLES],
    columns: Annotated[Int, where["columns > 0"]],
    rows: Int,
    g_packed: Annotated[Output, float32["threads * TOGETHER * (rows + 1) * TILE"]],
    x_packed: Annotated[Output, float32["threads * TOGETHER * (columns + 1) * TILE"]],
    width: Int,
    chunks: Annotated[Int, computed["rows * -(-columns // width)"]],
    ends: Annotated[Array, int32["== chunks + 1"]],
    offsets: Annotated[Array, uint16["== stored"], unit["width"]],
    stored: Int,
    part: Annotated[Output, float32["== threads * stored"]],
    sums: Annotated[Output, float32["== threads * stored"]],
    squared: Annotated[Output, float32["== examples", "== pieces"]],
    squared_step: Annotated[Int, step["squared"]],
    pieces: Annotated[Int, PIECES],
    sharing: Annotated[Output, int64["== 1"]],
) -> None:
    """Write each thread's share of ``G^T X`` at the nonzeros of W, and the squared norms of the examples' parts.

    Args:
        examples: into which the tokens are divided, equally many each.
        width, chunks, ends, offsets, stored: of the layout of W.
        part: the gradient of one example, by thread. sums: the shares; both in the order of the layout.
        squared: a row for each example.
        pieces: into which an example is cut.
        sharing: receives the number of threads that wrote sums.
    """
    first, last, index = share(team, examples * pieces)
    length, own = tokens // examples, index * stored
    g_tile, x_tile = (rows + 1) * TILE, (columns + 1) * TILE
    g_base, x_base = index * TOGETHER * g_tile, index * TOGETHER * x_tile
    if index == 0:
        sharing[0] = sharers(team)
    clear(sums, own, own + stored)
    for item in range(first, last):
        example, piece = item // pieces, item % pieces
        begin, stop = cut(rows, piece, pieces, 1), cut(rows, piece + 1, pieces, 1)
        for block in range(0, chunks, rows):
            clear(part, own + np.int64(element(ends, block + begin)), own + np.int64(element(ends, block + stop)))
        for tile in range(0, tiles(length), TOGETHER):
            many = min(TOGETHER, tiles(length) - tile)
            for one in range(many):
                # A tile is filled from the tokens of this example alone.
                left = length - (tile + one) * TILE
                at = example * length + (tile + one) * TILE
                csr.pack_tile(g, at, g_step, left, rows, g_packed, g_base + one * g_tile)
                csr.pack_tile(x, at, x_step, left, columns, x_packed, x_base + one * x_tile)
            csr.sum_tiles(
                *(g_packed, g_base, g_tile, x_packed, x_base, x_tile, many, rows, begin, stop),
                *(width, chunks, ends, offsets, part, own),
            )
        total = np.float32(0.0)
        for block in range(0, chunks, rows):
            start, end = np.int64(element(ends, block + begin)), np.int64(element(ends, block + stop))
            total += add_and_square(part, own + start, sums, own + start, end - start)
        squared[example * squared_step + piece] = total


csr_gradients = Kernel(_csr_gradients, "csr_gradients", float32)
csr_gradients_bfloat16 = Kernel(_csr_gradients, "csr_gradients_bfloat16", bfloat16)


def _bsr_gradients(
    team: Team,
    g: Annotated[Array, element_type["== tokens", "== rows"]],
    x: Annotated[Array, element_type["== tokens", "== columns"]],
    g_step: Annotated[Int, step["g"]],
    x_step: Annotated[Int, step["x"]],
    tokens: Int,
    examples: Annotated[Int, _EXAMPLES],
    columns: Annotated[Int, where["columns > 0"]],
    rows: Int,
    g_packed: Annotated[Output, float32["threads * 2 * rows * TILE"]],
    x_packed: Annotated[Output, float32["threads * 2 * columns * TILE"]],
    height: Annotated[Int, where[f"{MIN_BLOCK} <= height <= {MAX_BLOCK} and rows % height == 0"]],
    width: Annotated[Int, where[f"{MIN_BLOCK} <= width <= {MAX_BLOCK} and columns % width == 0"]],
    panels: Annotated[Int, where["panels > 0"]],
    ends: Annotated[Array, int32["== rows // height * panels + 1"]],
    blocks: Annotated[Array, int32["== stored"]],
    stored: Int,
    nonzeros: Annotated[Int, computed["stored * height * width"]],
    part: Annotated[Output, float32["== threads * nonzeros"]],
    sums: Annotated[Output, float32["== threads * nonzeros"]],
    squared: Annotated[Output, float32["== examples", "== pieces"]],
    squared_step: Annotated[Int, step["squared"]],
    pieces: Annotated[Int, PIECES],
    sharing: Annotated[Output, int64["== 1"]],
) -> None:
    """Do the same at the blocks of W; their values stand in the order of the pattern.

    Args:
        height, width: of a block. panels, ends, blocks, stored: which blocks there are, see `bsr_layout.Blocks`.
    """
    first, last, index = share(team, examples * pieces)
    length, size, own = tokens // examples, height * width, index * nonzeros
    g_tile, x_tile = rows * TILE, columns * TILE
    g_base, x_base = index * 2 * g_tile, index * 2 * x_tile
    if index == 0:
        sharing[0] = sharers(team)
    clear(sums, own, own + nonzeros)
    for item in range(first, last):
        example, piece = item // pieces, item % pieces
        begin, stop = cut(rows // height, piece, pieces, 1), cut(rows // height, piece + 1, pieces, 1)
        start = own + np.int64(element(ends, begin * panels)) * size
        end = own + np.int64(element(ends, stop * panels)) * size
        clear(part, start, end)
        for tile in range(0, tiles(length), 2):
            many = min(2, tiles(length) - tile)
            for one in range(many):
                present = min(TILE, length - (tile + one) * TILE)
                token = example * length + (tile + one) * TILE
                pack(g, token * g_step, g_step, present, rows, g_packed, g_base + one * g_tile)
                pack(x, token * x_step, x_step, present, columns, x_packed, x_base + one * x_tile)
            bsr.sum_tiles(
                *(g_packed, g_base, g_tile, x_packed, x_base, x_tile, many),
                *(height, width, panels, ends, blocks, begin, stop, part, own),
            )
        squared[example * squared_step + piece] = add_and_square(part, start, sums, start, end - start)


bsr_gradients = Kernel(_bsr_gradients, "bsr_gradients", float32)
bsr_gradients_bfloat16 = Kernel(_bsr_gradients, "bsr_gradients_bfloat16", bfloat16)
