"""Masks that evolve in a run: resumed bit for bit, recorded in the metrics, FLOPs counted step by step."""

from __future__ import annotations

import json
import re
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from runs import assert_same_run, on_loss, records, send, stop_after

from sparsetrain.cost.flops import matrices, training_flops_per_token
from sparsetrain.cost.run_flops import RunFlops, planned_flops
from sparsetrain.errors import UserError
from sparsetrain.models import Transformer
from sparsetrain.models.config import ModelConfig
from sparsetrain.optim import Budget, BudgetConfig
from sparsetrain.parameterization import Parameterization, param_groups
from sparsetrain.runs.checkpoint import load_checkpoint
from sparsetrain.runs.result import load_result
from sparsetrain.sparsity import EvolutionConfig, MaskManager, Phase, RigL, SparsityConfig, make_rule
from sparsetrain.sparsity.evolution.managed import allocated_densities
from sparsetrain.stages import FinetuneConfig, PipelineConfig, PretrainConfig, finetune, pipeline, pretrain
from sparsetrain.training.state import Interrupted

Configure = Callable[..., Any]
Trained = Callable[..., Path]

# Outputs of these tiny layers may lose all weights at 90 %.
pytestmark = pytest.mark.filterwarnings("ignore:.* have no weight")

RULES: dict[str, dict[str, Any]] = {
    "set": {"rule": "set", "every": 2},
    "rigl": {"rule": "rigl", "every": 2, "stop": 1.0, "drop_schedule": "linear"},
    "staggered": {"rule": "rigl", "every": 8, "accumulation": "staggered", "drop_schedule": "constant", "stop": 1.0},
    "gmp": {"rule": "gmp", "every": 2, "start": 0.1},
    "vspdf": {"rule": "vspdf", "phases": [{"at": 0.4, "sparsity": 0.5}, {"at": 0.8, "sparsity": 0.0}]},
}


def sparsity(name: str) -> dict[str, Any]:
    return {"sparsity": {"sparsity": 0.75, "evolution": RULES[name]}}


def assert_same_masks_and_run(one: Path, other: Path) -> None:
    assert_same_run(one, other)
    first, second = (load_checkpoint(path / "checkpoints") for path in (one, other))
    assert first.state["masks"] == second.state["masks"]


@pytest.mark.parametrize("name", list(RULES))
@pytest.mark.parametrize("step", [3, 6])
def test_resume_is_bitwise(
    configure: Configure,
    trained: Trained,
    tmp_path: Path,
    screen: Console,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    step: int,
) -> None:
    # Step 3 precedes an update, whose probes must be set again; step 6 is an update.
    with monkeypatch.context() as patch:
        on_loss(patch, step, send(signal.SIGTERM))
        with pytest.raises(Interrupted, match=f"stopped after step {step} of 12"):
            pretrain(configure(PretrainConfig, sparsity(name), run_dir=tmp_path / "cut"), screen)
    assert pretrain(configure(PretrainConfig, sparsity(name), run_dir=tmp_path / "cut"), screen).complete
    assert_same_masks_and_run(trained(sparsity(name)), tmp_path / "cut")


