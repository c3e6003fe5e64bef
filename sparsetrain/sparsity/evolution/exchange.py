"""Selection of the units of a layer that an update drops and grows, by panels of rows that need little memory.

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
from sparsetrain.sparsity.patterns.pattern import Panel, SparsityPattern
from sparsetrain.sparsity.patterns.select import Slices, draw_ranks, select_largest, split_evenly

Counts = list[tuple[Slices, int, int]]
"""(band, units kept, units grown) for each band."""


def stored_scores(values: Tensor, gradient: Tensor | None, block: tuple[int, int], rule: Rule) -> Tensor:
    """Return ``[units]``: the sum of a rule's scores over each stored unit.

    Args:
        values: ``[nnz]``, of whole units. gradient: theirs, ``[nnz]``; None for zeros.

    Raises:
        UserError: the rule's scores are not a real tensor of that shape. NotFiniteError: they are NaN.
    """
    values = values.detach()
    zeros = values.new_zeros(()).expand_as(values)  # without memory of their own
    scores = _ranked(rule, "score", values, zeros if gradient is None else gradient)
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    return scores if block == (1, 1) else scores.view(-1, block[0] * block[1]).sum(1)


def empty_scores(gradient: Tensor, block: tuple[int, int], rule: Rule) -> Tensor:
    """Return ``[U, V]``: the sum of a rule's scores over each unit of the grid, for a dense gradient ``[R, C]``.

    Raises:
        UserError: the rule's scores are not a real tensor of that shape. NotFiniteError: they are NaN.
    """
    scores = _ranked(rule, "growth", gradient)
    if block == (1, 1):
        return scores
    bh, bw = block
    return scores.view(gradient.shape[0] // bh, bh, gradient.shape[1] // bw, bw).sum((1, 3))


def _ranked(rule: Rule, method: str, *arguments: Tensor) -> Tensor:
    """Return what ``rule.score`` or ``rule.growth`` makes of its arguments; scores of a rule of one's own are checked.

    Such a rule gets copies, since a method that works in place would change the weights.
    """
    if getattr(type(rule), method) is getattr(Rule, method):
        scores: Tensor = getattr(rule, method)(*arguments)
        return scores
    scores = getattr(rule, method)(*(argument.clone() for argument in arguments))
    expected = arguments[0]
    if not isinstance(scores, Tensor):
        raise UserError(f"{rule.name}: {method}() returned {type(scores).__name__}; it must return a tensor")
    if scores.shape != expected.shape:
        raise UserError(
            f"{rule.name}: {method}() returned shape {tuple(scores.shape)}; it must be {tuple(expected.shape)}, that "
            "of its argument"
        )
    if scores.dtype.is_complex or scores.layout != torch.strided or scores.device != expected.device:
        raise UserError(
            f"{rule.name}: {method}() returned a tensor of {scores.dtype} on {scores.device} ({scores.layout}); it "
            f"must be real and dense, on {expected.device}"
        )
    # float32 holds the types of 8 bits too, which torch cannot compare.
    wide = torch.promote_types(scores.dtype, torch.float32) if scores.element_size() > 1 else torch.float32
    scores = scores.detach().to(wide)
    if bool(scores.isnan().any()):
        raise NotFiniteError(f"{rule.name}: {method}() returned NaN")
    limits = torch.finfo(wide)
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


def band_units(pattern: SparsityPattern, bands: list[Slices]) -> list[int]:
    """Return the number of stored units in each band."""
    if bands == [(slice(0, grid_of(pattern)[0]), slice(0, grid_of(pattern)[1]))]:
        return [pattern.col.numel()]
    active = active_units(pattern)
    return [count_true(active[band]) for band in bands]


def exchange_counts(pattern: SparsityPattern, target: int, bands: list[Slices], drop: float) -> Counts:
    """Return ``(band, kept, grown)`` for each band of a layer, which add up to ``target`` units.

    An update that does not change the size keeps each band's count; one that does gives all bands the same.

    Args:
        target: units after the update. drop: the fraction to exchange.
    """
    present = band_units(pattern, bands)
    wanted = present if sum(present) == target else split_evenly(target, len(bands))
    counts = []
    for band, before, after in zip(bands, present, wanted, strict=True):
        # At low sparsity few positions are empty, which limits the exchange.
        exchanged = min(int(drop * min(before, after)), _entries_in(band) - max(before, after))
        counts.append((band, min(before, after) - exchanged, max(0, after - before) + exchanged))
    return counts


def _entries_in(band: Slices) -> int:
    return (band[0].stop - band[0].start) * (band[1].stop - band[1].start)


def _in_grid(places: Tensor, panel: Panel, band: Slices, columns: int) -> Tensor:
    """Return the row-major places in the whole grid for ``places`` within a panel's rows and a band's columns."""
    width = band[1].stop - band[1].start
    return (places // width + panel.rows.start) * columns + (places % width + band[1].start)


def _in_order(found: list[Tensor], pattern: SparsityPattern, counts: Counts) -> Tensor:
    if not found:
        return torch.empty(0, dtype=torch.int64, device=pattern.device)
    places = torch.cat(found)
    return places if len(counts) == 1 else places.sort().values


def select_grown(dense: Tensor, pattern: SparsityPattern, counts: Counts, rule: Rule) -> Tensor:
    """Return the places, int64, increasing, of the empty units to grow in the grid: as many as each band grows.

    They have the highest scores, see `Rule.growth`; of equal scores the first in row-major order.

    Args:
        dense: the gradient ``[R, C]``, which is finite.

    Raises:
        UserError, NotFiniteError: as `empty_scores`.
    """
    bh, columns = pattern.block[0], grid_of(pattern)[1]

    def scores(panel: Panel, band: Slices) -> Tensor:
        found = empty_scores(dense[panel.rows.start * bh : panel.rows.stop * bh], pattern.block, rule)
        return found.masked_fill(stored_in(pattern, panel), -torch.inf)[:, band[1]].reshape(-1)

    grown = []
    for band, _, count in counts:
        if count:
            panels = pattern.panels(band[0])
            ranked = [partial(scores, panel, band) for panel in panels]
            for panel, chosen in zip(panels, select_largest(ranked, _entries_in(band), count), strict=True):
                grown.append(_in_grid(chosen.nonzero()[:, 0], panel, band, columns))
    return _in_order(grown, pattern, counts)


def draw_grown(pattern: SparsityPattern, counts: Counts, generator: torch.Generator) -> Tensor:
    """Return the places, int64, increasing, of empty units drawn uniformly, as many as each band grows."""
    columns, grown = grid_of(pattern)[1], []
    for band, _, count in counts:
        if not count:
            continue
        width, start = band[1].stop - band[1].start, 0
        ranks = draw_ranks(_entries_in(band) - band_units(pattern, [band])[0], count, generator)
        for panel in pattern.panels(band[0], pattern.col.numel()):
            stored = pattern.places(panel)
            if width < columns:
                column = stored % columns - band[1].start
                inside = (column >= 0) & (column < width)
                stored = (stored // columns * width + column)[inside]
            # The number of empty places before each stored one. The empty place of rank r lies behind the stored places
            # that have at most r empty places before them.
            before = stored.sub_(torch.arange(len(stored), device=stored.device))
            end = start + rows_in(panel) * width - len(stored)
            ends = torch.tensor([start, end], dtype=ranks.dtype, device="cpu")
            first, last = torch.searchsorted(ranks, ends).tolist()
            here = (ranks[first:last].to(torch.int64) - start).to(stored.device)
            grown.append(_in_grid(here + torch.searchsorted(before, here, right=True), panel, band, columns))
            start = end
    return _in_order(grown, pattern, counts)


def select_kept(values: Tensor, pattern: SparsityPattern, counts: Counts, rule: Rule) -> Tensor:
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

    def weakness(panel: Panel, band: Slices, guard: Tensor | None) -> Tensor:
        members = _members(pattern, panel, band)
        found = scores(members).neg()
        return found if guard is None else found.masked_fill_(guard[members], -torch.inf)

    for band, count, _ in counts:
        panels = pattern.panels(band[0], pattern.col.numel())
        total = band_units(pattern, [band])[0]
        guarded = 0 if best is None else sum(count_true(best[_members(pattern, panel, band)]) for panel in panels)
        guard = best if 0 < guarded <= count else None
        # The dropped units are selected, and not the kept ones, so that of equal scores the first is dropped.
        if count < total:
            ranked = [partial(weakness, panel, band, guard) for panel in panels]
            for panel, goes in zip(panels, select_largest(ranked, total, total - count), strict=True):
                kept[_members(pattern, panel, band)] = ~goes
    return kept


def _members(pattern: SparsityPattern, panel: Panel, band: Slices) -> slice | Tensor:
    """Return the stored units of a panel that lie in the columns of a band."""
    columns = grid_of(pattern)[1]
    if band[1] == slice(0, columns):
        return panel.units
    column = pattern.places(panel).remainder_(columns)
    return ((column >= band[1].start) & (column < band[1].stop)).nonzero()[:, 0].add_(panel.units.start)


def _best_of_rows(scores: Callable[[slice], Tensor], pattern: SparsityPattern) -> Tensor:
    """Return bool ``[units]``: the unit with the highest score in each row of units, of equal scores the first.

    Args:
        scores: maps a slice of the stored units to their scores.
    """
    best = torch.empty(pattern.col.numel(), dtype=torch.bool, device=pattern.device)
    for panel in pattern.panels():
        stored, found = stored_in(pattern, panel), scores(panel.units)
        highest = found.new_full(stored.shape, -torch.inf).masked_scatter_(stored, found).max(1)
        first = torch.zeros_like(stored).scatter_(1, highest.indices[:, None], stored.any(1, keepdim=True))
        best[panel.units] = first[stored]
    return best
