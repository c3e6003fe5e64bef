"""Where a sparse matrix has its nonzeros: an immutable compressed-row description.

Legend: R rows, C columns, ``(bh, bw)`` the block, nnz the number of stored scalars.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sparsetrain.errors import UserError
from sparsetrain.sparsity.patterns.indices import (
    UNKNOWN,
    Checked,
    as_indices,
    check_block,
    check_indices,
    fingerprint,
    recorded,
)
from sparsetrain.sparsity.patterns.select import row_slices

_REFRESH = threading.Lock()
_KEPT = ("layout_id",)  # layouts that do not depend on the indices


class Panel(NamedTuple):
    """Some block rows of a pattern, and the blocks that are stored in them."""

    rows: slice
    units: slice


@dataclass(frozen=True, eq=False)
class SparsityPattern:
    """The nonzero positions of an R x C matrix in compressed-row form, optionally in blocks of ``bh x bw``.

    A value vector over the pattern holds ``nnz`` scalars in row-major order of the blocks, and in row-major order
    inside a block; for the block ``(1, 1)`` that is the order of CSR. Patterns are immutable: a changed topology is
    a new pattern. Empty rows are legal, since a random mask of a small matrix has some.

    The indices of a layer's pattern are buffers of the layer, and other code may write into them (a distributed
    checkpoint, DDP, an average of models). Layouts are therefore derived from checked indices only, and `refresh`
    notices a write.

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
    _checked: Checked = field(init=False, repr=False)
    owner: str = field(default="a sparse layer", init=False, repr=False)  # the name of its layer in messages
    copied: bool = field(default=False, init=False, repr=False)  # whether its layer is a copy of one whose masks move
    # Whether such a copy has had a gradient, which an average of models never has.
    trained: bool = field(default=False, init=False, repr=False)
    # A `DenseGradientRequest` while the dense gradient of its layer is requested.
    request: Any = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "shape", (int(self.shape[0]), int(self.shape[1])))
        object.__setattr__(self, "block", (int(self.block[0]), int(self.block[1])))
        row_ptr, col = as_indices("row_ptr", self.row_ptr), as_indices("col", self.col)
        if row_ptr.device != col.device:
            raise UserError(f"row_ptr is on {row_ptr.device} and col on {col.device}; one device is needed")
        if col.is_meta:
            raise UserError("a pattern cannot live on the meta device: its indices are data, not only a shape")
        # The check sees int64: an index beyond int32 must be reported, not wrapped around.
        check_indices(self.shape, row_ptr, col, self.block)
        self._hold(row_ptr, col.to(torch.int32))

    def _hold(self, row_ptr: Tensor, col: Tensor) -> None:
        row_ptr, col = recorded(row_ptr), recorded(col)
        self.__dict__.update(row_ptr=row_ptr, col=col, _checked=Checked(row_ptr, col))

    def __getstate__(self) -> dict[str, Any]:
        # Derived layouts hold identities of this process and are cheap to rebuild, so they are not copied.
        return {
            **self.__dict__,
            "_derived": {},
            "_checked": self._checked.fingerprint,
            "request": None,
            "trained": False,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if "_checked" not in state:  # written by an earlier version
            self._hold(self.row_ptr, self.col)
            return
        # Without versions the first use of the copy compares its indices with the checked ones.
        checked = Checked.copied(self.col.numel(), state["_checked"])
        self.__dict__["_checked"] = checked

    @classmethod
    def over(
        cls, shape: tuple[int, int], row_ptr: Tensor, col: Tensor, block: tuple[int, int] = (1, 1)
    ) -> SparsityPattern:
        """Return a pattern that holds the given tensors themselves, and not copies, where their types allow it.

        It serves tensors that other code also holds and may write into, such as the buffers of a layer.

        Raises:
            UserError: as the constructor.
        """
        if row_ptr.dtype != torch.int64 or col.dtype != torch.int32 or row_ptr.is_inference() or col.is_inference():
            return cls(shape, row_ptr, col, block)
        if row_ptr.device != col.device or not (row_ptr.is_contiguous() and col.is_contiguous()):
            return cls(shape, row_ptr, col, block)
        check_indices(shape, row_ptr, col, block)
        pattern = object.__new__(cls)
        pattern.__dict__.update(shape=shape, block=block, _derived={})
        pattern._hold(row_ptr, col)
        return pattern

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
        check_block((rows, columns), block)
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

        The caller guarantees that they are sorted, unique and in range, ``row_ptr`` int64 and ``col`` int32.
        """
        pattern = object.__new__(cls)
        pattern.__dict__.update(shape=like.shape, block=like.block, _derived={})
        pattern._hold(row_ptr, col)
        return pattern

    # ------------------------------------------------------------------------------------------- writes by others

    @property
    def untouched(self) -> bool:
        """Whether torch has recorded no write into the indices since they were last checked."""
        return self._checked.versions == (self.row_ptr._version, self.col._version)

    @property
    def fit(self) -> tuple[int]:
        """The shape ``(nnz,)`` of a vector of values, according to the checked indices."""
        return (self._checked.units * self.block[0] * self.block[1],)

    @property
    def changes(self) -> int:
        """How many times `refresh` has found other positions."""
        return self._checked.changes

    def doubt(self) -> None:
        """Make the next `refresh` read the indices: torch does not record writes through ``.data`` or NumPy."""
        self._checked.versions = UNKNOWN

    def refresh(self, accept: bool = False) -> bool:
        """Check the indices again if they were written into; return whether they hold other positions now.

        Layouts that were derived from other positions are dropped. A write of the same content costs one pass over the
        indices.

        Args:
            accept: also accept other positions in a copied layer.

        Raises:
            UserError: the indices do not describe a matrix of this shape any more, or the layer is a copy, whose
                indices only an average of models would change. Each call raises until the indices are repaired.
        """
        if self.untouched:
            return False
        with _REFRESH:
            # The versions are read before the content, so the next call finds a write that comes in between.
            versions, checked = (self.row_ptr._version, self.col._version), self._checked
            found = fingerprint(self.row_ptr, self.col)
            if found == checked.fingerprint and self.col.numel() == checked.units:
                checked.versions = versions
                return False
            if self.copied and not self.trained and not accept:
                raise UserError(
                    f"{self.owner}: the masks of this copy of a layer were changed in place, as an average of models "
                    "does; average with sparsetrain.AveragedModel, or load other masks by load_state_dict"
                )
            try:
                if self.row_ptr.dtype != torch.int64 or self.col.dtype != torch.int32:
                    raise UserError(f"row_ptr is now {self.row_ptr.dtype} and col {self.col.dtype}")
                if not (self.row_ptr.is_contiguous() and self.col.is_contiguous()):
                    raise UserError("row_ptr and col are no longer contiguous")
                check_indices(self.shape, self.row_ptr, self.col, self.block)
            except UserError as error:
                raise UserError(
                    f"{self.owner}: its indices were modified in place and do not describe a mask any more ({error}); "
                    "indices cannot be averaged or rounded"
                ) from None
            for name in [name for name in self._derived if name not in _KEPT]:
                self._derived.pop(name, None)
            checked.units, checked.changes = self.col.numel(), checked.changes + 1
            checked.fingerprint, checked.versions = found, versions
            return True

    @property
    def nnz(self) -> int:
        """Number of stored scalars."""
        return self._checked.units * self.block[0] * self.block[1]

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
        """Return the layout called ``name``, built by ``build()`` on first use and kept as long as the pattern.

        ``build`` must copy what it keeps of the indices, since compiled code reads layouts without checks.

        Raises:
            UserError: the indices were modified since they were checked; the next use checks them again.
        """
        found = self._derived.get(name)
        if found is None:
            checked = self._checked
            if name not in _KEPT and fingerprint(self.row_ptr, self.col) != checked.fingerprint:
                self.doubt()
                raise UserError(
                    f"{self.owner}: its indices were modified in place while it was in use; the next forward pass "
                    "uses the new ones"
                )
            found = self._derived.setdefault(name, build())
        return found

    def block_rows(self) -> Tensor:
        """Return int64 ``[number of blocks]``: the block row of each stored block."""
        counts = self.row_ptr[1:] - self.row_ptr[:-1]
        return torch.repeat_interleave(torch.arange(len(counts), device=self.device), counts)

    def panels(self, rows: slice | None = None, units: int | None = None) -> list[Panel]:
        """Return all block rows, or ``rows``, in panels (`row_slices`) for passes that need little memory.

        Patterns of equal shape and block have equal panels of rows for equal ``units``.

        Args:
            units: the number of stored blocks that a pass goes over; None for a pass over the whole grid.
        """
        height, columns = self.row_ptr.numel() - 1, self.shape[1] // self.block[1]
        first, last, _ = (rows or slice(None)).indices(height)
        width = columns if units is None else max(1, -(-units // height))
        slices = row_slices(last - first, width, self.block[0] * self.block[1])
        if len(slices) == 1 and (first, last) == (0, height):
            return [Panel(slice(0, height), slice(0, self.col.numel()))]
        ends = self.row_ptr[[first, *(first + each.stop for each in slices)]].tolist()
        return [
            Panel(slice(first + each.start, first + each.stop), slice(*ends[index : index + 2]))
            for index, each in enumerate(slices)
        ]

    def places(self, panel: Panel) -> Tensor:
        """Return int64 ``[blocks of the panel]``: the row-major place of each in the grid of the panel's block rows."""
        columns = self.shape[1] // self.block[1]
        ends = self.row_ptr[panel.rows.start : panel.rows.stop + 1]
        starts = torch.arange(0, (len(ends) - 1) * columns, columns, device=self.device)
        return torch.repeat_interleave(starts, ends[1:] - ends[:-1]).add_(self.col[panel.units])

    def positions(self) -> Tensor:
        """Return int64 ``[nnz]``: the row-major position in the dense matrix of each value.

        They are computed at each call unless `keep_positions` was called. Kept positions take 8 bytes per nonzero.
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
        for panel in self.panels():
            places = self.places(panel)
            row, column = places // (columns // bw), places % (columns // bw)
            corner = row.add_(panel.rows.start).mul_(bh * columns).add_(column.mul_(bw))
            torch.add(corner[:, None], inside.view(1, -1), out=positions[panel.units])
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
        """Return the transposed pattern and int64 ``[nnz]``, the place in this pattern of each of its values."""
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
        self.doubt()  # so that the next product checks what was compared here
        other.doubt()
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
