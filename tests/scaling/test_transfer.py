"""Optima of curves: quadratics with known minima, scipy, and hand-made edge cases."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import scipy.stats
from hypothesis import assume, given
from hypothesis import strategies as st
from scipy.interpolate import BarycentricInterpolator
from scipy.optimize import minimize_scalar

from sparsetrain.errors import UserError
from sparsetrain.scaling.transfer import (
    Curve,
    Row,
    gap_beyond,
    losses_at,
    make_curves,
    optimum,
    own_optima,
    relative_gap,
    shift,
    to_run,
)

GRID = np.arange(-11.0, -4.0)


def curve(losses: Any, grid: Any = GRID, seeds: tuple[int, ...] | None = None) -> Curve:
    array = np.asarray(losses, dtype=float)
    array = array[:, None] if array.ndim == 1 else array
    return Curve(np.asarray(grid, dtype=float), seeds or tuple(range(array.shape[1])), array)


def quadratic(center: float, curvature: float = 0.1, floor: float = 2.0, grid: np.ndarray = GRID) -> np.ndarray:
    return floor + curvature * (grid - center) ** 2


@given(
    center=st.floats(-9.9, -6.1),
    curvature=st.floats(0.01, 10.0),
    floor=st.floats(0.5, 5.0),
    spacing=st.lists(st.floats(0.2, 2.0), min_size=6, max_size=12),
)
def test_the_optimum_of_a_quadratic_is_exact_on_any_grid(
    center: float, curvature: float, floor: float, spacing: list[float]
) -> None:
    grid = -11.0 + np.concatenate(([0.0], np.cumsum(spacing)))
    losses = quadratic(center, curvature, floor, grid)
    best = int(np.argmin(losses))
    assume(0 < best < len(grid) - 1)
    found = optimum(curve(losses, grid))
    assert found.log2 == pytest.approx(center, abs=1e-6)
    assert found.loss == pytest.approx(floor, abs=1e-6)
    assert (found.interpolated, found.edge, found.interval, found.best) == (True, None, None, grid[best])


@given(st.lists(st.floats(1.0, 3.0), min_size=3, max_size=3), st.floats(0.3, 2.0), st.floats(0.3, 2.0))
def test_three_points_agree_with_scipys_interpolation(y: list[float], before: float, after: float) -> None:
    y = [y[0] + 2.5, y[1], y[2] + 2.5]  # the middle is lowest
    grid = np.array([-before, 0.0, after])
    polynomial = BarycentricInterpolator(grid, y)
    expected = minimize_scalar(lambda x: float(polynomial(x)), bounds=(-before, after), method="bounded")
    found = optimum(curve(y, grid))
    assert found.log2 == pytest.approx(expected.x, abs=1e-3)
    assert found.loss == pytest.approx(expected.fun, abs=1e-6)


@given(st.lists(st.floats(1.0, 3.0), min_size=3, max_size=12), st.floats(-5, 5), st.floats(0.1, 9))
def test_moving_the_grid_moves_the_optimum_and_scaling_the_loss_does_not(
    losses: list[float], move: float, scale: float
) -> None:
    grid = np.arange(float(len(losses)))
    found, moved = optimum(curve(losses, grid)), optimum(curve(scale * np.array(losses), grid + move))
    assert found.edge == moved.edge
    if found.log2 is not None and moved.log2 is not None:
        assert grid[0] < found.log2 < grid[-1]
        assert moved.log2 == pytest.approx(found.log2 + move, abs=1e-4)


@given(st.lists(st.floats(0.1, 3.0), min_size=2, max_size=10))
def test_an_edge_is_never_an_optimum(losses: list[float]) -> None:
    found = optimum(curve([0.0, *losses], np.arange(len(losses) + 1.0)))
    assert (found.edge, found.log2, found.interval) == ("low", None, None)
    found = optimum(curve([*losses, 0.0], np.arange(len(losses) + 1.0)))
    assert (found.edge, found.log2, found.interval) == ("high", None, None)


def test_a_single_point_is_an_edge() -> None:
    assert optimum(curve([2.0], [-8.0])).log2 is None


def test_a_diverged_neighbour_brackets_but_is_not_interpolated() -> None:
    found = optimum(curve([2.5, 2.2, 2.0, math.inf, math.inf], GRID[:5]))
    assert (found.log2, found.edge, found.interpolated) == (-9.0, None, False)
    # A point at which one of two seeds diverged is not an optimum, however low the other loss is.
    found = optimum(curve([[2.5, 2.5], [2.2, 2.2], [1.0, math.inf]], GRID[:3]))
    assert (found.best, found.log2, found.interpolated) == (-10.0, -10.0, False)
    with pytest.raises(UserError, match="every point of the curve diverged"):
        optimum(curve([math.inf] * 3, GRID[:3]))


def noisy(center: float, seeds: int, noise: float, rng: np.random.Generator) -> np.ndarray:
    offsets = rng.normal(0, 0.1, size=seeds)  # one offset per seed, which cancels in the position
    return quadratic(center)[:, None] + offsets + rng.normal(0, noise, size=(len(GRID), seeds))


def vertices(losses: np.ndarray, points: slice) -> np.ndarray:
    """Return the vertex of numpy's parabola through three points of each seed."""
    a, b, _ = np.polyfit(GRID[points], losses[points], 2)
    return np.asarray(-b / (2 * a))


