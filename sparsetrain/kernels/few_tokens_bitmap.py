"""``Y = X W^T`` for up to 16 tokens with a sparse matrix W ``[rows, columns]`` that is not very sparse.

A column of 16 bits beside each value makes 6 bytes a nonzero: more than a dense matrix has from a density of two thirds
on. Here a bit of each weight says whether it is stored: 4 bytes a nonzero and an eighth of a byte a weight in float32,
so that even a matrix without a zero has only 1.03 times the bytes of a dense one (1.06 times in bfloat16). Values are
read once, from where the optimizer keeps them.

Sixteen columns of a row are computed at a time: as many values as bits are set are spread over the lanes of these bits,
and multiplied with x there. The work is that of a dense product, 16 columns for every multiply-add, which few tokens
hide behind the reads. Threads take ranges of rows with about as many nonzeros each.
"""

from __future__ import annotations

from typing import Annotated

import numpy as np

from sparsetrain.kernels.few_tokens import AHEAD, SHARES, rows_of
from sparsetrain.kernels.simd.arguments import (
    Array,
    Int,
    Output,
    Team,
    bfloat16,
    element_type,
    float32,
    int64,
    step,
    uint16,
    where,
)
from sparsetrain.kernels.simd.bits import SPREADS, SPREADS_BFLOAT16, load_at, ones, spread
from sparsetrain.kernels.simd.compile import inlined
from sparsetrain.kernels.simd.gather import prefetch
from sparsetrain.kernels.simd.kernel import Kernel
from sparsetrain.kernels.simd.lanes import sum_lanes, write_sums4, write_sums8
from sparsetrain.kernels.simd.vectors import add, element, fma, splat
from sparsetrain.kernels.simd.words import share

__all__ = ["MOST", "SPREADS", "SPREADS_BFLOAT16", "product", "product_bfloat16"]

MOST = 16  # tokens


def _product(
    team: Team,
    x: Annotated[Array, float32["== tokens", "== columns"]],
    y: Annotated[Output, float32["== tokens", "== rows"]],
    x_step: Annotated[Int, step["x"]],
    y_step: Annotated[Int, step["y"]],
    tokens: Annotated[Int, where["1 <= tokens <= MOST"]],
    columns: Annotated[Int, where["columns <= 16 * pieces"]],
    rows: Int,
    pieces: Int,
    bounds: Annotated[Array, int64["== rows + 1"]],
    bitmap: Annotated[Array, uint16["== rows * pieces"]],
    nonzeros: Int,
    values: Annotated[Array, element_type["== nonzeros"]],
) -> None:
    """Write ``Y = X W^T``.

    Args:
        pieces, bounds, bitmap: of the `few_tokens_layout.Bitmap` of W. values: in the order of its rows.
    """
    first, last, _ = share(team, SHARES)
    begin = rows_of(bounds, rows, nonzeros, first, SHARES)
    stop = rows_of(bounds, rows, nonzeros, last, SHARES)
    for row in range(begin, stop):
        start, at = element(bounds, row), row * pieces
        if tokens == 1:
            y[row] = _one(x, bitmap, at, pieces, values, start)
            continue
        for token in range(0, tokens, 8):
            to, last = token * y_step + row, min(7, tokens - token - 1)
            if last < 4:
                _four(x, token * x_step, x_step, last, bitmap, at, pieces, values, start, y, to, y_step)
            else:
                _eight(x, token * x_step, x_step, last, bitmap, at, pieces, values, start, y, to, y_step)


product = Kernel(_product, "product", float32)
product_bfloat16 = Kernel(_product, "product_bfloat16", bfloat16)


@inlined
def _one(x: Array, bitmap: Array, at: Int, pieces: Int, values: Array, place: Int) -> float:
    """Return the inner product of one token and a row; two accumulators, which take turns, hide a latency."""
    a = b = splat(np.float32(0.0))
    piece = 0
    while piece + 2 <= pieces:
        prefetch(values, place + AHEAD)
        prefetch(values, place + AHEAD + 16)
        bits = element(bitmap, at + piece)
        a = fma(spread(values, place, bits), load_at(x, 16 * piece, bits), a)
        place += ones(bits)
        bits = element(bitmap, at + piece + 1)
        b = fma(spread(values, place, bits), load_at(x, 16 * piece + 16, bits), b)
        place += ones(bits)
        piece += 2
    if piece < pieces:
        bits = element(bitmap, at + piece)
        a = fma(spread(values, place, bits), load_at(x, 16 * piece, bits), a)
    return sum_lanes(add(a, b))


@inlined
def _four(
    x: Array,
    from_: Int,
    x_step: Int,
    last: Int,
    bitmap: Array,
    at: Int,
    pieces: Int,
    values: Array,
    place: Int,
    y: Array,
    to: Int,
    y_step: Int,
) -> None:
    """Write the inner products of a row and tokens 0 to ``last`` of four; the last one stands for those behind it."""
    two, three, four = from_ + min(1, last) * x_step, from_ + min(2, last) * x_step, from_ + last * x_step
    a = b = c = d = splat(np.float32(0.0))
    for piece in range(pieces):
        prefetch(values, place + AHEAD)
        bits = element(bitmap, at + piece)
        w = spread(values, place, bits)
        place += ones(bits)
        column = 16 * piece
        a = fma(w, load_at(x, from_ + column, bits), a)
        b = fma(w, load_at(x, two + column, bits), b)
        c = fma(w, load_at(x, three + column, bits), c)
        d = fma(w, load_at(x, four + column, bits), d)
    write_sums4(y, to, y_step, last, a, b, c, d)


@inlined
def _eight(
    x: Array,
    from_: Int,
    x_step: Int,
    last: Int,
    bitmap: Array,
    at: Int,
    pieces: Int,
    values: Array,
    place: Int,
    y: Array,
    to: Int,
    y_step: Int,
) -> None:
    """Do the same for tokens 0 to ``last`` of eight, at least five."""
    six, seven = from_ + min(5, last) * x_step, from_ + min(6, last) * x_step
    eight = from_ + last * x_step
    a = b = c = d = e = f = g = h = splat(np.float32(0.0))
    for piece in range(pieces):
        prefetch(values, place + AHEAD)
        bits = element(bitmap, at + piece)
        w = spread(values, place, bits)
        place += ones(bits)
        column = 16 * piece
        start = from_ + column
        a = fma(w, load_at(x, start, bits), a)
        b = fma(w, load_at(x, start + x_step, bits), b)
        c = fma(w, load_at(x, start + 2 * x_step, bits), c)
        d = fma(w, load_at(x, start + 3 * x_step, bits), d)
        e = fma(w, load_at(x, start + 4 * x_step, bits), e)
        f = fma(w, load_at(x, six + column, bits), f)
        g = fma(w, load_at(x, seven + column, bits), g)
        h = fma(w, load_at(x, eight + column, bits), h)
    write_sums8(y, to, y_step, last, a, b, c, d, e, f, g, h)
