"""The predicted time of runs: sums over stretches of equal steps."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import constant_machine
import pytest

from sparsetrain.cost.blocks import shape_of_config, shape_of_model
from sparsetrain.cost.flops import hidden_shapes, parameter_count
from sparsetrain.cost.run_flops import RunFlops, Stretch
from sparsetrain.cost.run_time import RunWork, predicted
from sparsetrain.cost.simulate import simulate
from sparsetrain.errors import UserError
from sparsetrain.models import ModelConfig, Prompted, SoftPrompt, Transformer
from sparsetrain.optim import Budget, BudgetConfig
from sparsetrain.optim.budget_config import PhaseConfig
from sparsetrain.sparsity import EvolutionConfig, SparsityConfig, make_rule
from sparsetrain.sparsity.evolution.managed import allocated_densities

MODEL = ModelConfig(d_model=32, n_layers=3, n_heads=2, vocab_size=300, max_context=64)
BAND = 1.1788  # exp(1.6449 * 0.1), of the spread of the machine


def ledger(evolution: dict[str, Any], budget: BudgetConfig, accumulation: int = 1) -> RunFlops:
    phases = Budget.of(budget, 64)
    section = SparsityConfig(sparsity=0.75, evolution=EvolutionConfig(**evolution))
    rule = make_rule(section, phases.total_steps)
    densities = allocated_densities(hidden_shapes(MODEL), section, rule)
    return RunFlops(MODEL, densities, rule, phases, lambda size: size // accumulation)


def work_of(run: RunFlops) -> RunWork:
    stretches = list(run.stretches(0, run.budget.total_steps))
    return RunWork(run.config, stretches, grows_by_gradient=run.rule.needs_gradient)


PHASES = [PhaseConfig(share=0.5, context=16, batch_size=8), PhaseConfig(share=0.5, context=64, batch_size=4)]


@pytest.mark.parametrize("phases", [None, PHASES], ids=["one phase", "contexts"])
@pytest.mark.parametrize(
    "evolution",
    [{"rule": "static"}, {"rule": "rigl", "every": 4}, {"rule": "gmp", "every": 5}],
    ids=lambda evolution: evolution["rule"],
)
def test_where_only_products_take_time_it_is_that_of_the_formula(
    evolution: dict[str, Any], phases: list[PhaseConfig] | None
) -> None:
    run = ledger(evolution, BudgetConfig(steps=40, batch_size=4, phases=phases))
    found = predicted(work_of(run), constant_machine.machine())
    flops = run.through(40)
    assert found.seconds == pytest.approx(flops["total"] / constant_machine.RATE, rel=1e-6)
    assert found.band == pytest.approx((found.seconds / BAND, found.seconds * BAND), rel=1e-4)
    assert sum(found.terms.values()) == pytest.approx(found.seconds, rel=1e-9)
    assert found.flops == pytest.approx(flops["total"] - flops.get("mask_updates", 0.0))
    assert (found.steps, found.tokens) == (40, run.budget.tokens)  # type: ignore[attr-defined]


def test_the_weights_are_updated_once_for_all_micro_batches() -> None:
    slow = constant_machine.machine(bandwidth="1 MB/s")
    one = predicted(RunWork(MODEL, [Stretch(1, 64, 2, 2, {})]), slow)
    assert one.seconds == pytest.approx(simulate(MODEL, slow, 64, 2).seconds)
    four = predicted(RunWork(MODEL, [Stretch(1, 64, 8, 2, {})]), slow)
    update = 28.0 * parameter_count(MODEL).total / 1e6  # AdamW reads and writes seven values of a parameter
    assert four.terms["optimizer"] == pytest.approx(update)
    assert four.seconds == pytest.approx(4 * one.seconds - 3 * update)
    assert (four.steps, four.tokens, four.flops) == (1, 8 * 64, 4 * one.flops)


@pytest.mark.parametrize("tied", [True, False])
def test_frozen_parameters_count_as_those_of_a_live_model(tied: bool) -> None:
    config = replace(MODEL, tie_embeddings=tied)
    machine = constant_machine.machine(bandwidth="1 GB/s")

    def of(trained: tuple[str, ...], prompt: int) -> Any:
        found = predicted(RunWork(config, [Stretch(1, 64, 4, 4, {})], trained=trained, prompt_tokens=prompt), machine)
        return found.seconds, found.flops, found.peak_memory, found.bytes

    for trained in (("blocks.1.",), ("embed.", "head.")):
        model = Transformer(config)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name.startswith(trained))
        live, shape = shape_of_model(model), shape_of_config(config, 1.0, trained=trained)
        assert live is not None
        assert (live.layers, live.frozen, live.trains) == (shape.layers, shape.frozen, shape.trains)
        expected = simulate(model, machine, 64, 4)
        assert of(trained, 0) == pytest.approx((expected.seconds, expected.flops, expected.peak_memory, expected.bytes))
    prompted = Prompted(Transformer(config).requires_grad_(False), SoftPrompt(5, 32))
    expected = simulate(prompted, machine, 59, 4)
    assert of((), 5) == pytest.approx((expected.seconds, expected.flops, expected.peak_memory, expected.bytes))
    assert of((), 5)[0] < 0.8 * predicted(RunWork(config, [Stretch(1, 64, 4, 4, {})]), machine).seconds


def test_what_is_left_of_a_run() -> None:
    run = work_of(ledger({"rule": "rigl", "every": 4}, BudgetConfig(steps=40, batch_size=4)))
    machine = constant_machine.machine()
    whole, left = predicted(run, machine), predicted(run.after(30), machine)
    assert (run.steps, run.after(30).steps, run.after(40).steps) == (40, 10, 0)
    assert left.steps == 10
    # Updates come early, so the rest takes less than its share.
    assert 0.2 * whole.seconds < left.seconds <= 0.25 * whole.seconds
    with pytest.raises(UserError, match="without steps"):
        predicted(run.after(40), machine)


def test_zeros_count_on_a_machine_that_cannot_skip_them() -> None:
    sparse, dense = (RunWork(MODEL, [Stretch(3, 64, 4, 4, densities)]) for densities in ({"blocks.0.mlp.up": 0.1}, {}))
    whole = constant_machine.machine(skips="none")
    assert predicted(sparse, whole).seconds == pytest.approx(predicted(dense, whole).seconds, rel=1e-6)
    assert any("cannot skip" in note for note in predicted(sparse, whole).notes)
    assert predicted(sparse, constant_machine.machine()).seconds < 0.97 * predicted(dense, whole).seconds


def test_frozen_weights_need_no_memory_for_gradients() -> None:
    document = constant_machine.content()
    work = RunWork(MODEL, [Stretch(1, 64, 4, 4, {})], trained=(), prompt_tokens=5)
    machine = constant_machine.machine()
    needed = predicted(work, machine).peak_memory
    full = predicted(replace(work, trained=None), machine).peak_memory
    assert needed < full
    document["memory"][0]["size"]["value"] = f"{(needed + full) // 2} B"
    small = constant_machine.Machine.from_document(document, "this", "small.yaml")
    assert predicted(work, small).peak_memory == needed
    for trained in (replace(work, trained=None), RunWork(MODEL, work.stretches)):
        with pytest.raises(UserError, match=r"needs .* GiB"):
            predicted(trained, small)
