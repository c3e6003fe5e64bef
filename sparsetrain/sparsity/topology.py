"""One change of a layer's mask: which weights stay, which grow, and how everything that belongs to them follows.

Legend: a *unit* is a block of the pattern, a single weight for the block (1, 1); [U, V] is the grid of units of a
matrix [R, C].
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from sparsetrain.errors import UserError
from sparsetrain.sparsity.linear import SparseLinear
from sparsetrain.sparsity.pattern import Run, SparsityPattern
from sparsetrain.sparsity.select import Slices, choose_largest, draw_ranks, split_evenly

Counts = list[tuple[Slices, int, int]]
GROWN = -1


@dataclass(frozen=True)
class TopologyUpdate:
    """A new pattern, and where each of its values comes from: what survives keeps its order.

    Args:
        pattern: the new one.
        kept: bool ``[units]`` of the old pattern. fresh: bool ``[units]`` of the new one, true for those that grew;
            None if there are none.
        runs: slices of old and of new units with the same survivors.
    """

    pattern: SparsityPattern
    kept: Tensor
    fresh: Tensor | None
    runs: list[tuple[slice, slice]]

    @classmethod
    def between(cls, old: SparsityPattern, new: SparsityPattern) -> TopologyUpdate:
        """Return the update that leads from one pattern to another of the same shape and block.

        Raises:
            UserError: the patterns differ in shape or block.
        """
        if old.shape != new.shape or old.block != new.block:
            raise UserError(
                f"patterns differ in shape or block: {old.shape} in blocks of {old.block}, {new.shape} in {new.block}"
            )
        kept = torch.empty(old.col.numel(), dtype=torch.bool, device=old.device)
        fresh = torch.empty(new.col.numel(), dtype=torch.bool, device=old.device)
        columns = grid_of(old)[1]
        for before, after in zip(old.runs(), new.runs(), strict=True):
            was, now = old.cells(before), new.cells(after)
            stored = torch.zeros(_rows(before) * columns, dtype=torch.bool, device=old.device)
            stored[now] = True
            kept[before.units] = stored[was]
            stored.zero_()[was] = True
            fresh[after.units] = ~stored[now]
        return cls(new, kept, fresh, _shared_runs(old, new))

    @classmethod
    def exchange(cls, old: SparsityPattern, kept: Tensor, grown: Tensor) -> TopologyUpdate:
        """Return the update that keeps some units and grows others.

        Args:
            kept: bool ``[units]`` of ``old``; belongs to the update from now on.
            grown: int64 or int32, increasing: row-major places in the grid of units that ``old`` does not store.
        """
        rows, columns = grid_of(old)
        units = _count(kept) + len(grown)
        col = torch.empty(units, dtype=torch.int32, device=old.device)
        row_ptr = torch.zeros(rows + 1, dtype=torch.int64, device=old.device)
        fresh = torch.zeros(units, dtype=torch.bool, device=old.device) if len(grown) else None
        runs = old.runs()
        starts = torch.tensor([run.rows.start * columns for run in runs], dtype=grown.dtype, device=grown.device)
        ends = [*torch.searchsorted(grown, starts).tolist(), len(grown)]
        done = 0
        for index, run in enumerate(runs):
            cells = old.cells(run)[kept[run.units]]
            here = grown[ends[index] : ends[index + 1]]
            if fresh is not None and len(here):
                # 1 survives, 2 grows.
                kinds = torch.zeros(_rows(run) * columns, dtype=torch.uint8, device=old.device)
                kinds[cells] = 1
                kinds[here.to(torch.int64) - run.rows.start * columns] = 2
                cells = kinds.nonzero()[:, 0]
                torch.eq(kinds[cells], 2, out=fresh[done : done + len(cells)])
            counts = torch.bincount(cells // columns, minlength=_rows(run))
            row_ptr[run.rows.start + 1 : run.rows.stop + 1] = counts
            col[done : done + len(cells)] = cells.remainder_(columns)
            done += len(cells)
        new = SparsityPattern.of_sorted(old, row_ptr.cumsum_(0), col)
        return cls(new, kept, fresh, _shared_runs(old, new))

    @property
    def grown(self) -> Tensor:
        """Bool ``[nnz]`` of the new pattern: the values that are new."""
        size = self.pattern.block[0] * self.pattern.block[1]
        if self.fresh is None:
            return torch.zeros(self.pattern.nnz, dtype=torch.bool, device=self.pattern.device)
        return self.fresh.repeat_interleave(size) if size > 1 else self.fresh

    @property
    def grown_count(self) -> int:
        """Number of values that are new."""
        size = self.pattern.block[0] * self.pattern.block[1]
        return 0 if self.fresh is None else _count(self.fresh) * size

    @property
    def source(self) -> Tensor:
        """Int64 ``[nnz]`` of the new pattern: the place of each value in the old vector, or -1 for one that grew."""
        size = self.pattern.block[0] * self.pattern.block[1]
        source = torch.full((self.pattern.nnz,), GROWN, dtype=torch.int64, device=self.pattern.device)
        survivors = self.kept.nonzero() * size + torch.arange(size, device=source.device)
        source[~self.grown] = survivors.view(-1)
        return source

    def carry(self, tensor: Tensor) -> Tensor:
        """Return ``[new nnz]``: the entries of ``tensor`` ``[old nnz]`` that survive, bit for bit, and zeros."""
        size = self.pattern.block[0] * self.pattern.block[1]
        old = tensor.detach().view(-1, size)
        new = old.new_zeros(self.pattern.col.numel(), size)
        for before, after in self.runs:
            survivors = old[before][self.kept[before]]
            if self.fresh is None:
                new[after] = survivors
            else:
                new[after][~self.fresh[after]] = survivors
        return new.view(-1)


def _rows(run: Run) -> int:
    return run.rows.stop - run.rows.start


def _shared_runs(old: SparsityPattern, new: SparsityPattern) -> list[tuple[slice, slice]]:
    larger, other = (old, new) if old.nnz > new.nnz else (new, old)
    runs = larger.runs(stored=True)
    pairs = zip(runs, other.cut([run.rows for run in runs]), strict=True)
    return [(one.units, two.units) if larger is old else (two.units, one.units) for one, two in pairs]


def grid_of(pattern: SparsityPattern) -> tuple[int, int]:
    """Return [U, V]."""
    return pattern.shape[0] // pattern.block[0], pattern.shape[1] // pattern.block[1]


def _stored(pattern: SparsityPattern, run: Run) -> Tensor:
    """Return bool ``[rows, V]`` of a run's block rows, true where a block is stored."""
    stored = torch.zeros(_rows(run), grid_of(pattern)[1], dtype=torch.bool, device=pattern.device)
    stored.view(-1)[pattern.cells(run)] = True
    return stored


