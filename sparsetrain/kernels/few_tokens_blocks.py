"""``Y = X W^T`` for up to 48 tokens with a block sparse matrix W ``[rows, columns]``, as in decoding.

The values of a block are read once, in their order, and four of its rows share each load of the tokens of a column,
which stand side by side as in `few_tokens`. A thread takes ranges of block rows with about as many blocks each.
"""

from __future__ import annotations

from typing import Annotated, Any

import numpy as np

from sparsetrain.kernels.bsr_layout import MAX_BLOCK, MIN_BLOCK
from sparsetrain.kernels.few_tokens import AHEAD, MOST, SHARES, lanes_of, pack_tokens, rows_of, write_panel
from sparsetrain.kernels.simd.arguments import (
    Array,
    Int,
    Output,
    Team,
    bfloat16,
    element_type,
    float32,
    int32,
    int64,
    step,
    where,
)
from sparsetrain.kernels.simd.compile import inlined
from sparsetrain.kernels.simd.gather import prefetch
from sparsetrain.kernels.simd.kernel import Kernel
from sparsetrain.kernels.simd.tiles import clear
from sparsetrain.kernels.simd.vectors import element, fma, get, load, load8, splat, splat8, store
from sparsetrain.kernels.simd.words import share

PANEL = MAX_BLOCK  # rows of Y that are collected before they are turned and written


def _several(
    team: Team,
    x: Annotated[Array, float32["== tokens", "== columns"]],
    y: Annotated[Output, float32["== tokens", "== block_rows * height"]],
    x_step: Annotated[Int, step["x"]],
    y_step: Annotated[Int, step["y"]],
    tokens: Annotated[Int, where["1 <= tokens <= MOST"]],
    columns: Int,
    height: Annotated[Int, where[f"{MIN_BLOCK} <= height <= {MAX_BLOCK}"]],
    width: Annotated[Int, where[f"{MIN_BLOCK} <= width <= {MAX_BLOCK} and columns % width == 0"]],
    block_rows: Int,
    packed: Annotated[Output, float32["threads * (columns + 16) * MOST"]],
    scratch: Annotated[Output, float32["threads * (PANEL + 16) * MOST"]],
    bounds: Annotated[Array, int64["== block_rows + 1"]],
    index: Annotated[Array, int32["== blocks"]],
    blocks: Int,
    values: Annotated[Array, element_type["== blocks * height * width"]],
) -> None:
    """Write ``Y = X W^T``.

    Args:
        packed, scratch: as for `few_tokens.several`.
        height, width: of a block. bounds, index, blocks: the blocks by block rows, and the block column of each.
    """
    first, last, number = share(team, SHARES)
    begin = rows_of(bounds, block_rows, blocks, first, SHARES)
    stop = rows_of(bounds, block_rows, blocks, last, SHARES)
    if begin == stop:
        return
    lanes = lanes_of(tokens)
    base, made = number * (columns + 16) * MOST, number * (PANEL + 16) * MOST
    pack_tokens(x, x_step, tokens, columns, lanes, packed, base)
    for row in range(begin, stop):
        clear(scratch, made, made + height * lanes)
        for block in range(element(bounds, row), element(bounds, row + 1)):
            at = base + np.int64(element(index, block)) * width * lanes
            value = block * height * width
            for line in range(0, height // 4 * 4, 4):
                prefetch(values, value + line * width + AHEAD)
                prefetch(values, value + (line + 2) * width + AHEAD)
                place = made + line * lanes
                if lanes == 8:
                    _four_rows_of_8(packed, at, 8, values, value + line * width, width, scratch, place)
                else:
                    for token in range(0, lanes, 16):
                        _four_rows_of_16(
                            packed, at + token, lanes, values, value + line * width, width, scratch, place + token
                        )
            for line in range(height // 4 * 4, height):
                for token in range(0, lanes, 8):
                    place = made + line * lanes + token
                    _one_row_of_8(packed, at + token, lanes, values, value + line * width, width, scratch, place)
        write_panel(scratch, made, made + PANEL * MOST, lanes, height, tokens, y, row * height, y_step)


several = Kernel(_several, "several", float32)
several_bfloat16 = Kernel(_several, "several_bfloat16", bfloat16)


def _four_rows(load: Any, splat: Any) -> Any:
    """Return a function that adds the products of four rows of a block for one vector of tokens to a panel."""

    @inlined
    def rows(x: Array, at: Int, lanes: Int, values: Array, value: Int, width: Int, y: Array, place: Int) -> None:
        a, b = load(y, place), load(y, place + lanes)
        c, d = load(y, place + 2 * lanes), load(y, place + 3 * lanes)
        for column in range(width):
            w, one = load(x, at + column * lanes), value + column
            a, b = fma(splat(get(values, one)), w, a), fma(splat(get(values, one + width)), w, b)
            c, d = fma(splat(get(values, one + 2 * width)), w, c), fma(splat(get(values, one + 3 * width)), w, d)
        store(y, place, a)
        store(y, place + lanes, b)
        store(y, place + 2 * lanes, c)
        store(y, place + 3 * lanes, d)

    return rows


_four_rows_of_8, _four_rows_of_16 = _four_rows(load8, splat8), _four_rows(load, splat)


@inlined
def _one_row_of_8(x: Array, at: Int, lanes: Int, values: Array, value: Int, width: Int, y: Array, place: Int) -> None:
    a = load8(y, place)
    for column in range(width):
        a = fma(splat8(get(values, value + column)), load8(x, at + column * lanes), a)
    store(y, place, a)
