"""Batch sizes over time: ramps and lists against a walk step by step, decisions by hand, and refused settings."""

from __future__ import annotations

import math
from itertools import accumulate
from typing import Any

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from sparsetrain.errors import UserError
from sparsetrain.optim import (
    BatchSizeConfig,
    BatchStepConfig,
    Budget,
    BudgetConfig,
    OptimizerConfig,
    PhaseConfig,
    RunSchedule,
    ScheduleConfig,
    SegmentConfig,
    SettingSchedules,
    build_optimizer,
)

CONTEXT = 10
D2Z = ScheduleConfig()  # linear to zero, with a tenth of warmup


def budget(size: Any, phases: list[PhaseConfig] | None = None, **length: Any) -> Budget:
    return Budget.of(BudgetConfig(batch_size=size, phases=phases, **length), CONTEXT, lambda _context: 1000)


def walk(found: Budget) -> list[tuple[int, int, int]]:
    """Return stream, first sample and size of every step."""
    return [(*found.samples_at(step), found.at(step).batch_size) for step in range(found.total_steps)]


def assert_tiled(found: Budget) -> None:
    """Each stream is read once, in order, from its first sample, without a gap."""
    ends: dict[int, int] = {}
    for step, (stream, first, size) in enumerate(walk(found)):
        assert first == ends.get(stream, 0)
        ends[stream] = first + size
        before = found.tokens_at(step)
        assert found.tokens_at(step + 1) == before + size * found.at(step).context
    assert found.tokens == found.tokens_at(found.total_steps)


ramps = st.builds(
    lambda start, end, points, multiple: BatchSizeConfig(start * multiple, end * multiple, points, multiple),
    *(st.integers(1, 40), st.integers(1, 40), st.integers(2, 15), st.integers(1, 4)),
)


@st.composite
def lists(draw: st.DrawFn) -> BatchSizeConfig:
    cuts = sorted(draw(st.sets(st.integers(1, 99), max_size=5)))
    shares = [(after - before) / 100 for before, after in zip([0, *cuts], cuts, strict=False)]
    sizes = draw(st.lists(st.integers(1, 60), min_size=len(shares) + 1, max_size=len(shares) + 1))
    steps = [BatchStepConfig(size, share) for size, share in zip(sizes, shares, strict=False)]
    return BatchSizeConfig(steps=[*steps, BatchStepConfig(sizes[-1])])


@given(ramps | lists(), st.integers(1, 20_000))
def test_the_samples_of_any_schedule_tile_the_data_and_the_last_rate_is_promised(
    size: BatchSizeConfig, tokens: int
) -> None:
    found = budget(size, tokens=tokens)
    assert_tiled(found)
    last = found.at(found.total_steps - 1)
    assert found.tokens - last.tokens_per_step < tokens <= found.tokens  # no token is missing, no step is in vain
    schedule = RunSchedule(D2Z, found)
    warm = math.floor(0.1 * found.tokens + 0.5)
    seen = found.tokens - last.tokens_per_step
    rate = schedule.factor(found.total_steps - 1)
    if seen >= warm:
        assert rate == pytest.approx(last.tokens_per_step / (found.tokens - warm))
    assert all(0.0 < schedule.factor(step) <= 1.0 for step in range(found.total_steps))


@given(
    ramps | lists(),
    st.sampled_from([{"steps": 200}, {"epochs": 3.0}, {"tokens": 90_000}]),
    st.lists(st.tuples(st.integers(1, 9), st.sampled_from([None, 5, 30]), st.sampled_from([None, 10, 20]))),
)
def test_phases_cut_a_schedule_of_sizes(
    size: BatchSizeConfig, length: dict[str, Any], raw: list[tuple[int, int | None, int | None]]
) -> None:
    total = sum(weight for weight, _, _ in raw)
    phases = [PhaseConfig(weight / total, batch_size=own, context=context) for weight, own, context in raw] or None
    try:
        found = budget(size, phases, **length)
    except UserError:  # a phase that is shorter than a step
        assume(False)
    assert_tiled(found)
    assert sorted({phase.index for phase in found.phases}) == list(range(len(raw) or 1))
    assert {phase.batch_size for phase in found.phases} <= {*size.sizes, *(own for _, own, _ in raw)}
    if "steps" in length:
        assert found.total_steps == 200


