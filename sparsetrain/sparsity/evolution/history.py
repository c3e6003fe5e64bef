"""The history of a layer's masks: the first mask, and every position that was ever active.

The in-time over-parameterization rate R_s (Liu et al. 2021, arXiv 2102.02887) is the fraction of the dense weights that
were active at some time. Both masks are stored as bits, together a 16th of the bytes of the dense weights.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from sparsetrain.errors import UserError
from sparsetrain.sparsity.patterns.pattern import SparsityPattern

_ONES = np.array([bin(byte).count("1") for byte in range(256)], np.uint8)


def pack_bits(pattern: SparsityPattern) -> Tensor:
    """Return uint8 ``[ceil(U * V / 8)]`` on the CPU: the grid of stored blocks in row-major order, eight a byte."""
    columns = pattern.shape[1] // pattern.block[1]
    size = (pattern.row_ptr.numel() - 1) * columns
    bits = np.empty(-(-size // 8), np.uint8)
    for panel in pattern.panels():
        stored = torch.zeros((panel.rows.stop - panel.rows.start) * columns, dtype=torch.bool, device=pattern.device)
        stored[pattern.places(panel)] = True
        packed = np.packbits(stored.cpu().numpy())
        first = panel.rows.start * columns // 8  # panels begin at multiples of 8 rows
        bits[first : first + len(packed)] = packed
    return torch.from_numpy(bits)


def _count(bits: Tensor) -> int:
    return int(_ONES[bits.numpy()].sum(dtype=np.int64))


def unpack_bits(bits: Tensor, shape: tuple[int, int]) -> Tensor:
    """Return the bool ``[U, V]`` tensor that `pack_bits` packed."""
    return torch.from_numpy(np.unpackbits(bits.numpy(), count=shape[0] * shape[1]).astype(bool)).view(shape)


class Exploration:
    """The history of one layer's mask; nothing is stored before the first update.

    Args:
        grid: units of the matrix, [U, V]. active: units of the first mask. unit: weights in each.
    """

    def __init__(self, grid: tuple[int, int], active: int, unit: int = 1) -> None:
        self.grid, self.unit = grid, unit
        self.first: Tensor | None = None
        self.ever: Tensor | None = None
        self._first_count = self._ever_count = self._overlap_count = active

    def begin(self, first: SparsityPattern) -> None:
        """Record the first mask; further calls have no effect."""
        if self.first is None:
            self.first = self.ever = pack_bits(first)

    def record(self, after: SparsityPattern) -> None:
        """Record the mask after an update."""
        assert self.first is not None
        assert self.ever is not None
        now = pack_bits(after)
        self.ever = self.ever | now
        self._ever_count = _count(self.ever)
        self._overlap_count = _count(now.bitwise_and_(self.first))

    @property
    def rate(self) -> float:
        """R_s: the fraction of units that were active at some time."""
        return self._ever_count / (self.grid[0] * self.grid[1])

    @property
    def overlap(self) -> float:
        """The fraction of the first mask's units that are active now."""
        return self._overlap_count / self._first_count

    @property
    def first_weights(self) -> int:
        """Number of weights of the first mask."""
        return self._first_count * self.unit

    @property
    def overlap_weights(self) -> int:
        """Number of weights that the first mask and the present one share."""
        return self._overlap_count * self.unit

    def tensors(self) -> dict[str, Tensor]:
        """Return what a checkpoint needs; empty before the first update."""
        return {} if self.first is None or self.ever is None else {"first": self.first, "ever": self.ever}

    def snapshot(self, now: SparsityPattern) -> dict[str, Tensor]:
        """Return what `tensors` does, as copies, and before the first update the mask of ``now`` as both."""
        bits = self.tensors() or dict.fromkeys(("first", "ever"), pack_bits(now))
        return {name: tensor.clone() for name, tensor in bits.items()}

    def check(self, tensors: Mapping[str, Tensor]) -> None:
        """Raise `UserError` unless `restore` accepts the tensors: none, or both in this layer's size."""
        size = -(-self.grid[0] * self.grid[1] // 8)
        for name in ("first", "ever") if tensors else ():
            bits = tensors.get(name)
            if not isinstance(bits, Tensor) or bits.shape != (size,) or bits.dtype != torch.uint8:
                raise UserError(f"the mask history has no '{name}' of {size} bytes: it belongs to another layer")

    def restore(self, tensors: Mapping[str, Tensor], now: SparsityPattern) -> None:
        """Put back what `tensors` or `snapshot` returned, beside the mask of that time.

        Raises:
            UserError: as `check`.
        """
        self.check(tensors)
        if not tensors:
            self.first = self.ever = None
            self._first_count = self._ever_count = self._overlap_count = now.col.numel()
            return
        self.first, self.ever = tensors["first"].cpu(), tensors["ever"].cpu()
        self._first_count = _count(self.first)
        self._ever_count = _count(self.ever)
        self._overlap_count = _count(self.first & pack_bits(now))
