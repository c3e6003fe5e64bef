"""The three products of a training step with an unstructured sparse matrix W ``[rows, columns]``.

    Y = X W^T     one nonzero: one broadcast and the multiply-adds of 64 tokens, kept in registers for a whole run of
                  nonzeros of a row
    dX = G W      the same on the layout of W^T
    dW = G^T X    at the nonzeros only: eight of a row at a time, 64 tokens before their lanes are summed

Columns are cut into blocks whose tile of tokens stays in L1; a `layout.Layout` holds the nonzeros block by block, row
by row. A thread takes a range of tiles of tokens. The gradient of the values is summed in the order of tokens inside
a part and then in the order of parts: for one number of threads the bits of a result are always the same.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from sparsetrain.kernels.compile import Kernel, part
from sparsetrain.kernels.lanes import add_sums4, add_sums8, sum_lanes
from sparsetrain.kernels.simd import add, element, fma, lane, load, load8, load_four, load_quad, splat, splat8, store
from sparsetrain.kernels.tiles import TILE, Array, Int, add_to, clear, copy, pack, tiles, unpack
from sparsetrain.kernels.words import floats, ints, longs, number, share, shorts

# Rows whose tile of outputs (or of gradients) is worked on at a time: 128 KB, a part of L2.
PANEL = 512

_LOW16, _16, _32, _48 = np.uint64(0xFFFF), np.uint64(16), np.uint64(32), np.uint64(48)
_lane0, _lane1, _lane2, _lane3 = lane


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

    Words: x ``[tokens, columns]``, y ``[tokens, rows]``, the distances of their rows, tokens, columns, rows; packed
    ``[tiles, columns + 1, 64]``; use: 0 to pack every tile into the one tile of this part, ``packed[part]``, 1 to pack
    x into ``packed`` and leave it there, 2 if ``packed`` holds x already; width, chunks, ends, offsets and values of
    the layout; scratch ``[parts, rows, 64]``.
    """
    x_step, y_step, tokens = number(words, 6), number(words, 7), number(words, 8)
    columns, rows, packed, use = number(words, 9), number(words, 10), floats(words, 11), number(words, 12)
    width, chunks, ends, offsets = number(words, 13), number(words, 14), ints(words, 15), shorts(words, 16)
    values, scratch = floats(words, 17), floats(words, 18)
    first, last, index = share(words, tiles(tokens))
    made = index * rows * TILE
    for tile in range(first, last):
        token = tile * TILE
        present = min(TILE, tokens - token)
        base = (index if use == 0 else tile) * (columns + 1) * TILE
        if use != 2:
            _pack(x, token * x_step, x_step, present, columns, packed, base)
        _tile(packed, base, present, width, chunks, ends, offsets, values, rows, scratch, made)
        unpack(scratch, made, present, rows, y, token * y_step, y_step)


