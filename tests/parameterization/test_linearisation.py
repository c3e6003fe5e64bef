"""The linearisation of a residual branch: its slope over depth, and the ratio against finite differences."""

from __future__ import annotations

import math

import pytest

from sparsetrain.errors import UserError
from sparsetrain.parameterization import Parameterization
from sparsetrain.parameterization.linearisation import (
    Linearisation,
    linearisation_ratio,
    linearisation_slope,
    linearisation_table,
)

P = Parameterization
WIDTH, DEPTHS, SEEDS = 48, (2, 8, 32, 128), range(16)


@pytest.mark.parametrize(("alpha", "slope"), [(0.5, -0.5), (1.0, 0.0)])
def test_slope_over_depth_is_alpha_minus_one(alpha: float, slope: float) -> None:
    rows = linearisation_table([P.completep(WIDTH, 2, alpha)], DEPTHS, SEEDS, WIDTH)
    assert linearisation_slope(rows) == pytest.approx(slope, abs=0.15)


def test_both_exponents_agree_at_the_base_depth() -> None:
    ratios = {linearisation_ratio(P.completep(WIDTH, 2, alpha), 2, 0, WIDTH) for alpha in (0.5, 1.0)}
    assert len(ratios) == 1
    assert ratios == {linearisation_ratio(P.mup(WIDTH), 2, 0, WIDTH)}


def test_the_ratio_is_of_first_order_in_the_step() -> None:
    # Second over first order: halving the step halves the ratio. It is averaged, since a step may cross kinks.
    rules = P.completep(WIDTH, 2)
    halved = [
        linearisation_ratio(rules, 4, seed, WIDTH, lr=1e-4) / linearisation_ratio(rules, 4, seed, WIDTH, lr=2e-4)
        for seed in range(12)
    ]
    assert sorted(halved)[6] == pytest.approx(0.5, rel=0.02)


def test_slope_of_a_power_law_is_exact_and_of_a_broken_one_nan() -> None:
    rows = [Linearisation("completep", 0.5, depth, seed, depth**-0.5) for depth in (2, 8, 32) for seed in (0, 1)]
    assert linearisation_slope(rows) == pytest.approx(-0.5)
    assert math.isnan(linearisation_slope([*rows, Linearisation("completep", 0.5, 64, 0, math.nan)]))


def test_a_single_branch_is_refused() -> None:
    with pytest.raises(UserError, match="depth=1 must be at least 2"):
        linearisation_ratio(P.sp(), 1, 0)
