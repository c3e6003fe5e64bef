"""Writes a sparse matrix out densely and reads a dense one at the nonzeros, straight from a pattern's own indices.

Bits are moved, not numbers: float32, or any type of 16 bits as uint16. Single weights are stored at unsigned places:
Numba looks at every other index to see whether it is negative.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from sparsetrain.kernels.compile import Kernel, part
from sparsetrain.kernels.simd import element
from sparsetrain.kernels.tiles import Array, Int
from sparsetrain.kernels.words import floats, ints, longs, number, share, shorts


@Kernel
def spread(words: Any) -> None:
    """Write values to their places in a dense matrix and zeros everywhere else; see `_spread` for the words."""
    _spread(words, floats(words, 4), floats(words, 5))


@Kernel
def spread16(words: Any) -> None:
    """The same for elements of 16 bits."""
    _spread(words, shorts(words, 4), shorts(words, 5))


@Kernel
def collect(words: Any) -> None:
    """Read a dense matrix at the places of the values; see `_collect` for the words."""
    _collect(words, floats(words, 4), floats(words, 5))


@Kernel
def collect16(words: Any) -> None:
    """The same for elements of 16 bits."""
    _collect(words, shorts(words, 4), shorts(words, 5))


@part
def _spread(words: Any, values: Array, dense: Array) -> None:
    """Words: values ``[nnz]``, dense ``[rows, columns]``, row_ptr int64, col int32, block rows, columns, bh, bw."""
    row_ptr, col, rows, columns = longs(words, 6), ints(words, 7), number(words, 8), number(words, 9)
    bh, bw = number(words, 10), number(words, 11)
    first, last, _ = share(words, rows * bh)
    for row in range(first, last):
        start, end, to, line = row_ptr[row // bh], row_ptr[row // bh + 1], row * columns, row % bh
        dense[to : to + columns] = 0
        if bw == 1:
            for unit in range(start, end):
                dense[np.uint64(to + element(col, unit))] = element(values, unit * bh + line)
        else:
            for unit in range(start, end):
                _move(values, (unit * bh + line) * bw, dense, to + element(col, unit) * bw, bw)


@part
def _collect(words: Any, dense: Array, values: Array) -> None:
    """Words: dense ``[rows, columns]``, values ``[nnz]``, row_ptr int64, col int32, block rows, columns, bh, bw."""
    row_ptr, col, rows, columns = longs(words, 6), ints(words, 7), number(words, 8), number(words, 9)
    bh, bw = number(words, 10), number(words, 11)
    first, last, _ = share(words, rows * bh)
    for row in range(first, last):
        start, end, at, line = row_ptr[row // bh], row_ptr[row // bh + 1], row * columns, row % bh
        if bw == 1:
            for unit in range(start, end):
                values[np.uint64(unit * bh + line)] = element(dense, at + element(col, unit))
        else:
            for unit in range(start, end):
                _move(dense, at + element(col, unit) * bw, values, (unit * bh + line) * bw, bw)


@part
def _move(source: Array, at: Int, target: Array, to: Int, count: Int) -> None:
    """Copy a few elements, four at a time: a call of `memcpy` or a loop of vectors takes longer to get going."""
    whole = count // 4 * 4
    for place in range(0, whole, 4):
        a, b = element(source, at + place), element(source, at + place + 1)
        c, d = element(source, at + place + 2), element(source, at + place + 3)
        target[to + place], target[to + place + 1] = a, b
        target[to + place + 2], target[to + place + 3] = c, d
    for place in range(whole, count):
        target[to + place] = element(source, at + place)