@pytest.mark.parametrize("accumulation", [1, 2])
def test_masks_follow_the_plan_in_metrics_result_and_checkpoint(trained: Trained, accumulation: int) -> None:
    directory = trained(sparsity("gmp") | ({"loop.accumulation": 2} if accumulation == 2 else {}))
    run = load_result(directory / "result.json")
    seen = [record for record in records(directory) if "loss" in record]
    # Dense at step 1 (of 12), then a cubic curve to the target at step 9.
    expected = [
        1 - 0.75 * (1 - (1 - ((min(step, 9) - 1) // 2 * 2 / 8 if step < 9 else 1.0)) ** 3) for step in range(1, 13)
    ]
    assert [record["density"] for record in seen] == pytest.approx(expected, abs=1e-3)
    assert all(record["density"] == record["target_density"] for record in seen)
    assert seen[-1]["density"] == run["density"] == 0.25
    assert {record["itop_rate"] for record in seen} == {1.0}
    assert seen[-1]["mask_overlap"] == pytest.approx(0.25)
    assert all(record["gradient_flow"] > 0 for record in seen)
    stored = load_checkpoint(directory / "checkpoints").model
    for name, layer in run["masks"]["layers"].items():
        assert stored[f"{name}.values"].numel() == layer["nnz"]
    assert run["masks"]["rule"] == "GMP"
    evaluated = [record for record in records(directory) if "val_loss" in record]
    assert [record["layers"]["blocks.0.attn.qkv"]["density"] for record in evaluated][::2] == [1.0, 0.25]


def test_the_progress_line_says_what_masks_do(configure: Configure, tmp_path: Path, screen: Console) -> None:
    pretrain(configure(PretrainConfig, sparsity("rigl"), run_dir=tmp_path / "run"), screen)
    text = screen.file.getvalue()  # type: ignore[attr-defined]
    assert re.search(r"12/12 .* density 0\.25 \(target 0\.25\)  R_s 0\.[34]\d  overlap 0\.\d\d  ETA", text)
    pretrain(configure(PretrainConfig, run_dir=tmp_path / "static"), Console(file=screen.file))
    assert screen.file.getvalue().count("target") == text.count("target")  # type: ignore[attr-defined]


def test_masks_of_a_static_run_stay(trained: Trained) -> None:
    masks = load_result(trained() / "result.json")["masks"]
    assert masks["itop_rate"] == masks["density"] == 0.25
    stored = load_checkpoint(trained() / "checkpoints")
    assert not any(name.startswith("mask_history") for name in stored.optimizer.tensors)
    assert not any("layers" in record for record in records(trained()))


def test_a_checkpoint_of_other_masks_is_refused(
    configure: Configure, tmp_path: Path, screen: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        on_loss(patch, 4, send(signal.SIGTERM))
        with pytest.raises(Interrupted):
            pretrain(configure(PretrainConfig, sparsity("set"), run_dir=tmp_path / "cut"), screen)
    other = sparsity("rigl")
    (tmp_path / "cut" / "config.yaml").unlink()
    with pytest.raises(UserError, match="masks were saved under SET and cannot go on under RigL"):
        pretrain(configure(PretrainConfig, other, run_dir=tmp_path / "cut"), screen)


# Later stages of a run whose masks evolved.


@pytest.mark.parametrize("name", ["rigl", "gmp", "vspdf"])
def test_fine_tuning_starts_from_the_last_masks(
    configure: Configure, trained: Trained, tmp_path: Path, screen: Console, name: str
) -> None:
    before = load_checkpoint(trained(sparsity(name)) / "checkpoints").model
    for mode in ("sparse", "dense"):
        changes = sparsity(name) | {"budget.steps": 2}
        start = trained(sparsity(name))
        config = configure(FinetuneConfig, changes, mode=mode, init_from=start, run_dir=tmp_path / mode)
        tuned = finetune(config, screen)
        after = load_checkpoint(tuned.directory / "checkpoints").model
        if mode == "sparse":
            assert torch.equal(after["blocks.0.mlp.up.col"], before["blocks.0.mlp.up.col"])
        else:
            assert after["blocks.0.mlp.up.weight"].shape == (128, 32)


@pytest.mark.parametrize(("name", "goes_on"), [("rigl", "RigL"), ("gmp", "Static"), ("vspdf", "Static")])
def test_a_second_pretraining_keeps_the_density_it_finds(
    configure: Configure, trained: Trained, tmp_path: Path, screen: Console, name: str, goes_on: str
) -> None:
    before = trained(sparsity(name))
    config = configure(PretrainConfig, sparsity(name), init_from=before, run_dir=tmp_path / "next")
    following = pretrain(config, screen)
    assert following["density"] == load_result(before / "result.json")["density"]
    assert following["masks"]["rule"] == goes_on


def test_the_variable_recipe_runs_as_one_pipeline(configure: Configure, tmp_path: Path, screen: Console) -> None:
    stages = [{"name": "pretrain"}, {"name": "finetune", "from": "pretrain", "budget": {"steps": 2, "batch_size": 4}}]
    changes = {"sparsity": sparsity("vspdf")["sparsity"], "pipeline.stages": stages}
    config = configure(PipelineConfig, changes, run_dir=tmp_path / "pipe")
    pipeline(config, screen)
    report = json.loads((tmp_path / "pipe" / "report.json").read_text())
    arm = report["arms"][1]
    assert arm["masks"]["rule"] == "VariableSparsity"
    assert (arm["sparsity"], arm["density"], arm["masks"]["density"]) == (0.75, 1.0, 1.0)
    dense = report["arms"][0]["train_flops"]
    assert 0.25 * dense < arm["train_flops"] < dense
    assert "masks" not in report["arms"][0]
    assert "VariableSparsity" in (tmp_path / "pipe" / "report.html").read_text()
    assert "VariableSparsity" in screen.file.getvalue()  # type: ignore[attr-defined]


def test_groups_keep_the_density_of_the_start_and_refuse_another() -> None:
    rules = Parameterization.supar(base_width=16)
    config = ModelConfig(d_model=32, n_layers=1, n_heads=2, vocab_size=30, seed=0)
    evolution = EvolutionConfig(rule="gmp", every=1, stop=1.0)
    plan = SparsityConfig(sparsity=0.75, seed=0, evolution=evolution)
    model = Transformer(config, rules, plan)
    manager = MaskManager(model, make_rule(plan, 2), plan=plan)

    def hidden_rate() -> float:
        return next(g["lr"] for g in param_groups(model, rules, lr=1.0) if g["name"] == "hidden")

    assert hidden_rate() == 0.5  # that of a dense matrix of twice the base width
    optimizer = torch.optim.AdamW(param_groups(model, rules, lr=1.0))
    for _ in range(2):
        optimizer.step()
        manager.step(optimizer)
    assert [group["lr"] for group in optimizer.param_groups if group["name"] == "hidden"] == [0.5]
    with pytest.raises(UserError, match=r"has density 0\.25 but was initialised for 1: call parameterize again"):
        hidden_rate()
    model.parameterize(rules, reinitialise=False)
    assert hidden_rate() == 2.0


# FLOPs.

MODEL = ModelConfig(d_model=32, n_layers=2, n_heads=2, vocab_size=300)
SHAPES = {matrix.name: (matrix.out_features, matrix.in_features) for matrix in matrices(MODEL)}


def ledger(plan: SparsityConfig, steps: int, accumulation: int = 1) -> RunFlops:
    """The ledger of a run with 256 tokens per step."""
    rule, budget = make_rule(plan, steps), Budget.of(BudgetConfig(steps=steps, batch_size=4), 64)
    return RunFlops(MODEL, allocated_densities(SHAPES, plan, rule), rule, budget, lambda size: size // accumulation)


def plan_of(name: str) -> SparsityConfig:
    settings = dict(RULES[name])
    if "phases" in settings:
        settings["phases"] = [Phase(**phase) for phase in settings["phases"]]
    return SparsityConfig(sparsity=0.75, evolution=EvolutionConfig(**settings))


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("name", list(RULES))
def test_flops_are_the_sum_over_steps(name: str, accumulation: int) -> None:
    plan, steps = plan_of(name), 40
    rule = make_rule(plan, steps)
    densities_at = allocated_densities(SHAPES, plan, rule)
    expected = sum(256 * training_flops_per_token(MODEL, densities_at(step), 64).total for step in range(steps))
    if isinstance(rule, RigL):
        dense = sum(rows * columns for rows, columns in SHAPES.values())
        # An update ranks the dense gradient of the last micro-batch.
        expected += sum(rule.due(step) for step in range(1, steps + 1)) * 256 / accumulation * 2 * dense
    found = ledger(plan, steps, accumulation).through(steps)
    assert found["total"] == pytest.approx(expected)
    assert found["total"] == pytest.approx(sum(value for key, value in found.items() if key != "total"))


def test_a_static_mask_costs_what_it_did() -> None:
    plan = SparsityConfig(sparsity=0.75)
    terms = training_flops_per_token(MODEL, 0.25, 64).for_tokens(10 * 256)
    assert ledger(plan, 10).through(10) == terms.as_dict()


@pytest.mark.parametrize("name", ["static", *RULES])
def test_a_budget_of_flops_is_met_from_below(name: str) -> None:
    plan = SparsityConfig(sparsity=0.75) if name == "static" else plan_of(name)
    flops = planned_flops(MODEL, lambda _budget: plan, lambda size: size)
    steps = Budget.of(BudgetConfig(flops=3e9, batch_size=4), 64, flops=flops).total_steps
    assert ledger(plan, steps).through(steps)["total"] <= 3e9 < ledger(plan, steps + 1).through(steps + 1)["total"]
    with pytest.raises(UserError, match=r"budget\.flops=10 does not pay for one step"):
        Budget.of(BudgetConfig(flops=10.0, batch_size=4), 64, flops=flops)


def test_runs_of_equal_flops(configure: Configure, tmp_path: Path, screen: Console) -> None:
    spent = {}
    for name in ("rigl", "gmp"):
        changes = sparsity(name) | {"budget.steps": None, "budget.flops": 5e8}
        run = pretrain(configure(PretrainConfig, changes, run_dir=tmp_path / name), screen)
        spent[name] = run["flops"]["total"]
        assert run["steps"] > 3
    assert all(0.85 * 5e8 < total <= 5e8 for total in spent.values())


def test_a_rule_that_never_acts_is_refused_and_leaves_no_trace(
    configure: Configure, tmp_path: Path, screen: Console
) -> None:
    changes = {"sparsity": {"sparsity": 0.75, "evolution": {"rule": "set", "every": 100}}}
    with pytest.raises(UserError, match=r"sparsity\.evolution: SET: every=100 .* no update within stop=9"):
        pretrain(configure(PretrainConfig, changes, run_dir=tmp_path / "run"), screen)
    assert not (tmp_path / "run").exists()


FOLLOWED = {"model.n_layers": 1, "parameterization": {"scheme": "supar", "base_width": 16, "follow": "density"}}


@pytest.mark.parametrize("name", ["gmp", "vspdf", "set", "phases"])
def test_multipliers_follow_the_density_and_resume_to_the_same_bits(
    name: str, configure: Configure, tmp_path: Path, screen: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    phases = [{"share": 0.4, "density": 0.75}, {"share": 0.6, "density": 0.25}]
    changes = {**FOLLOWED, **({"budget.phases": phases} if name == "phases" else sparsity(name))}
    config = configure(PretrainConfig, changes, run_dir=tmp_path / "straight")
    pretrain(config, screen)
    cut = configure(PretrainConfig, changes, run_dir=tmp_path / "cut")
    with monkeypatch.context() as patch:
        stop_after(patch, 7)
        with pytest.raises(Interrupted):
            pretrain(cut, screen)
    pretrain(cut, screen)
    assert_same_run(tmp_path / "straight", tmp_path / "cut")
    # The rates at the end are those of the density at the end: eta / (m_d m_rho), with m_d = 2.
    last = load_checkpoint(tmp_path / "straight" / "checkpoints")
    groups = [group for group in last.optimizer.groups if isinstance(group, dict)]
    followed = [group["options"] for group in groups if "density" in group["options"]]  # type: ignore[operator]
    assert len(followed) == 4
    for options in followed:
        assert options["initial_lr"] == pytest.approx(4e-3 / (2.0 * options["density"]))  # type: ignore[index,call-overload]
        assert options["density"] == pytest.approx(1.0 if name == "vspdf" else 0.25, abs=0.01)  # type: ignore[index,call-overload]
