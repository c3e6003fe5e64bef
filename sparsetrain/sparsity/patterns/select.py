"""Selection of the highest scores of a matrix, or of random entries: exact counts, and ties decided by position."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from sparsetrain.errors import UserError

Slices = tuple[slice, slice]
Part = Callable[[], Tensor]


def row_slices(rows: int, columns: int, size: int = 1) -> list[slice]:
    """Cut a ``rows x columns`` matrix of entries with ``size`` numbers each into panels of rows.

    A pass over the panels one by one needs little memory beside its result. A panel is a 64th of the matrix, at least
    2**14 numbers, and a multiple of 8 rows, so that bits of different panels never share a byte.
    """
    step = max(2**14, rows * columns * size // 64) // max(1, columns * size)
    step = max(8, -(-step // 8) * 8)
    return [slice(start, min(start + step, rows)) for start in range(0, rows, step)]


def select_largest(parts: Sequence[Part], total: int, count: int) -> Iterator[Tensor]:
    """Yield for each part a bool vector, true at the ``count`` largest scores of all parts together.

    Among equal scores the first ones are taken on every device; a sorting routine would break ties differently on
    different machines. A sort or a partition of all scores would hold them and their places several times. Here the
    scores are counted by their leading bits until few candidates for the smallest selected score are left (radix
    select).

    Args:
        parts: functions that return scores, real numbers without NaN, as a vector. Each is called several times, so
            that only one part exists at a time. total: number of scores. count: 1 to that number.
    """
    ranked: list[Part] = [partial(_keys_of, part) for part in parts]
    if len(parts) == 1:
        whole = _keys_of(parts[0])
        ranked = [lambda: whole]
    least, digits, ties = _threshold(ranked, total, count)
    for part in ranked:
        keys = part() >> digits if digits else part()
        selected = keys > least
        if ties:
            equal = (keys == least).nonzero()[:ties, 0]
            selected[equal] = True
            ties -= len(equal)
        yield selected


def _keys_of(part: Part) -> Tensor:
    """Return signed integers in the order of a part's scores; equal scores, such as both zeros, have equal integers."""
    scores = part()
    if scores.dtype not in (torch.float32, torch.float64):
        scores = scores.to(torch.float32 if scores.is_floating_point() else torch.float64)
    # The sum turns -0.0 into 0.0, and is the copy that is changed below.
    bits = (scores + 0.0).view(torch.int32 if scores.dtype == torch.float32 else torch.int64)
    # Negative floats are ordered by magnitude.
    return bits.bitwise_xor_((bits >> (8 * bits.element_size() - 1)).bitwise_and_(torch.iinfo(bits.dtype).max))


