"""Budgets: how lengths and shares become steps, the batch and context of each step, and refused settings."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from sparsetrain.errors import UserError
from sparsetrain.optim import Budget, BudgetConfig, PhaseConfig, RunSchedule, Schedule, ScheduleConfig


def budget(context: int = 100, samples: int = 1000, **fields: object) -> Budget:
    return Budget.of(BudgetConfig(**fields), context, lambda _context: samples)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("fields", "steps"),
    [
        ({"steps": 7}, 7),
        ({"tokens": 1000, "batch_size": 1}, 10),
        ({"tokens": 1001, "batch_size": 1}, 11),  # rounded up
        ({"tokens": 1, "batch_size": 1}, 1),
        ({"tokens": 10**12 + 1, "batch_size": 1}, 10**10 + 1),
        ({"epochs": 2.0, "batch_size": 16}, 125),
        ({"epochs": 0.5, "batch_size": 32}, 16),  # 15.6
        ({"epochs": 0.001, "batch_size": 32}, 1),
    ],
)
def test_a_length_becomes_steps(fields: dict[str, object], steps: int) -> None:
    found = budget(**fields)
    assert found.total_steps == steps
    assert len(found.phases) == 1
    assert found.tokens == steps * found.phases[0].batch_size * 100


def test_a_share_is_one_of_tokens_and_rounds_to_the_nearest_step() -> None:
    # 12,000 tokens: 9,000 make 2.25 steps of 4,000, and 3,000 make 3 steps of 1,000.
    phases = [PhaseConfig(share=0.75, context=100, batch_size=40), PhaseConfig(share=0.25, context=500, batch_size=2)]
    found = budget(tokens=12_000, phases=phases)
    assert [(phase.first_step, phase.end_step) for phase in found.phases] == [(0, 2), (2, 6)]
    assert found.tokens == 2 * 4000 + 4 * 1000
    # Shares are always shares of tokens, also for a length in steps: here 3/4 at four times the batch.
    found = budget(steps=70, phases=[PhaseConfig(share=0.75, batch_size=4), PhaseConfig(share=0.25, batch_size=1)])
    assert [phase.steps for phase in found.phases] == [30, 40]
    assert [phase.tokens for phase in found.phases] == [12_000, 4_000]


def test_phases_in_tokens_say_how_long_the_run_is() -> None:
    phases = [PhaseConfig(tokens=1000, batch_size=1), PhaseConfig(tokens=500, batch_size=2)]
    found = budget(phases=phases)
    assert [phase.steps for phase in found.phases] == [10, 3]  # 2.5 more steps, rounded half up
    assert budget(tokens=1500, phases=phases) == found
    with pytest.raises(UserError, match=r"budget.tokens=1600: the phases have 1500 tokens in total"):
        BudgetConfig(tokens=1600, phases=phases)


phase_lists = st.lists(
    st.tuples(st.integers(1, 20), st.integers(1, 8), st.sampled_from([16, 64, 100])), min_size=1, max_size=5
)


@given(phase_lists, st.integers(50, 5000))
def test_every_step_belongs_to_a_phase_and_no_sample_comes_twice(parts: list[tuple[int, int, int]], steps: int) -> None:
    whole = sum(weight for weight, _, _ in parts)
    phases = [PhaseConfig(share=weight / whole, batch_size=batch, context=context) for weight, batch, context in parts]
    exact = [Fraction(weight, batch * context) for weight, batch, context in parts]
    assume(steps * min(exact) >= sum(exact))  # no phase is shorter than a step
    found = Budget.of(BudgetConfig(steps=steps, phases=phases), 32)
    assert found.total_steps == steps
    assert found.phases[0].first_step == 0
    for one, other in itertools.pairwise(found.phases):
        assert one.end_step == other.first_step
    # An oracle in exact arithmetic: each border is within half a step of its share.
    for phase, share in zip(found.phases, itertools.accumulate(exact), strict=True):
        assert abs(phase.end_step - steps * share / sum(exact)) <= Fraction(1, 2) + Fraction(1, 10**6)
    tokens, read = 0, [0] * len(found.contexts)
    for step in range(steps):
        phase, (stream, sample) = found.at(step), found.samples_at(step)
        assert phase.first_step <= step < phase.end_step
        assert found.contexts[stream] == phase.context
        assert sample == read[stream]
        assert found.tokens_at(step) == tokens
        assert found.steps_of_tokens(tokens) == pytest.approx(step)
        read[stream] += phase.batch_size
        tokens += phase.tokens_per_step
    assert found.tokens == tokens == found.tokens_at(steps)


def test_flops_buy_the_largest_number_of_steps() -> None:
    config = BudgetConfig(
        flops=1e6,
        phases=[PhaseConfig(share=0.5, context=10, batch_size=1), PhaseConfig(share=0.5, context=30, batch_size=1)],
    )

    def cost(found: Budget) -> float:
        return sum(phase.tokens * (7.0 + phase.context) for phase in found.phases)

    found = Budget.of(config, 10, flops=cost)
    assert cost(found) <= 1e6 < cost(Budget.of(BudgetConfig(steps=found.total_steps + 1, phases=config.phases), 10))
    with pytest.raises(UserError, match=r"budget.flops=10 does not pay for one step of this model"):
        Budget.of(BudgetConfig(flops=10.0), 10, flops=cost)
    with pytest.raises(UserError, match=r"budget.flops=1e\+30 pays for more than"):
        Budget.of(BudgetConfig(flops=1e30), 10, flops=cost)
    with pytest.raises(UserError, match=r"budget.flops=10 is the length of a pre-training"):
        Budget.of(BudgetConfig(flops=10.0), 10)


def test_a_phase_may_have_a_schedule_of_its_own() -> None:
    own = ScheduleConfig(name="cosine", warmup=0.2)
    phases = [PhaseConfig(share=0.5), PhaseConfig(share=0.3, schedule=own), PhaseConfig(share=0.2)]
    config = ScheduleConfig(name="linear_to_zero", warmup=0.1)
    schedule = RunSchedule(config, budget(steps=100, phases=phases))
    whole, alone = Schedule(config, 100), Schedule(own, 30)
    found = [schedule.factor(step) for step in range(100)]
    assert found == [alone.factor(step - 50) if 50 <= step < 80 else whole.factor(step) for step in range(100)]
    assert schedule.total_steps == 100


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: BudgetConfig(steps=3, tokens=4), "budget.steps=3 and budget.tokens=4: a run has one length"),
        (lambda: BudgetConfig(steps=0), "budget.steps=0 must be at least 1"),
        (lambda: BudgetConfig(tokens=-5), "budget.tokens=-5 must be at least 1"),
        (lambda: BudgetConfig(epochs=math.nan), "budget.epochs=nan must be above 0"),
        (lambda: BudgetConfig(flops=math.inf), "budget.flops=inf must be above 0 and finite"),
        (lambda: BudgetConfig(batch_size=0), "budget.batch_size=0 must be at least 1"),
        (lambda: BudgetConfig(phases=[]), r"budget.phases=\[\]: a run has at least one phase"),
        (lambda: BudgetConfig(phases=[PhaseConfig(share=0.7)]), r"the shares \[0.7\] add up to 0.7"),
        (lambda: PhaseConfig(), "share=None, tokens=None: give exactly one of share and tokens"),
        (lambda: PhaseConfig(share=0.5, tokens=3), "share=0.5, tokens=3: give exactly one of"),
        (lambda: PhaseConfig(share=0.0), r"share=0.0 must lie in \(0, 1\]"),
        (lambda: PhaseConfig(share=1.0, context=0), "context=0 must be at least 1"),
        (lambda: PhaseConfig(share=1.0, density=0.0), r"density=0.0 must lie in \(0, 1\]"),
        (lambda: BudgetConfig(phases=[PhaseConfig(share=0.5), PhaseConfig(tokens=5)]), "every phase a share, or every"),
        (lambda: budget(), "run length is not set: give one of budget.steps, budget.tokens"),
        (
            lambda: budget(steps=10, phases=[PhaseConfig(share=0.99), PhaseConfig(share=0.01)]),
            r"budget.phases\[1\]: share=0.01 of a run of 10 steps is shorter than one step",
        ),
        (
            lambda: budget(steps=6, phases=[PhaseConfig(share=0.9), PhaseConfig(share=0.1)]),
            r"budget.phases\[1\]: share=0.1 of a run of 6 steps is shorter than one step",
        ),
    ],
)
def test_a_bad_budget_is_named_in_one_line(make: object, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        make()  # type: ignore[operator]
    assert "\n" not in str(caught.value)
