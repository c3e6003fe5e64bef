"""Both gradients of ``Y = X W^T`` for up to 48 tokens with an unstructured sparse matrix W ``[rows, columns]``.

In training on few tokens the bytes of W bind too. One pass over the rows of W computes both gradients. While the
nonzeros of a row are in L1, their values are read for dX and their gradients are written: 10 bytes a nonzero come from
memory, where dense products read 4 and write 4 a weight. The tokens of a column of X and dX stand side by side, as in
`few_tokens`, so that the transpose of W is not needed, nor its layout: dX is summed where it lies, by each thread in a
copy of its own.
"""

from __future__ import annotations

from typing import Annotated, Any

import numpy as np

from sparsetrain.kernels.few_tokens import AHEAD, MOST, PADDING, SHARES, lanes_of, pack_tokens, rows_of
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
from sparsetrain.kernels.simd.gather import prefetch
from sparsetrain.kernels.simd.kernel import Kernel
from sparsetrain.kernels.simd.lanes import add_sums8, sum_lanes
from sparsetrain.kernels.simd.tiles import clear
from sparsetrain.kernels.simd.vectors import element, fma, get, load, load8, load_quad, splat, splat8, store
from sparsetrain.kernels.simd.words import share, sharers

__all__ = ["MOST", "PADDING", "gradients", "gradients_bfloat16"]  # the first two are named in the signature

_LOW16, _16, _32, _48 = np.uint64(0xFFFF), np.uint64(16), np.uint64(32), np.uint64(48)


def _gradients(
    team: Team,
    g: Annotated[Array, float32["== tokens", "== rows"]],
    x: Annotated[Array, float32["== tokens if need_values", "== columns if need_values"]],
    g_step: Annotated[Int, step["g"]],
    x_step: Annotated[Int, step["x"]],
    tokens: Annotated[Int, where["1 <= tokens <= MOST"]],
    columns: Annotated[Int, where["columns <= segments * width"]],
    rows: Int,
    need_dx: Annotated[Int, where["need_dx <= 1"]],
    need_values: Annotated[Int, where["need_values <= 1"]],
    g_packed: Annotated[Output, float32["threads * (rows + 16) * MOST"]],
    x_packed: Annotated[Output, float32["threads * (columns + 16) * MOST if need_values"]],
    dx: Annotated[Output, float32["threads * columns * MOST if need_dx"]],
    width: Annotated[Int, where["1 <= width <= 65536"]],
    segments: Annotated[Int, where["segments > 0"]],
    bounds: Annotated[Array, int64["== (segments + 1) * rows"]],
    places: Annotated[Array, uint16["== nonzeros + PADDING"], unit["width"]],
    nonzeros: Int,
    values: Annotated[Array, element_type["== nonzeros"]],
    dvalues: Annotated[Output, float32["== nonzeros if need_values"]],
    sharing: Annotated[Output, int64["== 1"]],
) -> None:
    """Write each thread's share of ``dX = G W``, its tokens side by side, and ``G^T X`` at the nonzeros of W.

    Args:
        need_dx, need_values: 0 or 1; what is not needed is not touched, nor is what it alone is computed from.
        g_packed, x_packed: scratch for G and X, their tokens side by side.
        dx: ``[threads, columns, lanes]`` from its start on, with the lanes that `few_tokens.lanes_of` gives.
        sharing: receives the number of threads that wrote a share of dX.
        width, segments, bounds, places: of the `few_tokens_layout.Columns` of W. values: in the order of its rows.
    """
    first, last, index = share(team, SHARES)
    begin = rows_of(bounds, rows, nonzeros, first, SHARES)
    stop = rows_of(bounds, rows, nonzeros, last, SHARES)
    if index == 0:
        sharing[0] = sharers(team)
    lanes = lanes_of(tokens)
    own, beside, sums = index * (rows + 16) * MOST, index * (columns + 16) * MOST, index * columns * lanes
    if need_dx:
        clear(dx, sums, sums + columns * lanes)  # also where this thread has no rows, since all shares are added up
    if begin == stop:
        return
    pack_tokens(g, g_step, tokens, rows, lanes, g_packed, own)
    for row in range(begin, stop):
        for token in range(tokens, lanes):  # what lies behind the last token adds nothing
            g_packed[own + row * lanes + token] = np.float32(0.0)
    if need_values:
        pack_tokens(x, x_step, tokens, columns, lanes, x_packed, beside)
        for column in range(columns):
            for token in range(tokens, lanes):  # zero times infinity would be no number
                x_packed[beside + column * lanes + token] = np.float32(0.0)
    for segment in range(segments):
        from_, to, aside = segment * rows, (segment + 1) * rows, segment * width * lanes
        for row in range(begin, stop):
            start, end = element(bounds, from_ + row), element(bounds, to + row)
            line = own + row * lanes
            if lanes == 8:
                if need_dx:
                    _add_8(g_packed, line, dx, sums + aside, lanes, places, values, start, end)
                if need_values:
                    _sum_8(g_packed, line, x_packed, beside + aside, lanes, places, dvalues, start, end, True)
            else:
                for token in range(0, lanes, 16):
                    if need_dx:
                        _add_16(g_packed, line + token, dx, sums + aside + token, lanes, places, values, start, end)
                    if need_values:
                        at, fresh = beside + aside + token, token == 0
                        _sum_16(g_packed, line + token, x_packed, at, lanes, places, dvalues, start, end, fresh)


