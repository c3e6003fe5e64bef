"""Where the nonzeros of an unstructured matrix stand for the kernels of `few_tokens` and `few_tokens_bitmap`."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import numpy as np

from sparsetrain.kernels.few_tokens import PADDING
from sparsetrain.kernels.simd.arguments import Array, Buffer
from sparsetrain.kernels.simd.compile import compiled

WIDTH = 8192  # columns of a segment: x of 48 tokens takes 1.5 MB there, of 16 tokens half a megabyte


@dataclass(frozen=True)
class Columns:
    """The columns of a matrix's nonzeros in 16 bits, in the order of its rows.

    Attributes:
        rows, columns, nonzeros: of the matrix.
        width: columns of a segment.
        bounds: int64 ``[segments + 1, rows]``: row r has the nonzeros from ``bounds[s, r]`` to ``bounds[s + 1, r]`` in
            segment s.
        places: uint16 ``[nonzeros + PADDING]``: the column of each nonzero, counted from the start of its segment.
    """

    rows: int
    columns: int
    nonzeros: int
    width: int
    bounds: np.ndarray
    places: np.ndarray

    @functools.cached_property
    def arguments(self) -> dict[str, Any]:
        """What the kernels take of a layout, by keyword."""
        return {
            "rows": self.rows,
            "columns": self.columns,
            "nonzeros": self.nonzeros,
            "width": self.width,
            "segments": len(self.bounds) - 1,
            "bounds": Buffer(self.bounds, "bounds"),
            "places": Buffer(self.places, "places", self.width),
        }


def build_columns(row_ptr: Array, col: Array, columns: int, width: int = WIDTH) -> Columns:
    """Return the layout of a CSR matrix: ``row_ptr`` int64 ``[rows + 1]``, ``col`` int32 ``[nnz]``, sorted in rows."""
    rows, segments = len(row_ptr) - 1, max(1, -(-columns // width))
    bounds = np.empty((segments + 1, rows), np.int64)
    places = np.zeros(len(col) + PADDING, np.uint16)
    _divide(row_ptr, col, width, bounds, places)
    return Columns(rows, columns, len(col), width, bounds, places)


@compiled
def _divide(row_ptr: Array, col: Array, width: int, bounds: Array, places: Array) -> None:
    segments = bounds.shape[0] - 1
    for row in range(len(row_ptr) - 1):
        at, end = row_ptr[row], row_ptr[row + 1]
        bounds[0, row] = at
        for segment in range(segments):
            start = segment * width
            while at < end and col[at] < start + width:
                places[at] = col[at] - start
                at += 1
            bounds[segment + 1, row] = at


@dataclass(frozen=True)
class Bitmap:
    """A bit of each weight of a matrix that says whether it is stored.

    Attributes:
        rows, columns, nonzeros: of the matrix.
        pieces: of 16 columns, in a row.
        bounds: int64 ``[rows + 1]``: row r has the values from ``bounds[r]`` to ``bounds[r + 1]``.
        bitmap: uint16 ``[rows, pieces]``: bit b of piece p is set where there is a value at column ``16 p + b``.
    """

    rows: int
    columns: int
    nonzeros: int
    pieces: int
    bounds: np.ndarray
    bitmap: np.ndarray

    @functools.cached_property
    def arguments(self) -> dict[str, Any]:
        """What the kernels take of a layout, by keyword."""
        return {
            "rows": self.rows,
            "columns": self.columns,
            "nonzeros": self.nonzeros,
            "pieces": self.pieces,
            "bounds": Buffer(self.bounds, "bounds"),
            "bitmap": Buffer(self.bitmap, "bitmap"),
        }


def build_bitmap(row_ptr: Array, col: Array, columns: int) -> Bitmap:
    """Return the layout of a CSR matrix: ``row_ptr`` int64 ``[rows + 1]``, ``col`` int32 ``[nnz]``, sorted in rows."""
    rows, pieces = len(row_ptr) - 1, -(-columns // 16)
    bounds, bitmap = np.array(row_ptr, np.int64), np.zeros((rows, pieces), np.uint16)
    _mark(bounds, col, bitmap)
    return Bitmap(rows, columns, len(col), pieces, bounds, bitmap)


@compiled
def _mark(bounds: Array, col: Array, bitmap: Array) -> None:
    for row in range(len(bounds) - 1):
        for at in range(bounds[row], bounds[row + 1]):
            bitmap[row, col[at] // 16] |= np.uint16(1) << np.uint16(col[at] % 16)
