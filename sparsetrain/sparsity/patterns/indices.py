"""The indices of a pattern: their checks, and the detection of writes by other code."""

from __future__ import annotations

import zlib
from typing import Any

import torch
from torch import Tensor

from sparsetrain.errors import UserError

MAX_SIDE = 2**31 - 1
_CHUNK = 1 << 22
_ODD, _ODDER = 0x1E3779B97F4A7C15, 0x3F58476D1CE4E5B9  # multipliers that spread bits, modulo 2^64
UNKNOWN = (-1, -1)  # versions that no tensors have


class Checked:
    """The state of the indices at their last check.

    Attributes:
        units: stored blocks. versions: of row_ptr and col, which torch raises at every write that it records.
        fingerprint: of their content, for a write that changes nothing, or that torch does not record.
        changes: how often a check found that the content had changed.
    """

    __slots__ = ("changes", "fingerprint", "units", "versions")

    def __init__(self, row_ptr: Tensor, col: Tensor) -> None:
        self.units, self.versions, self.changes = col.numel(), (row_ptr._version, col._version), 0
        self.fingerprint = fingerprint(row_ptr, col)

    @classmethod
    def copied(cls, units: int, fingerprint: int) -> Checked:
        """Return the state for copies of checked indices; without versions, so that the copies are checked again."""
        checked = cls.__new__(cls)
        checked.units, checked.versions, checked.changes, checked.fingerprint = units, UNKNOWN, 0, fingerprint
        return checked


def fingerprint(row_ptr: Tensor, col: Tensor) -> int:
    """Return a number of 64 bits or more that identifies a pair of index tensors, up to accidental collisions."""
    if row_ptr.is_meta or col.is_meta:
        return 0
    first, second = (_checksum(part.detach()) for part in (row_ptr, col))
    return first << 64 | second


def _checksum(indices: Tensor) -> int:
    if indices.device.type == "cpu":
        return zlib.crc32(indices.contiguous().numpy().data)
    return mixed_sum(indices)


def mixed_sum(indices: Tensor) -> int:
    """Return a sum over (place, index), each pair mixed to 64 bits; it is computed on the device of the indices."""
    total = torch.zeros((), dtype=torch.int64, device=indices.device)
    start = 0
    for chunk in indices.split(_CHUNK):
        place = torch.arange(start, start + len(chunk), device=indices.device)
        mixed = chunk.to(torch.int64).add_(place.mul_(_ODD)).mul_(_ODDER)
        mixed ^= mixed >> 29
        total += mixed.mul_(_ODD).sum()
        start += len(chunk)
    return int(total) & (2**64 - 1)


def recorded(indices: Tensor) -> Tensor:
    """Return the tensor itself, or a copy of an inference tensor, for which torch does not record writes."""
    if not indices.is_inference():
        return indices
    with torch.inference_mode(False):
        return indices.clone()


def as_indices(name: str, given: Any) -> Tensor:
    """Return a copy of integers as a contiguous int64 tensor on their device."""
    # A tensor stays where it is; `as_tensor` would move it to torch's default device.
    indices = given.detach() if isinstance(given, Tensor) else torch.as_tensor(given)
    if indices.dtype == torch.bool or indices.is_floating_point() or indices.is_complex():
        raise UserError(f"{name} has dtype {indices.dtype}; integers are needed")
    # A copy, because the pattern must stay as it is when the given tensor changes.
    return indices.to(torch.int64, copy=True).contiguous()


def check_block(shape: tuple[int, int], block: tuple[int, int]) -> None:
    """Raise `UserError` unless ``block`` divides a matrix of that shape, which indices of 32 bits can address."""
    if min(shape) < 1:
        raise UserError(f"pattern shape {shape}: both sides must be at least 1")
    if max(shape) > MAX_SIDE:
        raise UserError(f"pattern shape {shape}: both sides must be at most {MAX_SIDE}")
    if min(block) < 1 or shape[0] % block[0] or shape[1] % block[1]:
        raise UserError(f"block {block[0]}x{block[1]} does not divide the matrix {shape[0]}x{shape[1]}")


def check_indices(shape: tuple[int, int], row_ptr: Tensor, col: Tensor, block: tuple[int, int]) -> None:
    """Raise `UserError`, which names the first wrong row, unless the indices describe a matrix of that shape."""
    check_block(shape, block)
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
