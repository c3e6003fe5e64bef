"""The points that laws are fitted to: lists of numbers above 0, and the seed of each."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from sparsetrain.errors import UserError

Numbers = Sequence[float] | np.ndarray


def checked_numbers(name: str, values: Numbers) -> np.ndarray:
    """Return a list of numbers as an array.

    Raises:
        UserError: it is no list of numbers, or a number is not above 0 and finite.
    """
    plain = _array(name, values)
    if plain.dtype.kind not in "iufb":
        raise UserError(f"{name} must be a list of numbers; it has values of the type {plain.dtype}")
    given = plain.astype(np.float64)
    if given.ndim != 1:
        raise UserError(f"{name} has shape {list(given.shape)}; it must be a list of numbers")
    wrong = np.flatnonzero(~((given > 0.0) & np.isfinite(given)))
    if len(wrong):
        raise UserError(f"{name}[{wrong[0]}]={given[wrong[0]]} must be above 0 and finite")
    return given


def checked_seeds(seeds: Sequence[int] | np.ndarray) -> np.ndarray:
    """Return seeds as an array.

    Raises:
        UserError: they are no list of integers.
    """
    given = _array("seeds", seeds)
    if given.dtype.kind not in "iu" or given.ndim != 1:
        raise UserError(f"seeds must be a list of integers; it has values of the type {given.dtype}")
    return given


def _array(name: str, values: object) -> np.ndarray:
    try:
        return np.asarray(values)
    except ValueError:  # rows of different lengths
        raise UserError(f"{name} must be a list of numbers, not of lists") from None
