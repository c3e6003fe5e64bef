"""Where the blocks of a block matrix stand for the kernels of `bsr`: by panels of columns."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import numpy as np

from sparsetrain.kernels.simd.arguments import Array, Buffer

# The sides of a block that the kernels take.
MIN_BLOCK, MAX_BLOCK = 4, 64


@dataclass(frozen=True)
class Blocks:
    """The blocks of a matrix, or of its transpose, by block rows and, in each, by panels of columns.

    A panel is a range of columns whose tile of tokens stays in a cache while all block rows use it.

    Attributes:
        rows, columns: of the matrix that multiplies: of the transpose, if this describes that.
        height, width: of its blocks.
        panels: number of panels.
        ends: int32 ``[rows / height * panels + 1]``; the blocks of row r in panel p are those from ``ends[r * panels +
            p]`` to the next.
        index: int32 ``[blocks]``, the block column of each.
        order: int32 ``[blocks]``, where in the values each block stands, with its sides swapped; None if this is the
            matrix itself, whose blocks stand one after the other.
    """

    rows: int
    columns: int
    height: int
    width: int
    panels: int
    ends: Array
    index: Array
    order: Array | None

    @functools.cached_property
    def arguments(self) -> dict[str, Any]:
        """What a kernel takes of the blocks of its matrix, by keyword."""
        own = {"height": self.height, "width": self.width, "panels": self.panels}
        arrays = {"ends": Buffer(self.ends, "ends"), "blocks": Buffer(self.index, "blocks")}
        return {**own, **arrays, "stored": len(self.index)}

    @functools.cached_property
    def turned_arguments(self) -> dict[str, Any]:
        """What a kernel takes of these blocks as those of the transpose, by keyword."""
        arrays = {
            "t_ends": self.ends,
            "t_blocks": self.index,
            "t_order": self.index if self.order is None else self.order,
        }
        return {"t_panels": self.panels, **{name: Buffer(array, name) for name, array in arrays.items()}}


def panel_width(height: int) -> int:
    """Return how many columns a panel has.

    Low blocks use what they load only a few times, so their panel fits into L1: 128 columns of 64 tokens are 32 KB.
    Higher blocks have one panel for all columns: each load of a tile serves at least 16 rows.
    """
    return 128 if height < 16 else 1 << 20


def build_blocks(row_ptr: Array, col: Array, shape: tuple[int, int], block: tuple[int, int]) -> Blocks:
    """Return the blocks of a matrix ``shape``: ``row_ptr`` int64 ``[block rows + 1]``, ``col`` int32 ``[blocks]``."""
    row_of = np.repeat(np.arange(len(row_ptr) - 1), np.diff(row_ptr))
    return _build(row_of, col, shape, block, None)


def build_turned(row_ptr: Array, col: Array, shape: tuple[int, int], block: tuple[int, int]) -> Blocks:
    """Return the blocks of the transpose of a matrix, from the indices and the shape of the matrix."""
    row_of = np.repeat(np.arange(len(row_ptr) - 1, dtype=np.int32), np.diff(row_ptr))
    order = np.argsort(col, kind="stable")
    return _build(col[order], row_of[order], shape[::-1], block[::-1], order.astype(np.int32))


def _build(row_of: Array, index: Array, shape: tuple[int, int], block: tuple[int, int], order: Array | None) -> Blocks:
    (rows, columns), (height, width) = shape, block
    step = max(1, panel_width(height) // width)
    panels = -(-(columns // width) // step)
    ends = np.zeros(rows // height * panels + 1, np.int32)
    counts = np.bincount(row_of.astype(np.int64) * panels + index // step, minlength=len(ends) - 1)
    np.cumsum(counts, out=ends[1:])
    return Blocks(rows, columns, height, width, panels, ends, index, order)