def test_a_ramp_has_equal_shares_of_the_tokens_and_sizes_that_are_rounded_up() -> None:
    size = BatchSizeConfig(16, 120, points=10)
    assert size.sizes == [math.ceil(16 + 104 * point / 9) for point in range(10)]
    assert BatchSizeConfig(16, 120, points=10, multiple=8).sizes == [16, 32, 40, 56, 64, 80, 88, 104, 112, 120]
    assert BatchSizeConfig(64, 8, points=8).sizes == [64, 56, 48, 40, 32, 24, 16, 8]
    found = budget(size, tokens=10_000_000)
    assert [phase.tokens for phase in found.phases] == pytest.approx([1e6] * 10, rel=2e-3)
    # The mean of the ramp says 14,706 steps, 0.69 of them: with that count the decay would end too early.
    assert found.total_steps == pytest.approx(sum(1e5 / step for step in size.sizes), abs=2)
    assert found.total_steps > 1.4 * 10_000_000 / CONTEXT / 68


def test_lengths_of_a_list_may_be_tokens() -> None:
    size = BatchSizeConfig(steps=[BatchStepConfig(2, tokens=100), BatchStepConfig(4, tokens=200), BatchStepConfig(8)])
    assert [(phase.batch_size, phase.steps) for phase in budget(size, tokens=700).phases] == [(2, 5), (4, 5), (8, 5)]
    phases = [PhaseConfig(tokens=300), PhaseConfig(tokens=400, batch_size=1)]
    assert [(phase.batch_size, phase.steps) for phase in budget(size, phases).phases] == [(2, 5), (4, 5), (1, 40)]
    with pytest.raises(UserError, match=r"budget.batch_size.steps: tokens=100 needs a run whose length is in tokens"):
        budget(size, steps=10)
    with pytest.raises(UserError, match=r"budget.batch_size.steps: the entries before the last one fill the whole run"):
        budget(size, tokens=250)


def test_schedules_run_in_tokens_where_the_size_changes() -> None:
    # Twelve steps of 1 and then six of 2 sequences, 24 units of ten tokens.
    size = BatchSizeConfig(steps=[BatchStepConfig(1, 0.5), BatchStepConfig(2)])
    segments = [SegmentConfig("warmup", steps=4), SegmentConfig("linear", 0.0)]
    schedules = SettingSchedules(weight_decay=[SegmentConfig("linear", 0.0)])
    optimizer = OptimizerConfig(weight_decay=0.1, schedules=schedules)
    schedule = RunSchedule(ScheduleConfig(segments=segments), budget(size, tokens=240), optimizer)
    seen = [0, *accumulate([1] * 12 + [2] * 6)]
    wanted = [0.25, 0.5, 0.75, 1.0, *((24 - before) / 20 for before in seen[4:-1])]
    assert [schedule.factor(step) for step in range(18)] == pytest.approx(wanted)
    found = [schedule.value(optimizer, "weight_decay", step) for step in range(18)]
    assert found == pytest.approx([0.1 * (24 - before) / 24 for before in seen[:-1]])
    # A phase's own schedule counts its own tokens.
    own = ScheduleConfig(segments=[SegmentConfig("linear", 0.0)], continues=True)
    phases = [PhaseConfig(0.25), PhaseConfig(0.75, schedule=own)]
    flat = RunSchedule(ScheduleConfig("constant", warmup=0.0), budget(size, phases, tokens=240))
    assert [flat.factor(step) for step in range(6)] == [1.0] * 6
    assert [flat.factor(step) for step in range(6, 18)] == pytest.approx([(24 - before) / 18 for before in seen[6:-1]])


