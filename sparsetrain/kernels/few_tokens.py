"""``Y = X W^T`` for up to 48 tokens with an unstructured sparse matrix W ``[rows, columns]``, as in decoding.

With few tokens a product is bound by the bytes of W, and not by multiply-adds. The kernels therefore read each value
once, from where the optimizer keeps it, and beside it a column of 16 bits: 6 bytes a nonzero (4 in bfloat16), where a
dense product reads 4 a weight. Nothing is reordered and nothing is kept beside the columns.

    1 token     sixteen nonzeros of a row at a time: their values, their columns, and a gather of x
    2 to 8      x is turned once, so that a column's tokens stand side by side: a nonzero is one broadcast and one
                multiply-add of 8 lanes
    up to 48    the same with one to three vectors of 16 lanes

A segment is as many columns as keep x of all tokens in L2, at most what 16 bits can count. Threads take ranges of rows
with about as many nonzeros each.
"""

from __future__ import annotations

from typing import Annotated, Any

import numpy as np

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
    unit,
    where,
)
from sparsetrain.kernels.simd.compile import inlined
from sparsetrain.kernels.simd.gather import gather, gather_head, head, prefetch
from sparsetrain.kernels.simd.kernel import Kernel
from sparsetrain.kernels.simd.lanes import sum_lanes, turn8, turn16
from sparsetrain.kernels.simd.vectors import add, element, fma, get, load, load8, load_quad, splat, splat8, store
from sparsetrain.kernels.simd.words import share

MOST = 48  # tokens
PANEL = 64  # rows of Y that are collected before they are turned and written
AHEAD = 512  # values between what is computed and the cache lines that are asked for; measured, see the log
PADDING = 16  # columns behind the last one, so that the last nonzeros can be read like all others

SHARES = 1 << 20  # of the nonzeros, by which threads get ranges of rows
_LOW16, _16, _32, _48 = np.uint64(0xFFFF), np.uint64(16), np.uint64(32), np.uint64(48)


@inlined
def lanes_of(tokens: Int) -> int:
    """Return how many tokens stand side by side for a number of tokens: 8, 16, 32 or 48."""
    return 8 if tokens <= 8 else (tokens + 15) // 16 * 16


@inlined
def rows_of(bounds: Array, rows: Int, nonzeros: Int, shared: Int, shares: Int) -> int:
    """Return the first row of share ``shared`` of ``shares``: where that share of the nonzeros has been passed."""
    if shared >= shares:
        return rows
    wanted, low, high = nonzeros * shared // shares, 0, rows
    while low < high:
        middle = (low + high) // 2
        if element(bounds, middle) < wanted:
            low = middle + 1
        else:
            high = middle
    return low


def _one(
    team: Team,
    x: Annotated[Array, float32["== columns"]],
    y: Annotated[Output, float32["== rows"]],
    columns: Annotated[Int, where["columns <= segments * width"]],
    rows: Int,
    width: Annotated[Int, where["1 <= width <= 65536"]],
    segments: Annotated[Int, where["segments > 0"]],
    bounds: Annotated[Array, int64["== (segments + 1) * rows"]],
    places: Annotated[Array, uint16["== nonzeros + PADDING"], unit["width"]],
    nonzeros: Int,
    values: Annotated[Array, element_type["== nonzeros"]],
) -> None:
    """Write ``y = W x``.

    Args:
        width, segments, bounds, places: of the `few_tokens_layout.Columns` of W. values: in the order of its rows.
    """
    first, last, _ = share(team, SHARES)
    begin = rows_of(bounds, rows, nonzeros, first, SHARES)
    stop = rows_of(bounds, rows, nonzeros, last, SHARES)
    for segment in range(segments):
        at, from_, to = segment * width, segment * rows, (segment + 1) * rows
        for row in range(begin, stop):
            start, end = element(bounds, from_ + row), element(bounds, to + row)
            total = _inner(x, at, places, values, start, end, nonzeros)
            y[row] = total if segment == 0 else y[row] + total


one = Kernel(_one, "one", float32)
one_bfloat16 = Kernel(_one, "one_bfloat16", bfloat16)


@inlined
def _inner(x: Array, at: Int, places: Array, values: Array, start: Int, end: Int, nonzeros: Int) -> float:
    """Return the inner product of the nonzeros ``start`` to ``end`` with x at their columns."""
    a = b = splat(np.float32(0.0))
    place = start
    while place + 32 <= end:
        prefetch(values, place + AHEAD)
        prefetch(values, place + AHEAD + 16)
        prefetch(places, place + AHEAD)
        a = fma(load(values, place), gather(x, at, places, place), a)
        b = fma(load(values, place + 16), gather(x, at, places, place + 16), b)
        place += 32
    if place + 16 <= end:
        a = fma(load(values, place), gather(x, at, places, place), a)
        place += 16
    if place < end and place + 16 <= nonzeros:
        count = end - place
        b = fma(head(load(values, place), count), gather_head(x, at, places, place, count), b)
        place = end
    total = sum_lanes(add(a, b))
    while place < end:  # the last nonzeros of the matrix
        total += get(values, place) * element(x, at + np.int64(element(places, place)))
        place += 1
    return total


