"""Selection of the units of a layer that an update drops and grows, by runs of rows that need little memory.

Legend: a *unit* is a block of the pattern, a single weight for the block (1, 1); [U, V] is the grid of units of a
matrix [R, C]; a *band* is a rectangle of the grid within which units are ranked.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from sparsetrain.errors import NotFiniteError, UserError
from sparsetrain.sparsity.evolution.base import Rule
from sparsetrain.sparsity.evolution.topology import active_units, count_true, grid_of, rows_in, stored_in
from sparsetrain.sparsity.patterns.pattern import Run, SparsityPattern
from sparsetrain.sparsity.patterns.select import Slices, choose_largest, draw_ranks, split_evenly

Counts = list[tuple[Slices, int, int]]
"""(band, units kept, units grown) for each band."""


def stored_scores(values: Tensor, gradient: Tensor | None, block: tuple[int, int], rule: Rule) -> Tensor:
    """Return ``[units]``: the sum of a rule's scores over each stored unit.

    Args:
        values: ``[nnz]``, of whole units. gradient: theirs, ``[nnz]``; None for zeros.

    Raises:
        UserError: the rule's scores have another shape. NotFiniteError: they are NaN.
    """
    values = values.detach()
    zeros = values.new_zeros(()).expand_as(values)  # without memory of their own
    scores = _checked(rule.score(values, zeros if gradient is None else gradient), values.shape, rule, "score")
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    return scores if block == (1, 1) else scores.view(-1, block[0] * block[1]).sum(1)


def empty_scores(gradient: Tensor, block: tuple[int, int], rule: Rule) -> Tensor:
    """Return ``[U, V]``: the sum of a rule's scores over each unit of the grid, for a dense gradient ``[R, C]``.

    Raises:
        UserError: the rule's scores have another shape. NotFiniteError: they are NaN.
    """
    scores = _checked(rule.growth(gradient), gradient.shape, rule, "growth")
    if block == (1, 1):
        return scores
    bh, bw = block
    return scores.view(gradient.shape[0] // bh, bh, gradient.shape[1] // bw, bw).sum((1, 3))


def _checked(scores: Tensor, shape: torch.Size, rule: Rule, method: str) -> Tensor:
    """Return the scores of a rule, those of its own ``method`` within the finite numbers."""
    if getattr(type(rule), method) is getattr(Rule, method):
        return scores
    if scores.shape != shape:
        raise UserError(
            f"{rule.name}: {method}() returned shape {tuple(scores.shape)}; it must be {tuple(shape)}, that of its "
            "argument"
        )
    if bool(scores.isnan().any()):
        raise NotFiniteError(f"{rule.name}: {method}() returned NaN")
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    limits = torch.finfo(scores.dtype)
    return scores.clamp(limits.min, limits.max)  # infinities mark other things


def units_of(dense: Tensor, places: Tensor, block: tuple[int, int]) -> Tensor:
    """Return the elements of ``dense`` ``[R, C]`` in the units at ``places`` of the grid, in the order of a pattern."""
    bh, bw = block
    blocks = dense.view(dense.shape[0] // bh, bh, dense.shape[1] // bw, bw)
    columns = blocks.shape[2]
    return blocks[places // columns, :, places % columns].reshape(-1)


def all_finite(tensor: Tensor) -> bool:
    """Whether ``tensor`` has neither infinities nor NaN, found without the copies that `torch.isfinite` makes."""
    return bool(torch.isfinite(torch.stack(torch.aminmax(tensor.detach()))).all())


def band_units(pattern: SparsityPattern, parts: list[Slices]) -> list[int]:
    """Return the number of stored units in each band."""
    if parts == [(slice(0, grid_of(pattern)[0]), slice(0, grid_of(pattern)[1]))]:
        return [pattern.col.numel()]
    active = active_units(pattern)
    return [count_true(active[part]) for part in parts]


def exchange_counts(pattern: SparsityPattern, target: int, parts: list[Slices], drop: float) -> Counts:
    """Return ``(band, kept, grown)`` for each band of a layer, which add up to ``target`` units.

    An update that does not change the size keeps each band's count; one that does gives all bands the same.

    Args:
        target: units after the update. parts: the bands. drop: the fraction to exchange.
    """
    present = band_units(pattern, parts)
    wanted = present if sum(present) == target else split_evenly(target, len(parts))
    counts = []
    for part, before, after in zip(parts, present, wanted, strict=True):
        # At low sparsity few positions are empty, which limits the exchange.
        exchanged = min(int(drop * min(before, after)), _cells_in(part) - max(before, after))
        counts.append((part, min(before, after) - exchanged, max(0, after - before) + exchanged))
    return counts


def _cells_in(part: Slices) -> int:
    return (part[0].stop - part[0].start) * (part[1].stop - part[1].start)


def _in_grid(places: Tensor, run: Run, part: Slices, columns: int) -> Tensor:
    """Return the row-major places in the whole grid for ``places`` within a run's rows and a band's columns."""
    width = part[1].stop - part[1].start
    return (places // width + run.rows.start) * columns + (places % width + part[1].start)


def _in_order(found: list[Tensor], pattern: SparsityPattern, counts: Counts) -> Tensor:
    if not found:
        return torch.empty(0, dtype=torch.int64, device=pattern.device)
    places = torch.cat(found)
    return places if len(counts) == 1 else places.sort().values


def choose_grown(dense: Tensor, pattern: SparsityPattern, counts: Counts, rule: Rule) -> Tensor:
    """Return the places, int64, increasing, of the empty units to grow in the grid: as many as each band grows.

    They have the highest scores, see `Rule.growth`; of equal scores the first in row-major order.

    Args:
        dense: the gradient ``[R, C]``, which is finite.

    Raises:
        UserError, NotFiniteError: as `empty_scores`.
    """
    bh, columns = pattern.block[0], grid_of(pattern)[1]

    def scores(run: Run, part: Slices) -> Tensor:
        found = empty_scores(dense[run.rows.start * bh : run.rows.stop * bh], pattern.block, rule)
        return found.masked_fill(stored_in(pattern, run), -torch.inf)[:, part[1]].reshape(-1)

    grown = []
    for part, _, count in counts:
        if count:
            runs = pattern.runs(part[0])
            parts = [partial(scores, run, part) for run in runs]
            for run, chosen in zip(runs, choose_largest(parts, _cells_in(part), count), strict=True):
                grown.append(_in_grid(chosen.nonzero()[:, 0], run, part, columns))
    return _in_order(grown, pattern, counts)


def draw_grown(pattern: SparsityPattern, counts: Counts, generator: torch.Generator) -> Tensor:
    """Return the places, int64, increasing, of empty units drawn uniformly, as many as each band grows."""
    columns, grown = grid_of(pattern)[1], []
    for part, _, count in counts:
        if not count:
            continue
        width, start = part[1].stop - part[1].start, 0
        ranks = draw_ranks(_cells_in(part) - band_units(pattern, [part])[0], count, generator)
        for run in pattern.runs(part[0], pattern.col.numel()):
            cells = pattern.cells(run)
            if width < columns:
                column = cells % columns - part[1].start
                inside = (column >= 0) & (column < width)
                cells = (cells // columns * width + column)[inside]
            # The number of empty places before each stored one. The empty place of rank r lies behind the stored places
            # that have at most r empty places before them.
            before = cells.sub_(torch.arange(len(cells), device=cells.device))
            end = start + rows_in(run) * width - len(cells)
            ends = torch.tensor([start, end], dtype=ranks.dtype, device="cpu")
            first, last = torch.searchsorted(ranks, ends).tolist()
            here = (ranks[first:last].to(torch.int64) - start).to(cells.device)
            grown.append(_in_grid(here + torch.searchsorted(before, here, right=True), run, part, columns))
            start = end
    return _in_order(grown, pattern, counts)


def choose_kept(values: Tensor, pattern: SparsityPattern, counts: Counts, rule: Rule) -> Tensor:
    """Return bool ``[units]``: the stored units with the highest scores, as many as each band keeps.

    Of equal scores the first in row-major order is dropped first. Only stored units are ranked, so a weight that grew
    and is still exactly zero has the lowest magnitude, but is never confused with one that does not exist.

    Args:
        values: ``[nnz]``; their gradient, where there is one, is that of the step.
        rule: its `Rule.score` ranks. If it protects rows, the best unit of each row stays, in bands that keep at least
            as many units as they have rows with units.

    Raises:
        UserError, NotFiniteError: as `stored_scores`.
    """

    def scores(members: slice | Tensor) -> Tensor:
        gradient = None if gradients is None else gradients[members].reshape(-1)
        return stored_scores(units[members].reshape(-1), gradient, pattern.block, rule)

    size = pattern.block[0] * pattern.block[1]
    units = values.detach().reshape(-1, size)
    gradients = None if values.grad is None else values.grad.reshape(-1, size)
    best = _best_of_rows(scores, pattern) if rule.protect_rows else None
    kept = torch.ones(len(units), dtype=torch.bool, device=pattern.device)

    def weakness(run: Run, part: Slices, guard: Tensor | None) -> Tensor:
        members = _members(pattern, run, part)
        found = scores(members).neg()
        return found if guard is None else found.masked_fill_(guard[members], -torch.inf)

    for part, count, _ in counts:
        runs = pattern.runs(part[0], pattern.col.numel())
        total = band_units(pattern, [part])[0]
        guarded = 0 if best is None else sum(count_true(best[_members(pattern, run, part)]) for run in runs)
        guard = best if 0 < guarded <= count else None
        # The dropped units are selected, and not the kept ones, so that of equal scores the first is dropped.
        if count < total:
            parts = [partial(weakness, run, part, guard) for run in runs]
            for run, goes in zip(runs, choose_largest(parts, total, total - count), strict=True):
                kept[_members(pattern, run, part)] = ~goes
    return kept


def _members(pattern: SparsityPattern, run: Run, part: Slices) -> slice | Tensor:
    """Return the stored units of a run that lie in the columns of a band."""
    columns = grid_of(pattern)[1]
    if part[1] == slice(0, columns):
        return run.units
    column = pattern.cells(run).remainder_(columns)
    return ((column >= part[1].start) & (column < part[1].stop)).nonzero()[:, 0].add_(run.units.start)


def _best_of_rows(scores: Callable[[slice], Tensor], pattern: SparsityPattern) -> Tensor:
    """Return bool ``[units]``: the unit with the highest score in each row of units, of equal scores the first.

    Args:
        scores: maps a slice of the stored units to their scores.
    """
    best = torch.empty(pattern.col.numel(), dtype=torch.bool, device=pattern.device)
    for run in pattern.runs():
        stored, found = stored_in(pattern, run), scores(run.units)
        highest = found.new_full(stored.shape, -torch.inf).masked_scatter_(stored, found).max(1)
        first = torch.zeros_like(stored).scatter_(1, highest.indices[:, None], stored.any(1, keepdim=True))
        best[run.units] = first[stored]
    return best