@pytest.mark.parametrize("rule", ["none", "sqrt", "linear"])
def test_the_rules_keep_what_they_say(rule: str) -> None:
    size = BatchSizeConfig(4, 64, points=3)
    config = BudgetConfig(tokens=10_000, batch_size=size, lr_rule=rule, wd_rule="tau")
    schedule = RunSchedule(ScheduleConfig("constant", warmup=0.0), Budget.of(config, CONTEXT))
    optimizer = build_optimizer(
        [{"params": [torch.nn.Parameter(torch.ones(2))], "lr": 0.3, "weight_decay": 0.2}], OptimizerConfig()
    )
    per_token, rates = set(), {}
    for step in range(schedule.total_steps):
        schedule.apply(optimizer.param_groups, step)
        group, batch = optimizer.param_groups[0], schedule.budget.at(step).batch_size
        per_token.add(round(group["lr"] * group["weight_decay"] / batch, 12))
        rates[batch] = group["lr"]
    assert per_token == {0.3 * 0.2 / 4}  # so tau = B / (lr wd D) stays
    power = {"none": 0.0, "sqrt": 0.5, "linear": 1.0}[rule]
    assert rates == pytest.approx({batch: 0.3 * (batch / 4) ** power for batch in (4, 34, 64)})


def test_rules_hold_for_phases_too() -> None:
    phases = [PhaseConfig(0.5, batch_size=2), PhaseConfig(0.5, batch_size=8)]
    config = BudgetConfig(steps=10, phases=phases, lr_rule="sqrt")
    schedule = RunSchedule(ScheduleConfig("constant", warmup=0.0), Budget.of(config, CONTEXT))
    assert [schedule.factor(step) for step in range(10)] == [1.0] * 8 + [2.0] * 2


# -- led by the noise scale ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "measured", "then"),
    [(8, 5.0, 8), (8, 9.0, 12), (8, 12.0, 12), (8, 12.1, 16), (8, 500.0, 16), (40, 500.0, 64), (64, 500.0, 64)],
)
def test_a_size_goes_to_the_measurement_never_back_and_at_most_doubles(size: int, measured: float, then: int) -> None:
    assert BatchSizeConfig(8, 64, multiple=4, led_by="gns").grown(size, measured) == then


@pytest.mark.parametrize("measured", [math.nan, math.inf, -math.inf, -3.0, 0.0])
def test_what_is_no_measurement_changes_nothing(measured: float) -> None:
    assert BatchSizeConfig(8, 64, led_by="gns").grown(16, measured) == 16


def led(tokens: int = 9_600, **settings: Any) -> Budget:
    return budget(BatchSizeConfig(**{"start": 8, "end": 64, "points": 4, "led_by": "gns", **settings}), tokens=tokens)


def test_decisions_change_the_steps_that_follow() -> None:
    found = led()
    assert found.total_steps == 120
    due = [step for step in range(1, 120) if found.decides(step)]
    assert due == [30, 60, 90]
    made = found.decide(30, 12.0)
    assert (made.step, made.tokens, made.noise_scale, made.batch_size) == (30, 2_400, 12.0, 12)
    assert found.total_steps == 30 + 60
    assert [step for step in range(31, 90) if found.decides(step)] == [50, 70]
    assert found.decide(50, math.nan).noise_scale is None
    found.decide(70, 1000.0)
    assert [(phase.batch_size, phase.steps) for phase in found.phases] == [(8, 30), (12, 40), (24, 10)]
    assert_tiled(found)
    # The same decisions give a new budget the same steps.
    again = led()
    again.replay(found.decisions)
    assert again == found
    assert RunSchedule(D2Z, again).factor(79) == pytest.approx(240 / (9_600 - 960))


