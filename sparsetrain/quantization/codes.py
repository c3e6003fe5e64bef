"""Group-wise codes: a matrix as whole numbers of 4 or 8 bits, with a scale and an offset for each group of a row.

Legend: R rows, C columns, G = ceil(C / group) groups in a row, P = ceil(C bits / 8) bytes of codes in a row.

The last group of a row may be short. A weight is ``offset + scale * code``. Symmetric codes would need no offset, which
is a quarter of a bit a weight at groups of 64; their squared error on trained models was 1.5 to 2 times as large.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from sparsetrain.errors import UserError

BITS = (4, 8)
SCALES = torch.bfloat16  # it has float32's range, so no weight is too large or too small for it
LARGEST = 1e38  # the width of a group must be finite

# Shares of the range of a group that its codes may span. A narrower span cuts the extremes and has finer steps.
_SHARES = tuple(1.025 - 0.025 * step for step in range(18))


def encode(matrix: Tensor, bits: int, group: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the codes, scales and offsets of a matrix, each group with the least squared error that was found.

    Args:
        matrix: ``[R, C]``, floating point. bits: 4 or 8. group: the number of weights that share a scale.

    Returns:
        Codes uint8 ``[R, P]``, with two codes in a byte (the left one in its low half) if they have 4 bits; scales and
        offsets bfloat16 ``[R, G]``.

    Raises:
        UserError: a weight is not finite, or above 1e38.
    """
    rows, columns = matrix.shape
    # Rows of a length that a pass may hold several times.
    step = max(1, (1 << 20) // max(1, columns))
    parts = [_encode(matrix[first : first + step].float(), bits, group) for first in range(0, rows, step)]
    codes, scales, offsets = (torch.cat(part) for part in zip(*parts, strict=True))
    return codes, scales, offsets


def _encode(matrix: Tensor, bits: int, group: int) -> tuple[Tensor, Tensor, Tensor]:
    if not (matrix.abs() <= LARGEST).all():
        raise UserError("a weight is NaN, infinite or above 1e38, and has no code")
    rows, columns = matrix.shape
    short = -columns % group
    # A repeated last weight changes no range; it is not counted in the error.
    x = F.pad(matrix[None], (0, short), mode="replicate")[0].view(rows, -1, group)
    counted = torch.ones(columns + short, device=x.device)
    counted[columns:] = 0.0
    counted = counted.view(-1, group)
    low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
    centre, half, levels = (low + high) / 2, (high - low) / 2, 2**bits - 1
    # Errors are compared in units of the range, or of equal weights, whose squares neither vanish nor overflow.
    unit = torch.where(half > 0, half, torch.where(centre == 0, 1.0, centre.abs()))
    least = torch.full_like(centre, torch.inf)
    codes = torch.zeros_like(x)
    scales, offsets = torch.zeros_like(centre), torch.zeros_like(centre)
    for share in _SHARES:
        # The code of a weight is chosen for the scale and the offset as they are stored.
        scale = (2 * half * share / levels).to(SCALES).float()
        offset = (centre - half * share).to(SCALES).float()
        code = ((x - offset) / torch.where(scale > 0, scale, 1.0)).round_().clamp_(0, levels)
        error = (code * scale + offset - x).div_(unit).square_().mul_(counted).sum(-1, keepdim=True)
        better = error < least
        least = torch.where(better, error, least)
        codes = torch.where(better, code, codes)
        scales, offsets = torch.where(better, scale, scales), torch.where(better, offset, offsets)
    numbers = codes.to(torch.uint8).view(rows, -1)[:, :columns]
    return _pack(numbers, bits), scales.squeeze(-1).to(SCALES), offsets.squeeze(-1).to(SCALES)


def decode(codes: Tensor, scales: Tensor, offsets: Tensor, columns: int, bits: int, group: int) -> Tensor:
    """Return the matrix, float32 ``[R, columns]``; each number is rounded once, so the device does not matter.

    Args:
        codes, scales, offsets: as `encode` returns them.
    """
    numbers = _unpack(codes, columns, bits).float()
    numbers = F.pad(numbers, (0, -columns % group)).view(len(codes), -1, group)
    # A scale has 8 significant bits and a code at most 8, so their product is exact.
    numbers.mul_(scales.float()[..., None]).add_(offsets.float()[..., None])
    return numbers.view(len(codes), -1)[:, :columns]


def row_bytes(columns: int, bits: int) -> int:
    """Return P, the bytes of the codes of a row."""
    return -(-columns * bits // 8)


def _pack(numbers: Tensor, bits: int) -> Tensor:
    if bits == 8:
        return numbers.contiguous()
    numbers = F.pad(numbers, (0, numbers.shape[1] % 2))
    return numbers[:, ::2] | numbers[:, 1::2] << 4


def _unpack(codes: Tensor, columns: int, bits: int) -> Tensor:
    if bits == 8:
        return codes
    return torch.stack((codes & 15, codes >> 4), dim=-1).flatten(1)[:, :columns]
