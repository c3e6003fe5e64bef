"""AdamW as an average of its updates: against a simulated AdamW, and against published figures."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import sparsetrain
from sparsetrain.errors import UserError
from sparsetrain.optim import SCHEDULES, Schedule, ScheduleConfig
from sparsetrain.optim.timescale import average, ema_coefficients, group_averages, timescale, weight_decay_for


@given(
    lrs=st.lists(st.floats(0, 1), min_size=1, max_size=200),
    weight_decay=st.floats(0, 1) | st.integers(0, 2**32 - 1),
)
def test_coefficients_are_a_convex_combination(lrs: list[float], weight_decay: float) -> None:
    decay: float | torch.Tensor = weight_decay
    if isinstance(weight_decay, int):
        decay = torch.rand(len(lrs), generator=torch.Generator().manual_seed(weight_decay), dtype=torch.float64)
    coefficients = ema_coefficients(lrs, decay)
    assert coefficients.dtype == torch.float64
    assert coefficients.shape == (len(lrs) + 1,)
    assert bool((coefficients >= 0).all())
    assert float(coefficients.sum()) == pytest.approx(1.0, abs=1e-12)


@pytest.mark.parametrize("steps", [1, 1000, 20_000])
def test_they_sum_to_one_however_long_the_training(steps: int) -> None:
    factors = [Schedule(ScheduleConfig(), steps).factor(step) * 0.1 for step in range(steps)]
    assert float(ema_coefficients(factors, 0.01).sum()) == pytest.approx(1.0, abs=1e-12)


@pytest.mark.parametrize(("alpha", "steps"), [(1e-7, 1_000_000), (1e-5, 160_000), (1.0, 3)])
def test_they_sum_to_one_at_the_same_small_decay_in_every_step(alpha: float, steps: int) -> None:
    rates = torch.full((steps,), alpha, dtype=torch.float64)
    assert float(ema_coefficients(rates, 1.0).sum()) == pytest.approx(1.0, abs=1e-12)


@pytest.mark.parametrize("name", SCHEDULES.names())
@pytest.mark.parametrize("scheduled_decay", [False, True])
def test_they_are_those_of_torchs_adamw(name: str, scheduled_decay: bool) -> None:
    """The final weights of a run of AdamW are the average that the coefficients say, with several groups."""
    steps, draw = 60, torch.Generator().manual_seed(0)
    schedule = Schedule(ScheduleConfig(name=name), steps)
    factors = [schedule.factor(step) for step in range(steps)]
    peaks, decays = (0.02, 0.3), (0.5, 0.1)
    weights = [torch.nn.Parameter(torch.randn(7, 5, generator=draw, dtype=torch.float64)) for _ in peaks]
    starts = [weight.detach().clone() for weight in weights]
    groups = [
        {"params": [weight], "lr": peak, "weight_decay": decay, "initial_lr": peak}
        for weight, peak, decay in zip(weights, peaks, decays, strict=True)
    ]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95))
    applied: list[list[float]] = [[], []]
    wd: list[list[float]] = [[], []]
    updates: list[list[torch.Tensor]] = [[], []]
    for factor in factors:
        for index, group in enumerate(optimizer.param_groups):
            group["lr"] = peaks[index] * factor
            group["weight_decay"] = decays[index] * ((1.5 - factor) if scheduled_decay else 1.0)
            applied[index].append(group["lr"])
            wd[index].append(group["weight_decay"])
        before = [weight.detach().clone() for weight in weights]
        for weight in weights:
            weight.grad = torch.randn(weight.shape, generator=draw, dtype=torch.float64)
        optimizer.step()
        for index, weight in enumerate(weights):
            alpha = applied[index][-1] * wd[index][-1]
            updates[index].append((weight.detach() - (1 - alpha) * before[index]) / alpha)
    for index, weight in enumerate(weights):
        coefficients = ema_coefficients(applied[index], wd[index])
        combined = coefficients[0] * starts[index]
        for coefficient, update in zip(coefficients[1:], updates[index], strict=True):
            combined = combined + coefficient * update
        torch.testing.assert_close(combined, weight.detach(), rtol=1e-9, atol=1e-9)
    if not scheduled_decay:
        found = group_averages(optimizer.param_groups, factors)
        assert found == [average(applied[index], decays[index]) for index in (0, 1)]
        assert found[0].tau == pytest.approx(1 / (0.02 * 0.5 * steps))


# c_0, the share of the last 1 % of the updates, and T times the sum of the squared coefficients, as published for
# T = 10,000 steps with 1,000 of warmup at tau = 0.2105.
PUBLISHED = {
    "constant": (0.011, 0.0464, 2.38),
    "linear_10x": (0.075, 0.0050, 0.987),
    "cosine": (0.075, 0.0047, 1.027),
    "linear_to_zero": (0.093, 0.00027, 0.990),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_bias_variance_and_the_last_percent_are_the_published_ones(name: str) -> None:
    total, lr = 10_000, 3e-3
    schedule = Schedule(ScheduleConfig(name=name, warmup_steps=1000), total)
    wd = weight_decay_for(0.2105, lr, total)
    found = average([lr * schedule.factor(step) for step in range(total)], wd)
    bias, last, variance = PUBLISHED[name]
    assert found.tau == pytest.approx(0.2105, rel=1e-12)
    for value, expected in ((found.bias, bias), (found.last_percent, last), (found.variance, variance)):
        digits = len(f"{expected}".split(".")[1])
        assert round(value, digits) == pytest.approx(expected, abs=1e-12)


def test_timescale_and_weight_decay_are_inverse() -> None:
    assert sparsetrain.timescale(2e-3, 0.1, 5000) == timescale(2e-3, 0.1, 5000) == pytest.approx(1.0)
    assert sparsetrain.weight_decay_for(0.25, 2e-3, 5000) == weight_decay_for(0.25, 2e-3, 5000) == pytest.approx(0.4)
    assert sparsetrain.ema_coefficients is ema_coefficients
    assert timescale(1e-3, 0.0, 10) == math.inf
    assert average([0.1, 0.2], 0.0) == average([0.0, 0.0], 0.3)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ema_coefficients([], 0.1), r"lrs has shape \[0\]"),
        (lambda: ema_coefficients([[0.1]], 0.1), r"lrs has shape \[1, 1\]"),  # type: ignore[list-item]
        (lambda: ema_coefficients([0.1, 0.1], [0.1]), r"weight_decay has shape \[1\]; it must be a number or \[2\]"),
        (lambda: ema_coefficients([0.1, 3.0], 0.5), r"lr times weight_decay is 1.5 in step 1; it must lie in \[0, 1\]"),
        (lambda: ema_coefficients([0.1, float("nan")], 0.5), r"is nan in step 1"),
        (lambda: ema_coefficients([-0.1], 0.5), r"is -0.05 in step 0"),
        (lambda: timescale(0.0, 0.1, 10), r"lr=0.0 must be above 0"),
        (lambda: timescale(0.1, -0.1, 10), r"weight_decay=-0.1 must be at least 0"),
        (lambda: timescale(0.1, 0.1, 0), r"steps=0 must be at least 1"),
        (lambda: timescale(0.1, 0.1, math.nan), r"steps=nan must be at least 1"),  # type: ignore[arg-type]
        (lambda: timescale(math.nan, 0.1, 10), r"lr=nan must be above 0"),
        (lambda: timescale(1e-200, 1e-200, 1), r"lr=1e-200 times weight_decay=1e-200 times steps=1 is 0.0, and 1 over"),
        (lambda: timescale(1e200, 1e200, 1), r"steps=1 is inf, and 1 over it is no usable number"),
        (lambda: timescale(1e-200, 1e-115, 1), r"steps=1 is 1e-315, and 1 over it is no usable number"),
        (lambda: weight_decay_for(1e-300, 1e-300, 1), r"tau=1e-300 times lr=1e-300 times steps=1 is 0.0"),
        (lambda: weight_decay_for(0.0, 0.1, 10), r"tau=0.0 must be above 0"),
    ],
)
def test_what_has_no_average_is_refused(call: object, message: str) -> None:
    with pytest.raises(UserError, match=message):
        call()  # type: ignore[operator]