@part
def _pack(source: Array, at: Int, step: Int, tokens: Int, features: Int, target: Array, to: Int) -> None:
    """Pack a tile with the feature more, all zero, that blanks point at."""
    pack(source, at, step, tokens, features, target, to)
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
    y: Array,
    made: Int,
) -> None:
    """Write the product of one packed tile at ``x[base]`` to the tile at ``y[made]``."""
    for top in range(0, rows, PANEL):
        bottom = min(rows, top + PANEL)
        for block in range(chunks // rows):
            at = base + block * width * TILE
            end = np.int64(element(ends, block * rows + top))
            for row in range(top, bottom):
                start = end
                end = np.int64(element(ends, block * rows + row + 1))
                to = made + row * TILE
                if present > 32:
                    _row_of_64(x, at, offsets, values, start, end, y, to, block == 0)
                else:
                    _row_of_16(x, at, offsets, values, start, end, y, to, block == 0)
                    if present > 16:
                        _row_of_16(x, at + 16, offsets, values, start, end, y, to + 16, block == 0)


@part
def _row_of_64(
    x: Array, at: Int, offsets: Array, values: Array, start: Int, end: Int, y: Array, to: Int, first: bool
) -> None:
    """Add the products of one chunk to one row of a tile of outputs, or write them if they are the ``first``."""
    if first:
        a = b = c = d = splat(np.float32(0.0))
    else:
        a, b, c, d = load(y, to), load(y, to + 16), load(y, to + 32), load(y, to + 48)
    place = start
    while place + 4 <= end:
        quad, four = load_quad(offsets, place), load_four(values, place)
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
    while place < end:  # rare, see `Layout`
        o, w = at + np.int64(element(offsets, place)), splat(element(values, place))
        a, b = fma(w, load(x, o), a), fma(w, load(x, o + 16), b)
        c, d = fma(w, load(x, o + 32), c), fma(w, load(x, o + 48), d)
        place += 1
    store(y, to, a)
    store(y, to + 16, b)
    store(y, to + 32, c)
    store(y, to + 48, d)


@part
def _row_of_16(
    x: Array, at: Int, offsets: Array, values: Array, start: Int, end: Int, y: Array, to: Int, first: bool
) -> None:
    """The same for 16 tokens; four nonzeros have sums of their own, since one sum would wait for itself."""
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
    while place < end:  # rare, see `Layout`
        a = fma(splat(element(values, place)), load(x, at + np.int64(element(offsets, place))), a)
        place += 1
    store(y, to, add(add(a, b), add(c, d)))


@Kernel
def pack_all(words: Any) -> None:
    """Pack a matrix as `multiply` does.

    Words: x ``[tokens, columns]``, the distance of its rows, tokens, columns, packed ``[tiles, columns + spare, 64]``,
    spare: 1, or 0 without the feature more that blanks point at.
    """
    _pack_all(words, floats(words, 4))


@Kernel
def pack_all_bfloat16(words: Any) -> None:
    """The same for x in bfloat16, passed as uint16."""
    _pack_all(words, shorts(words, 4))


@part
def _pack_all(words: Any, x: Array) -> None:
    step, tokens, columns, packed = number(words, 5), number(words, 6), number(words, 7), floats(words, 8)
    spare = number(words, 9)
    first, last, _ = share(words, tiles(tokens))
    for tile in range(first, last):
        token, to = tile * TILE, tile * (columns + spare) * TILE
        pack(x, token * step, step, min(TILE, tokens - token), columns, packed, to)
        clear(packed, to + columns * TILE, to + (columns + spare) * TILE)


@Kernel
def gradients(words: Any) -> None:
    """Write the gradient of the input and each part's share of that of the values; see `_gradients` for the words."""
    _gradients(words, floats(words, 4), floats(words, 5))


@Kernel
def gradients_bfloat16(words: Any) -> None:
    """The same for G and dX in bfloat16, passed as uint16."""
    _gradients(words, shorts(words, 4), shorts(words, 5))


@part
def _gradients(words: Any, g: Array, dx: Array) -> None:
    """Write ``dX = G W`` and ``G^T X`` at the nonzeros of W, a tile of tokens at a time.

    Both products read a tile of G while it is in L2; G is never packed as a whole.

    Words: g ``[tokens, rows]``, dx ``[tokens, columns]``, the distances of their rows, tokens, columns, rows; packed g,
    scratch ``[parts, rows + 1, 64]``; need of dx, 0 or 1; width, chunks, ends, offsets and values of the layout of the
    transpose of W; scratch ``[parts, columns, 64]``; need of the values' gradient; packed x
    ``[tiles, columns + 1, 64]``; width, chunks, ends, offsets and stored of the layout of W; sums ``[parts, stored]``,
    in the order of that layout.
    """
    g_step, dx_step, tokens = number(words, 6), number(words, 7), number(words, 8)
    columns, rows, packed, need_dx = number(words, 9), number(words, 10), floats(words, 11), number(words, 12)
    t_width, t_chunks, t_ends = number(words, 13), number(words, 14), ints(words, 15)
    t_offsets, t_values, scratch = shorts(words, 16), floats(words, 17), floats(words, 18)
    need_values, x, width, chunks = number(words, 19), floats(words, 20), number(words, 21), number(words, 22)
    ends, offsets, stored, sums = ints(words, 23), shorts(words, 24), number(words, 25), floats(words, 26)
    first, last, index = share(words, tiles(tokens))
    base, made, own = index * (rows + 1) * TILE, index * columns * TILE, index * stored
    if need_values:
        clear(sums, own, own + stored)
    for tile in range(first, last):
        token = tile * TILE
        present = min(TILE, tokens - token)
        _pack(g, token * g_step, g_step, present, rows, packed, base)
        if need_dx:
            _tile(packed, base, present, t_width, t_chunks, t_ends, t_offsets, t_values, columns, scratch, made)
            unpack(scratch, made, present, columns, dx, token * dx_step, dx_step)
        if need_values:
            _sums(packed, base, x, tile * (columns + 1) * TILE, rows, width, chunks, ends, offsets, sums, own)


@part
def _sums(
    g: Array,
    g_at: Int,
    x: Array,
    x_at: Int,
    rows: Int,
    width: Int,
    chunks: Int,
    ends: Array,
    offsets: Array,
    sums: Array,
    own: Int,
) -> None:
    """Add to ``sums[own:]`` the inner products at the nonzeros over one tile of g and x."""
    for top in range(0, rows, PANEL):
        bottom = min(rows, top + PANEL)
        for block in range(chunks // rows):
            at = x_at + block * width * TILE
            end = np.int64(element(ends, block * rows + top))
            for row in range(top, bottom):
                start = end
                end = np.int64(element(ends, block * rows + row + 1))
                _sums_of_row(x, at, g, g_at + row * TILE, offsets, start, end, sums, own)


@Kernel
def add_parts(words: Any) -> None:
    """Add up the parts of a gradient and bring it into the order of the pattern.

    Words: sums ``[parts, stored]``, number of parts, stored, row_ptr int64 ``[rows + 1]``, ends, chunks, rows, target
    float32 ``[nnz]``.
    """
    sums, count, stored, row_ptr = floats(words, 4), number(words, 5), number(words, 6), longs(words, 7)
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


@part
def _sums_of_row(
    x: Array, at: Int, g: Array, row: Int, offsets: Array, start: Int, end: Int, sums: Array, own: Int
) -> None:
    """Add the inner products of one row of a tile of g with the x of each nonzero of a chunk."""
    zero = splat8(np.float32(0.0))
    place = start
    while place + 8 <= end:
        quad, more = load_quad(offsets, place), load_quad(offsets, place + 4)
        a = b = c = d = e = f = h = i = zero
        oa, ob = at + np.int64(quad & _LOW16), at + np.int64((quad >> _16) & _LOW16)
        oc, od = at + np.int64((quad >> _32) & _LOW16), at + np.int64(quad >> _48)
        oe, of = at + np.int64(more & _LOW16), at + np.int64((more >> _16) & _LOW16)
        oh, oi = at + np.int64((more >> _32) & _LOW16), at + np.int64(more >> _48)
        for token in range(0, TILE, 8):
            w = load8(g, row + token)
            a, b = fma(w, load8(x, oa + token), a), fma(w, load8(x, ob + token), b)
            c, d = fma(w, load8(x, oc + token), c), fma(w, load8(x, od + token), d)
            e, f = fma(w, load8(x, oe + token), e), fma(w, load8(x, of + token), f)
            h, i = fma(w, load8(x, oh + token), h), fma(w, load8(x, oi + token), i)
        add_sums8(sums, own + place, a, b, c, d, e, f, h, i)
        place += 8
    if place + 4 <= end:
        # Each of four has two sums, since one would wait for itself.
        quad = load_quad(offsets, place)
        a = b = c = d = e = f = h = i = zero
        oa, ob = at + np.int64(quad & _LOW16), at + np.int64((quad >> _16) & _LOW16)
        oc, od = at + np.int64((quad >> _32) & _LOW16), at + np.int64(quad >> _48)
        for token in range(0, TILE, 16):
            w, v = load8(g, row + token), load8(g, row + token + 8)
            a, e = fma(w, load8(x, oa + token), a), fma(v, load8(x, oa + token + 8), e)
            b, f = fma(w, load8(x, ob + token), b), fma(v, load8(x, ob + token + 8), f)
            c, h = fma(w, load8(x, oc + token), c), fma(v, load8(x, oc + token + 8), h)
            d, i = fma(w, load8(x, od + token), d), fma(v, load8(x, od + token + 8), i)
        add_sums4(sums, own + place, add(a, e), add(b, f), add(c, h), add(d, i))
        place += 4
    while place < end:  # rare, see `Layout`
        a, o = zero, at + np.int64(element(offsets, place))
        for token in range(0, TILE, 8):
            a = fma(load8(g, row + token), load8(x, o + token), a)
        sums[own + place] += sum_lanes(a)
        place += 1
