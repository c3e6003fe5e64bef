"""What the kernels of `bsr` do in registers: a few rows or sums for all columns of a block, for some tokens.

Two FMA ports with 4-cycle latency need 8 independent accumulators. Twelve of 8 lanes fit into the 16 registers of AVX2
beside three loads of tokens and one broadcast; sixteen of 16 lanes fit into the 32 registers of AVX-512. Four rows of a
block share each load of tokens, so the FMA ports bind here and not the loads.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from sparsetrain.kernels.simd.arguments import Array, Int
from sparsetrain.kernels.simd.compile import inlined
from sparsetrain.kernels.simd.lanes import add_sums4, add_sums_2x4, add_sums_head
from sparsetrain.kernels.simd.tiles import TILE, store_tile
from sparsetrain.kernels.simd.vectors import (
    NATIVE_LANES,
    element,
    fma,
    load,
    load8,
    native_load,
    native_splat,
    splat,
    splat8,
    store,
)


@inlined
def four_rows(
    x: Array,
    at: Int,
    height: Int,
    width: Int,
    index: Array,
    order: Array,
    turned: bool,
    values: Array,
    start: Int,
    stop: Int,
    line: Int,
    y: Array,
    to: Int,
    first: bool,
) -> None:
    """Add to four rows and 16 tokens of the outputs the products of blocks ``start`` to ``stop``, from ``line`` on."""
    size = height * width
    # In the values of a block: the distance from a row to the next one, and from a column to the next one.
    across, along = (np.int64(1), height) if turned else (width, np.int64(1))
    if first:
        a = b = c = d = splat(np.float32(0.0))
    else:
        a, b, c, d = load(y, to), load(y, to + TILE), load(y, to + 2 * TILE), load(y, to + 3 * TILE)
    for block in range(start, stop):
        number = np.int64(element(order, block)) if turned else block
        w = number * size + line * across
        o = at + np.int64(element(index, block)) * width * TILE
        end = o + width * TILE
        # Four columns at a time, so that the counter costs one instruction in four terms.
        while o + 4 * TILE <= end:
            a, b, c, d = _term(x, o, values, w, across, a, b, c, d)
            a, b, c, d = _term(x, o + TILE, values, w + along, across, a, b, c, d)
            a, b, c, d = _term(x, o + 2 * TILE, values, w + 2 * along, across, a, b, c, d)
            a, b, c, d = _term(x, o + 3 * TILE, values, w + 3 * along, across, a, b, c, d)
            o += 4 * TILE
            w += 4 * along
        while o < end:
            a, b, c, d = _term(x, o, values, w, across, a, b, c, d)
            o += TILE
            w += along
    store(y, to, a)
    store(y, to + TILE, b)
    store(y, to + 2 * TILE, c)
    store(y, to + 3 * TILE, d)


@inlined
def four_rows_of_24(
    x: Array,
    at: Int,
    height: Int,
    width: Int,
    index: Array,
    order: Array,
    turned: bool,
    values: Array,
    start: Int,
    stop: Int,
    line: Int,
    y: Array,
    to: Int,
    first: bool,
) -> None:
    """Do the same for 24 tokens: four rows by three vectors of 8 lanes are twelve accumulators, which fill AVX2."""
    size = height * width
    across, along = (np.int64(1), height) if turned else (width, np.int64(1))
    if first:
        a = b = c = d = e = f = g = h = i = j = k = m = splat8(np.float32(0.0))
    else:
        a, b, c = load8(y, to), load8(y, to + 8), load8(y, to + 16)
        d, e, f = load8(y, to + TILE), load8(y, to + TILE + 8), load8(y, to + TILE + 16)
        g, h, i = load8(y, to + 2 * TILE), load8(y, to + 2 * TILE + 8), load8(y, to + 2 * TILE + 16)
        j, k, m = load8(y, to + 3 * TILE), load8(y, to + 3 * TILE + 8), load8(y, to + 3 * TILE + 16)
    for block in range(start, stop):
        number = np.int64(element(order, block)) if turned else block
        w = number * size + line * across
        o = at + np.int64(element(index, block)) * width * TILE
        end = o + width * TILE
        while o < end:
            # Three loads and four broadcasts for twelve FMAs: 3.5 cycles of loads, 6 of FMAs.
            p, q, r = load8(x, o), load8(x, o + 8), load8(x, o + 16)
            v = splat8(element(values, w))
            a, b, c = fma(v, p, a), fma(v, q, b), fma(v, r, c)
            v = splat8(element(values, w + across))
            d, e, f = fma(v, p, d), fma(v, q, e), fma(v, r, f)
            v = splat8(element(values, w + 2 * across))
            g, h, i = fma(v, p, g), fma(v, q, h), fma(v, r, i)
            v = splat8(element(values, w + 3 * across))
            j, k, m = fma(v, p, j), fma(v, q, k), fma(v, r, m)
            o += TILE
            w += along
    for place, left, middle, right in ((0, a, b, c), (1, d, e, f), (2, g, h, i), (3, j, k, m)):
        store(y, to + place * TILE, left)
        store(y, to + place * TILE + 8, middle)
        store(y, to + place * TILE + 16, right)


@inlined
def four_rows_of_64(
    x: Array,
    at: Int,
    height: Int,
    width: Int,
    index: Array,
    order: Array,
    turned: bool,
    values: Array,
    start: Int,
    stop: Int,
    line: Int,
    y: Array,
    to: Int,
    first: bool,
) -> None:
    """Do the same for 64 tokens with AVX-512: four rows by four vectors of 16 lanes are sixteen accumulators."""
    size = height * width
    across, along = (np.int64(1), height) if turned else (width, np.int64(1))
    second, third, fourth = to + TILE, to + 2 * TILE, to + 3 * TILE
    if first:
        a = b = c = d = e = f = g = h = i = j = k = m = n = o = p = q = splat(np.float32(0.0))
    else:
        a, b, c, d = load(y, to), load(y, to + 16), load(y, to + 32), load(y, to + 48)
        e, f, g, h = load(y, second), load(y, second + 16), load(y, second + 32), load(y, second + 48)
        i, j, k, m = load(y, third), load(y, third + 16), load(y, third + 32), load(y, third + 48)
        n, o, p, q = load(y, fourth), load(y, fourth + 16), load(y, fourth + 32), load(y, fourth + 48)
    for block in range(start, stop):
        number = np.int64(element(order, block)) if turned else block
        w = number * size + line * across
        place = at + np.int64(element(index, block)) * width * TILE
        end = place + width * TILE
        while place < end:
            # Four loads and four broadcasts for sixteen FMAs.
            r, s, t, u = load(x, place), load(x, place + 16), load(x, place + 32), load(x, place + 48)
            v = splat(element(values, w))
            a, b, c, d = fma(v, r, a), fma(v, s, b), fma(v, t, c), fma(v, u, d)
            v = splat(element(values, w + across))
            e, f, g, h = fma(v, r, e), fma(v, s, f), fma(v, t, g), fma(v, u, h)
            v = splat(element(values, w + 2 * across))
            i, j, k, m = fma(v, r, i), fma(v, s, j), fma(v, t, k), fma(v, u, m)
            v = splat(element(values, w + 3 * across))
            n, o, p, q = fma(v, r, n), fma(v, s, o), fma(v, t, p), fma(v, u, q)
            place += TILE
            w += along
    store_tile(y, to, a, b, c, d)
    store_tile(y, second, e, f, g, h)
    store_tile(y, third, i, j, k, m)
    store_tile(y, fourth, n, o, p, q)


@inlined
def _term(
    x: Array, o: Int, values: Array, w: Int, across: Int, a: Any, b: Any, c: Any, d: Any
) -> tuple[Any, Any, Any, Any]:
    """Return the accumulators of four rows and 16 tokens after one more column of a block."""
    tokens = load(x, o)
    return (
        fma(splat(element(values, w)), tokens, a),
        fma(splat(element(values, w + across)), tokens, b),
        fma(splat(element(values, w + 2 * across)), tokens, c),
        fma(splat(element(values, w + 3 * across)), tokens, d),
    )


@inlined
def one_row(
    x: Array,
    at: Int,
    height: Int,
    width: Int,
    index: Array,
    order: Array,
    turned: bool,
    values: Array,
    start: Int,
    stop: Int,
    line: Int,
    y: Array,
    to: Int,
    first: bool,
) -> None:
    """Do the same for a single row and all 64 tokens: for the rows of a block beyond a multiple of four."""
    size = height * width
    across, along = (np.int64(1), height) if turned else (width, np.int64(1))
    if first:
        a = b = c = d = splat(np.float32(0.0))
    else:
        a, b, c, d = load(y, to), load(y, to + 16), load(y, to + 32), load(y, to + 48)
    for block in range(start, stop):
        number = np.int64(element(order, block)) if turned else block
        w = number * size + line * across
        o = at + np.int64(element(index, block)) * width * TILE
        # Four loads and a broadcast for four FMAs: loads bind, but at most three rows of a block come this way.
        for _ in range(width):
            v = splat(element(values, w))
            a, b = fma(v, load(x, o), a), fma(v, load(x, o + 16), b)
            c, d = fma(v, load(x, o + 32), c), fma(v, load(x, o + 48), d)
            o += TILE
            w += along
    store_tile(y, to, a, b, c, d)


@inlined
def two_by_four(
    g: Array, row: Int, g_tile: Int, x: Array, at: Int, x_tile: Int, many: Int, sums: Array, to: Int, width: Int
) -> None:
    """Add the inner products of two rows of g with four of x: eight accumulators, and six loads for eight FMAs."""
    a = b = c = d = e = f = h = i = native_splat(np.float32(0.0))
    for tile in range(many):
        first, other = row + tile * g_tile, at + tile * x_tile
        for token in range(0, TILE, NATIVE_LANES):
            u, v, o = native_load(g, first + token), native_load(g, first + TILE + token), other + token
            p, q = native_load(x, o), native_load(x, o + TILE)
            r, s = native_load(x, o + 2 * TILE), native_load(x, o + 3 * TILE)
            a, b, c, d = fma(u, p, a), fma(u, q, b), fma(u, r, c), fma(u, s, d)
            e, f, h, i = fma(v, p, e), fma(v, q, f), fma(v, r, h), fma(v, s, i)
    add_sums_2x4(sums, to, to + width, a, b, c, d, e, f, h, i)


@inlined
def three_by_four(
    g: Array, row: Int, g_tile: Int, x: Array, at: Int, x_tile: Int, many: Int, sums: Array, to: Int, width: Int
) -> None:
    """Do the same for three rows of g: twelve accumulators, and seven loads for twelve FMAs."""
    a = b = c = d = e = f = h = i = j = k = m = n = native_splat(np.float32(0.0))
    for tile in range(many):
        first, other = row + tile * g_tile, at + tile * x_tile
        for token in range(0, TILE, NATIVE_LANES):
            o, line = other + token, first + token
            u, v, w = native_load(g, line), native_load(g, line + TILE), native_load(g, line + 2 * TILE)
            # A row of x is loaded when it is needed: with all four, 19 vectors would be alive; AVX2 has 16 registers.
            p = native_load(x, o)
            a, e, j = fma(u, p, a), fma(v, p, e), fma(w, p, j)
            p = native_load(x, o + TILE)
            b, f, k = fma(u, p, b), fma(v, p, f), fma(w, p, k)
            p = native_load(x, o + 2 * TILE)
            c, h, m = fma(u, p, c), fma(v, p, h), fma(w, p, m)
            p = native_load(x, o + 3 * TILE)
            d, i, n = fma(u, p, d), fma(v, p, i), fma(w, p, n)
    add_sums_2x4(sums, to, to + width, a, b, c, d, e, f, h, i)
    add_sums4(sums, to + 2 * width, j, k, m, n)


@inlined
def one_by_few(
    g: Array, row: Int, g_tile: Int, x: Array, at: Int, x_tile: Int, many: Int, sums: Array, to: Int, count: Int
) -> None:
    """Add the inner products of one row of g with ``count`` (at most four) of x."""
    # The missing ones of four repeat the last and are not written.
    second, third, fourth = min(1, count - 1) * TILE, min(2, count - 1) * TILE, (count - 1) * TILE
    a = b = c = d = native_splat(np.float32(0.0))
    for tile in range(many):
        first, other = row + tile * g_tile, at + tile * x_tile
        for token in range(0, TILE, NATIVE_LANES):
            u, o = native_load(g, first + token), other + token
            a, b = fma(u, native_load(x, o), a), fma(u, native_load(x, o + second), b)
            c, d = fma(u, native_load(x, o + third), c), fma(u, native_load(x, o + fourth), d)
    if count == 4:
        add_sums4(sums, to, a, b, c, d)
    else:
        add_sums_head(sums, to, count, a, b, c, d)
