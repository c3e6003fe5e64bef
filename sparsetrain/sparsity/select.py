"""Which cells of a score matrix come first: exact counts, and ties decided by position alone."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from sparsetrain.errors import UserError

Slices = tuple[slice, slice]


def top_cells(scores: Tensor, count: int) -> Tensor:
    """Return a bool mask, of the shape of ``scores``, of the ``count`` largest.

    Among equal scores those that come first in row-major order are taken, on every device: a selection that left ties
    to the sorting routine would differ between machines.

    Args:
        scores: real numbers of any shape, without NaN. count: 0 to the number of scores.

    Raises:
        ValueError: ``count`` outside that range.
    """
    flat = scores.reshape(-1)
    if not 0 <= count <= flat.numel():
        raise ValueError(f"count={count} must lie between 0 and {flat.numel()}")
    if count == flat.numel():
        return torch.ones_like(scores, dtype=torch.bool)
    chosen = torch.zeros_like(flat, dtype=torch.bool)
    if count > 0:
        threshold = flat.kthvalue(flat.numel() - count + 1).values
        chosen = flat > threshold
        missing = count - int(chosen.sum())
        chosen[(flat == threshold).nonzero()[:missing, 0]] = True
    return chosen.view(scores.shape)


def random_cells(candidates: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Return a bool mask of ``count`` of the true entries of ``candidates``, each subset equally likely.

    The draw is made on the CPU and over positions in row-major order, so that it does not depend on the device.

    Raises:
        ValueError: fewer candidates than ``count``.
    """
    if count == 0:
        return torch.zeros_like(candidates)
    places = candidates.reshape(-1).nonzero()[:, 0]
    if count > len(places):
        raise ValueError(f"count={count}: there are only {len(places)} candidates")
    drawn = torch.randperm(len(places), generator=generator, device="cpu")[:count].to(places.device)
    chosen = torch.zeros(candidates.numel(), dtype=torch.bool, device=candidates.device)
    chosen[places[drawn]] = True
    return chosen.view(candidates.shape)


def split_evenly(total: int, parts: int) -> list[int]:
    """Return ``parts`` counts that add up to ``total`` and differ by at most one, the larger ones first."""
    share, rest = divmod(total, parts)
    return [share + (part < rest) for part in range(parts)]


def largest_remainder(shares: list[float], total: int, limits: list[int]) -> list[int]:
    """Return integers near ``shares`` that add up to exactly ``total``, none above its limit.

    Each share is rounded down and what is missing goes to the largest fractions, the first of equal ones.

    Raises:
        ValueError: the limits do not leave room for ``total``.
    """
    counts = [min(int(share), limit) for share, limit in zip(shares, limits, strict=True)]
    if not sum(counts) <= total <= sum(limits):
        raise ValueError(f"total={total} does not fit between {sum(counts)} and {sum(limits)}")
    order = sorted(range(len(shares)), key=lambda index: (counts[index] - shares[index], index))
    while sum(counts) < total:
        for index in order:
            if counts[index] < limits[index] and sum(counts) < total:
                counts[index] += 1
    return counts


def bands(grid: tuple[int, int], parts: tuple[int, int]) -> list[Slices]:
    """Return the slices that cut a ``grid`` into ``parts[0]`` bands of rows times ``parts[1]`` of columns.

    Scores are ranked inside each of them on its own, for example within each attention head.

    Raises:
        UserError: the parts do not divide the grid.
    """
    if min(parts) < 1 or grid[0] % parts[0] or grid[1] % parts[1]:
        raise UserError(f"bands={list(parts)} do not divide the {grid[0]}x{grid[1]} matrix (in blocks) evenly")
    return list(_bands(grid, parts))


def _bands(grid: tuple[int, int], parts: tuple[int, int]) -> Iterator[Slices]:
    height, width = grid[0] // parts[0], grid[1] // parts[1]
    for row in range(parts[0]):
        for column in range(parts[1]):
            yield (
                slice(row * height, (row + 1) * height),
                slice(column * width, (column + 1) * width),
            )