def _several(
    team: Team,
    x: Annotated[Array, float32["== tokens", "== columns"]],
    y: Annotated[Output, float32["== tokens", "== rows"]],
    x_step: Annotated[Int, step["x"]],
    y_step: Annotated[Int, step["y"]],
    tokens: Annotated[Int, where["1 <= tokens <= MOST"]],
    columns: Annotated[Int, where["columns <= segments * width"]],
    rows: Int,
    packed: Annotated[Output, float32["threads * (columns + 16) * MOST"]],
    scratch: Annotated[Output, float32["threads * (PANEL + 16) * MOST"]],
    width: Annotated[Int, where["1 <= width <= 65536"]],
    segments: Annotated[Int, where["segments > 0"]],
    bounds: Annotated[Array, int64["== (segments + 1) * rows"]],
    places: Annotated[Array, uint16["== nonzeros + PADDING"], unit["width"]],
    nonzeros: Int,
    values: Annotated[Array, element_type["== nonzeros"]],
) -> None:
    """Write ``Y = X W^T``.

    Args:
        packed: scratch for x, its tokens side by side. scratch: for a panel of y and a square of it.
        width, segments, bounds, places: of the `few_tokens_layout.Columns` of W. values: in the order of its rows.
    """
    first, last, index = share(team, SHARES)
    begin = rows_of(bounds, rows, nonzeros, first, SHARES)
    stop = rows_of(bounds, rows, nonzeros, last, SHARES)
    if begin == stop:
        return
    lanes = lanes_of(tokens)
    base, made = index * (columns + 16) * MOST, index * (PANEL + 16) * MOST
    square = made + PANEL * MOST
    pack_tokens(x, x_step, tokens, columns, lanes, packed, base)
    for top in range(begin, stop, PANEL):
        bottom = min(stop, top + PANEL)
        for segment in range(segments):
            at, fresh = base + segment * width * lanes, segment == 0
            from_, to = segment * rows, (segment + 1) * rows
            for row in range(top, bottom):
                start, end = element(bounds, from_ + row), element(bounds, to + row)
                line = made + (row - top) * lanes
                if lanes == 8:
                    _row_of_8(packed, at, places, values, start, end, scratch, line, fresh)
                elif lanes == 16:
                    _row_of_16(packed, at, places, values, start, end, scratch, line, fresh)
                elif lanes == 32:
                    _row_of_32(packed, at, places, values, start, end, scratch, line, fresh)
                else:
                    _row_of_48(packed, at, places, values, start, end, scratch, line, fresh)
        write_panel(scratch, made, square, lanes, bottom - top, tokens, y, top, y_step)


several = Kernel(_several, "several", float32)
several_bfloat16 = Kernel(_several, "several_bfloat16", bfloat16)


@inlined
def pack_tokens(x: Array, x_step: Int, tokens: Int, columns: Int, lanes: Int, packed: Array, base: Int) -> None:
    """Write x ``[tokens, columns]`` as ``[columns, lanes]``; what lanes behind the last token hold is not used."""
    whole = columns // 16 * 16
    for token in range(0, tokens, 16):
        last = tokens - token - 1
        for column in range(0, whole, 16):
            source, to = token * x_step + column, base + column * lanes + token
            if lanes == 8:
                turn8(x, source, x_step, last, packed, to, lanes)
                turn8(x, source + 8, x_step, last, packed, to + 8 * lanes, lanes)
            else:
                turn16(x, source, x_step, last, packed, to, lanes)
    for column in range(whole, columns):
        for token in range(tokens):
            packed[base + column * lanes + token] = element(x, token * x_step + column)
        for token in range(tokens, lanes):
            packed[base + column * lanes + token] = np.float32(0.0)


@inlined
def write_panel(
    scratch: Array, made: Int, square: Int, lanes: Int, rows: Int, tokens: Int, y: Array, top: Int, y_step: Int
) -> None:
    """Write a panel ``[rows, lanes]`` to the columns of y from ``top`` on, by squares that lie at ``square``."""
    whole = rows // 16 * 16
    for row in range(0, whole, 16):
        for token in range(0, tokens, 16):
            source = made + row * lanes + token
            if lanes == 8:
                turn8(scratch, source, lanes, 7, scratch, square, 16)
                turn8(scratch, source + 8 * lanes, lanes, 7, scratch, square + 8, 16)
            else:
                turn16(scratch, source, lanes, 15, scratch, square, 16)
            for one in range(min(16, tokens - token)):
                store(y, (token + one) * y_step + top + row, load(scratch, square + 16 * one))
    for row in range(whole, rows):
        for token in range(tokens):
            y[token * y_step + top + row] = scratch[made + row * lanes + token]


