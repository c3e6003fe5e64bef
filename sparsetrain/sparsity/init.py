"""Which positions of a matrix hold weights at the start of training."""

from __future__ import annotations

from collections.abc import Callable

import torch

from sparsetrain.errors import UserError, check_choice
from sparsetrain.sparsity.pattern import SparsityPattern


def check_sparsity(sparsity: float, field: str = "sparsity") -> None:
    """Raise `UserError` unless ``sparsity`` lies in [0, 1)."""
    if isinstance(sparsity, bool) or not isinstance(sparsity, int | float) or not 0.0 <= sparsity < 1.0:
        raise UserError(f"{field}={sparsity!r} must be a number in [0, 1)")


def random_pattern(shape: tuple[int, int], density: float, generator: torch.Generator) -> SparsityPattern:
    """Return a uniformly random pattern with exactly ``round(density * R * C)`` nonzeros.

    The count is exact, not Bernoulli: SμPar (arXiv 2405.15743) divides by the density, and at small widths the
    density that a coin throws differs from the one that was asked for.

    Raises:
        UserError: density outside (0, 1], or so small that no weight is left.
    """
    if not 0.0 < density <= 1.0:
        raise UserError(f"density={density} must lie in (0, 1]")
    rows, columns = shape
    nnz = round(density * rows * columns)
    if nnz < 1:
        raise UserError(f"density={density} leaves no weight at all in a {rows}x{columns} matrix")
    # On the CPU whatever torch's default device is: so is the generator.
    mask = torch.zeros(rows * columns, dtype=torch.bool, device="cpu")
    mask[torch.randperm(rows * columns, generator=generator, device="cpu")[:nnz]] = True
    return SparsityPattern.from_mask(mask.view(rows, columns))


PATTERNS: dict[str, Callable[[tuple[int, int], float, torch.Generator], SparsityPattern]] = {
    "random": random_pattern,
}


def make_pattern(name: str, shape: tuple[int, int], density: float, generator: torch.Generator) -> SparsityPattern:
    """Return a pattern by its registered name; the generator must be one on the CPU."""
    check_choice("pattern", name, PATTERNS)
    return PATTERNS[name](shape, density, generator)