def _threshold(ranked: Sequence[Part], total: int, count: int) -> tuple[int, int, int]:
    """Return ``least, digits, ties``, where the lowest ``digits`` bits of all keys are cut off.

    Selected are the keys above ``least`` and the first ``ties`` keys equal to it.

    Args:
        ranked: functions that return the keys of each part.
    """
    few = max(2**14, total // 16)
    bits = left = 0  # bits of a key, and the lower ones that are not counted yet
    prefix, here = 0, total  # leading bits of the keys that may be the threshold, and their number
    while here > few and (left or not bits):
        counts: Tensor | None = None
        for part in ranked:
            keys = part()
            bits = 8 * keys.element_size()
            left = left or bits
            size = min(11, left)
            found = keys >> (left - size)
            if left < bits:
                found = found[(keys >> left) == prefix]
            found = torch.bincount(found.bitwise_and_(2**size - 1), minlength=2**size)
            counts = found if counts is None else counts.add_(found)
        assert counts is not None
        # The highest bit of the first digit is the sign, and negative keys are the small ones.
        first = 2 ** (size - 1) if left == bits else 0
        ordered = counts.roll(first).flip(0)
        above = ordered.cumsum(0)
        place = int(torch.searchsorted(above, count))
        here = int(ordered[place])
        count -= int(above[place]) - here
        prefix = (prefix << size) + 2**size - 1 - place - first
        left -= size
    if bits and (count == here or not left):
        return prefix, left, count
    among = []
    for part in ranked:
        keys = part()
        among.append(keys[(keys >> left) == prefix] if bits else keys)
    keys = torch.cat(among) if len(among) > 1 else among[0]
    least = keys.kthvalue(here - count + 1).values
    return int(least), 0, count - int(torch.count_nonzero(keys > least))


def top_entries(scores: Tensor, count: int) -> Tensor:
    """Return a bool mask, of the shape of ``scores``, of the ``count`` largest.

    Among equal scores the first ones in row-major order are taken.

    Args:
        scores: real numbers of any shape, without NaN. count: 0 to the number of scores.

    Raises:
        ValueError: ``count`` outside that range.
    """
    if not 0 <= count <= scores.numel():
        raise ValueError(f"count={count} must lie between 0 and {scores.numel()}")
    selected = torch.zeros(scores.shape, dtype=torch.bool, device=scores.device)
    if count == 0:
        return selected
    matrix = scores if scores.ndim == 2 else scores.reshape(-1, 1)
    panels = row_slices(*matrix.shape)
    rows = [lambda panel=panel: matrix[panel].reshape(-1) for panel in panels]
    found = select_largest(rows, scores.numel(), count)
    for panel, part in zip(panels, found, strict=True):
        selected.view(matrix.shape)[panel] = part.view(-1, matrix.shape[1])
    return selected


def draw_ranks(total: int, count: int, generator: torch.Generator) -> Tensor:
    """Return ``count`` of the numbers below ``total``, increasing, on the CPU; each subset is equally likely.

    Raises:
        ValueError: ``count`` above ``total``.
    """
    if count > total:
        raise ValueError(f"count={count}: there are only {total} candidates")
    if count == 0:
        return torch.empty(0, dtype=torch.int32, device="cpu")
    # The permutation takes most of the memory; both types give the same one.
    dtype = torch.int32 if total < 2**31 else torch.int64
    ranks = torch.randperm(total, generator=generator, dtype=dtype, device="cpu")[:count].clone()
    return ranks.sort().values


def pick_ranked(parts: Iterable[Tensor], ranks: Tensor) -> Iterator[Tensor]:
    """Yield for each part the places, int64, of the true entries that ``ranks`` select.

    Args:
        parts: bool vectors. ranks: numbers of true entries, counted over all parts; increasing, on the CPU.
    """
    start = 0
    for part in parts:
        places = part.nonzero()[:, 0]
        ends = torch.tensor([start, start + len(places)], dtype=ranks.dtype, device="cpu")
        first, last = torch.searchsorted(ranks, ends).tolist()
        yield places[(ranks[first:last].to(torch.int64) - start).to(places.device)]
        start += len(places)


def random_entries(candidates: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Return a bool mask of ``count`` of the true entries of ``candidates`` ``[R, C]``, each subset equally likely.

    The draw is made on the CPU over positions in row-major order, so it does not depend on the device.

    Raises:
        ValueError: fewer candidates than ``count``.
    """
    selected = torch.zeros(candidates.shape, dtype=torch.bool, device=candidates.device)
    if count == 0:
        return selected
    ranks = draw_ranks(int(torch.count_nonzero(candidates)), count, generator)
    panels = row_slices(*candidates.shape)
    picked = pick_ranked((candidates[panel].reshape(-1) for panel in panels), ranks)
    for panel, places in zip(panels, picked, strict=True):
        selected[panel].view(-1)[places] = True
    return selected


def split_evenly(total: int, parts: int) -> list[int]:
    """Return ``parts`` counts that add up to ``total`` and differ by at most one, the larger ones first."""
    share, rest = divmod(total, parts)
    return [share + (part < rest) for part in range(parts)]


def largest_remainder(shares: list[float], total: int, limits: list[int]) -> list[int]:
    """Return integers near ``shares`` that add up to ``total`` exactly; each is at most its limit.

    Each share is rounded down, and the remainder goes to the largest fractions, of equal ones to the first.

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


def bands(grid: tuple[int, int], counts: tuple[int, int]) -> list[Slices]:
    """Return the slices that cut a ``grid`` into ``counts[0]`` bands of rows times ``counts[1]`` of columns.

    Scores are ranked inside each band on its own, for example within each attention head.

    Raises:
        UserError: the counts do not divide the grid.
    """
    if min(counts) < 1 or grid[0] % counts[0] or grid[1] % counts[1]:
        raise UserError(f"bands={list(counts)} do not divide the {grid[0]}x{grid[1]} matrix (in blocks) evenly")
    return list(_bands(grid, counts))


def _bands(grid: tuple[int, int], counts: tuple[int, int]) -> Iterator[Slices]:
    height, width = grid[0] // counts[0], grid[1] // counts[1]
    for row in range(counts[0]):
        for column in range(counts[1]):
            yield (
                slice(row * height, (row + 1) * height),
                slice(column * width, (column + 1) * width),
            )