def _row_of_one_vector(lanes: int, load: Any, splat: Any) -> Any:
    """Return a function that adds the products of a row's nonzeros for one vector of tokens to a line of a panel.

    Each of four nonzeros has an accumulator: a single one would wait for its latency.
    """

    @inlined
    def row(
        x: Array, at: Int, places: Array, values: Array, start: Int, end: Int, y: Array, line: Int, fresh: bool
    ) -> None:
        a = b = c = d = splat(np.float32(0.0))
        place = start
        while place + 4 <= end:
            prefetch(values, place + AHEAD)
            prefetch(places, place + AHEAD)
            quad = load_quad(places, place)
            a = fma(splat(get(values, place)), load(x, at + np.int64(quad & _LOW16) * lanes), a)
            b = fma(splat(get(values, place + 1)), load(x, at + np.int64((quad >> _16) & _LOW16) * lanes), b)
            c = fma(splat(get(values, place + 2)), load(x, at + np.int64((quad >> _32) & _LOW16) * lanes), c)
            d = fma(splat(get(values, place + 3)), load(x, at + np.int64(quad >> _48) * lanes), d)
            place += 4
        while place < end:
            a = fma(splat(get(values, place)), load(x, at + np.int64(element(places, place)) * lanes), a)
            place += 1
        total = add(add(a, b), add(c, d))
        store(y, line, total if fresh else add(load(y, line), total))

    return row


@inlined
def _add_to(y: Array, line: Int, total: Any, fresh: bool) -> None:
    """Add the sums of a segment to those before it; a sum that ran on through a wide row would lose more digits."""
    store(y, line, total if fresh else add(load(y, line), total))


_row_of_8 = _row_of_one_vector(8, load8, splat8)
_row_of_16 = _row_of_one_vector(16, load, splat)


@inlined
def _row_of_32(
    x: Array, at: Int, places: Array, values: Array, start: Int, end: Int, y: Array, line: Int, fresh: bool
) -> None:
    """Do the same for two vectors of tokens; nonzeros alternate between two sets of accumulators."""
    a = b = c = d = splat(np.float32(0.0))
    place = start
    while place + 4 <= end:
        prefetch(values, place + AHEAD)
        prefetch(places, place + AHEAD)
        quad = load_quad(places, place)
        o, w = at + np.int64(quad & _LOW16) * 32, splat(get(values, place))
        a, b = fma(w, load(x, o), a), fma(w, load(x, o + 16), b)
        o, w = at + np.int64((quad >> _16) & _LOW16) * 32, splat(get(values, place + 1))
        c, d = fma(w, load(x, o), c), fma(w, load(x, o + 16), d)
        o, w = at + np.int64((quad >> _32) & _LOW16) * 32, splat(get(values, place + 2))
        a, b = fma(w, load(x, o), a), fma(w, load(x, o + 16), b)
        o, w = at + np.int64(quad >> _48) * 32, splat(get(values, place + 3))
        c, d = fma(w, load(x, o), c), fma(w, load(x, o + 16), d)
        place += 4
    while place < end:
        o, w = at + np.int64(element(places, place)) * 32, splat(get(values, place))
        a, b = fma(w, load(x, o), a), fma(w, load(x, o + 16), b)
        place += 1
    _add_to(y, line, add(a, c), fresh)
    _add_to(y, line + 16, add(b, d), fresh)


@inlined
def _row_of_48(
    x: Array, at: Int, places: Array, values: Array, start: Int, end: Int, y: Array, line: Int, fresh: bool
) -> None:
    """Do the same for three vectors of tokens."""
    a = b = c = d = e = f = splat(np.float32(0.0))
    place = start
    while place + 4 <= end:
        prefetch(values, place + AHEAD)
        prefetch(places, place + AHEAD)
        quad = load_quad(places, place)
        o, w = at + np.int64(quad & _LOW16) * 48, splat(get(values, place))
        a, b, c = fma(w, load(x, o), a), fma(w, load(x, o + 16), b), fma(w, load(x, o + 32), c)
        o, w = at + np.int64((quad >> _16) & _LOW16) * 48, splat(get(values, place + 1))
        d, e, f = fma(w, load(x, o), d), fma(w, load(x, o + 16), e), fma(w, load(x, o + 32), f)
        o, w = at + np.int64((quad >> _32) & _LOW16) * 48, splat(get(values, place + 2))
        a, b, c = fma(w, load(x, o), a), fma(w, load(x, o + 16), b), fma(w, load(x, o + 32), c)
        o, w = at + np.int64(quad >> _48) * 48, splat(get(values, place + 3))
        d, e, f = fma(w, load(x, o), d), fma(w, load(x, o + 16), e), fma(w, load(x, o + 32), f)
        place += 4
    while place < end:
        o, w = at + np.int64(element(places, place)) * 48, splat(get(values, place))
        a, b, c = fma(w, load(x, o), a), fma(w, load(x, o + 16), b), fma(w, load(x, o + 32), c)
        place += 1
    _add_to(y, line, add(a, d), fresh)
    _add_to(y, line + 16, add(b, e), fresh)
    _add_to(y, line + 32, add(c, f), fresh)
