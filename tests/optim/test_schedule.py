"""Schedules against a table, and against the schedulers of torch and transformers."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sparsetrain.errors import UserError
from sparsetrain.optim import SCHEDULES, SEGMENTS, Schedule, ScheduleConfig, SegmentConfig, register_schedule

# T = 10 steps with w = 2 warmup steps: f = (t - 2) / 8.
TABLE = {
    "linear_to_zero": [1 / 2, 1, 1, 7 / 8, 6 / 8, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8],
    "linear_10x": [0.5, 1, 1, 0.8875, 0.775, 0.6625, 0.55, 0.4375, 0.325, 0.2125],
    "cosine": [0.5, 1, *(0.55 + 0.45 * math.cos(math.pi * k / 8) for k in range(8))],
    "constant": [0.5, *([1] * 9)],
    "linear": [1 / 2, 1, *(1 - k / 8 for k in range(8))],
    "exponential": [0.5, 1, *(0.1 ** (k / 8) for k in range(8))],
    "inverse_sqrt": [0.5, 1, *(math.sqrt(2 / t) for t in range(2, 10))],
    "wsd": [0.5, *([1] * 7), 1, 0.5],
}
FINAL = {"linear_to_zero": 0.0, "linear_10x": 0.1, "cosine": 0.1, "constant": 1.0, "linear": 0.0, "exponential": 0.1}
FINAL |= {"inverse_sqrt": math.sqrt(2 / 10), "wsd": 0.0}


def factors(config: ScheduleConfig, total_steps: int) -> list[float]:
    schedule = Schedule(config, total_steps)
    return [schedule.factor(step) for step in range(total_steps)]


@pytest.mark.parametrize("name", SCHEDULES)
def test_factors_match_the_table(name: str) -> None:
    config = ScheduleConfig(name=name, warmup_steps=2)
    assert factors(config, 10) == pytest.approx(TABLE[name], abs=1e-15)
    assert Schedule(config, 10).factor(10) == pytest.approx(FINAL[name], abs=1e-15)
    assert Schedule(config, 10).factor(11) == Schedule(config, 10).factor(10)


def test_linear_to_zero_is_exact_and_wastes_no_update() -> None:
    total, warmup = 997, 100
    values = factors(ScheduleConfig(warmup=0.1), total)
    assert values == [(t + 1) / warmup if t < warmup else (total - t) / (total - warmup) for t in range(total)]
    assert min(values) == values[-1] == 1 / (total - warmup)


def test_final_moves_the_end_of_the_decay() -> None:
    for name in ("linear_10x", "cosine"):
        config = ScheduleConfig(name=name, warmup=0.0, final=0.00845)
        assert Schedule(config, 50).factor(50) == pytest.approx(0.00845, rel=1e-12)


configs = st.builds(
    ScheduleConfig,
    name=st.sampled_from([name for name in SCHEDULES if name != "wsd"]),
    warmup=st.floats(0, 1, exclude_max=True),
) | st.builds(
    ScheduleConfig,
    name=st.sampled_from(["linear_10x", "cosine"]),
    warmup=st.floats(0, 1, exclude_max=True),
    final=st.floats(0, 1),
)
configs |= st.builds(
    ScheduleConfig,
    name=st.just("wsd"),
    warmup=st.floats(0, 0.5),
    decay=st.floats(0.01, 0.5),
    shape=st.sampled_from(["linear", "cosine", "one_minus_sqrt", "exponential", "inverse_sqrt"]),
    final=st.none() | st.floats(0.001, 1),
)


@given(configs, st.integers(1, 300))
def test_factors_rise_to_one_and_then_never_rise(config: ScheduleConfig, total_steps: int) -> None:
    schedule = Schedule(config, total_steps)
    values = [schedule.factor(step) for step in range(total_steps)]
    warmup = schedule.warmup_steps
    assert all(0 < value <= 1 for value in values)
    assert max(values) == values[warmup] == 1
    assert all(later > earlier for earlier, later in itertools.pairwise(values[:warmup]))
    after = values[warmup:]
    assert all(later <= earlier + 1e-15 for earlier, later in itertools.pairwise(after))
    assert all(value >= schedule.final for value in after)


def learning_rates(make: type[torch.optim.lr_scheduler.LRScheduler], steps: int, **options: float) -> list[float]:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = make(optimizer, **options)  # type: ignore[arg-type]
    rates = []
    for _ in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


@pytest.mark.parametrize(("name", "final"), [("linear_to_zero", 0.0), ("linear_10x", 0.1)])
def test_decay_matches_torch_linear_lr(name: str, final: float) -> None:
    theirs = learning_rates(torch.optim.lr_scheduler.LinearLR, 40, start_factor=1.0, end_factor=final, total_iters=40)
    assert factors(ScheduleConfig(name=name, warmup=0.0), 40) == pytest.approx(theirs, rel=1e-12)


def test_decay_matches_torch_cosine_annealing() -> None:
    theirs = learning_rates(torch.optim.lr_scheduler.CosineAnnealingLR, 40, T_max=40, eta_min=0.1)
    assert factors(ScheduleConfig(name="cosine", warmup=0.0), 40) == pytest.approx(theirs, rel=1e-12)


def test_an_exponential_decay_matches_torch() -> None:
    theirs = learning_rates(torch.optim.lr_scheduler.ExponentialLR, 40, gamma=0.00845 ** (1 / 40))
    assert factors(ScheduleConfig("exponential", warmup=0.0, final=0.00845), 40) == pytest.approx(theirs, rel=1e-12)


def test_cycles_match_torch_warm_restarts() -> None:
    theirs = learning_rates(torch.optim.lr_scheduler.CosineAnnealingWarmRestarts, 60, T_0=20)
    found = factors(ScheduleConfig("cosine", warmup=0.0, final=0.0, cycles=3), 60)
    assert found == pytest.approx(theirs, abs=1e-12)


def test_after_the_warmup_they_match_transformers() -> None:
    """The first step of theirs has rate 0, and ours has not; after the warmup they are the same."""
    from transformers import optimization

    def theirs(make: Any, **options: Any) -> list[float]:
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
        scale = make(optimizer, **options).lr_lambdas[0]
        return [scale(step) for step in range(7, 60)]

    expected = theirs(optimization.get_inverse_sqrt_schedule, num_warmup_steps=7)
    assert factors(ScheduleConfig("inverse_sqrt", warmup_steps=7), 60)[7:] == pytest.approx(expected, rel=1e-12)
    for shape, name in (("linear", "linear"), ("cosine", "cosine"), ("one_minus_sqrt", "1-sqrt")):
        config = ScheduleConfig("wsd", warmup_steps=7, decay=0.25, shape=shape)
        expected = theirs(
            optimization.get_wsd_schedule,
            num_warmup_steps=7,
            num_decay_steps=15,
            num_training_steps=60,
            decay_type=name,
        )
        assert factors(config, 60)[7:] == pytest.approx(expected, abs=1e-12)


def test_cycles_without_a_step_to_decay_in_are_refused() -> None:
    with pytest.raises(UserError, match="cycles=100 must be at most 15: the training has 30 steps, and a cycle takes"):
        factors(ScheduleConfig("linear_to_zero", cycles=100), 30)
    assert factors(ScheduleConfig("linear_to_zero", cycles=1), 1) == [1.0]


def test_cycles_rise_again_from_where_the_last_one_ended() -> None:
    found = factors(ScheduleConfig("linear_10x", warmup=0.4, cycles=2), 20)
    once = [0.25, 0.5, 0.75, 1.0, *(1 - 0.9 * k / 6 for k in range(6))]
    assert found[:10] == pytest.approx(once)
    assert found[10:14] == pytest.approx([0.1 + 0.9 * k / 4 for k in (1, 2, 3, 4)])
    assert found[14:] == pytest.approx(once[4:])
    wsd = factors(ScheduleConfig("wsd", warmup=0.2, decay=0.4, cycles=2), 20)
    assert wsd == pytest.approx([0.5, 1, 1, 1, 1, 1, 1, 0.75, 0.5, 0.25] * 2)


def test_a_published_end_is_reached() -> None:
    """BTLM decays linearly to 0.845 % of the peak (arXiv 2309.11568)."""
    schedule = Schedule(ScheduleConfig("linear", warmup_steps=95, final=0.00845), 159_636)
    assert schedule.factor(94) == 1.0
    assert 0.012 * schedule.factor(159_636) == pytest.approx(1.0138e-4, rel=2e-4)


def test_factor_drives_torch_lambda_lr() -> None:
    schedule = Schedule(ScheduleConfig(warmup_steps=3), 20)
    theirs = learning_rates(torch.optim.lr_scheduler.LambdaLR, 20, lr_lambda=schedule.factor)  # type: ignore[arg-type]
    assert theirs == factors(ScheduleConfig(warmup_steps=3), 20)


@pytest.mark.parametrize(
    ("total_steps", "warmup", "expected"),
    [(100, 0.1, 10), (30, 0.1, 3), (5, 0.1, 1), (4, 0.1, 0), (1, 0.1, 0), (1, 0.9, 0), (10, 0.0, 0), (10, 0.99, 9)],
)
def test_warmup_fraction_rounds_to_the_nearest_update(total_steps: int, warmup: float, expected: int) -> None:
    assert Schedule(ScheduleConfig(warmup=warmup), total_steps).warmup_steps == expected


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"name": "cosin"}, "schedule.name='cosin' .*did you mean 'cosine'"),
        ({"warmup": 1.0}, "schedule.warmup=1.0"),
        ({"warmup": math.nan}, "schedule.warmup=nan"),
        ({"warmup_steps": -1}, "schedule.warmup_steps=-1"),
        ({"name": "cosine", "final": 1.5}, "schedule.final=1.5"),
        ({"name": "cosine", "final": math.nan}, "schedule.final=nan"),
        ({"final": 0.1}, "schedule.final=0.1 has no meaning for linear_to_zero; it is for linear_10x, cosine"),
        ({"name": "exponential", "final": 0.0}, "schedule.final=0.0 must be above 0 for exponential"),
        ({"name": "cosine", "decay": 0.2}, "schedule.decay=0.2 has no meaning for cosine; it is for wsd"),
        (
            {"name": "wsd", "decay": 0.95},
            "schedule.decay=0.95 must be a fraction of the steps, above 0 and at most 0.9",
        ),
        ({"name": "wsd", "decay": 0.0}, "schedule.decay=0.0 must be"),
        ({"name": "wsd", "shape": "warmup"}, "schedule.shape='warmup' is not one of linear, cosine"),
        ({"name": "wsd", "shape": "exponential", "final": 0.0}, "schedule.final=0.0 must be above 0 for exponential"),
        ({"cycles": 0}, "schedule.cycles=0 must be at least 1"),
        ({"cycles": 2, "warmup_steps": 3}, "schedule.cycles=2 and schedule.warmup_steps=3"),
        ({"segments": [SegmentConfig("linear")], "cycles": 2}, "schedule.cycles=2 cannot be combined"),
        ({"segments": []}, r"schedule.segments=\[\]: a schedule has at least one"),
        (
            {"segments": [SegmentConfig("linear")], "warmup": 0.1},
            "schedule.warmup=0.1 cannot be combined with schedule.segments",
        ),
        ({"segments": [SegmentConfig("linear"), SegmentConfig("cosine")]}, "only one segment may be without"),
        ({"segments": [SegmentConfig("linear", share=0.6), SegmentConfig("cosine", share=0.5)]}, "add up to 1.1"),
        ({"segments": [SegmentConfig("linear", share=0.6)]}, "add up to 0.6; they must be 1"),
    ],
)
def test_a_bad_field_is_named_in_one_line(fields: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        ScheduleConfig(**fields)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)


def test_a_length_that_cannot_be_is_refused() -> None:
    with pytest.raises(UserError, match=r"schedule.warmup_steps=10 must be below the 10 steps"):
        Schedule(ScheduleConfig(warmup_steps=10), 10)
    with pytest.raises(ValueError, match="total_steps=0"):
        Schedule(ScheduleConfig(), 0)
    with pytest.raises(ValueError, match="step=-1"):
        Schedule(ScheduleConfig(), 10).factor(-1)
    with pytest.raises(UserError, match=r"segments take 12 steps in total, but the training has 10"):
        Schedule(ScheduleConfig(segments=[SegmentConfig("warmup", steps=12), SegmentConfig("linear", 0.0)]), 10)
    with pytest.raises(UserError, match=r"tokens=5: the number of tokens per step is unknown"):
        Schedule(ScheduleConfig(segments=[SegmentConfig("warmup", tokens=5), SegmentConfig("linear", 0.0)]), 10)
    for fields, said in (
        ({"share": 2.0}, "share=2.0"),
        ({"to": -1.0}, "to=-1.0"),
        ({"steps": 1, "tokens": 1}, "only one"),
    ):
        with pytest.raises(UserError, match=said):
            SegmentConfig("linear", **fields)  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"to=0.0 must be above 0 for inverse_sqrt"):
        SegmentConfig("inverse_sqrt", to=0.0)
    fallen = [SegmentConfig("linear", 0.0, share=0.5), SegmentConfig("exponential", 0.1)]
    with pytest.raises(UserError, match=r"segments\[1\]: exponential cannot begin at a rate of 0"):
        Schedule(ScheduleConfig(segments=fallen), 10)


def test_segments_follow_one_another() -> None:
    # Warmup, stable, decay; the length of the second is in tokens, at 100 per step.
    parts = [
        SegmentConfig("warmup", share=0.2),
        SegmentConfig("constant", tokens=400),
        SegmentConfig("linear", 0.5, share=0.2),
        SegmentConfig("cosine", 0.0),
    ]
    schedule = Schedule(ScheduleConfig(segments=parts), 10, lambda tokens: tokens / 100)
    found = [schedule.factor(step) for step in range(11)]
    assert found == pytest.approx([0.5, 1, 1, 1, 1, 1, 1, 0.75, 0.5, 0.25, 0.0])


def test_a_named_schedule_is_its_segments() -> None:
    for name in SCHEDULES:
        config = ScheduleConfig(name=name, warmup=0.13)
        assert factors(ScheduleConfig(segments=config.expanded()), 97) == factors(config, 97)


def test_a_new_shape_is_one_function() -> None:
    @register_schedule("toy", final=0.5)
    def toy(i: int, n: int, start: float, to: float) -> float:
        return start + (to - start) * (i / n) ** 2

    try:
        config = ScheduleConfig(segments=[SegmentConfig("warmup", share=0.5), SegmentConfig("toy", 0.0)])
        assert factors(config, 8) == [0.25, 0.5, 0.75, 1, 1, 1 - 1 / 16, 1 - 4 / 16, 1 - 9 / 16]
        named = factors(ScheduleConfig("toy", warmup=0.5, final=0.0), 8)
        assert named == factors(config, 8)
        assert Schedule(ScheduleConfig("toy"), 8).final == 0.5
        register_schedule("toy", toy, final=0.5)  # the same again
        for again in ({"curve": toy}, {"curve": lambda i, n, start, to: 0.0, "final": 0.5}):
            with pytest.raises(UserError, match="schedule name 'toy' is taken; registered are"):
                register_schedule("toy", **again)  # type: ignore[call-overload]
        with pytest.raises(UserError, match="schedule name 'linear_10x' is taken"):
            register_schedule("linear_10x", toy)
        assert "linear_10x" not in SEGMENTS
    finally:
        SEGMENTS.unregister("toy")
        SCHEDULES.unregister("toy")
