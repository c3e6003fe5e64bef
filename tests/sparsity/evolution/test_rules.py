"""Rules as functions of the step: schedules against the papers' equations row for row, and what they refuse."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparsetrain.errors import UserError
from sparsetrain.sparsity import (
    GMP,
    SET,
    EvolutionConfig,
    Phase,
    RigL,
    Rule,
    SparsityConfig,
    Static,
    VariableSparsity,
    make_rule,
)
from sparsetrain.sparsity.evolution.rules import PROGRESS


def dues(rule: Rule, steps: int) -> list[int]:
    return [step for step in range(steps + 1) if rule.due(step)]


def test_updates_come_every_n_steps_from_start_until_before_stop() -> None:
    assert dues(SET(every=10), 45) == [10, 20, 30, 40]
    assert dues(RigL(every=10, start=15, stop=40), 100) == [20, 30]
    assert dues(Static(), 100) == []
    assert dues(GMP(every=10, start=5, stop=28), 100) == [5, 15, 25, 28]
    assert dues(VariableSparsity(sparsity=0.9, phases=((7, 0.5), (9, 0.0))), 20) == [7, 9]


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [0.3, 0.3, 0.3]),
        ("linear", [0.225, 0.15, 0.075]),
        # alpha / 2 (1 + cos(t pi / T_end)): RigL, section 3 (2).
        ("cosine", [0.15 * (1 + math.cos(math.pi * x)) for x in (0.25, 0.5, 0.75)]),
    ],
)
def test_drop_fractions_match_the_papers_formula(schedule: str, expected: list[float]) -> None:
    rule = RigL(every=1, stop=100, drop_fraction=0.3, drop_schedule=schedule)
    assert [rule.drop(step) for step in (25, 50, 75)] == pytest.approx(expected)


@pytest.mark.parametrize(
    ("curve", "expected"),
    [
        # s_t = s_f + (s_i - s_f) (1 - (t - t_0) / (n dt))^3: Zhu and Gupta, equation 1, with s_i = 0.2, s_f = 0.9.
        ("cubic", [0.2, *(0.9 + (0.2 - 0.9) * (1 - x) ** 3 for x in (0.25, 0.5, 0.75)), 0.9]),
        ("linear", [0.2, 0.375, 0.55, 0.725, 0.9]),
        ("cosine", [0.2, *(0.2 + 0.7 * (1 - math.cos(math.pi * x)) / 2 for x in (0.25, 0.5, 0.75)), 0.9]),
        ("step", [0.2, 0.375, 0.55, 0.725, 0.9]),
    ],
)
def test_pruning_curves_match_the_papers_formula(curve: str, expected: list[float]) -> None:
    rule = GMP(sparsity=0.9, every=25, start=100, stop=200, initial_sparsity=0.2, curve=curve)
    assert [1 - rule.layer_density(0.1, step) for step in (100, 125, 150, 175, 200)] == pytest.approx(expected)
    assert rule.layer_density(0.1, 0) == rule.layer_density(0.1, 110) == pytest.approx(0.8)
    assert rule.layer_density(0.1, 10**9) == 0.1
    assert rule.layer_density(0.863, 200) == 0.863  # exactly what the layer is allocated
    assert {rule.layer_density(0.863, step) for step in range(300)} == {0.863}  # denser than the beginning: it stays
    assert (min(rule.densities(0.1)), max(rule.densities(0.1))) == (0.1, pytest.approx(0.8))


def test_the_step_curve_has_four_stairs() -> None:
    levels = [PROGRESS["step"](x / 100) for x in range(101)]
    assert sorted(set(levels)) == [0.0, 0.25, 0.5, 0.75, 1.0]


@given(curve=st.sampled_from(sorted(PROGRESS)), x=st.floats(0, 1), y=st.floats(0, 1))
def test_pruning_never_turns_back(curve: str, x: float, y: float) -> None:
    low, high = sorted((x, y))
    assert -1e-12 <= PROGRESS[curve](low) <= PROGRESS[curve](high) + 1e-12 <= 1 + 1e-11


def test_variable_sparsity_follows_its_phases_and_scales_groups() -> None:
    rule = VariableSparsity(sparsity=0.9, phases=((50, 0.5), (90, 0.0)))
    densities = [rule.layer_density(0.1, step) for step in (0, 49, 50, 89, 90, 500)]
    assert densities == [0.1, 0.1, pytest.approx(0.5), pytest.approx(0.5), 1.0, 1.0]
    assert rule.layer_density(0.55, 50) == pytest.approx(0.75)
    assert list(rule.densities(0.55)) == [0.55, pytest.approx(0.75), 1.0]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: RigL(sparsity=1.0), r"RigL: sparsity=1.0 must be a number in \[0, 1\)"),
        (lambda: RigL(every=0), "RigL: every=0 must be at least 1"),
        (lambda: SET(start=-1), "SET: start=-1 must be at least 0"),
        (lambda: SET(start=5, stop=5), "SET: stop=5 must be above start=5"),
        (lambda: SET(drop_fraction=1.0), r"SET: drop_fraction=1.0 must lie in \(0, 1\)"),
        (lambda: SET(drop_schedule="cosine"), "drop_schedule=cosine falls until stop; set stop"),
        (lambda: SET(drop_schedule="cosin", stop=5), "did you mean 'cosine'"),
        (lambda: RigL(accumulation="lats"), "RigL: accumulation='lats' is not one of last, staggered"),
        (lambda: RigL(grown_scale=-1.0), "grown_scale=-1.0"),
        (lambda: SET(grown_moments="none"), "SET: grown_moments='none' is not one of zero, mean"),
        (lambda: GMP(sparsity=0.9), "GMP: stop=None"),
        (lambda: GMP(sparsity=0.5, stop=9, initial_sparsity=0.6), "initial_sparsity=0.6 is above sparsity=0.5"),
        (lambda: GMP(sparsity=0.5, stop=9, curve="cubik"), "did you mean 'cubic'"),
        (lambda: VariableSparsity(phases=((5, 0.5),)), "sparsity=None at the start must be above 0"),
        (lambda: VariableSparsity(sparsity=0.9), "at least one"),
        (lambda: VariableSparsity(sparsity=0.9, phases=((5, 0.5), (5, 0.0))), "phases: 5 follows 5"),
        (lambda: VariableSparsity(sparsity=0.9, phases=((5, 1.0),)), "phase at step 5=1.0"),
        (lambda: VariableSparsity(sparsity=0.9, phases=((5, 0.0),), grow="x"), "grow='x'"),
        (lambda: SET(stop=200).check(100), "SET: stop=200 lies after the end of training, at step 100"),
        (lambda: GMP(stop=200).check(100), "GMP: stop=200 lies after the end"),
        (lambda: RigL(every=200).check(100), "every=200 with start=0 leaves no update within 100 steps"),
        (lambda: RigL(every=60, stop=50).check(100), "leaves no update within stop=50 of 100 steps"),
        (
            lambda: VariableSparsity(sparsity=0.9, phases=((100, 0.0),)).check(100),
            "the phase at step 100 lies after the end of training",
        ),
    ],
)
def test_a_rule_that_cannot_be_meant_is_one_line(make: Callable[[], object], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        make()
    assert "\n" not in str(caught.value)


# From a configuration.


def test_fractions_of_training_become_steps() -> None:
    settings = EvolutionConfig(rule="rigl", every=50, start=0.1, stop=0.75, drop_schedule="linear")
    rule = make_rule(SparsityConfig(sparsity=0.9, evolution=settings), 1000)
    assert rule == RigL(every=50, start=100, stop=750, drop_fraction=0.3, drop_schedule="linear")
    phases = [Phase(0.5, 0.5), Phase(0.9, 0.0)]
    plan = SparsityConfig(sparsity=0.9, evolution=EvolutionConfig(rule="vspdf", phases=phases))
    assert make_rule(plan, 200) == VariableSparsity(sparsity=0.9, phases=((100, 0.5), (180, 0.0)))
    assert make_rule(SparsityConfig(sparsity=0.5), 10) == Static()
    for kind, options in (("set", {}), ("rigl", {}), ("vspdf", {"phases": phases})):
        evolution = EvolutionConfig(rule=kind, grown_moments="mean", **options)  # type: ignore[arg-type]
        assert make_rule(SparsityConfig(sparsity=0.9, evolution=evolution), 1000).grown_moments == "mean"
    gmp = make_rule(SparsityConfig(sparsity=0.9, evolution=EvolutionConfig(rule="gmp", every=10)), 100)
    assert gmp == GMP(every=10, stop=75)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: EvolutionConfig(rule="rigle"), r"sparsity.evolution.rule='rigle' .*did you mean 'rigl'"),
        (lambda: EvolutionConfig("set", every=0), "sparsity.evolution.every=0 must be at least 1"),
        (lambda: EvolutionConfig("set", stop=1.5), r"sparsity.evolution.stop=1.5 must lie in \[0, 1\]"),
        (lambda: EvolutionConfig("gmp", start=0.8), "sparsity.evolution.stop=0.75 must be above start=0.8"),
        (
            lambda: EvolutionConfig("rigl", drop_fraction=0.0),
            r"sparsity.evolution.drop_fraction=0.0 must lie in \(0, 1\)",
        ),
        (lambda: EvolutionConfig("rigl", curve="cubic"), "evolution.curve is no setting of rule=rigl; it has every,"),
        (lambda: EvolutionConfig("gmp", crve="x"), r"evolution.crve is no setting of rule=gmp \(did you mean 'curve'"),
        (lambda: EvolutionConfig(evry=5), "evolution.evry is no setting of rule=static; it has grow,"),
        (lambda: EvolutionConfig(rule="vspdf"), r"phases=\(\): at least one"),
        (lambda: EvolutionConfig(phases=[Phase(0.5, 0.5)]), "phases is no setting of rule=static; it has grow,"),
        (lambda: EvolutionConfig(rule="vspdf", phases=[Phase(0.5, 0.5), Phase(0.5, 0.1)]), "phases: 0.5 follows 0.5"),
        (lambda: Phase(1.0, 0.5), r"phases: at=1.0 must lie in \[0, 1\)"),
        (lambda: EvolutionConfig("rigl", grown_scale=math.nan), "grown_scale=nan"),
        (lambda: EvolutionConfig("set", grown_moments="none"), "sparsity.evolution.grown_moments='none' is not one of"),
        (
            lambda: make_rule(SparsityConfig(evolution=EvolutionConfig(rule="set")), 1000),
            "sparsity.evolution.rule=set: sparsity.sparsity=0 leaves no mask that could change",
        ),
        (
            lambda: make_rule(SparsityConfig(sparsity=0.5, evolution=EvolutionConfig(rule="set")), 100),
            "sparsity.evolution: SET: every=100 with start=0 leaves no update",
        ),
    ],
)
def test_a_configuration_that_cannot_be_meant_names_the_field(make: Callable[[], object], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        make()
    assert "\n" not in str(caught.value)


def test_the_caveat_of_transfer_is_in_the_docs() -> None:
    for rule in (RigL, GMP):
        assert "SμPar is not claimed to transfer here" in (rule.__doc__ or "")
