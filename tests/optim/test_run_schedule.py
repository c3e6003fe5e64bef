"""The schedules of a run: chained phases, and settings of the optimizer besides the learning rate."""

from __future__ import annotations

import pytest
import torch

from sparsetrain.errors import UserError
from sparsetrain.optim import (
    BatchSizeConfig,
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


def budget(steps: int, *phases: PhaseConfig) -> Budget:
    return Budget.of(BudgetConfig(steps=steps, phases=list(phases) or None), 16)


def test_a_phase_goes_on_from_where_the_one_before_it_ended() -> None:
    rewarmed = ScheduleConfig(name="linear", warmup=0.5, final=0.2, continues=True)
    chained = ScheduleConfig(segments=[SegmentConfig("linear", 0.0)], continues=True)
    phases = [PhaseConfig(share=0.5), PhaseConfig(share=0.25, schedule=rewarmed)]
    phases.append(PhaseConfig(share=0.25, schedule=chained))
    schedule = RunSchedule(ScheduleConfig("linear", warmup=0.0), budget(16, *phases))
    found = [schedule.factor(step) for step in range(16)]
    assert found[:8] == [1 - step / 16 for step in range(8)]  # of all 16 steps: the run's own schedule would end at 0
    assert found[8:12] == pytest.approx([0.75, 1.0, 1.0, 0.6])  # up from the half that it would have in step 8
    assert found[12:] == pytest.approx([0.2, 0.15, 0.1, 0.05])


@pytest.mark.parametrize(
    ("run", "phases", "message"),
    [
        (ScheduleConfig(continues=True), [], r"schedule.continues=true is for the schedule of a phase"),
        (
            ScheduleConfig(),
            [PhaseConfig(share=1.0, schedule=ScheduleConfig(continues=True))],
            r"budget.phases\[0\].schedule.continues=true needs a phase before it",
        ),
        (
            ScheduleConfig("linear", warmup=0.0),
            [
                PhaseConfig(share=0.5, schedule=ScheduleConfig("linear")),
                PhaseConfig(
                    share=0.5, schedule=ScheduleConfig(segments=[SegmentConfig("exponential", 0.1)], continues=True)
                ),
            ],
            r"budget.phases\[1\].schedule.segments\[0\]: exponential cannot begin at a rate of 0",
        ),
    ],
)
def test_what_cannot_continue_is_refused(run: ScheduleConfig, phases: list[PhaseConfig], message: str) -> None:
    with pytest.raises(UserError, match=message):
        RunSchedule(run, budget(20, *phases))


def ramp(last: float) -> list[SegmentConfig]:
    """Return the schedule that leads linearly from 1 to another factor."""
    return [SegmentConfig("linear", last)]


def test_weight_decay_and_betas_follow_their_schedules() -> None:
    schedules = SettingSchedules(weight_decay=ramp(0.0), beta2=ramp(1.04), beta1=ramp(0.5))
    config = OptimizerConfig(weight_decay=0.2, beta1=0.8, beta2=0.95, schedules=schedules)
    matrix, bias = torch.nn.Parameter(torch.ones(2, 2)), torch.nn.Parameter(torch.ones(2))
    groups = [{"params": [matrix], "lr": 0.1, "weight_decay": 0.4}, {"params": [bias], "lr": 0.3, "weight_decay": 0.0}]
    optimizer = build_optimizer(groups, config)
    schedule = RunSchedule(ScheduleConfig("constant", warmup=0.0), budget(10), config)
    for step in range(10):
        assert schedule.apply(optimizer.param_groups, step) == 1.0
        first, second = optimizer.param_groups
        assert (first["lr"], second["lr"], second["weight_decay"]) == (0.1, 0.3, 0.0)
        assert first["weight_decay"] == pytest.approx(0.4 * (1 - step / 10))
        assert first["betas"] == second["betas"] == pytest.approx((0.8 * (1 - step / 20), 0.95 * (1 + step / 250)))


def test_momentum_follows_its_schedule() -> None:
    config = OptimizerConfig("sgd", momentum=0.9, schedules=SettingSchedules(momentum=ramp(0.0)))
    optimizer = build_optimizer([{"params": [torch.nn.Parameter(torch.ones(2))], "lr": 0.1, "weight_decay": 0}], config)
    RunSchedule(ScheduleConfig(), budget(10), config).apply(optimizer.param_groups, 5)
    assert optimizer.param_groups[0]["momentum"] == pytest.approx(0.45)


def test_a_setting_that_cannot_be_scheduled_so_is_refused() -> None:
    with pytest.raises(UserError, match=r"optimizer.schedules.momentum has no meaning for optimizer.name=adamw"):
        OptimizerConfig(schedules=SettingSchedules(momentum=ramp(0.5)))
    config = OptimizerConfig(beta2=0.95, schedules=SettingSchedules(beta2=ramp(1.1)))
    with pytest.raises(UserError, match=r"optimizer.schedules.beta2: optimizer.beta2=0.95 times 1.1 is 1.045; it must"):
        RunSchedule(ScheduleConfig(), budget(10), config)
    long = SettingSchedules(weight_decay=[SegmentConfig("linear", 0.0, steps=30), SegmentConfig("constant")])
    with pytest.raises(UserError, match=r"optimizer.schedules.weight_decay take 30 steps in total"):
        RunSchedule(ScheduleConfig(), budget(10), OptimizerConfig(schedules=long))
    with pytest.raises(UserError, match=r"optimizer.schedules.weight_decay=\[\]: a schedule has at"):
        OptimizerConfig(schedules=SettingSchedules(weight_decay=[]))


@pytest.mark.parametrize("rules", [("none", "none"), ("none", "tau"), ("sqrt", "tau"), ("linear", "none")])
@pytest.mark.parametrize("batch", [4, BatchSizeConfig(start=2, end=32, points=5)])
@pytest.mark.parametrize("steps", [37, 3000])
def test_the_peak_is_the_largest_decay_per_token_that_is_applied(
    rules: tuple[str, str], batch: int | BatchSizeConfig, steps: int
) -> None:
    """Against the rates of a real group in every step; the mean per token is that of equal batches."""
    run = Budget.of(BudgetConfig(tokens=steps * 64, batch_size=batch, lr_rule=rules[0], wd_rule=rules[1]), 16)
    rate = ScheduleConfig(segments=[SegmentConfig("warmup", 0.5, share=0.1), SegmentConfig("linear", 0.0, share=0.9)])
    decay = [SegmentConfig("linear", 0.1, share=0.5), SegmentConfig("linear", 0.8, share=0.5)]
    schedule = RunSchedule(rate, run, OptimizerConfig(schedules=SettingSchedules(weight_decay=decay)))
    group = {"lr": 2.0, "initial_lr": 2.0, "weight_decay": 3.0}
    applied, tokens = [], 0
    for step in range(run.total_steps):
        schedule.apply([group], step)
        applied.append(group["lr"] * group["weight_decay"] / run.at(step).tokens_per_step)
        tokens += run.at(step).tokens_per_step
    assert 6.0 * schedule.peak() == pytest.approx(max(applied) * tokens / run.total_steps, rel=1e-6)
