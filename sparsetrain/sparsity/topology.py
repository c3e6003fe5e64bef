"""One change of a layer's mask: which weights stay, which grow, and how everything that belongs to them follows.

Legend: a *unit* is a block of the pattern, a single weight for the block (1, 1); [U, V] is the grid of units of a
matrix [R, C].
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from sparsetrain.errors import UserError
from sparsetrain.sparsity.linear import SparseLinear
from sparsetrain.sparsity.pattern import SparsityPattern
from sparsetrain.sparsity.select import Slices, random_cells, split_evenly, top_cells

GROWN = -1


@dataclass(frozen=True)
class TopologyUpdate:
    """A new pattern, and where each of its values comes from.

    Args:
        pattern: the new one.
        source: int64 ``[nnz]`` of the new pattern: the place of each value in the old vector, or -1 for one that grew.
    """

    pattern: SparsityPattern
    source: Tensor

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
        before, after = unit_ids(old), unit_ids(new)
        grid = grid_of(old)
        # A table of the whole grid: faster than searching one list in the other.
        place = torch.full((grid[0] * grid[1],), GROWN, dtype=torch.int32, device=old.device)
        place[before] = torch.arange(len(before), dtype=torch.int32, device=old.device)
        source = place[after].to(torch.int64)
        size = old.block[0] * old.block[1]
        if size > 1:
            inside = torch.arange(size, device=source.device)
            source = torch.where(source[:, None] < 0, GROWN, source[:, None] * size + inside).reshape(-1)
        return cls(new, source)

    @property
    def grown(self) -> Tensor:
        """Bool ``[nnz]``: the values that are new."""
        return self.source < 0

    def carry(self, tensor: Tensor) -> Tensor:
        """Return ``[new nnz]``: the entries of ``tensor`` ``[old nnz]`` that survive, bit for bit, and zeros."""
        moved = tensor.detach().index_select(0, self.source.clamp(min=0))
        return moved.masked_fill_(self.grown, 0)


def unit_ids(pattern: SparsityPattern) -> Tensor:
    """Return int64 ``[number of blocks]``, increasing: the row-major place of each stored block in the grid."""
    columns = pattern.shape[1] // pattern.block[1]
    return pattern.block_rows() * columns + pattern.col.to(torch.int64)


def grid_of(pattern: SparsityPattern) -> tuple[int, int]:
    """Return [U, V]."""
    return pattern.shape[0] // pattern.block[0], pattern.shape[1] // pattern.block[1]


def active_units(pattern: SparsityPattern) -> Tensor:
    """Return bool ``[U, V]``, true where a block is stored."""
    grid = grid_of(pattern)
    active = torch.zeros(grid[0] * grid[1], dtype=torch.bool, device=pattern.device)
    active[unit_ids(pattern)] = True
    return active.view(grid)


def unit_magnitudes(values: Tensor, pattern: SparsityPattern) -> Tensor:
    """Return ``[U, V]``: the sum of magnitudes of each stored unit, and -1 where there is none."""
    grid = grid_of(pattern)
    size = pattern.block[0] * pattern.block[1]
    magnitudes = values.detach().abs().to(torch.promote_types(values.dtype, torch.float32)).view(-1, size).sum(1)
    scores = torch.full((grid[0] * grid[1],), -1.0, dtype=magnitudes.dtype, device=magnitudes.device)
    scores[unit_ids(pattern)] = magnitudes
    return scores.view(grid)


def unit_scores(dense: Tensor, block: tuple[int, int], overwrite: bool = False) -> Tensor:
    """Return ``[U, V]``: the sum of magnitudes of ``dense`` ``[R, C]`` in each unit.

    With ``overwrite`` the memory of ``dense`` is used for them.
    """
    magnitudes = dense.abs_() if overwrite else dense.abs()
    if block == (1, 1):
        return magnitudes
    bh, bw = block
    return magnitudes.view(dense.shape[0] // bh, bh, dense.shape[1] // bw, bw).sum((1, 3))


def exchange_counts(active: Tensor, target: int, parts: list[Slices], drop: float) -> list[tuple[Slices, int, int]]:
    """Return ``(band, kept, grown)`` for each band of a layer, which add up to ``target`` units.

    An update that does not change the size keeps each band's count; one that does gives all bands the same.

    Args:
        active: bool ``[U, V]``. target: units after the update. parts: the bands. drop: the fraction to exchange.
    """
    present = [int(active[part].sum()) for part in parts]
    wanted = present if sum(present) == target else split_evenly(target, len(parts))
    counts = []
    for part, before, after in zip(parts, present, wanted, strict=True):
        # No more than there is room for: at low sparsity few positions are empty.
        exchanged = min(int(drop * min(before, after)), active[part].numel() - max(before, after))
        counts.append((part, min(before, after) - exchanged, max(0, after - before) + exchanged))
    return counts


def choose_grown(active: Tensor, counts: list[tuple[Slices, int, int]], scores: Tensor) -> Tensor:
    """Return bool ``[U, V]``: the empty units with the largest ``scores`` (at least 0), as many as each band grows.

    ``scores`` is overwritten where units are stored.
    """
    grown = torch.zeros_like(active)
    for part, _, count in counts:
        # In place: a layer's scores are as large as a dense layer, and there is to be one of those.
        grown[part] = top_cells(scores[part].masked_fill_(active[part], -1.0), count)
    return grown


def draw_grown(active: Tensor, counts: list[tuple[Slices, int, int]], generator: torch.Generator) -> Tensor:
    """Return bool ``[U, V]``: empty units drawn uniformly, as many as each band grows."""
    grown = torch.zeros_like(active)
    for part, _, count in counts:
        grown[part] = random_cells(~active[part], count, generator)
    return grown


def choose_kept(magnitudes: Tensor, counts: list[tuple[Slices, int, int]], protect_rows: bool = False) -> Tensor:
    """Return bool ``[U, V]``: the stored units of largest magnitude, as many as each band keeps.

    Of equal magnitudes the first in row-major order is dropped first. Only stored units are ranked, so a weight that
    grew and is still exactly zero is the weakest, but never confused with one that does not exist.

    Args:
        magnitudes: ``[U, V]`` from `unit_magnitudes`.
        protect_rows: keep the strongest unit of each row, in bands that keep at least as many as they have such units.
    """
    strongest = torch.zeros_like(magnitudes, dtype=torch.bool)
    if protect_rows:
        best = magnitudes.max(1)
        strongest.scatter_(1, best.indices[:, None], (best.values >= 0)[:, None])
    kept = torch.zeros_like(strongest)
    for part, count, _ in counts:
        band, protected = magnitudes[part], strongest[part]
        if int(protected.sum()) <= count:
            band = band.masked_fill(protected, torch.inf)
        # What goes is chosen, not what stays: that decides which of two equal ones is dropped.
        stored = band >= 0
        goes = top_cells(-band.masked_fill(~stored, torch.inf), int(stored.sum()) - count)
        kept[part] = stored & ~goes
    return kept


def pattern_of_units(units: Tensor, like: SparsityPattern) -> SparsityPattern:
    """Return the pattern that stores the true ``units`` ``[U, V]``, with the shape and block of ``like``."""
    grid = SparsityPattern.from_mask(units)
    return SparsityPattern(like.shape, grid.row_ptr, grid.col, like.block)


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
    moved: dict[str, Tensor] = {}
    for key, tensor in state.items():
        if isinstance(tensor, Tensor) and tensor.shape == parameter.shape:
            moved[key] = update.carry(tensor)
        elif isinstance(tensor, Tensor) and tensor.numel() > 1:
            raise UserError(
                f"optimizer state '{key}' has shape {tuple(tensor.shape)}, which cannot follow {parameter.numel()} "
                "weights to other positions"
            )
    values = update.carry(parameter)
    if grown is not None:
        values[update.grown] = grown.to(values)
    gradient = None if parameter.grad is None else update.carry(parameter.grad)
    layer.set_topology(update.pattern, values)
    parameter.grad = gradient
    state.update(moved)
