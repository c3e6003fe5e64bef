"""The index of a sparse matrix as gaps: how many empty places lie before each stored one.

Places are numbered row by row, so the gaps run over the ends of rows and there is no table of rows. A gap is written in
units of ``width`` bits: each unit of all ones stands for ``2^width - 1`` empty places and is continued, any other ends
the gap. The width is the one that needs the fewest bytes, so every density has a short index: at one stored place in
four, 2 bits and 0.43 bytes a place, where the entropy of random positions is 0.41; at full density, 1 bit.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from sparsetrain.errors import UserError

WIDTHS = (1, 2, 3, 4, 5, 6, 7, 8, 16)


def encode_gaps(places: Tensor) -> tuple[Tensor, int]:
    """Return the packed gaps, uint8, and the width of their units.

    Args:
        places: int64 ``[n]``, at least one, strictly increasing from at least 0.
    """
    gaps = torch.diff(places, prepend=places.new_full((1,), -1)) - 1
    width = min(WIDTHS, key=lambda bits: (int((gaps // (2**bits - 1)).sum()) + len(gaps)) * bits)
    full = 2**width - 1
    ends = torch.cumsum(gaps // full + 1, 0) - 1
    units = torch.full((int(ends[-1]) + 1,), full, dtype=torch.int64, device=places.device)
    units[ends] = gaps % full
    return _pack(units, width), width


def decode_gaps(packed: Tensor, width: int, count: int) -> Tensor:
    """Return the places, int64 ``[count]``.

    Raises:
        UserError: ``packed`` has fewer places.
    """
    units = _unpack(packed, width)
    ends = (units != 2**width - 1).nonzero().view(-1)[:count]
    if len(ends) < count:
        raise UserError(f"the index has {len(ends)} places; {count} are needed")
    return torch.cumsum(units, 0)[ends] + torch.arange(count, device=packed.device)


def _pack(units: Tensor, width: int) -> Tensor:
    size = -(-len(units) * width // 8)
    if width >= 8:
        return (units[:, None] >> _shifts(width // 8, 8, units) & 255).to(torch.uint8).view(-1)
    # Eight units fill `width` bytes, which fit into one integer.
    eights = F.pad(units, (0, -len(units) % 8)).view(-1, 8)
    words = (eights << _shifts(8, width, units)).sum(1)
    return (words[:, None] >> _shifts(width, 8, units) & 255).to(torch.uint8).view(-1)[:size].clone()


def _unpack(packed: Tensor, width: int) -> Tensor:
    whole = len(packed) * 8 // width
    if width >= 8:
        size = width // 8
        return (packed[: whole * size].view(-1, size).long() << _shifts(size, 8, packed)).sum(1)
    parts = F.pad(packed, (0, -len(packed) % width)).view(-1, width).long()
    words = (parts << _shifts(width, 8, packed)).sum(1)
    return (words[:, None] >> _shifts(8, width, packed) & 2**width - 1).view(-1)[:whole]


def _shifts(count: int, width: int, like: Tensor) -> Tensor:
    return torch.arange(0, count * width, width, device=like.device)
