"""Power laws against SciPy's regression, closed forms, and simulated sweeps whose truth is known."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import scipy.optimize
import scipy.stats
import torch
from hypothesis import given
from hypothesis import strategies as st

import sparsetrain
from sparsetrain.errors import UserError
from sparsetrain.scaling.optima import best_of, law_of_optima
from sparsetrain.scaling.power_law import fit_power_law
from sparsetrain.scaling.transfer import Curve

X = np.array([2.0, 5.0, 10.0, 20.0, 40.0])


@given(
    coefficient=st.floats(1e-6, 1e6),
    exponent=st.floats(-3, 3),
    x=st.lists(st.floats(1e-3, 1e9), min_size=3, max_size=8, unique_by=lambda x: round(math.log(x), 3)),
)
def test_an_exact_law_is_found_from_any_points(coefficient: float, exponent: float, x: list[float]) -> None:
    y = coefficient * np.array(x) ** exponent
    for loss in ("least_squares", "log_huber"):
        law = fit_power_law(x, y, loss=loss)
        assert law.exponent == pytest.approx(exponent, abs=1e-6)
        assert [law.predict(value) for value in x] == pytest.approx(list(y), rel=1e-6)
        low, high = law.interval()
        assert low - 1e-6 <= exponent <= high + 1e-6
    assert law.range == (min(x), max(x))


def test_without_seeds_it_is_scipys_regression() -> None:
    rng = np.random.default_rng(0)
    y = 3.0 * X**-0.5 * np.exp(rng.normal(0.0, 0.2, 5))
    law, line = fit_power_law(X, y), scipy.stats.linregress(np.log(X), np.log(y))
    assert (law.exponent, math.log(law.coefficient)) == pytest.approx((line.slope, line.intercept))
    assert law.r_squared == pytest.approx(line.rvalue**2)
    for level in (0.5, 0.95):
        quantile = scipy.stats.t.ppf((1 + level) / 2, 3)
        half, wide = quantile * line.stderr, quantile * line.intercept_stderr
        assert law.interval(level) == pytest.approx((line.slope - half, line.slope + half))
        ends = np.exp([line.intercept - wide, line.intercept + wide])
        assert law.interval(level, "coefficient") == pytest.approx(tuple(ends))
    # The coefficient is the value at x = 1.
    assert law.predict_interval(1.0) == pytest.approx(law.interval(0.95, "coefficient"))


def test_with_seeds_it_is_scipys_t_interval_over_their_lines() -> None:
    rng = np.random.default_rng(1)
    y = 3.0 * X[:, None] ** -0.5 * np.exp(rng.normal(0.0, 0.2, (5, 3)) + rng.normal(0.0, 0.5, 3))
    law = fit_power_law(np.repeat(X, 3), y.ravel(), np.tile([4, 7, 9], 5))
    slopes = [scipy.stats.linregress(np.log(X), np.log(column)).slope for column in y.T]
    expected = scipy.stats.t.interval(0.9, 2, loc=np.mean(slopes), scale=scipy.stats.sem(slopes))
    assert law.interval(0.9) == pytest.approx(expected)
    assert (law.seeds, law.points) == (3, 15)
    # A seed of one x has no line, and changes nothing but the scatter.
    more = fit_power_law([*np.repeat(X, 3), 80.0], [*y.ravel(), 1.0], [*np.tile([4, 7, 9], 5), 11])
    assert (more.exponent, *more.interval()) == pytest.approx((law.exponent, *law.interval()))


def test_with_a_huber_loss_it_is_scipys_robust_line_and_an_outlier_moves_it_little() -> None:
    rng = np.random.default_rng(2)
    x = np.geomspace(1.0, 1e3, 12)
    y = 2.0 * x**0.4 * np.exp(rng.normal(0.0, 0.05, 12))
    y[-1] *= 8.0
    law = fit_power_law(x, y, loss="log_huber", delta=0.1)

    def residuals(line: np.ndarray) -> Any:
        return line[0] + line[1] * np.log(x) - np.log(y)

    expected = scipy.optimize.least_squares(residuals, [0.0, 0.0], loss="huber", f_scale=0.1, xtol=1e-12, ftol=1e-12)
    assert [math.log(law.coefficient), law.exponent] == pytest.approx(expected.x, abs=1e-5)
    assert abs(law.exponent - 0.4) < 0.05 < abs(fit_power_law(x, y).exponent - 0.4)
    assert law.interval() == fit_power_law(x, y, loss="log_huber", delta=0.1).interval()  # the same at each call


def test_intervals_of_noisy_points_cover_the_truth_as_often_as_they_say() -> None:
    """500 simulated sweeps of three seeds: log-normal noise of each point, and a level that each seed has."""
    rng, seeds = np.random.default_rng(0), np.tile([0, 1, 2], 5)
    covered = np.zeros(3)
    for _ in range(500):
        noise = rng.normal(0.0, 0.2, (5, 3)) + rng.normal(0.0, 0.3, 3)
        law = fit_power_law(np.repeat(X, 3), (1.3 * X[:, None] ** -0.5 * np.exp(noise)).ravel(), seeds)
        for place, (ends, truth) in enumerate(
            [
                (law.interval(), -0.5),
                (law.interval(of="coefficient"), 1.3),
                (law.predict_interval(80.0), 1.3 * 80.0**-0.5),
            ]
        ):
            covered[place] += ends[0] <= truth <= ends[1]
    assert np.all((covered >= 0.92 * 500) & (covered <= 0.98 * 500)), covered


def test_intervals_of_laws_from_loss_curves_cover_the_truth_as_often_as_they_say() -> None:
    """500 simulated sweeps of three seeds: flat basins over tau with noise, their optima, and the law of these.

    A step of 2x from the optimum costs 0.3 % of the loss, and the noise of a run is 0.1 % of it.
    """
    rng, grid = np.random.default_rng(1), np.arange(-8.0, 5.0)
    covered = optima = curves = 0
    for _ in range(500):
        level, offset = rng.normal(0.0, 0.02, 3), rng.uniform(-0.5, 0.5)
        found = []
        for x in X:
            truth = offset - 0.5 * math.log2(x)
            losses = 3.0 + 0.01 * (grid[:, None] - truth) ** 2 + level + rng.normal(0.0, 0.003, (len(grid), 3))
            best = best_of(float(x), Curve(grid, (0, 1, 2), losses))
            found.append(best)
            if best.optimum.interval is not None:
                curves += 1
                optima += best.optimum.interval[0] <= truth <= best.optimum.interval[1]
        low, high = law_of_optima(found).interval()
        covered += low <= -0.5 <= high
    assert 0.92 <= covered / 500 <= 0.98
    assert curves > 2400
    assert 0.92 <= optima / curves <= 0.98


def test_optima_beyond_the_grid_give_no_points() -> None:
    grid, seeds = np.arange(-2.0, 3.0), (0, 1, 2)
    losses = np.tile((grid[:, None] - 1.0) ** 2, 3)
    losses[3:, 2] = [1.0, 0.9]  # this seed still falls
    best = best_of(4.0, Curve(grid, seeds, losses))
    assert best.value == pytest.approx(2.0**best.optimum.log2)
    assert (sorted(best.own), best.beyond) == ([0, 1], (2,))
    edge = best_of(4.0, Curve(grid[:3], seeds, losses[:3]))
    assert (edge.value, edge.optimum.edge) == (None, "high")
    with pytest.raises(UserError, match="2 of 3 curves have a minimum inside their grid; a law needs at least 3"):
        law_of_optima([best, best, edge])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([1, 2], [1, 2]), "x has 2 different values; a power law needs at least 3"),
        (([1, 2, 2], [1, 2, 2]), "x has 2 different values"),
        (([1, 2, 3], [1, 2]), "x has 3 values and y has 2"),
        (([1, 0, 3], [1, 2, 3]), r"x\[1\]=0.0 must be above 0 and finite"),
        (([1, 2, 3], [1, 2, math.nan]), r"y\[2\]=nan must be above 0 and finite"),
        (([[1, 2, 3]], [1, 2, 3]), r"x has shape \[1, 3\]"),
        (([1, 2, 3], [1, 2, 3], [0, 0]), r"seeds has shape \[2\] and x \[3\]"),
        (([1, 2, 3], [1, 2, 3], [0, 0, 0]), "1 of 1 seeds have two different x"),
        (([1, 2, 3], [1, 2, 3], [0, 0, 1]), "1 of 2 seeds have two different x"),
        ((["a", "b", "c"], [1, 2, 3]), "x must be a list of numbers; it has values of the type <U1"),
        (([1, None, 3], [1, 2, 3]), "x must be a list of numbers; it has values of the type object"),
        (([1, 2, 3], [1j, 2, 3]), "y must be a list of numbers; it has values of the type complex128"),
        (([1, 2, [3]], [1, 2, 3]), "x must be a list of numbers, not of lists"),
        (([1, 2, 3], [1, 2, 3], [None, None, None]), "seeds must be a list of integers; it has values of the type obj"),
        (([1, 2, 3], [1, 2, 3], [math.nan, 0, 1]), "seeds must be a list of integers; it has values of the type float"),
    ],
)
def test_points_that_make_no_law_are_named(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(UserError, match=message) as raised:
        sparsetrain.fit_power_law(*arguments)
    assert "\n" not in str(raised.value)


def test_tensors_are_points_and_inputs_have_names() -> None:
    law = sparsetrain.fit_power_law(torch.tensor([1.0, 2.0, 4.0]), torch.tensor([1.0, 2.0, 4.0]))
    assert law.exponent == pytest.approx(1.0)
    assert law.range == (1.0, 4.0)
    assert sparsetrain.tau_opt(tokens_per_parameter=20) == sparsetrain.tau_opt(20)
    assert sparsetrain.batch_opt(tokens=1e9) == sparsetrain.batch_opt(1e9)
    for wrong in (lambda: sparsetrain.tau_opt(tokens=20), lambda: sparsetrain.tau_opt("20"), sparsetrain.tau_opt):
        with pytest.raises(UserError):
            wrong()


def test_unknown_choices_are_refused() -> None:
    with pytest.raises(UserError, match="loss='huber' is not one of least_squares, log_huber"):
        fit_power_law(X, X, loss="huber")
    with pytest.raises(UserError, match="delta=0"):
        fit_power_law(X, X, loss="log_huber", delta=0)