@given(st.lists(st.floats(allow_nan=True), max_size=30), st.integers(1, 50_000), st.integers(1, 20), st.integers(1, 9))
def test_whatever_is_measured_the_run_ends_with_its_tokens(
    measured: list[float], tokens: int, points: int, start: int
) -> None:
    found = led(tokens, points=points, start=start, multiple=1)
    most, fewest = found.total_steps, found.fewest_steps()
    schedule, step = RunSchedule(D2Z, found), 0
    values = iter(measured)
    while step < found.total_steps:
        assert 0.0 < schedule.factor(step) <= 1.0
        step += 1
        if found.decides(step):
            before = found.at(step).batch_size
            size = found.decide(step, next(values, math.nan)).batch_size
            assert before <= size <= min(2 * before, 64)
    assert fewest <= found.total_steps <= most
    assert found.tokens - found.phases[-1].tokens_per_step < tokens <= found.tokens
    assert_tiled(found)


def test_the_fewest_steps_are_those_of_doubling_at_every_decision() -> None:
    found = led()
    fewest = found.fewest_steps()
    assert found == led()  # asking changes nothing
    for step in range(1, 120):
        if found.decides(step):
            found.decide(step, 1e9)
    assert found.total_steps == fewest < 120


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: BudgetConfig(batch_size="big"), "budget.batch_size=big must be a number, gns, or a section"),
        (lambda: BatchSizeConfig(4), "give start and end, or steps, or led_by=gns; end is missing"),
        (lambda: BatchSizeConfig(4, 9, multiple=2), "budget.batch_size.end=9 must be a multiple of 2"),
        (lambda: BatchSizeConfig(4, 8, points=1), "budget.batch_size.points=1 must be at least 2"),
        (lambda: BatchSizeConfig(4, 8, ratio=2.0), "budget.batch_size.ratio=2.0 has no meaning without led_by=gns"),
        (lambda: BatchSizeConfig(8, 4, led_by="gns"), "budget.batch_size.end=4 must be at least start=8"),
        (lambda: BatchSizeConfig(led_by="loss"), "budget.batch_size.led_by='loss' is not one of tokens, gns"),
        (lambda: BatchSizeConfig(led_by="gns", ratio=math.nan), "budget.batch_size.ratio=nan must be above 0"),
        (lambda: BatchSizeConfig(4, steps=[BatchStepConfig(4)]), "budget.batch_size.start=4 cannot be combined with"),
        (lambda: BatchSizeConfig(steps=[]), "a list of sizes has at least one entry"),
        (lambda: BatchSizeConfig(steps=[BatchStepConfig(4), BatchStepConfig(5)]), "only the last entry may be without"),
        (lambda: BatchSizeConfig(steps=[BatchStepConfig(4, 0.7)]), r"the shares \[0.7\] add up to 0.7"),
        (lambda: BatchStepConfig(0), "size=0 must be at least 1"),
        (lambda: BatchStepConfig(4, 0.5, 3), "share=0.5, tokens=3: give at most one"),
        (
            lambda: BudgetConfig(batch_size="gns", steps=9),
            "budget.steps=9: with budget.batch_size led by gns the length",
        ),
        (lambda: BudgetConfig(batch_size="gns", epochs=1.0), "budget.epochs=1.0: with budget.batch_size led by gns"),
        (lambda: BudgetConfig(batch_size="gns", phases=[PhaseConfig(1.0)]), "budget.phases cannot be combined with"),
        (lambda: BudgetConfig(lr_rule="cube"), "budget.lr_rule='cube' is not one of none, sqrt, linear"),
        (lambda: BudgetConfig(wd_rule="cube"), "budget.wd_rule='cube' is not one of none, tau"),
        (
            lambda: RunSchedule(ScheduleConfig(warmup_steps=3), led()),
            "schedule: a length of 3 steps, with budget.batch_size led by gns",
        ),
        (
            lambda: RunSchedule(ScheduleConfig(warmup_steps=500), budget(BatchSizeConfig(4, 8), tokens=1000)),
            "schedule.warmup_steps=500 must be below",
        ),
    ],
)
def test_a_bad_batch_size_is_named_in_one_line(make: Any, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        make()
    assert "\n" not in str(caught.value)
