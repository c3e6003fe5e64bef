"""Makers of patterns: they draw the positions of a matrix that hold weights at the start of training."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sparsetrain.errors import UserError
from sparsetrain.sparsity.patterns.foreign import is_sparse, pattern_of_sparse
from sparsetrain.sparsity.patterns.pattern import SparsityPattern
from sparsetrain.sparsity.patterns.select import random_entries, split_evenly, top_entries
from sparsetrain.sparsity.patterns.spec import (
    PATTERNS,
    PatternKind,
    PatternSpec,
    block_grid,
    exact_count,
    kept_of_m,
    kept_regions,
    nm_count,
    pattern_nnz,
    register_pattern,
    units_count,
)

CURVEBALL_ROUNDS = 16  # trades per row, enough to mix a pattern with balanced fan-out


def random_pattern(
    shape: tuple[int, int], density: float, generator: torch.Generator, bands: tuple[int, int] = (1, 1)
) -> SparsityPattern:
    """Return a uniformly random pattern with exactly ``round(density * R * C)`` nonzeros.

    The count is exact, and positions are not independent Bernoulli draws: SμPar (arXiv 2405.15743) divides by the
    density, and at small widths the density of independent draws differs from the requested one.

    Raises:
        UserError: density outside (0, 1], or so small that no weight is left.
    """
    return make_pattern(PatternSpec("random", bands=bands), shape, density, generator)


def block_pattern(
    shape: tuple[int, int],
    density: float,
    generator: torch.Generator,
    block: tuple[int, int],
    bands: tuple[int, int] = (1, 1),
) -> SparsityPattern:
    """Return a pattern of randomly placed blocks.

    If the block divides the matrix, the pattern stores blocks. Otherwise blocks at the right and lower edge are cut
    off, each size of block keeps its share, and the pattern stores single weights.

    Raises:
        UserError: a block larger than the matrix, or a density outside (0, 1] or too small for one block.
    """
    return make_pattern(PatternSpec("block", block=block, bands=bands), shape, density, generator)


def magnitude_pattern(
    weight: Tensor, density: float, block: tuple[int, int] = (1, 1), bands: tuple[int, int] = (1, 1)
) -> SparsityPattern:
    """Return the pattern of the largest magnitudes of ``weight`` ``[R, C]``; blocks rank by the sum of magnitudes.

    Args:
        bands: rank inside each band on its own, for example each head.

    Raises:
        UserError: density out of range, a block or bands that do not divide the matrix, or a weight that is NaN.
    """
    rows, columns = weight.shape
    spec = PatternSpec("magnitude", block=block, bands=bands)
    return make_pattern(spec, (rows, columns), density, torch.Generator(), weight)


def balanced_pattern(
    shape: tuple[int, int], density: float, generator: torch.Generator, fan_out: bool = False
) -> SparsityPattern:
    """Return a random pattern with the same fan-in in every row: counts differ by at most one, the total is exact.

    Args:
        fan_out: make the counts of columns differ by at most one too.
    """
    return make_pattern(PatternSpec("balanced", fan_out=fan_out), shape, density, generator)


def nm_pattern(shape: tuple[int, int], n: int, m: int, generator: torch.Generator) -> SparsityPattern:
    """Return a random n:m pattern: every ``m`` consecutive inputs of an output have ``n`` weights."""
    return make_pattern(PatternSpec("nm", m=m), shape, n / m, generator)


def given_pattern(mask: Any, block: tuple[int, int] = (1, 1)) -> SparsityPattern:
    """Return a given mask as a pattern.

    Args:
        mask: bool ``[out_features, in_features]`` as a tensor or an array, a `SparsityPattern`, or a sparse matrix of
            scipy or torch, whose nonzero entries count. Indices are checked before they are used.

    Raises:
        UserError: another type or dtype, blocks that are only partly true, or indices outside of the matrix.
    """
    if isinstance(mask, SparsityPattern):
        return mask
    if is_sparse(mask):
        pattern = pattern_of_sparse(mask)
        return pattern if block == (1, 1) else SparsityPattern.from_mask(pattern.mask(), block)
    if isinstance(mask, Tensor):
        return SparsityPattern.from_mask(mask, block)
    if hasattr(mask, "dtype") and hasattr(mask, "shape"):
        array = np.asarray(mask)
        if array.dtype != bool:
            raise UserError(f"mask has dtype {array.dtype}; bool is needed (for example weight != 0)")
        return SparsityPattern.from_mask(torch.tensor(array), block)
    raise UserError(f"mask is a {type(mask).__name__}; a bool tensor or array, or a sparse matrix is needed")


def full_pattern(shape: tuple[int, int], block: tuple[int, int] = (1, 1)) -> SparsityPattern:
    """Return the pattern of all positions, with which gradual pruning begins, in blocks if they divide the matrix."""
    return _unit_pattern(shape, torch.ones(block_grid(shape, block), dtype=torch.bool, device="cpu"), block)


def _unit_pattern(shape: tuple[int, int], units: Tensor, block: tuple[int, int]) -> SparsityPattern:
    """Return the pattern whose blocks are the true ``units``, bool ``[ceil(R / bh), ceil(C / bw)]``."""
    (rows, columns), (bh, bw) = shape, block
    if (rows % bh, columns % bw) != (0, 0):
        full = units.repeat_interleave(bh, 0).repeat_interleave(bw, 1)
        return SparsityPattern.from_mask(full[:rows, :columns].contiguous())
    grid = SparsityPattern.from_mask(units)
    return grid if block == (1, 1) else SparsityPattern(shape, grid.row_ptr, grid.col, block)


def _random(
    spec: PatternSpec, shape: tuple[int, int], density: float, generator: torch.Generator, weight: Tensor | None
) -> SparsityPattern:
    regions = kept_regions(spec, shape, density)
    # The generator is on the CPU, whatever torch's default device.
    units = torch.zeros(block_grid(shape, spec.block), dtype=torch.bool, device="cpu")
    for region in regions:
        candidates = torch.ones_like(units[region.place])
        units[region.place] = random_entries(candidates, region.kept, generator)
    return _unit_pattern(shape, units, spec.block)


def _magnitude(
    spec: PatternSpec, shape: tuple[int, int], density: float, generator: torch.Generator, weight: Tensor | None
) -> SparsityPattern:
    if weight is None:
        raise UserError("pattern 'magnitude' ranks weights, and no weight was given: sparsify a model that has weights")
    if tuple(weight.shape) != shape:
        raise UserError(f"weight has shape {tuple(weight.shape)}; the pattern needs {shape}")
    (rows, columns), (bh, bw) = shape, spec.block
    if rows % bh or columns % bw:
        raise UserError(f"block {bh}x{bw} does not divide the matrix {rows}x{columns}")
    scores = weight.detach().abs().to(torch.promote_types(weight.dtype, torch.float32))
    scores = scores.reshape(rows // bh, bh, columns // bw, bw).sum((1, 3))
    if bool(scores.isnan().any()):
        raise UserError("pattern 'magnitude': the weight has values that are not a number")
    units = torch.zeros_like(scores, dtype=torch.bool)
    for region in kept_regions(spec, shape, density):
        units[region.place] = top_entries(scores[region.place], region.kept)
    return _unit_pattern(shape, units, spec.block)


def _balanced(
    spec: PatternSpec, shape: tuple[int, int], density: float, generator: torch.Generator, weight: Tensor | None
) -> SparsityPattern:
    rows, columns = shape
    counts = torch.tensor(split_evenly(exact_count(shape, density), rows), device="cpu")
    counts = counts[torch.randperm(rows, generator=generator, device="cpu")]
    mask = torch.zeros(rows, columns, dtype=torch.bool, device="cpu")
    if not spec.fan_out:
        order = torch.rand(rows, columns, generator=generator, device="cpu").topk(int(counts.max())).indices
        return SparsityPattern.from_mask(mask.scatter_(1, order, torch.arange(order.shape[1]) < counts[:, None]))
    # Deal a shuffled deck of columns repeatedly: no row gets a column twice, and the counts of columns differ by at
    # most one. Trades between rows keep the counts of rows and columns and mix the pattern (curveball algorithm).
    deck = torch.randperm(columns, generator=generator, device="cpu")
    row = torch.repeat_interleave(torch.arange(rows, device="cpu"), counts)
    mask[row, deck[torch.arange(len(row), device="cpu") % columns]] = True
    for _ in range(CURVEBALL_ROUNDS if rows > 1 else 0):
        _trade(mask, generator)
    return SparsityPattern.from_mask(mask)


def _trade(mask: Tensor, generator: torch.Generator) -> None:
    """Pair the rows at random and redistribute the columns that one row of a pair has alone (Strona et al. 2014)."""
    pairs = torch.randperm(mask.shape[0], generator=generator, device="cpu")
    pairs = pairs[: len(pairs) // 2 * 2].view(-1, 2)
    one, other = mask[pairs[:, 0]], mask[pairs[:, 1]]
    open_to_trade = one ^ other
    keep = (one & ~other).sum(1, keepdim=True)
    keys = torch.rand(one.shape, generator=generator, device="cpu").masked_fill_(~open_to_trade, 2.0)
    order = keys.argsort(1)
    rank = torch.empty_like(order).scatter_(1, order, torch.arange(order.shape[1]).expand_as(order))
    mask[pairs[:, 0]] = (one & other) | (open_to_trade & (rank < keep))
    mask[pairs[:, 1]] = (one & other) | (open_to_trade & (rank >= keep))


def _nm(
    spec: PatternSpec, shape: tuple[int, int], density: float, generator: torch.Generator, weight: Tensor | None
) -> SparsityPattern:
    n = kept_of_m(spec, shape, density)
    keys = torch.rand(shape[0], shape[1] // spec.m, spec.m, generator=generator, device="cpu")
    mask = torch.zeros(keys.shape, dtype=torch.bool, device="cpu").scatter_(2, keys.topk(n).indices, True)
    return SparsityPattern.from_mask(mask.view(shape))


def _regular(shape: tuple[int, int], density: float, column: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Tensor:
    """Return the mask whose row r has its j-th of k weights at ``column(r, j, k)``; no randomness."""
    rows, columns = shape
    nnz = exact_count(shape, density)
    ends = torch.arange(rows + 1, device="cpu") * nnz // rows
    counts = ends[1:] - ends[:-1]
    row = torch.repeat_interleave(torch.arange(rows, device="cpu"), counts)
    place = torch.arange(nnz, device="cpu") - ends[row]
    mask = torch.zeros(rows, columns, dtype=torch.bool, device="cpu")
    mask[row, column(row, place, counts[row]) % columns] = True
    return mask


def _banded(
    spec: PatternSpec, shape: tuple[int, int], density: float, generator: torch.Generator, weight: Tensor | None
) -> SparsityPattern:
    rows, columns = shape
    return SparsityPattern.from_mask(_regular(shape, density, lambda r, j, k: r * columns // rows + j - k // 2))


def _checkerboard(
    spec: PatternSpec, shape: tuple[int, int], density: float, generator: torch.Generator, weight: Tensor | None
) -> SparsityPattern:
    return SparsityPattern.from_mask(_regular(shape, density, lambda r, j, k: j * shape[1] // k + r))


PATTERNS.register("random", PatternKind(_random, units_count, evolves=True, in_bands=True))
register_pattern("balanced", _balanced)
PATTERNS.register("magnitude", PatternKind(_magnitude, units_count, evolves=True, in_blocks=True, in_bands=True))
PATTERNS.register("block", PatternKind(_random, units_count, evolves=True, in_blocks=True, in_bands=True))
register_pattern("nm", _nm, count=nm_count)
# Regular patterns, for measuring kernels.
register_pattern("banded", _banded)
register_pattern("checkerboard", _checkerboard)


def make_pattern(
    kind: PatternSpec | str,
    shape: tuple[int, int],
    density: float,
    generator: torch.Generator,
    weight: Tensor | None = None,
) -> SparsityPattern:
    """Return a pattern of a kind with `pattern_nnz` nonzeros.

    Args:
        kind: a spec, or a registered name for the spec with default options.
        shape: ``(out_features, in_features)``. density: in (0, 1].
        generator: on the CPU. weight: ``[out_features, in_features]``, for patterns that rank weights.

    Raises:
        UserError: an unknown name, a density or shape that the pattern cannot have, no weights to rank, or a pattern of
            another shape or number of nonzeros than its kind has.
    """
    spec = PatternSpec(kind) if isinstance(kind, str) else kind
    expected = pattern_nnz(spec, shape, density)
    pattern = given_pattern(PATTERNS[spec.name].make(spec, shape, density, generator, weight, **spec.options))
    if pattern.shape != shape or pattern.nnz != expected:
        raise UserError(
            f"pattern {spec.name!r} drew {pattern.nnz} weights in a {pattern.shape[0]}x{pattern.shape[1]} matrix; at "
            f"density={density:g} it must draw {expected} in {shape[0]}x{shape[1]}"
        )
    return pattern
