"""Writes a sparse matrix out densely and reads a dense one at the nonzeros, by the indices of a pattern.

The kernels move bits and do not compute: elements of 32 or of 16 bits. Memory bandwidth binds them. Single weights are
stored at unsigned places, because Numba tests signed indices for being negative.
"""

from __future__ import annotations

from typing import Annotated

import numpy as np

from sparsetrain.kernels.simd.arguments import (
    Array,
    Int,
    Output,
    Team,
    bits16,
    bits32,
    element_type,
    int32,
    int64,
)
from sparsetrain.kernels.simd.compile import inlined
from sparsetrain.kernels.simd.kernel import Kernel
from sparsetrain.kernels.simd.vectors import element
from sparsetrain.kernels.simd.words import share


def _scatter(
    team: Team,
    values: Annotated[Array, element_type["== blocks * bh * bw"]],
    dense: Annotated[Output, element_type["== rows * bh * columns"]],
    row_ptr: Annotated[Array, int64["== rows + 1"]],
    col: Annotated[Array, int32["== blocks"]],
    rows: Int,
    columns: Int,
    bh: Int,
    bw: Int,
    blocks: Int,
) -> None:
    """Write values to their places in a dense matrix ``[rows * bh, columns]``, and zeros everywhere else.

    Args:
        row_ptr, col: the indices of a pattern with ``rows`` rows of blocks ``bh x bw``.
    """
    # Threads share rows of elements and not of blocks, of which there may be fewer than threads.
    first, last, _ = share(team, rows * bh)
    for row in range(first, last):
        start, end, to, line = row_ptr[row // bh], row_ptr[row // bh + 1], row * columns, row % bh
        dense[to : to + columns] = 0  # just before its nonzeros, so that they find the row in L1 or L2
        if bw == 1:
            for block in range(start, end):
                dense[np.uint64(to + element(col, block))] = element(values, block * bh + line)
        else:
            for block in range(start, end):
                _move(values, (block * bh + line) * bw, dense, to + element(col, block) * bw, bw)


scatter = Kernel(_scatter, "scatter", bits32)
scatter16 = Kernel(_scatter, "scatter16", bits16)


def _gather(
    team: Team,
    dense: Annotated[Array, element_type["== rows * bh * columns"]],
    values: Annotated[Output, element_type["== blocks * bh * bw"]],
    row_ptr: Annotated[Array, int64["== rows + 1"]],
    col: Annotated[Array, int32["== blocks"]],
    rows: Int,
    columns: Int,
    bh: Int,
    bw: Int,
    blocks: Int,
) -> None:
    """Read a dense matrix ``[rows * bh, columns]`` at the places of the values; arguments as for `_scatter`."""
    first, last, _ = share(team, rows * bh)
    for row in range(first, last):
        start, end, at, line = row_ptr[row // bh], row_ptr[row // bh + 1], row * columns, row % bh
        if bw == 1:
            for block in range(start, end):
                values[np.uint64(block * bh + line)] = element(dense, at + element(col, block))
        else:
            for block in range(start, end):
                _move(dense, at + element(col, block) * bw, values, (block * bh + line) * bw, bw)


gather = Kernel(_gather, "gather", bits32)
gather16 = Kernel(_gather, "gather16", bits16)


@inlined
def _move(source: Array, at: Int, target: Array, to: Int, count: Int) -> None:
    """Copy a few elements, four at a time: for so few, a call of `memcpy` or a loop of vectors costs more to set up."""
    whole = count // 4 * 4
    for place in range(0, whole, 4):
        a, b = element(source, at + place), element(source, at + place + 1)
        c, d = element(source, at + place + 2), element(source, at + place + 3)
        target[to + place], target[to + place + 1] = a, b
        target[to + place + 2], target[to + place + 3] = c, d
    for place in range(whole, count):
        target[to + place] = element(source, at + place)