@pytest.mark.parametrize("seeds", [2, 3, 6])
def test_the_interval_is_scipys_over_the_seeds_own_vertices(seeds: int) -> None:
    losses = noisy(-8.3, seeds, 0.004, np.random.default_rng(seeds))
    one = curve(losses)
    found = optimum(one)
    own = vertices(losses, slice(2, 5))  # the mean is lowest at -8
    assert found.best == -8.0
    assert list(own_optima(one).values()) == pytest.approx(own)
    assert found.interval == pytest.approx(scipy.stats.t.interval(0.95, seeds - 1, own.mean(), scipy.stats.sem(own)))


def test_intervals_cover_the_truth_as_often_as_they_say() -> None:
    rng = np.random.default_rng(0)
    count, ranges = 1500, 0
    ratios: list[float] = []
    moves: list[float] = []
    for _ in range(count):
        at, base_at = rng.uniform(-7.6, -7.2), rng.uniform(-8.6, -8.2)
        tilt = GRID[:, None] * rng.normal(0, 0.02, 3)  # a tilt that two curves of the same seeds share
        one, base = (curve(noisy(center, 3, 0.01, rng) + tilt) for center in (at, base_at))
        own = list(own_optima(one).values())
        ranges += min(own) <= at <= max(own)
        ratios.append((np.mean(own) - at) / scipy.stats.sem(own))
        found, moved = optimum(one).interval, shift(one, base)
        assert found is not None
        assert moved is not None
        assert moved.interval is not None
        # The width of the interval in standard errors, for t with two degrees of freedom.
        assert found[1] - found[0] == pytest.approx(2 * scipy.stats.t.ppf(0.975, 2) * scipy.stats.sem(own))
        middle, half = np.mean(moved.interval), (moved.interval[1] - moved.interval[0]) / 2
        moves.append(float((middle - (at - base_at)) / (half / scipy.stats.t.ppf(0.975, 2))))
    for found_ratios in (ratios, moves):
        covered = np.mean(np.abs(found_ratios) <= scipy.stats.t.ppf(0.975, 2))
        assert 0.935 <= covered <= 0.965
        assert scipy.stats.kstest(found_ratios, scipy.stats.t(2).cdf).pvalue > 0.01
    # A percentile bootstrap of three seeds gives their range, which covers the mean in 1 - 2 (1/2)^3 of all cases.
    assert ranges / count == pytest.approx(0.75, abs=0.04)


