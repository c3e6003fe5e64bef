"""Where the nonzeros of an unstructured matrix stand for the kernels of `csr`: by blocks of columns."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import numpy as np

from sparsetrain.kernels.simd.arguments import Array, Buffer
from sparsetrain.kernels.simd.compile import compiled
from sparsetrain.kernels.simd.tiles import TILE

# Nonzeros that share one load of their offsets (4 x 16 bits) and one of their values (4 x 32 bits). Chunks are
# multiples of it, so that no tail of single nonzeros follows, with a branch that is hard to predict.
GROUP = 4
_REACH = 65535 // TILE  # columns that a 16-bit offset can tell apart


@dataclass(frozen=True)
class Layout:
    """The nonzeros of a matrix by blocks of columns.

    A chunk is what one row has in one block of columns, rounded up to a multiple of four nonzeros by taking the first
    ones of the next block. A row's last chunk is filled up by blanks: places with the value zero in the column after
    the last one, where a packed tile is zero. Inner loops therefore have no remainder, unless the next block lies
    beyond a 16-bit offset.

    Attributes:
        rows, columns: of the matrix.
        width: columns of a block.
        ends: int32 ``[blocks * rows + 1]``; chunk ``b * rows + r`` is ``ends[b * rows + r]`` to the next.
        offsets: uint16 ``[stored]``; 64 times the column, counted from the start of the block.
        order: int32 ``[stored]``, where in the values of the pattern each nonzero stands, -1 for a blank; None if the
            layout is of the matrix itself: then a chunk is a run of its row's values.
        row_ptr: int64 ``[rows + 1]``, where the values of each row begin; its own copy, since the indices that the
            layout was made of may be written over while kernels read it. None beside an order.
    """

    rows: int
    columns: int
    width: int
    ends: Array
    offsets: Array
    order: Array | None
    row_ptr: Array | None

    @functools.cached_property
    def stored(self) -> int:
        """Nonzeros and blanks."""
        return len(self.offsets)

    @functools.cached_property
    def arguments(self) -> dict[str, Any]:
        """What a kernel takes of the layout of its matrix, by keyword."""
        return self._arguments("")

    @functools.cached_property
    def turned_arguments(self) -> dict[str, Any]:
        """What a kernel takes of this layout as that of the transpose, by keyword."""
        turned = self._arguments("t_")
        del turned["t_width"]  # it is that of the layout beside it
        return turned

    def _arguments(self, prefix: str) -> dict[str, Any]:
        arrays = {"ends": self.ends, "offsets": self.offsets}
        buffers = {name: Buffer(array, prefix + name, self.width) for name, array in arrays.items()}
        return {prefix + name: value for name, value in {"width": self.width, "stored": self.stored, **buffers}.items()}

    @functools.cached_property
    def runs(self) -> dict[str, Any]:
        """What a kernel takes to go through the rows of the matrix, run by run, by keyword."""
        assert self.row_ptr is not None
        own = self.arguments
        return {
            "row_ptr": Buffer(self.row_ptr, "row_ptr"),
            "rows": self.rows,
            "chunks": len(self.ends) - 1,
            **{name: own[name] for name in ("ends", "stored")},
        }

    @functools.cached_property
    def places(self) -> Buffer:
        """`order` as kernels take it."""
        assert self.order is not None
        return Buffer(self.order, "order")


def block_width(density: float) -> int:
    """Return how many columns a block has.

    64 columns of 64 tokens are 16 KB, half of the L1. Sparser matrices need wider blocks, since a row would have only
    a few nonzeros in each and a chunk ends at a branch that is hard to predict.

    Measured on a processor with 32 KB of L1 (docs/kernels.md); one with more gains little from wider blocks.
    """
    for least, width in ((0.4, 64), (0.15, 96), (0.07, 128)):
        if density >= least:
            return width
    return 192


def build_layout(row_ptr: Array, col: Array, columns: int, width: int | None = None) -> Layout:
    """Return the layout of a CSR matrix: ``row_ptr`` int64 ``[rows + 1]``, ``col`` int32 ``[nnz]``, sorted in rows."""
    rows = len(row_ptr) - 1
    width = width or block_width(len(col) / (rows * columns))
    blocks = -(-columns // width)
    ends = np.zeros(blocks * rows + 1, np.int32)
    counts = row_ptr[1:] - row_ptr[:-1]
    offsets = np.empty(int(((counts + GROUP - 1) // GROUP * GROUP).sum()), np.uint16)
    _place(row_ptr, col, columns, width, ends, offsets)
    return Layout(rows, columns, width, ends, offsets, None, row_ptr.copy())


def build_transposed(row_ptr: Array, col: Array, columns: int, width: int | None = None) -> Layout:
    """Return the layout of the transpose of a CSR matrix, whose `Layout.order` points into the values of the matrix."""
    rows = len(row_ptr) - 1
    turned_ptr = np.zeros(columns + 1, np.int64)
    turned_col, order = np.empty(len(col), np.int32), np.empty(len(col), np.int32)
    _transpose(row_ptr, col, turned_ptr, turned_col, order)
    plain = build_layout(turned_ptr, turned_col, rows, width)
    placed = np.empty(plain.stored, np.int32)
    _permute(order, turned_ptr, plain.ends, placed)
    return Layout(columns, rows, plain.width, plain.ends, plain.offsets, placed, None)


@compiled
def _transpose(row_ptr: Array, col: Array, turned_ptr: Array, turned_col: Array, order: Array) -> None:
    for index in range(len(col)):
        turned_ptr[col[index] + 1] += 1
    for column in range(1, len(turned_ptr)):
        turned_ptr[column] += turned_ptr[column - 1]
    cursor = turned_ptr[:-1].copy()
    for row in range(len(row_ptr) - 1):
        for index in range(row_ptr[row], row_ptr[row + 1]):
            place = cursor[col[index]]
            cursor[col[index]] = place + 1
            turned_col[place] = row
            order[place] = index


@compiled
def _place(row_ptr: Array, col: Array, columns: int, width: int, ends: Array, offsets: Array) -> None:
    """Cut rows into chunks: fill ``ends`` and ``offsets`` of a layout."""
    rows = len(row_ptr) - 1
    blocks = (len(ends) - 1) // rows
    for row in range(rows):
        at, last = row_ptr[row], row_ptr[row + 1]
        for block in range(blocks):
            first, base = at, block * width
            while at < last and (col[at] < base + width or ((at - row_ptr[row]) % GROUP and col[at] < base + _REACH)):
                at += 1
            ends[block * rows + row + 1] = at - first
        ends[(blocks - 1) * rows + row + 1] += -(last - row_ptr[row]) % GROUP
    for chunk in range(1, len(ends)):
        ends[chunk] += ends[chunk - 1]
    for row in range(rows):
        at, last = row_ptr[row], row_ptr[row + 1]
        for block in range(blocks):
            chunk = block * rows + row
            for place in range(ends[chunk], ends[chunk + 1]):
                offsets[place] = ((col[at] if at < last else columns) - block * width) * TILE
                at += 1


@compiled
def _permute(order: Array, row_ptr: Array, ends: Array, placed: Array) -> None:
    """Bring what stands in the order of rows into that of a layout, with -1 for its blanks."""
    rows = len(row_ptr) - 1
    for row in range(rows):
        at, last = row_ptr[row], row_ptr[row + 1]
        for chunk in range(row, len(ends) - 1, rows):
            for place in range(ends[chunk], ends[chunk + 1]):
                placed[place] = order[at] if at < last else -1
                at += 1
