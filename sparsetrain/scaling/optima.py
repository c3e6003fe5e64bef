"""From loss curves over a hyperparameter to a power law of their optima."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from sparsetrain.errors import UserError
from sparsetrain.scaling.law import PowerLaw
from sparsetrain.scaling.power_law import fit_power_law
from sparsetrain.scaling.transfer import Curve, Optimum, optimum, own_optima


@dataclass(frozen=True)
class Best:
    """The optimum of one curve.

    Args:
        x: where the curve stands in the law, such as its tokens per weight.
        optimum: of the mean curve.
        own: optima of the seeds that have one inside the grid; not in logarithms.
        beyond: seeds whose own optimum lies outside the grid, where nothing was measured, or that have none.
    """

    x: float
    optimum: Optimum
    own: dict[int, float]
    beyond: tuple[int, ...] = ()

    @property
    def value(self) -> float | None:
        """The optimum, not in logarithms; None at an edge."""
        return None if self.optimum.log2 is None else 2.0**self.optimum.log2


def best_of(x: float, curve: Curve) -> Best:
    """Return the optimum of a curve, and of its seeds.

    Raises:
        UserError: every point diverged.
    """
    found = optimum(curve)
    low, high = curve.log2[0], curve.log2[-1]
    own = own_optima(curve)
    inside = {seed: 2.0**log2 for seed, log2 in own.items() if low <= log2 <= high}
    return Best(x, found, inside, tuple(seed for seed in own if seed not in inside))


def law_of_optima(found: Sequence[Best]) -> PowerLaw:
    """Return the power law of optima over x.

    If at least two seeds have optima at two x or more, it is fitted to the seeds' own optima, with Student's t over
    seeds; else to the optima of the curves.

    Raises:
        UserError: fewer than three curves have an optimum inside their grid, or fewer than three x differ.
    """
    inside = [best for best in found if best.value is not None]
    if len(inside) < 3:
        raise UserError(
            f"{len(inside)} of {len(found)} curves have a minimum inside their grid; a law needs at least 3"
        )
    points = [(best.x, value, seed) for best in inside for seed, value in best.own.items() if math.isfinite(value)]
    x, y, seeds = (np.array(column) for column in zip(*points, strict=True)) if points else (np.array([]),) * 3
    lines = [seed for seed in np.unique(seeds) if len(np.unique(x[seeds == seed])) > 1]
    if len(lines) > 1 and len(np.unique(x)) > 2:
        return fit_power_law(x, y, seeds)
    return fit_power_law([best.x for best in inside], [best.value or 0.0 for best in inside])