def test_a_seed_that_lacks_one_of_the_three_points_has_no_optimum_of_its_own() -> None:
    losses = noisy(-8.3, 4, 0.004, np.random.default_rng(0))
    whole = optimum(curve(losses[:, :3])).interval
    losses[2, 3] = np.nan  # a filled-in loss adds no information
    assert own_optima(curve(losses)).keys() == {0, 1, 2}
    assert optimum(curve(losses)).interval == pytest.approx(whole)
    losses[2, 1:] = np.nan
    assert optimum(curve(losses)).interval is None


def test_a_seed_whose_losses_have_no_minimum_leaves_the_interval_open() -> None:
    falling = np.array([[2.0, 2.0, 2.1], [1.0, 1.0, 1.8], [2.0, 2.0, 1.2]])
    one = curve(falling, [0.0, 1.0, 2.0])
    assert own_optima(one) == {0: 1.0, 1: 1.0, 2: math.inf}
    assert optimum(one).interval == (-math.inf, math.inf)
    moved = shift(one, curve(falling[:, [0, 1, 0]], [0.0, 1.0, 2.0]))
    assert moved is not None
    assert (moved.steps, moved.interval) == (pytest.approx(9 / 74), (-math.inf, math.inf))


def test_offsets_of_whole_seeds_do_not_widen_the_interval() -> None:
    exact = quadratic(-8.3)[:, None] + np.array([0.0, 0.5, -0.5])
    assert optimum(curve(exact)).interval == pytest.approx((-8.3, -8.3))


def test_an_interval_that_reaches_beyond_the_grid_is_open_there() -> None:
    # The optimum of seed 1 alone lies beyond the right end.
    losses = np.array([[2.0, 2.0], [1.0, 1.5], [1.6, 1.2]])
    found = optimum(curve(losses, [0.0, 1.0, 2.0]))
    assert found.log2 is not None
    assert found.interval is not None
    assert found.interval[1] == math.inf


def test_missing_losses_are_filled_by_the_additive_model() -> None:
    truth = quadratic(-8.3)[:, None] + np.array([0.0, 0.3, -0.2])
    sparse = truth.copy()
    sparse[[0, 1, 5, 6], 1:] = np.nan  # three seeds around the minimum only
    assert curve(sparse).filled() == pytest.approx(truth)
    assert optimum(curve(sparse)).log2 == pytest.approx(-8.3)
    sparse[6, 0] = math.inf
    assert np.isinf(curve(sparse).filled()[6]).all()


@given(st.floats(-8.9, -7.1), st.floats(-8.9, -7.1), st.sampled_from([0.5, 1.0, 2.0]))
def test_shift_counts_grid_steps(base: float, other: float, step: float) -> None:
    grid = np.arange(-14.0, -1.9, step)
    curves = [curve(quadratic(center, grid=grid), grid) for center in (other, base)]
    found = shift(*curves)
    assert found is not None
    assert found.steps == pytest.approx((other - base) / step, abs=1e-6)
    assert (found.at_least, found.interval) == (False, None)


def test_shift_to_an_edge_is_a_bound_and_from_an_edge_nothing() -> None:
    base, falling = curve(quadratic(-8.3)), curve(np.linspace(3, 2, len(GRID)))
    found = shift(falling, base)
    assert found is not None
    assert (found.steps, found.at_least, found.interval) == (pytest.approx(3.3), True, None)
    assert shift(base, falling) is None


def test_common_noise_of_shared_seeds_cancels_in_the_shift() -> None:
    # A tilt of the loss moves a parabola's vertex: with the same tilts in both curves the shift stays one step.
    tilt = GRID[:, None] * np.array([0.0, 0.05, -0.05])
    a, b = curve(quadratic(-7.0)[:, None] + tilt), curve(quadratic(-8.0)[:, None] + tilt)
    found = shift(a, b)
    assert found is not None
    assert found.interval == pytest.approx((1.0, 1.0))
    # With different seeds nothing cancels.
    apart = shift(curve(a.losses, seeds=(7, 8, 9)), b)
    assert apart is not None
    assert apart.interval is not None
    assert apart.interval[0] < 0.9 < 1.1 < apart.interval[1]


