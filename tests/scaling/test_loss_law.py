"""The law of loss and critical batches, from synthetic runs with known exponents; Pareto points against brute force."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import scipy.optimize
from hypothesis import given
from hypothesis import strategies as st

from sparsetrain.errors import UserError
from sparsetrain.scaling.critical import (
    branched_critical_batch,
    fit_critical_batch,
    loss_curve,
    tokens_to_reach,
)
from sparsetrain.scaling.law import LossLaw
from sparsetrain.scaling.loss_law import fit_loss_law, unidentified
from sparsetrain.scaling.pareto import pareto_trainings, tokens_for

TRUTH = {"floor": 1.7, "a": 400.0, "b": 900.0, "alpha": 0.36, "beta": 0.42}
N = np.repeat([5e4, 1e5, 2e5, 4e5], 5)
D = N * np.tile([5.0, 10.0, 20.0, 40.0, 80.0], 4)
LOSSES = 1.7 + 400.0 / N**0.36 + 900.0 / D**0.42


@given(alpha=st.floats(0.15, 0.9), beta=st.floats(0.15, 0.9), floor=st.floats(0.0, 3.0))
def test_exponents_of_exact_losses_are_found(alpha: float, beta: float, floor: float) -> None:
    """The oracle is the law that made the losses; both terms are as large at the middle of the runs."""
    size, length = math.exp(np.log(N).mean()), math.exp(np.log(D).mean())
    y = floor + 0.8 * (N / size) ** -alpha + 0.8 * (D / length) ** -beta
    law = fit_loss_law(N, D, y, samples=2)
    assert [law.parameters[name] for name in ("floor", "alpha", "beta")] == pytest.approx(
        [floor, alpha, beta], abs=0.02
    )
    assert max(abs(law(n, d) / loss - 1) for n, d, loss in zip(N, D, y, strict=True)) < 1e-4


def test_a_noisy_sweep_gives_its_exponents_with_intervals_and_outliers_move_them_little() -> None:
    rng = np.random.default_rng(0)
    noisy = LOSSES * np.exp(rng.normal(0.0, 0.002, 20))
    law = fit_loss_law(N, D, noisy)
    for name, truth in TRUTH.items():
        low, high = law.interval(0.95, name)
        assert low <= truth <= high
    assert law.r_squared > 0.99
    noisy[3] *= 1.3
    robust, squared = (fit_loss_law(N, D, noisy, samples=2, loss=loss) for loss in ("log_huber", "squared"))
    errors = [
        np.abs(np.log([each(n, d) for n, d in zip(N, D, strict=True)] / LOSSES)).max() for each in (robust, squared)
    ]
    assert errors[0] < 0.01 < errors[1]


def test_over_seeds_the_interval_covers_the_truth() -> None:
    """60 simulated sweeps of three seeds, a floor of 88 % for so few."""
    rng, seeds, covered = np.random.default_rng(1), np.repeat([0, 1, 2], 20), 0
    for _ in range(60):
        noise = rng.normal(0.0, 0.002, 60) + rng.normal(0.0, 0.003, 3)[seeds]
        law = fit_loss_law(np.tile(N, 3), np.tile(D, 3), np.tile(LOSSES, 3) * np.exp(noise), seeds)
        low, high = law.interval(of="alpha")
        covered += low <= 0.36 <= high
    assert covered >= 53


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((N[:5], D[:5], LOSSES[:5]), "5 runs of 1 sizes and 5 lengths"),
        ((N[:10], D[:10], LOSSES[:10]), "10 runs of 2 sizes and 6 lengths"),
        ((N, D, LOSSES[:10]), "have 20, 20 and 10 values"),
        ((N, D, -LOSSES), r"losses\[0\]=.* must be above 0"),
        ((N, D, LOSSES, [None] * 20), "seeds must be a list of integers"),
    ],
)
def test_runs_that_give_no_law_of_loss_are_named(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(UserError, match=message):
        fit_loss_law(*arguments)


def test_a_curve_is_inverted_at_a_loss() -> None:
    d = np.array([1e6, 2e6, 4e6, 8e6])
    curve = loss_curve(d, 2.0 + 50.0 * d**-0.4)
    assert curve.inverse(2.3) == pytest.approx((50.0 / 0.3) ** 2.5, rel=1e-4)
    assert curve.inverse(1.9) == math.inf
    with pytest.raises(UserError, match="2 lengths and 2 losses: a curve needs at least 3"):
        loss_curve(d[:2], d[:2])


def critical_sweep(b_crit: float, d_min: float, target: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return batches, tokens and losses of runs whose curves reach ``target`` on the hyperbola."""
    rows = []
    for b in (2e3, 4e3, 8e3, 16e3, 32e3, 64e3):
        at = d_min * (1 + b / b_crit)
        rows += [(b, d, target - 0.3 + 0.3 * (d / at) ** -0.4) for d in at * np.array([0.5, 0.8, 1.3, 2.0])]
    return tuple(np.array(column) for column in zip(*rows, strict=True))  # type: ignore[return-value]


def test_a_critical_batch_is_found_from_loss_curves() -> None:
    batches, tokens, losses = critical_sweep(12e3, 1e6, 2.5)
    reached = tokens_to_reach(2.5, batches, tokens, losses, least=1.0, most=1.0)
    law = fit_critical_batch(list(reached), list(reached.values()))
    assert law.parameters == pytest.approx({"d_min": 1e6, "b_crit": 12e3}, rel=1e-3)
    assert law(12e3) == pytest.approx(2e6, rel=1e-3)
    assert tokens_to_reach(1.0, batches, tokens, losses) == {}