def active_units(pattern: SparsityPattern) -> Tensor:
    """Return bool ``[U, V]``, true where a block is stored."""
    active = torch.empty(grid_of(pattern), dtype=torch.bool, device=pattern.device)
    for run in pattern.runs():
        active[run.rows] = _stored(pattern, run)
    return active


def unit_magnitudes(values: Tensor, block: tuple[int, int]) -> Tensor:
    """Return ``[units]``: the sum of magnitudes of each stored unit, of values ``[nnz]``."""
    magnitudes = values.detach().abs().to(torch.promote_types(values.dtype, torch.float32))
    return magnitudes if block == (1, 1) else magnitudes.view(-1, block[0] * block[1]).sum(1)


def unit_scores(dense: Tensor, block: tuple[int, int]) -> Tensor:
    """Return ``[U, V]``: the sum of magnitudes of ``dense`` ``[R, C]`` in each unit."""
    magnitudes = dense.abs()
    if block == (1, 1):
        return magnitudes
    bh, bw = block
    return magnitudes.view(dense.shape[0] // bh, bh, dense.shape[1] // bw, bw).sum((1, 3))


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
    return [_count(active[part]) for part in parts]


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
        # No more than there is room for: at low sparsity few positions are empty.
        exchanged = min(int(drop * min(before, after)), _cells_in(part) - max(before, after))
        counts.append((part, min(before, after) - exchanged, max(0, after - before) + exchanged))
    return counts


def _cells_in(part: Slices) -> int:
    return (part[0].stop - part[0].start) * (part[1].stop - part[1].start)


def _in_grid(places: Tensor, run: Run, part: Slices, columns: int) -> Tensor:
    """Return the row-major places in the whole grid of places in the part of a run that lies in a band."""
    width = part[1].stop - part[1].start
    return (places // width + run.rows.start) * columns + (places % width + part[1].start)


def _in_order(found: list[Tensor], pattern: SparsityPattern, counts: Counts) -> Tensor:
    if not found:
        return torch.empty(0, dtype=torch.int64, device=pattern.device)
    places = torch.cat(found)
    return places if len(counts) == 1 else places.sort().values


def choose_grown(dense: Tensor, pattern: SparsityPattern, counts: Counts) -> Tensor:
    """Return the places, int64, increasing, of the empty units to grow in the grid: as many as each band grows.

    They are those with the largest sums of magnitudes of ``dense`` ``[R, C]``, which is finite; of equal ones the
    first. ``dense`` is overwritten where units are stored.
    """
    (bh, bw), columns = pattern.block, grid_of(pattern)[1]

    def of_run(run: Run) -> Tensor:
        return dense[run.rows.start * bh : run.rows.stop * bh]

    # A mark that takes no memory of its own and is seen in the sum of a block.
    for run in pattern.runs():
        corners = of_run(run).view(_rows(run), bh, columns, bw)[:, 0, :, 0]
        corners.masked_fill_(_stored(pattern, run), torch.nan)

    def scores(run: Run, part: Slices) -> Tensor:
        return unit_scores(of_run(run), pattern.block)[:, part[1]].reshape(-1).nan_to_num_(-1.0, torch.inf)

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
        for run in pattern.runs(part[0], stored=True):
            cells = pattern.cells(run)
            if width < columns:
                column = cells % columns - part[1].start
                inside = (column >= 0) & (column < width)
                cells = (cells // columns * width + column)[inside]
            # How many empty places lie before each stored one; rank r is preceded by the stored ones with at most r.
            before = cells.sub_(torch.arange(len(cells), device=cells.device))
            end = start + _rows(run) * width - len(cells)
            first, last = torch.searchsorted(ranks, torch.tensor([start, end], dtype=ranks.dtype)).tolist()
            here = (ranks[first:last].to(torch.int64) - start).to(cells.device)
            grown.append(_in_grid(here + torch.searchsorted(before, here, right=True), run, part, columns))
            start = end
    return _in_order(grown, pattern, counts)


def choose_kept(values: Tensor, pattern: SparsityPattern, counts: Counts, protect_rows: bool = False) -> Tensor:
    """Return bool ``[units]``: the stored units of largest magnitude, as many as each band keeps.

    Of equal magnitudes the first in row-major order is dropped first. Only stored units are ranked, so a weight that
    grew and is still exactly zero is the weakest, but never confused with one that does not exist.

    Args:
        values: ``[nnz]``.
        protect_rows: keep the strongest unit of each row, in bands that keep at least as many as they have such units.
    """
    size = pattern.block[0] * pattern.block[1]
    strongest = _strongest(values, pattern) if protect_rows else None
    units = values.detach().view(-1, size)
    kept = torch.ones(len(units), dtype=torch.bool, device=pattern.device)

    def weakness(run: Run, part: Slices, guard: Tensor | None) -> Tensor:
        members = _members(pattern, run, part)
        found = unit_magnitudes(units[members].reshape(-1), pattern.block).neg()
        return found if guard is None else found.masked_fill_(guard[members], -torch.inf)

    for part, count, _ in counts:
        runs = pattern.runs(part[0], stored=True)
        total = band_units(pattern, [part])[0]
        guarded = 0 if strongest is None else sum(_count(strongest[_members(pattern, run, part)]) for run in runs)
        guard = strongest if 0 < guarded <= count else None
        # What goes is chosen, not what stays: that decides which of two equal ones is dropped.
        if count < total:
            parts = [partial(weakness, run, part, guard) for run in runs]
            for run, goes in zip(runs, choose_largest(parts, total, total - count), strict=True):
                kept[_members(pattern, run, part)] = ~goes
    return kept


def _members(pattern: SparsityPattern, run: Run, part: Slices) -> slice | Tensor:
    """Return which stored units of a run lie in the columns of a band."""
    columns = grid_of(pattern)[1]
    if part[1] == slice(0, columns):
        return run.units
    column = pattern.cells(run).remainder_(columns)
    return ((column >= part[1].start) & (column < part[1].stop)).nonzero()[:, 0].add_(run.units.start)


def _strongest(values: Tensor, pattern: SparsityPattern) -> Tensor:
    """Return bool ``[units]``: the one of largest magnitude in each row of units, of equal ones the first."""
    size = pattern.block[0] * pattern.block[1]
    units = values.detach().view(-1, size)
    strongest = torch.empty(len(units), dtype=torch.bool, device=pattern.device)
    for run in pattern.runs():
        stored = _stored(pattern, run)
        magnitudes = unit_magnitudes(units[run.units].reshape(-1), pattern.block)
        best = magnitudes.new_full(stored.shape, -1.0).masked_scatter_(stored, magnitudes).max(1)
        first = torch.zeros_like(stored).scatter_(1, best.indices[:, None], (best.values >= 0)[:, None])
        strongest[run.units] = first[stored]
    return strongest


def _count(mask: Tensor) -> int:
    # The sum of a bool tensor is taken of a copy in int64, eight times its size.
    return int(torch.count_nonzero(mask))


# ------------------------------------------------------------------------------------------------------ optimizers

# Their state is one number a weight, and numbers a tensor: moving the entries of the state with those of the
# parameter gives the optimizer of the new weights. (Adafactor factors matrices only; values are a vector.)
_ELEMENTWISE: set[type[Optimizer]] = {
    getattr(torch.optim, name)
    for name in (
        *("SGD", "Adam", "AdamW", "Adamax", "NAdam", "RAdam"),
        *("Adagrad", "Adadelta", "RMSprop", "Rprop", "ASGD", "Adafactor"),
    )
    if hasattr(torch.optim, name)
}


def register_elementwise_optimizer(kind: type[Optimizer]) -> None:
    """Declare that the state of an optimizer class is one number per weight (or one per parameter), as Adam's is.

    A `MaskManager` refuses optimizers that it does not know: it could not move their state when a mask changes.
    """
    _ELEMENTWISE.add(kind)


def check_optimizer(optimizer: Optimizer, parameters: dict[str, nn.Parameter]) -> None:
    """Raise `UserError` if the state of ``optimizer`` could not follow a change of ``parameters``.

    That is so for an optimizer of unknown kind, and for one that does not hold them because it was built before the
    layers were made sparse, or because they are frozen.
    """
    if not isinstance(optimizer, tuple(_ELEMENTWISE)):
        known = ", ".join(sorted(kind.__name__ for kind in _ELEMENTWISE))
        raise UserError(
            f"optimizer {type(optimizer).__name__} is not known to keep one number per weight; known are {known}; "
            "register_elementwise_optimizer(kind) adds one"
        )
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    for name, parameter in parameters.items():
        if id(parameter) not in held:
            raise UserError(
                f"the optimizer does not hold {name}: build MaskManager(model, rule) first, and the optimizer from the "
                "parameters that the model then has"
            )


def apply_update(
    layer: SparseLinear, update: TopologyUpdate, optimizer: Optimizer | None = None, grown: Tensor | None = None
) -> None:
    """Give a layer its new pattern; values, gradient and optimizer state move alike.

    The Parameter object stays. What survives keeps its bits; what grew starts at zero (or at ``grown``), with a zero
    gradient and zero in every tensor of the optimizer that has one entry per weight.

    Args:
        layer: changed in place. update: from its present pattern.
        optimizer: whose state follows. grown: initial values ``[number that grew]``, zeros if None.

    Raises:
        UserError: a tensor of the optimizer that has neither one entry per weight nor one for all; nothing is changed.
    """
    parameter = layer.values
    state = {} if optimizer is None else optimizer.state.get(parameter, {})
    shape = parameter.shape
    for key, tensor in state.items():
        if isinstance(tensor, Tensor) and tensor.shape != shape and tensor.numel() > 1:
            raise UserError(
                f"optimizer state '{key}' has shape {tuple(tensor.shape)}, which cannot follow {parameter.numel()} "
                "weights to other positions"
            )
    # One tensor after the other: each is freed before the next one is made.
    layer.move_topology(update.pattern, update.carry)
    if grown is not None:
        parameter.data[update.grown] = grown.to(parameter)
    for key, tensor in state.items():
        if isinstance(tensor, Tensor) and tensor.shape == shape:
            state[key] = update.carry(tensor)