def test_relative_gap_agrees_with_scipys_paired_t_test() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.uniform(2, 3, 5), rng.uniform(2, 3, 5)
    found = relative_gap(dict(enumerate(a)), dict(enumerate(b)))
    low, high = scipy.stats.ttest_rel(np.log(a), np.log(b)).confidence_interval(0.95)
    assert found is not None
    assert found.interval == pytest.approx((math.expm1(low), math.expm1(high)))
    assert found.relative == pytest.approx(math.expm1(np.mean(np.log(a) - np.log(b))))


def test_a_gap_beyond_that_of_the_bases_is_scipys_paired_t_test_of_the_difference_in_differences() -> None:
    rng = np.random.default_rng(0)
    a, b, a_base, b_base = (dict(enumerate(rng.uniform(2, 3, 4))) for _ in range(4))
    found = gap_beyond({**a, 9: 1.0}, b, a_base, b_base)
    ours, theirs = (
        np.log([x[seed] for seed in range(4)]) - np.log([y[seed] for seed in range(4)])
        for x, y in ((a, b), (a_base, b_base))
    )
    low, high = scipy.stats.ttest_rel(ours, theirs).confidence_interval(0.95)
    assert found is not None
    assert found.relative == pytest.approx(math.expm1(float(np.mean(ours - theirs))))
    assert found.interval == pytest.approx((math.expm1(low), math.expm1(high)))
    assert gap_beyond(a, b, {7: 1.0}, b_base) is None
    assert gap_beyond(a, b, a_base, {0: math.inf}) is None


def test_relative_gap_pairs_by_seed_and_names_divergence() -> None:
    assert relative_gap({0: 2.2, 1: 9.0}, {0: 2.0, 2: 1.0}) == pytest.approx(relative_gap({0: 2.2}, {0: 2.0}))
    assert relative_gap({0: 1.0}, {1: 1.0}) is None
    diverged = relative_gap({0: math.inf}, {0: 2.0})
    assert diverged is not None
    assert (diverged.relative, diverged.interval) == (math.inf, None)


def test_losses_at_a_point_are_the_measured_ones() -> None:
    losses = np.array([[2.0, 2.1], [1.0, np.nan], [1.5, 1.6]])
    assert losses_at(curve(losses, [0.0, 1.0, 2.0]), 1.0) == {0: 1.0}
    assert losses_at(curve(losses, [0.0, 1.0, 2.0]), 2.0) == {0: 1.5, 1: 1.6}


@pytest.mark.parametrize("at", [-9.0, -8.6, -7.6, -7.2, -6.1, -5.3, -5.0])
def test_losses_between_points_are_numpys_parabola_through_three(at: float) -> None:
    x, rng = np.array([-9.0, -8.0, -7.0, -6.0, -5.0]), np.random.default_rng(0)
    losses = 1.0 + abs(x + 7.1)[:, None] ** 1.5 + rng.uniform(0, 0.05, (5, 2))
    first = {-9.0: 0, -8.6: 0, -7.6: 1, -7.2: 1, -6.1: 1, -5.3: 2, -5.0: 2}[at]  # the optimum is near -7
    near = slice(first, first + 3)
    found = losses_at(curve(losses, x), at)
    expected = [float(np.polyval(np.polyfit(x[near], losses[near, seed], 2), at)) for seed in range(2)]
    assert [found[0], found[1]] == pytest.approx(expected)


def test_the_loss_at_a_curves_own_optimum_is_that_of_its_vertex() -> None:
    one = curve([[3.0, 3.2], [1.2, 1.1], [2.0, 2.4], [5.0, 5.1]], [-8.0, -7.0, -6.0, -5.0])
    found = optimum(one)
    assert found.log2 is not None
    assert np.mean(list(losses_at(one, found.log2).values())) == pytest.approx(found.loss)


