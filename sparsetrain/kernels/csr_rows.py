"""What the kernels of `csr` do in registers: one row's run of nonzeros in a block of columns, for a tile of tokens.

Two FMA ports with 4-cycle latency need 8 independent accumulators. A 64-token tile gives 8 of 8 lanes but only 4 of 16,
so full-width AVX-512 keeps a second set. Where an FMA of 16 lanes occupies the port for two cycles (Zen 4), 4 suffice.

Loads bind these loops, not FMAs: each nonzero loads its own 64 tokens of x from L1, at two loads a cycle.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from sparsetrain.kernels.simd.arguments import Array, Int
from sparsetrain.kernels.simd.compile import inlined
from sparsetrain.kernels.simd.lanes import add_sums4, add_sums8, sum_lanes
from sparsetrain.kernels.simd.tiles import TILE, store_tile
from sparsetrain.kernels.simd.vectors import (
    PATH_LANES,
    add,
    element,
    fma,
    lane,
    load,
    load_four,
    load_quad,
    path_load,
    path_splat,
    splat,
    store,
)

# Tiles of tokens that the weight gradient sums over before it adds up lanes. Lanes are added up half as often for two
# tiles, which pays with 16 lanes; a block of columns of two tiles of x just fills an L1 of 48 KB. The choice for 8
# lanes was measured with 32 KB.
TOGETHER = PATH_LANES // 8

_LOW16, _16, _32, _48 = np.uint64(0xFFFF), np.uint64(16), np.uint64(32), np.uint64(48)
_lane0, _lane1, _lane2, _lane3 = lane


@inlined
def row_of_64(
    x: Array, at: Int, offsets: Array, values: Array, start: Int, end: Int, y: Array, to: Int, first: bool
) -> None:
    """Add the products of one chunk to one row of a tile of outputs, or write them if they are the ``first``.

    The accumulators stay in registers for the whole chunk. Four nonzeros share one load of their offsets and one of
    their values, so that a nonzero costs eight loads of x (8 lanes) and half a load of its own.
    """
    # 64 tokens in four vectors of 16 lanes; LLVM splits each into two registers where a register has 8.
    if first:
        a = b = c = d = splat(np.float32(0.0))
    else:
        a, b, c, d = load(y, to), load(y, to + 16), load(y, to + 32), load(y, to + 48)
    place = start
    if PATH_LANES == 16:
        a, b, c, d, place = _two_sets(x, at, offsets, values, place, end, a, b, c, d)
    while place + 4 <= end:
        quad, four = load_quad(offsets, place), load_four(values, place)
        # An offset of 16 bits counts floats, so it is added to the address without a multiplication.
        o, w = at + np.int64(quad & _LOW16), _lane0(four)
        a, b = fma(w, load(x, o), a), fma(w, load(x, o + 16), b)
        c, d = fma(w, load(x, o + 32), c), fma(w, load(x, o + 48), d)
        o, w = at + np.int64((quad >> _16) & _LOW16), _lane1(four)
        a, b = fma(w, load(x, o), a), fma(w, load(x, o + 16), b)
        c, d = fma(w, load(x, o + 32), c), fma(w, load(x, o + 48), d)
        o, w = at + np.int64((quad >> _32) & _LOW16), _lane2(four)
        a, b = fma(w, load(x, o), a), fma(w, load(x, o + 16), b)
        c, d = fma(w, load(x, o + 32), c), fma(w, load(x, o + 48), d)
        o, w = at + np.int64(quad >> _48), _lane3(four)
        a, b = fma(w, load(x, o), a), fma(w, load(x, o + 16), b)
        c, d = fma(w, load(x, o + 32), c), fma(w, load(x, o + 48), d)
        place += 4
    while place < end:  # the next block lies beyond a 16-bit offset: rare, see `Layout`
        o, w = at + np.int64(element(offsets, place)), splat(element(values, place))
        a, b = fma(w, load(x, o), a), fma(w, load(x, o + 16), b)
        c, d = fma(w, load(x, o + 32), c), fma(w, load(x, o + 48), d)
        place += 1
    store_tile(y, to, a, b, c, d)


@inlined
def _two_sets(
    x: Array, at: Int, offsets: Array, values: Array, place: Int, end: Int, a: Any, b: Any, c: Any, d: Any
) -> tuple[Any, Any, Any, Any, int]:
    """Add the products of a chunk's groups of four to the accumulators of 64 tokens.

    Nonzeros alternate between two sets of four accumulators: one set would wait for the latency of its FMAs. Values are
    broadcast by loads, since a shuffle of 16 lanes occupies a port that FMAs need.
    """
    # Eight accumulators of 16 lanes and a broadcast value are 9 of the 32 registers; x goes into the FMAs from memory.
    e = f = g = h = splat(np.float32(0.0))
    while place + 4 <= end:
        quad = load_quad(offsets, place)
        o, w = at + np.int64(quad & _LOW16), splat(element(values, place))
        a, b = fma(w, load(x, o), a), fma(w, load(x, o + 16), b)
        c, d = fma(w, load(x, o + 32), c), fma(w, load(x, o + 48), d)
        o, w = at + np.int64((quad >> _16) & _LOW16), splat(element(values, place + 1))
        e, f = fma(w, load(x, o), e), fma(w, load(x, o + 16), f)
        g, h = fma(w, load(x, o + 32), g), fma(w, load(x, o + 48), h)
        o, w = at + np.int64((quad >> _32) & _LOW16), splat(element(values, place + 2))
        a, b = fma(w, load(x, o), a), fma(w, load(x, o + 16), b)
        c, d = fma(w, load(x, o + 32), c), fma(w, load(x, o + 48), d)
        o, w = at + np.int64(quad >> _48), splat(element(values, place + 3))
        e, f = fma(w, load(x, o), e), fma(w, load(x, o + 16), f)
        g, h = fma(w, load(x, o + 32), g), fma(w, load(x, o + 48), h)
        place += 4
    return add(a, e), add(b, f), add(c, g), add(d, h), place


@inlined
def row_of_16(
    x: Array, at: Int, offsets: Array, values: Array, start: Int, end: Int, y: Array, to: Int, first: bool
) -> None:
    """Do the same for 16 tokens. Each of four nonzeros has an accumulator: a single one would wait for its latency."""
    a = splat(np.float32(0.0)) if first else load(y, to)
    b = c = d = splat(np.float32(0.0))
    place = start
    while place + 4 <= end:
        quad, four = load_quad(offsets, place), load_four(values, place)
        a = fma(_lane0(four), load(x, at + np.int64(quad & _LOW16)), a)
        b = fma(_lane1(four), load(x, at + np.int64((quad >> _16) & _LOW16)), b)
        c = fma(_lane2(four), load(x, at + np.int64((quad >> _32) & _LOW16)), c)
        d = fma(_lane3(four), load(x, at + np.int64(quad >> _48)), d)
        place += 4
    while place < end:  # the next block lies beyond a 16-bit offset: rare, see `Layout`
        a = fma(splat(element(values, place)), load(x, at + np.int64(element(offsets, place))), a)
        place += 1
    store(y, to, add(add(a, b), add(c, d)))


@inlined
def sums_of_row(
    x: Array,
    at: Int,
    x_tile: Int,
    g: Array,
    row: Int,
    g_tile: Int,
    many: Int,
    offsets: Array,
    start: Int,
    end: Int,
    sums: Array,
    own: Int,
) -> None:
    """Add the inner products of one row of tiles of g with the x of each nonzero of a chunk.

    Eight nonzeros share each load of g and have one accumulator each, which hides the latency of the FMAs. Their lanes
    are summed together at the end, in one tree of shuffles, which takes 1.7 cycles a nonzero on Zen 3.
    """
    zero = path_splat(np.float32(0.0))
    tiles_at_once = many if TOGETHER > 1 else 1
    place = start
    while place + 8 <= end:
        quad, more = load_quad(offsets, place), load_quad(offsets, place + 4)
        # Eight accumulators and one vector of g: 9 of at least 16 registers. The eight addresses are in others.
        a = b = c = d = e = f = h = i = zero
        oa, ob = at + np.int64(quad & _LOW16), at + np.int64((quad >> _16) & _LOW16)
        oc, od = at + np.int64((quad >> _32) & _LOW16), at + np.int64(quad >> _48)
        oe, of = at + np.int64(more & _LOW16), at + np.int64((more >> _16) & _LOW16)
        oh, oi = at + np.int64((more >> _32) & _LOW16), at + np.int64(more >> _48)
        for tile in range(tiles_at_once):
            t, u = tile * x_tile, row + tile * g_tile
            for token in range(0, TILE, PATH_LANES):
                # Nine loads for eight FMAs: at two loads a cycle they bind, with 4.5 cycles against 4.
                w = path_load(g, u + token)
                a, b = fma(w, path_load(x, oa + t + token), a), fma(w, path_load(x, ob + t + token), b)
                c, d = fma(w, path_load(x, oc + t + token), c), fma(w, path_load(x, od + t + token), d)
                e, f = fma(w, path_load(x, oe + t + token), e), fma(w, path_load(x, of + t + token), f)
                h, i = fma(w, path_load(x, oh + t + token), h), fma(w, path_load(x, oi + t + token), i)
        add_sums8(sums, own + place, a, b, c, d, e, f, h, i)
        place += 8
    if place + 4 <= end:
        # The tail of four: two accumulators for each nonzero, so that there are eight again.
        quad = load_quad(offsets, place)
        a = b = c = d = e = f = h = i = zero
        oa, ob = at + np.int64(quad & _LOW16), at + np.int64((quad >> _16) & _LOW16)
        oc, od = at + np.int64((quad >> _32) & _LOW16), at + np.int64(quad >> _48)
        for tile in range(tiles_at_once):
            t, u = tile * x_tile, row + tile * g_tile
            for token in range(0, TILE, 2 * PATH_LANES):
                w, v = path_load(g, u + token), path_load(g, u + token + PATH_LANES)
                a, e = (
                    fma(w, path_load(x, oa + t + token), a),
                    fma(v, path_load(x, oa + t + token + PATH_LANES), e),
                )
                b, f = (
                    fma(w, path_load(x, ob + t + token), b),
                    fma(v, path_load(x, ob + t + token + PATH_LANES), f),
                )
                c, h = (
                    fma(w, path_load(x, oc + t + token), c),
                    fma(v, path_load(x, oc + t + token + PATH_LANES), h),
                )
                d, i = (
                    fma(w, path_load(x, od + t + token), d),
                    fma(v, path_load(x, od + t + token + PATH_LANES), i),
                )
        add_sums4(sums, own + place, add(a, e), add(b, f), add(c, h), add(d, i))
        place += 4
    while place < end:  # the next block lies beyond a 16-bit offset: rare, see `Layout`
        a, o = zero, at + np.int64(element(offsets, place))
        for tile in range(tiles_at_once):
            t, u = tile * x_tile, row + tile * g_tile
            for token in range(0, TILE, PATH_LANES):
                a = fma(path_load(g, u + token), path_load(x, o + t + token), a)
        sums[own + place] += sum_lanes(a)
        place += 1
