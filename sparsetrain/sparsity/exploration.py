"""What a layer's masks have been so far: the first one, and every position that was ever active.

The in-time over-parameterization rate R_s (Liu et al. 2021, arXiv 2102.02887) is the part of the dense weights that
were active at some time. Both masks are kept as bits: a 16th of the bytes of the dense weights together.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from sparsetrain.errors import UserError


def pack_bits(mask: Tensor) -> Tensor:
    """Return uint8 ``[ceil(n / 8)]`` on the CPU: the entries of a bool tensor in row-major order, eight a byte."""
    return torch.from_numpy(np.packbits(mask.detach().cpu().numpy().reshape(-1)))


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

    def record(self, before: Tensor, after: Tensor) -> None:
        """Note an update from one mask, bool ``[U, V]``, to the next."""
        before, after = before.cpu(), after.cpu()
        if self.first is None or self.ever is None:
            self.first = pack_bits(before)
            self.ever = self.first
        ever = unpack_bits(self.ever, self.grid) | after
        self.ever = pack_bits(ever)
        self._ever_count = int(ever.sum())
        self._overlap_count = int((unpack_bits(self.first, self.grid) & after).sum())

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

    def restore(self, tensors: dict[str, Tensor], active: Tensor) -> None:
        """Put back what `tensors` returned, beside the mask ``active`` of that time.

        Raises:
            UserError: tensors of another size.
        """
        count = int(active.sum())
        if not tensors:
            self.first = self.ever = None
            self._first_count = self._ever_count = self._overlap_count = count
            return
        size = -(-self.grid[0] * self.grid[1] // 8)
        for name in ("first", "ever"):
            if name not in tensors or tensors[name].shape != (size,):
                raise UserError(f"the mask history has no '{name}' of {size} bytes: it belongs to another layer")
        self.first, self.ever = tensors["first"].cpu(), tensors["ever"].cpu()
        first = unpack_bits(self.first, self.grid)
        self._first_count = int(first.sum())
        self._ever_count = int(unpack_bits(self.ever, self.grid).sum())
        self._overlap_count = int((first & active.cpu()).sum())
