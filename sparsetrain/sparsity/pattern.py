"""Where a sparse matrix has its nonzeros: an immutable compressed-row description.

Legend: R rows, C columns, ``(bh, bw)`` the block, nnz the number of stored scalars.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sparsetrain.errors import UserError
from sparsetrain.sparsity.select import row_slices


class Run(NamedTuple):
    """Some block rows of a pattern, and the blocks that are stored in them."""

    rows: slice
    units: slice


@dataclass(frozen=True, eq=False)
class SparsityPattern:
    """The nonzero positions of an R x C matrix in compressed-row form, optionally in blocks of ``bh x bw``.

    A value vector over the pattern holds ``nnz`` scalars in row-major order of the blocks, and in row-major order
    inside a block; for the block ``(1, 1)`` that is the order of CSR. Patterns are immutable: a changed topology is
    a new pattern. Empty rows are legal, since a random mask of a small matrix has some.

    Args:
        shape: ``(R, C)`` of the dense matrix, i.e. ``(out_features, in_features)`` of a linear layer.
        row_ptr: int64 ``[R / bh + 1]``; the blocks of block row r are ``col[row_ptr[r]:row_ptr[r + 1]]``.
        col: int32 ``[number of blocks]``; block columns, strictly increasing inside a block row.
        block: ``(bh, bw)``; must divide ``shape``.

    Raises:
        UserError: the indices do not describe a matrix of that shape; the message names the first wrong row.
    """

    shape: tuple[int, int]
    row_ptr: Tensor
    col: Tensor
    block: tuple[int, int] = (1, 1)
    # Derived layouts (flat positions, kernel tilings): computed once, on first use, per pattern.
    _derived: dict[str, Any] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "shape", (int(self.shape[0]), int(self.shape[1])))
        object.__setattr__(self, "block", (int(self.block[0]), int(self.block[1])))
        row_ptr, col = _indices("row_ptr", self.row_ptr), _indices("col", self.col)
        if row_ptr.device != col.device:
            raise UserError(f"row_ptr is on {row_ptr.device} and col on {col.device}; one device is needed")
        if col.is_meta:
            raise UserError("a pattern cannot live on the meta device: its indices are data, not only a shape")
        # Validated as int64: an index beyond int32 must be reported, not wrapped around.
        _validate(self.shape, row_ptr, col, self.block)
        object.__setattr__(self, "row_ptr", row_ptr)
        object.__setattr__(self, "col", col.to(torch.int32))

    def __getstate__(self) -> dict[str, Any]:
        # Derived layouts hold identities of this process and are cheap to rebuild: they are not copied.
        return {**self.__dict__, "_derived": {}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)

    @classmethod
    def from_mask(cls, mask: Tensor, block: tuple[int, int] = (1, 1)) -> SparsityPattern:
        """Return the pattern of the true entries of ``mask``: bool ``[R, C]`` (out_features, in_features).

        With a block larger than ``(1, 1)`` every block must be wholly true or wholly false.

        Raises:
            UserError: not a matrix, not boolean, or a block that is only partly true.
        """
        if mask.ndim != 2:
            raise UserError(f"mask has {mask.ndim} dimensions; a matrix [out_features, in_features] is needed")
        if mask.dtype != torch.bool:
            raise UserError(f"mask has dtype {mask.dtype}; torch.bool is needed (for example weight != 0)")
        rows, columns = mask.shape
        bh, bw = block
        _check_block((rows, columns), block)
        tiles = mask.reshape(rows // bh, bh, columns // bw, bw)
        occupied = tiles.any(3).any(1)
        if block != (1, 1) and not torch.equal(occupied, tiles.all(3).all(1)):
            row, column = (occupied & ~tiles.all(3).all(1)).nonzero()[0].tolist()
            raise UserError(f"mask: block {bh}x{bw} at block row {row}, block column {column} is only partly true")
        counts = occupied.sum(1)
        row_ptr = torch.zeros(rows // bh + 1, dtype=torch.int64, device=mask.device)
        torch.cumsum(counts, 0, out=row_ptr[1:])
        return cls((rows, columns), row_ptr, occupied.nonzero()[:, 1], (bh, bw))

    @classmethod
    def of_sorted(cls, like: SparsityPattern, row_ptr: Tensor, col: Tensor) -> SparsityPattern:
        """Return a pattern of the shape and block of ``like`` that owns the given indices, without a copy or a check.

        For code that has just made them: sorted, unique, in range, int64 and int32.
        """
        pattern = object.__new__(cls)
        pattern.__dict__.update(shape=like.shape, row_ptr=row_ptr, col=col, block=like.block, _derived={})
        return pattern

    @property
    def nnz(self) -> int:
        """Number of stored scalars."""
        return self.col.numel() * self.block[0] * self.block[1]

    @property
    def density(self) -> float:
        """nnz over the number of elements of the dense matrix."""
        return self.nnz / (self.shape[0] * self.shape[1])

    @property
    def empty_rows(self) -> int:
        """Number of matrix rows (outputs) without any weight."""
        return int((self.row_ptr[1:] == self.row_ptr[:-1]).sum()) * self.block[0]

    @property
    def device(self) -> torch.device:
        return self.col.device

    def to(self, device: torch.device | str) -> SparsityPattern:
        """Return the pattern with its indices on ``device``."""
        if self.device == torch.device(device):
            return self
        return SparsityPattern(self.shape, self.row_ptr.to(device), self.col.to(device), self.block)

    def derived(self, name: str, build: Callable[[], Any]) -> Any:
        """Return the layout called ``name``, built by ``build()`` on first use and kept as long as the pattern."""
        if name not in self._derived:
            self._derived[name] = build()
        return self._derived[name]

    def block_rows(self) -> Tensor:
        """Return int64 ``[number of blocks]``: the block row of each stored block."""
        counts = self.row_ptr[1:] - self.row_ptr[:-1]
        return torch.repeat_interleave(torch.arange(len(counts), device=self.device), counts)

    def runs(self, rows: slice | None = None, units: int | None = None) -> list[Run]:
        """Return the block rows, or those of ``rows``, in short runs (`row_slices`) for passes that need little memory.

        Patterns of equal shape and block have equal runs of rows for equal ``units``.

        Args:
            units: for passes over so many stored blocks; otherwise runs are made for passes over the grid.
        """
        height, columns = self.row_ptr.numel() - 1, self.shape[1] // self.block[1]
        first, last, _ = (rows or slice(None)).indices(height)
        width = columns if units is None else max(1, -(-units // height))
        parts = row_slices(last - first, width, self.block[0] * self.block[1])
        if len(parts) == 1 and (first, last) == (0, height):
            return [Run(slice(0, height), slice(0, self.col.numel()))]
        ends = self.row_ptr[[first, *(first + part.stop for part in parts)]].tolist()
        return [
            Run(slice(first + part.start, first + part.stop), slice(*ends[index : index + 2]))
            for index, part in enumerate(parts)
        ]

    def cells(self, run: Run) -> Tensor:
        """Return int64 ``[blocks of the run]``: the row-major place of each in the grid of the run's block rows."""
        columns = self.shape[1] // self.block[1]
        ends = self.row_ptr[run.rows.start : run.rows.stop + 1]
        starts = torch.arange(0, (len(ends) - 1) * columns, columns, device=self.device)
        return torch.repeat_interleave(starts, ends[1:] - ends[:-1]).add_(self.col[run.units])

    def positions(self) -> Tensor:
        """Return int64 ``[nnz]``: the row-major position in the dense matrix of each value.

        Computed anew unless `keep_positions` was called: kept, they are 8 bytes a nonzero, half of what training needs.
        """
        kept = self._derived.get("positions")
        return self._positions() if kept is None else kept

    def keep_positions(self) -> None:
        """Keep `positions` from now on, for code that scatters and gathers at every step."""
        self.derived("positions", self._positions)

    def _positions(self) -> Tensor:
        bh, bw = self.block
        columns = self.shape[1]
        inside = torch.arange(bh, device=self.device)[:, None] * columns + torch.arange(bw, device=self.device)
        positions = torch.empty(self.col.numel(), bh * bw, dtype=torch.int64, device=self.device)
        for run in self.runs():
            cells = self.cells(run)
            row, column = cells // (columns // bw), cells % (columns // bw)
            corner = row.add_(run.rows.start).mul_(bh * columns).add_(column.mul_(bw))
            torch.add(corner[:, None], inside.view(1, -1), out=positions[run.units])
        return positions.view(-1)

    def mask(self) -> Tensor:
        """Return bool ``[R, C]``, true where a value is stored."""
        mask = torch.zeros(self.shape[0] * self.shape[1], dtype=torch.bool, device=self.device)
        mask[self.positions()] = True
        return mask.view(self.shape)

    def scatter(self, values: Tensor) -> Tensor:
        """Return the dense ``[R, C]`` matrix with ``values`` ``[nnz]`` at the stored positions, zero elsewhere."""
        dense = values.new_zeros(self.shape[0] * self.shape[1])
        return dense.index_copy_(0, self.positions(), values).view(self.shape)

    def gather(self, dense: Tensor) -> Tensor:
        """Return ``[nnz]``: the elements of ``dense`` ``[R, C]`` at the stored positions."""
        return dense.reshape(-1).index_select(0, self.positions())

    def transpose(self) -> tuple[SparsityPattern, Tensor]:
        """Return the transposed matrix's pattern and a permutation, int64 ``[nnz]``: its values are ``values[it]``."""
        rows, columns = self.shape
        bh, bw = self.block
        order = torch.argsort(self.col.to(torch.int64), stable=True)
        counts = torch.bincount(self.col.to(torch.int64), minlength=columns // bw)
        row_ptr = torch.zeros(columns // bw + 1, dtype=torch.int64, device=self.device)
        torch.cumsum(counts, 0, out=row_ptr[1:])
        pattern = SparsityPattern((columns, rows), row_ptr, self.block_rows()[order], (bw, bh))
        if self.block == (1, 1):
            return pattern, order
        inside = torch.arange(bh * bw, device=self.device).view(bh, bw).t().reshape(-1)
        return pattern, (order[:, None] * (bh * bw) + inside).reshape(-1)

    def union(self, other: SparsityPattern) -> SparsityPattern:
        """Return the pattern of the positions stored in either."""
        self._check_same_layout(other)
        return SparsityPattern.from_mask(self.mask() | other.to(self.device).mask(), self.block)

    def difference(self, other: SparsityPattern) -> SparsityPattern:
        """Return the pattern of the positions stored in this one and not in ``other``."""
        self._check_same_layout(other)
        return SparsityPattern.from_mask(self.mask() & ~other.to(self.device).mask(), self.block)

    def equals(self, other: SparsityPattern) -> bool:
        """Whether both store the same positions of the same shape in the same blocks."""
        return (
            self.shape == other.shape
            and self.block == other.block
            and torch.equal(self.row_ptr.cpu(), other.row_ptr.cpu())
            and torch.equal(self.col.cpu(), other.col.cpu())
        )

    def _check_same_layout(self, other: SparsityPattern) -> None:
        if self.shape != other.shape or self.block != other.block:
            raise UserError(
                f"patterns differ in shape or block: {self.shape} in blocks of {self.block}, "
                f"{other.shape} in blocks of {other.block}"
            )


def _indices(name: str, given: Any) -> Tensor:
    # A tensor stays where it is; `as_tensor` would move it to torch's default device.
    indices = given.detach() if isinstance(given, Tensor) else torch.as_tensor(given)
    if indices.dtype == torch.bool or indices.is_floating_point() or indices.is_complex():
        raise UserError(f"{name} has dtype {indices.dtype}; integers are needed")
    # A copy: a pattern is immutable, whatever happens to the tensor it was made of.
    return indices.to(torch.int64, copy=True).contiguous()


def _check_block(shape: tuple[int, int], block: tuple[int, int]) -> None:
    if min(shape) < 1:
        raise UserError(f"pattern shape {shape}: both sides must be at least 1")
    if min(block) < 1 or shape[0] % block[0] or shape[1] % block[1]:
        raise UserError(f"block {block[0]}x{block[1]} does not divide the matrix {shape[0]}x{shape[1]}")


def _validate(shape: tuple[int, int], row_ptr: Tensor, col: Tensor, block: tuple[int, int]) -> None:
    _check_block(shape, block)
    rows, columns = shape[0] // block[0], shape[1] // block[1]
    if row_ptr.shape != (rows + 1,):
        raise UserError(f"row_ptr has shape {tuple(row_ptr.shape)}; a pattern with {rows} rows needs ({rows + 1},)")
    if col.ndim != 1:
        raise UserError(f"col has {col.ndim} dimensions; one is needed")
    if int(row_ptr[0]) != 0 or int(row_ptr[-1]) != len(col):
        ends = f"{int(row_ptr[0])} to {int(row_ptr[-1])}"
        raise UserError(f"row_ptr runs from {ends}; it must run from 0 to the {len(col)} stored columns")
    falls = row_ptr[1:] < row_ptr[:-1]
    if bool(falls.any()):
        raise UserError(f"row_ptr decreases at row {int(falls.nonzero()[0])}")
    row_of = torch.repeat_interleave(torch.arange(rows, device=col.device), row_ptr[1:] - row_ptr[:-1])
    outside = (col < 0) | (col >= columns)
    if bool(outside.any()):
        at = int(outside.nonzero()[0])
        raise UserError(f"row {int(row_of[at])} has column {int(col[at])}; columns go from 0 to {columns - 1}")
    unsorted = (col[1:] <= col[:-1]) & (row_of[1:] == row_of[:-1])
    if bool(unsorted.any()):
        at = int(unsorted.nonzero()[0])
        pair = f"{int(col[at])} and then {int(col[at + 1])}"
        raise UserError(f"row {int(row_of[at])} has columns {pair}; they must increase, without repeats")