def test_outside_of_the_grid_no_loss_is_known_and_divergence_is_not_smoothed() -> None:
    one = curve([2.0, 1.0, 1.5, math.inf], [0.0, 1.0, 2.0, 3.0])
    assert losses_at(one, 3.5) == losses_at(one, -0.1) == {}
    assert losses_at(one, 1.75) == pytest.approx({0: 1.0 - 0.25 * 0.75 + 0.75 * 0.75**2})
    assert losses_at(one, 2.25) == {0: math.inf}
    two = curve([2.0, 1.0, math.inf], [0.0, 1.0, 2.0])
    assert losses_at(two, 0.75) == pytest.approx({0: 1.25})  # a line: the third point diverged
    assert losses_at(curve([2.0], [0.0]), 0.0) == {0: 2.0}


def test_points_around_another_curves_optimum_are_proposed() -> None:
    full = curve([[3.0, 3.1], [1.0, 1.1], [2.0, 2.1]], [-8.0, -7.0, -6.0])
    assert to_run(full, (0, 1), at=-7.5) == []
    assert to_run(full, (0, 1), at=-8.4) == [(-9.0, 0), (-9.0, 1)]
    assert to_run(full, (0, 1), at=-9.7) == [(-10.0, 0), (-10.0, 1), (-9.0, 0), (-9.0, 1)]
    assert to_run(full, (0,), at=-4.0) == [(-4.0, 0)]


def test_what_to_run_next_extends_an_edge_or_adds_seeds_around_the_minimum() -> None:
    falling = curve([3.0, 2.0, 1.0], [-8.0, -7.0, -6.0])
    assert to_run(falling, (0, 1, 2)) == [(-5.0, 0), (-4.0, 0)]
    bracketed = curve([3.0, 2.0, 1.0, 2.0], [-8.0, -7.0, -6.0, -5.0])
    assert to_run(bracketed, (0, 1)) == [(-7.0, 1), (-6.0, 1), (-5.0, 1)]
    full = curve([[3.0, 3.0], [1.0, 1.0], [2.0, 2.0]], [-8.0, -7.0, -6.0])
    assert to_run(full, (0, 1)) == []
    open_at_the_right = curve([[2.0, 2.0], [1.0, 1.5], [1.6, 1.2]], [0.0, 1.0, 2.0])
    assert to_run(open_at_the_right, (0, 1)) == [(3.0, 0), (3.0, 1)]
    open_at_the_left = curve([[1.6, 1.2], [1.0, 1.5], [2.0, 2.0]], [0.0, 1.0, 2.0])
    assert to_run(open_at_the_left, (0, 1)) == [(-1.0, 0), (-1.0, 1)]


def test_curves_are_made_of_rows_in_any_order() -> None:
    rows = [Row("a", 2.0**x, seed, x * x + seed) for x in (1, -1, 0) for seed in (1, 0) if (x, seed) != (1, 1)]
    rows.append(Row("b", 1.0, 0, math.nan))
    made = make_curves(rows)
    assert list(made) == ["a", "b"]
    assert made["a"].log2.tolist() == [-1, 0, 1]
    assert made["a"].seeds == (0, 1)
    assert np.array_equal(made["a"].losses, [[1, 2], [0, 1], [1, np.nan]], equal_nan=True)
    assert made["b"].losses.tolist() == [[math.inf]]
    assert make_curves([*rows, *rows]).keys() == made.keys()  # a repeated row adds no information


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([Row("a", 0.0, 0, 1.0)], "x=0.0 of the curve a must be above 0"),
        ([Row("a", 1.0, 0, 1.0), Row("a", 1.0, 0, 2.0)], "two losses at x=1, seed=0: 1.0, 2.0"),
    ],
)
def test_rows_that_make_no_curve_are_named(rows: list[Row], message: str) -> None:

    with pytest.raises(UserError, match=message):
        make_curves(rows)