def test_the_hyperbola_is_scipys_and_its_intervals_cover_the_truth() -> None:
    rng = np.random.default_rng(0)
    b = np.array([2.0, 4.0, 8.0, 16.0, 32.0, 64.0])
    d = 1e6 * (1 + b / 12.0) * np.exp(rng.normal(0.0, 0.03, 6))

    def model(b: np.ndarray, log_d: float, log_b: float) -> np.ndarray:
        return log_d + np.log1p(b / np.exp(log_b))

    expected, covariance = scipy.optimize.curve_fit(model, b, np.log(d), p0=(13.0, 2.0))
    law = fit_critical_batch(b, d)
    assert [math.log(law.parameters[name]) for name in law.PARAMETERS] == pytest.approx(expected, rel=1e-4)
    assert np.array(law.covariance) == pytest.approx(covariance, rel=1e-3)
    seeds, covered = np.repeat([0, 1, 2], 6), 0
    for _ in range(100):
        noise = rng.normal(0.0, 0.03, 18) + rng.normal(0.0, 0.05, 3)[seeds]
        low, high = fit_critical_batch(
            np.tile(b, 3), 1e6 * (1 + np.tile(b, 3) / 12.0) * np.exp(noise), seeds
        ).interval()
        covered += low <= 12.0 <= high
    assert covered >= 89


def test_batches_below_the_best_one_are_left_out_where_seeds_tell_them_apart() -> None:
    b, seeds = np.array([1.0, 2.0, 4.0, 8.0, 16.0, 32.0]), np.repeat([0, 1, 2], 6)
    truth = 1e6 * (1 + b / 12.0)
    truth[0] *= 1.5
    noise = np.exp(np.random.default_rng(0).normal(0.0, 0.01, 18))
    law = fit_critical_batch(np.tile(b, 3), np.tile(truth, 3) * noise, seeds)
    assert law.ranges == ((2.0, 32.0),)
    assert law.parameters["b_crit"] == pytest.approx(12.0, rel=0.1)
    assert fit_critical_batch(b, truth, b_opt=4.0).ranges == ((4.0, 32.0),)
    assert fit_critical_batch(b, truth).ranges == ((1.0, 32.0),)  # one seed cannot tell
    with pytest.raises(UserError, match="2 batch sizes of at least 16 tokens: a critical batch needs 3"):
        fit_critical_batch(b, truth, b_opt=16.0)
    with pytest.raises(UserError, match="seeds must be a list of integers"):
        fit_critical_batch(b, truth, ["a"] * 6)
    with pytest.raises(UserError, match="the tokens do not grow with the batch"):
        fit_critical_batch(b, np.full(6, 1e6))


def test_a_critical_batch_by_branching_is_where_the_line_crosses_the_tolerance() -> None:
    b, seeds = np.tile([1.0, 2.0, 4.0, 8.0], 3), np.repeat([0, 1, 2], 4)
    losses = np.tile([3.0, 3.0, 3.02, 3.08], 3) + 0.01 * seeds
    found = branched_critical_batch(b, losses, seeds, tolerance=0.05)
    assert found.value == pytest.approx(4.0 * 2.0**0.5)
    assert found.interval == pytest.approx((found.value, found.value))
    assert branched_critical_batch(b, losses, seeds, tolerance=0.1).value == math.inf
    with pytest.raises(UserError, match="tolerance=0 must be above 0"):
        branched_critical_batch(b, losses, seeds, tolerance=0)
    with pytest.raises(UserError, match="seeds must be a list of integers"):
        branched_critical_batch(b, losses, seeds + 0.5, tolerance=0.1)
    with pytest.raises(UserError, match="1 different batches: branches need at least 2"):
        branched_critical_batch([1.0], [1.0], [0], tolerance=0.1)


def test_pareto_trainings_are_those_that_brute_force_keeps() -> None:
    law, sizes, factors = LossLaw(parameters=TRUTH, kind="loss"), [5e4, 2e5, 8e5, 3.2e6, 1e7], (1.0, 3.0, 10.0, 30.0)

    def batch_opt(d: float) -> float:
        return 20.0 * d**0.4

    def critical(d: float) -> float:
        return 60.0 * d**0.46

    kept = pareto_trainings(law, 5.0, sizes, batch_opt, critical, factors)
    assert len(kept) > 3
    every = []
    for n, factor in itertools.product(sizes, factors):
        d = tokens_for(law, 5.0, n)
        if d is None:
            continue
        assert LossLaw._value(law._vector(), n, d) == pytest.approx(5.0)
        best = batch_opt(d)
        least = scipy.optimize.brentq(lambda m, d=d, best=best: m * (1 + best / critical(m)) - d, 1e-9 * d, d)
        tokens = least * (1 + factor * best / critical(least))
        every.append((6 * n * tokens, 6 * n * tokens / (factor * best)))
    front = [p for p in every if not any(q != p and q[0] <= p[0] and q[1] <= p[1] for q in every)]
    assert sorted((each.flops, each.time) for each in kept) == [pytest.approx(p, rel=1e-6) for p in sorted(front)]
    with pytest.raises(UserError, match=r"no size of .* parameters reaches it"):
        pareto_trainings(law, 1.7, sizes, batch_opt, critical)
    with pytest.raises(UserError, match="must be at least 1"):
        pareto_trainings(law, 5.0, sizes, batch_opt, critical, factors=[0.5])


def test_a_term_that_the_losses_do_not_tell_is_named() -> None:
    clear = fit_loss_law(N, D, LOSSES, samples=2)
    assert unidentified(clear) == []
    noise = np.exp(np.random.default_rng(1).normal(0.0, 0.001, len(D)))
    flat = fit_loss_law(N, D, (1.7 + 900.0 / D**0.45) * noise, samples=2)
    (said,) = unidentified(flat)
    assert said.startswith("The losses do not tell how they depend on parameters: alpha = ")
