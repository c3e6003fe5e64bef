"""One change of a layer's mask: values, gradient and optimizer state follow the weights that stay.

Legend: a *unit* is a block of the pattern, a single weight for the block (1, 1); [U, V] is the grid of units of a
matrix [R, C].
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim import Optimizer

from sparsetrain.errors import UserError, check_choice
from sparsetrain.sparsity.evolution.base import MOMENTS
from sparsetrain.sparsity.evolution.optimizers import _ELEMENTWISE as _ELEMENTWISE
from sparsetrain.sparsity.evolution.optimizers import check_optimizer as check_optimizer
from sparsetrain.sparsity.evolution.optimizers import innermost
from sparsetrain.sparsity.evolution.optimizers import register_elementwise_optimizer as register_elementwise_optimizer
from sparsetrain.sparsity.layers.linear import SparseLinear
from sparsetrain.sparsity.patterns.pattern import Panel, SparsityPattern

GROWN = -1


@dataclass(frozen=True)
class TopologyUpdate:
    """A new pattern, and the origin of each of its values; survivors keep their order.

    Args:
        pattern: the new pattern.
        kept: bool ``[units]`` of the old pattern. fresh: bool ``[units]`` of the new pattern, true for grown units;
            None if no unit grew.
        panels: slices of old and of new units with the same survivors.
    """

    pattern: SparsityPattern
    kept: Tensor
    fresh: Tensor | None
    panels: list[tuple[slice, slice]]

    @classmethod
    def between(cls, old: SparsityPattern, new: SparsityPattern) -> TopologyUpdate:
        """Return the update from one pattern to another of the same shape and block.

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
        for before, after in zip(old.panels(), new.panels(), strict=True):
            was, now = old.places(before), new.places(after)
            stored = torch.zeros(rows_in(before) * columns, dtype=torch.bool, device=old.device)
            stored[now] = True
            kept[before.units] = stored[was]
            stored.zero_()[was] = True
            fresh[after.units] = ~stored[now]
        return cls(new, kept, fresh, _shared_panels(old, new))

    @classmethod
    def exchange(cls, old: SparsityPattern, kept: Tensor, grown: Tensor) -> TopologyUpdate:
        """Return the update that keeps some units and grows others.

        Args:
            kept: bool ``[units]`` of ``old``; the update owns it afterwards.
            grown: int64 or int32, increasing: row-major places in the grid of units that ``old`` does not store.
        """
        rows, columns = grid_of(old)
        units = count_true(kept) + len(grown)
        col = torch.empty(units, dtype=torch.int32, device=old.device)
        row_ptr = torch.zeros(rows + 1, dtype=torch.int64, device=old.device)
        fresh = torch.zeros(units, dtype=torch.bool, device=old.device) if len(grown) else None
        panels = old.panels(units=max(units, len(kept)))
        starts = torch.tensor([panel.rows.start * columns for panel in panels], dtype=grown.dtype, device=grown.device)
        ends = [*torch.searchsorted(grown, starts).tolist(), len(grown)]
        done = 0
        for index, panel in enumerate(panels):
            stored = old.places(panel)[kept[panel.units]]
            if fresh is not None:
                born = grown[ends[index] : ends[index + 1]].to(torch.int64) - panel.rows.start * columns
                # Both are sorted: a grown unit stands behind all survivors and grown units at smaller places.
                place = torch.searchsorted(stored, born).add_(torch.arange(len(born), device=born.device))
                here = fresh[done : done + len(stored) + len(born)]
                here[place] = True
                merged = stored.new_empty(len(here))
                merged[place] = born
                stored = merged.masked_scatter_(~here, stored)
            counts = torch.bincount(stored // columns, minlength=rows_in(panel))
            row_ptr[panel.rows.start + 1 : panel.rows.stop + 1] = counts
            col[done : done + len(stored)] = stored.remainder_(columns)
            done += len(stored)
        new = SparsityPattern.of_sorted(old, row_ptr.cumsum_(0), col)
        return cls(new, kept, fresh, _shared_panels(old, new))

    @property
    def grown(self) -> Tensor:
        """Bool ``[nnz]`` of the new pattern: true for grown values."""
        size = self.pattern.block[0] * self.pattern.block[1]
        if self.fresh is None:
            return torch.zeros(self.pattern.nnz, dtype=torch.bool, device=self.pattern.device)
        return self.fresh.repeat_interleave(size) if size > 1 else self.fresh

    @property
    def grown_count(self) -> int:
        """Number of grown values."""
        size = self.pattern.block[0] * self.pattern.block[1]
        return 0 if self.fresh is None else count_true(self.fresh) * size

    @property
    def source(self) -> Tensor:
        """Int64 ``[nnz]`` of the new pattern: the place of each value in the old vector, -1 for a grown value."""
        size = self.pattern.block[0] * self.pattern.block[1]
        source = torch.full((self.pattern.nnz,), GROWN, dtype=torch.int64, device=self.pattern.device)
        survivors = self.kept.nonzero() * size + torch.arange(size, device=source.device)
        source[~self.grown] = survivors.view(-1)
        return source

    def carry(self, tensor: Tensor) -> Tensor:
        """Return ``[new nnz]``: the entries of ``tensor`` ``[old nnz]`` that survive, bit for bit, and zeros."""
        size = self.pattern.block[0] * self.pattern.block[1]
        old = tensor.detach().reshape(-1, size)
        new = old.new_zeros(self.pattern.col.numel(), size)
        for before, after in self.panels:
            survivors = old[before][self.kept[before]]
            if self.fresh is None:
                new[after] = survivors
            else:
                new[after][~self.fresh[after]] = survivors
        return new.view(-1)


def rows_in(panel: Panel) -> int:
    """Return the number of block rows of a panel."""
    return panel.rows.stop - panel.rows.start


def _shared_panels(old: SparsityPattern, new: SparsityPattern) -> list[tuple[slice, slice]]:
    units = max(old.col.numel(), new.col.numel())
    pairs = zip(old.panels(units=units), new.panels(units=units), strict=True)
    return [(before.units, after.units) for before, after in pairs]


def grid_of(pattern: SparsityPattern) -> tuple[int, int]:
    """Return [U, V]."""
    return pattern.shape[0] // pattern.block[0], pattern.shape[1] // pattern.block[1]


def stored_in(pattern: SparsityPattern, panel: Panel) -> Tensor:
    """Return bool ``[rows, V]`` of a panel's block rows, true where a block is stored."""
    stored = torch.zeros(rows_in(panel), grid_of(pattern)[1], dtype=torch.bool, device=pattern.device)
    stored.view(-1)[pattern.places(panel)] = True
    return stored


def active_units(pattern: SparsityPattern) -> Tensor:
    """Return bool ``[U, V]``, true where a block is stored."""
    active = torch.empty(grid_of(pattern), dtype=torch.bool, device=pattern.device)
    for panel in pattern.panels():
        active[panel.rows] = stored_in(pattern, panel)
    return active


def count_true(mask: Tensor) -> int:
    """Return how many entries of a bool tensor are true."""
    # The sum of a bool tensor would make a copy in int64, eight times its size.
    return int(torch.count_nonzero(mask))


def apply_update(
    layer: SparseLinear,
    update: TopologyUpdate,
    optimizer: Optimizer | None = None,
    grown: Tensor | None = None,
    grown_moments: str = "zero",
) -> None:
    """Give a layer its new pattern; values, gradient and optimizer state move together.

    The Parameter object stays. Survivors keep their bits. Grown weights start at zero (or at ``grown``), with a zero
    gradient.

    In every tensor of the optimizer with one entry per weight, grown entries start at zero, or, with
    ``grown_moments="mean"``, at the mean of the survivors' entries. The first step of a weight with zero moments is
    larger than the learning rate if beta2 is large: after many steps the optimizer corrects no bias any more, so under
    Adam and AdamW the weight moves by ``(1 - beta1) / sqrt(1 - beta2)`` learning rates for any gradient. That is 3.2 at
    betas of 0.9 and 0.999, and 0.45 at 0.9 and 0.95.

    Args:
        layer: changed in place. update: from its present pattern.
        optimizer: the optimizer whose state follows, or a wrapper around it.
        grown: initial values ``[number of grown weights]``, zeros if None.
        grown_moments: ``zero`` or ``mean``.

    Raises:
        UserError: a tensor of the optimizer has neither one entry per weight nor a single entry; nothing is changed.
    """
    check_choice("grown_moments", grown_moments, MOMENTS)
    parameter = layer.values
    state = {} if optimizer is None else innermost(optimizer).state.get(parameter, {})
    shape = parameter.shape
    for key, tensor in state.items():
        if isinstance(tensor, Tensor) and tensor.shape != shape and tensor.numel() > 1:
            raise UserError(
                f"optimizer state '{key}' has shape {tuple(tensor.shape)}, which cannot follow {parameter.numel()} "
                "weights to other positions"
            )
    # One tensor after the other, so that each old one is freed before the next new one is made.
    layer.move_topology(update.pattern, update.carry)
    if grown is not None:
        parameter.data[update.grown] = grown.to(parameter)
    for key, tensor in state.items():
        if isinstance(tensor, Tensor) and tensor.shape == shape:
            state[key] = update.carry(tensor)
            if grown_moments == "mean" and tensor.is_floating_point() and update.fresh is not None:
                _fill_with_mean(state[key], update.grown)


def _fill_with_mean(tensor: Tensor, grown: Tensor) -> None:
    survivors = tensor[~grown]
    if survivors.numel() > 0:
        tensor[grown] = survivors.double().mean().to(tensor)