gradients = Kernel(_gradients, "few_gradients", float32)
gradients_bfloat16 = Kernel(_gradients, "few_gradients_bfloat16", bfloat16)


def _adding(load: Any, splat: Any) -> Any:
    """Return a function that adds the products of a row's nonzeros with a vector of tokens of G to dX.

    The columns of a row differ, so that no sum waits for the one before it.
    """

    @inlined
    def add(
        g: Array, line: Int, dx: Array, at: Int, lanes: Int, places: Array, values: Array, start: Int, end: Int
    ) -> None:
        rows = load(g, line)
        place = start
        while place + 4 <= end:
            prefetch(values, place + AHEAD)
            prefetch(places, place + AHEAD)
            quad = load_quad(places, place)
            a, b = at + np.int64(quad & _LOW16) * lanes, at + np.int64((quad >> _16) & _LOW16) * lanes
            c, d = at + np.int64((quad >> _32) & _LOW16) * lanes, at + np.int64(quad >> _48) * lanes
            store(dx, a, fma(splat(get(values, place)), rows, load(dx, a)))
            store(dx, b, fma(splat(get(values, place + 1)), rows, load(dx, b)))
            store(dx, c, fma(splat(get(values, place + 2)), rows, load(dx, c)))
            store(dx, d, fma(splat(get(values, place + 3)), rows, load(dx, d)))
            place += 4
        while place < end:
            a = at + np.int64(element(places, place)) * lanes
            store(dx, a, fma(splat(get(values, place)), rows, load(dx, a)))
            place += 1

    return add


def _summing(load: Any, splat: Any) -> Any:
    """Return a function that writes, or adds, the inner products of a vector of G with X at the columns of a row."""

    @inlined
    def total(
        g: Array,
        line: Int,
        x: Array,
        at: Int,
        lanes: Int,
        places: Array,
        dvalues: Array,
        start: Int,
        end: Int,
        fresh: bool,
    ) -> None:
        rows, zero = load(g, line), splat(np.float32(0.0))
        place = start
        while place + 8 <= end:
            if fresh:
                store(dvalues, place, splat8(np.float32(0.0)))
            low, high = load_quad(places, place), load_quad(places, place + 4)
            a = fma(load(x, at + np.int64(low & _LOW16) * lanes), rows, zero)
            b = fma(load(x, at + np.int64((low >> _16) & _LOW16) * lanes), rows, zero)
            c = fma(load(x, at + np.int64((low >> _32) & _LOW16) * lanes), rows, zero)
            d = fma(load(x, at + np.int64(low >> _48) * lanes), rows, zero)
            e = fma(load(x, at + np.int64(high & _LOW16) * lanes), rows, zero)
            f = fma(load(x, at + np.int64((high >> _16) & _LOW16) * lanes), rows, zero)
            h = fma(load(x, at + np.int64((high >> _32) & _LOW16) * lanes), rows, zero)
            i = fma(load(x, at + np.int64(high >> _48) * lanes), rows, zero)
            add_sums8(dvalues, place, a, b, c, d, e, f, h, i)
            place += 8
        while place < end:
            one = sum_lanes(fma(load(x, at + np.int64(element(places, place)) * lanes), rows, zero))
            dvalues[place] = one if fresh else dvalues[place] + one
            place += 1

    return total


_add_8, _add_16 = _adding(load8, splat8), _adding(load, splat)
_sum_8, _sum_16 = _summing(load8, splat8), _summing(load, splat)
