"""Densities of phases: masks, weights and moments at a border, and runs that start from such a run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from runs import records, stop_after, tensors
from shell import Shell
from torch import Tensor

from sparsetrain import VariableSparsity
from sparsetrain.data import PackedSamples, prepare
from sparsetrain.models import Transformer
from sparsetrain.optim import Schedule
from sparsetrain.parameterization import param_groups
from sparsetrain.runs.checkpoint import load_checkpoint
from sparsetrain.sparsity import MaskManager, SparsityConfig, densify
from sparsetrain.stages import FinetuneConfig, PipelineConfig, RunResult, finetune, pretrain
from sparsetrain.stages.config import model_config
from sparsetrain.stages.generate import load_run, run_config
from sparsetrain.stages.plan import plan_of
from sparsetrain.training.state import Interrupted

Configure = Callable[..., Any]


Phases = list[dict[str, Any]]


Train = Callable[..., RunResult]


# Outputs of these tiny layers may lose all weights.
pytestmark = pytest.mark.filterwarnings("ignore:.* have no weight")


LAYERS = {"attn.qkv": (48, 16), "attn.out": (16, 16), "mlp.up": (64, 16), "mlp.down": (16, 64)}


NUMEL = sum(rows * columns for rows, columns in LAYERS.values())


def scattered(found: dict[str, Tensor], layer: str, values: Tensor) -> Tensor:
    """Return the values of a layer as a dense matrix, with NaN where nothing is stored."""
    rows, columns = LAYERS[layer]
    prefix = f"blocks.0.{layer}"
    counts = found[f"{prefix}.row_ptr"].diff()
    matrix = torch.full((rows, columns), torch.nan)
    matrix[torch.arange(rows).repeat_interleave(counts), found[f"{prefix}.col"].long()] = values
    return matrix


def at_a_border(train: Train, monkeypatch: pytest.MonkeyPatch, phases: Phases, changes: dict[str, Any]) -> None:
    """Stop two runs after step 4: ``border-4`` has just changed its masks there, ``border-5`` not yet."""
    for border in (4, 5):
        lengths = (border * 64, (8 - border) * 64)
        with monkeypatch.context() as patch:
            stop_after(patch, 4)
            timed = [{"tokens": tokens, **phase} for tokens, phase in zip(lengths, phases, strict=True)]
            with pytest.raises(Interrupted):
                train(f"border-{border}", timed, changes)


@pytest.mark.parametrize(
    ("densities", "evolution"),
    [
        ((0.7, 0.3), "random"),
        ((1.0, 0.3), "random"),
        ((0.3, 0.7), "random"),
        ((0.3, 0.7), "gradient"),
        ((0.3, 1.0), "random"),
    ],
)
def test_a_border_drops_the_smallest_and_grows_zeros(
    densities: tuple[float, float],
    evolution: str,
    train: Train,
    tiny: Configure,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    changes = {"sparsity.evolution": {"grow": evolution}}
    at_a_border(train, monkeypatch, [{"density": density} for density in densities], changes)
    after, before = (tensors(tmp_path / f"border-{border}") for border in (4, 5))
    for layer, (rows, columns) in LAYERS.items():
        name = f"blocks.0.{layer}.values"
        old, new = scattered(before, layer, before[name]), scattered(after, layer, after[name])
        sizes = [round(density * rows * columns) for density in densities]
        assert [int((~matrix.isnan()).sum()) for matrix in (old, new)] == sizes
        kept = ~old.isnan()
        if sizes[1] < sizes[0]:
            # Among equal magnitudes, the first in row-major order are dropped.
            order = old.flatten().abs()[kept.flatten()].argsort(stable=True)
            places = kept.flatten().nonzero().squeeze(1)
            kept.view(-1)[places[order[: sizes[0] - sizes[1]]]] = False
            assert kept.equal(~new.isnan())
        assert new[kept].equal(old[kept])
        grown = ~new.isnan() & ~kept
        assert not new[grown].any()
        for moment in ("exp_avg", "exp_avg_sq"):
            key = f"optimizer {name}.{moment}"
            was, now = scattered(before, layer, before[key]), scattered(after, layer, after[key])
            assert now[kept].equal(was[kept])
            assert now[kept].any()
            assert not now[grown].any()
    assert all(before[key].equal(after[key]) for key in before if not any(layer in key for layer in LAYERS))
    if evolution == "gradient":
        assert_grown_by_gradient(train, tiny, tmp_path, monkeypatch, changes)


def assert_grown_by_gradient(
    train: Train, tiny: Configure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]
) -> None:
    """Compare the grown connections with gradients of a dense model of the same weights, in plain torch."""
    phases = [{"tokens": 320, "density": 0.3}, {"tokens": 192, "density": 0.7}]
    with monkeypatch.context() as patch:
        stop_after(patch, 3)
        with pytest.raises(Interrupted):
            train("three", phases, changes)
    model = densify(load_run(tmp_path / "three", torch.device("cpu"))[0]).train()
    batch = PackedSamples(prepare(tiny(phases).data).train, 16, 0, "pretrain").batch(12, 4)
    model(batch.tokens, batch.targets).backward()
    before, after = tensors(tmp_path / "three"), tensors(tmp_path / "border-4")
    for layer in LAYERS:
        name = f"blocks.0.{layer}.values"
        empty = scattered(before, layer, before[name]).isnan()
        grown = empty & ~scattered(after, layer, after[name]).isnan()
        gradient = model.get_submodule(f"blocks.0.{layer}").weight.grad.abs()
        assert gradient[grown].min() >= gradient[empty & ~grown].max() * 0.9999
        assert grown.any()


@pytest.mark.parametrize(
    "changes", [{}, {"sparsity.allocation": "erk"}, {"sparsity.groups": [{"match": "*mlp*", "sparsity": 0.4}]}]
)
def test_layers_keep_their_ratio_over_all_phases(changes: dict[str, Any], train: Train) -> None:
    densities = (0.25, 0.5, 1.0, 0.4)
    run = train(
        "run", [{"share": 0.25, "density": density} for density in densities], {**changes, "loop.eval_every": 1}
    )
    found = [record["layers"] for record in records(run.directory) if "layers" in record][:-1:3]
    assert len(found) == 4
    own = {f"blocks.0.{layer}": 1.0 - found[0][f"blocks.0.{layer}"]["density"] for layer in LAYERS}
    if not changes:
        assert set(own.values()) == {0.75}
    for layers, density in zip(found, densities, strict=True):
        for layer, (rows, columns) in LAYERS.items():
            sparsity = own[f"blocks.0.{layer}"] * (1.0 - density) / 0.75
            assert abs(layers[f"blocks.0.{layer}"]["nnz"] - (1.0 - sparsity) * rows * columns) <= (
                1 if changes else 0.5
            )
        if "sparsity.groups" not in changes:
            assert sum(layer["nnz"] for layer in layers.values()) == pytest.approx(density * NUMEL, abs=2)


def test_vspdf_on_the_command_line_is_variable_sparsity_by_hand(shell: Shell) -> None:
    words = ["sparsity=vspdf", "budget.steps=10", "loop.log_every=1", "schedule.warmup=0.2", "loop.checkpoint_every=0"]
    run = shell.trained(*words, "device=cpu")
    rule = "sparsity.evolution.phases=[{at: 0.5, sparsity: 0.5}, {at: 0.9, sparsity: 0.0}]"
    old = ["sparsity.sparsity=0.9", "sparsity.evolution.rule=vspdf", rule, *words[1:], "device=cpu"]
    assert_same_tensors(tensors(run), tensors(shell.trained(*old, run_dir="old")))

    config = run_config(run)
    torch.manual_seed(0)
    corpus = prepare(config.data)
    plan = SparsityConfig(sparsity=0.9, seed=config.seed)
    model = Transformer(model_config(config.model, 257, config.seed), config.parameterization, plan)
    manager = MaskManager(model, VariableSparsity(sparsity=0.9, phases=((5, 0.5), (9, 0.0))), plan=plan)
    settings = config.optimizer
    groups = param_groups(model, config.parameterization, settings.lr, settings.weight_decay, settings.eps)
    optimizer = torch.optim.AdamW(groups, betas=(settings.beta1, settings.beta2), fused=True)
    peaks = [group["lr"] for group in optimizer.param_groups]
    schedule = Schedule(config.schedule, 10)
    samples = PackedSamples(corpus.train, 48, 0, "pretrain")
    for step in range(10):
        for group, peak in zip(optimizer.param_groups, peaks, strict=True):
            group["lr"] = peak * schedule.factor(step)
        batch = samples.batch(4 * step, 4)
        loss = model(batch.tokens, batch.targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), settings.clip)
        optimizer.step()
        manager.step(optimizer)
        optimizer.zero_grad()
        assert loss.item() == [record["loss"] for record in records(run) if "loss" in record][step]
    assert_same_tensors(load_checkpoint(run / "checkpoints").model, model.state_dict())


def assert_same_tensors(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


@pytest.mark.parametrize("densities", [(None, 0.5), (0.5, 1.0), (1.0, 1.0)])
def test_stages_start_from_the_densities_of_the_last_phase(
    densities: tuple[float | None, float], train: Train, tiny: Configure, tmp_path: Path, screen: Console
) -> None:
    changes = {"sparsity": {"sparsity": 0.0 if densities[0] is None else 0.75}, "budget": {"steps": 4, "batch_size": 4}}
    run = train("run", [{"share": 0.5, "density": density} for density in densities], changes)
    assert run["density"] == densities[1]
    before = load_checkpoint(run.directory / "checkpoints").model
    model, _ = load_run(run.directory, torch.device("cpu"))
    assert_same_tensors(before, model.state_dict())
    few = {**changes, "budget": {"steps": 2, "batch_size": 4}}
    again = pretrain(tiny(None, few, init_from=run.directory, run_dir=tmp_path / "again"), screen)
    assert again["density"] == densities[1]
    wide = {**few, "data.context": 64, "model.max_context": 64}
    tuned = finetune(
        tiny(None, wide, FinetuneConfig, mode="sparse", init_from=run.directory, run_dir=tmp_path / "tuned"), screen
    )
    after = load_checkpoint(tuned.directory / "checkpoints").model
    assert {name: value.shape for name, value in after.items()} == {name: value.shape for name, value in before.items()}


def test_the_dense_arm_of_a_pipeline_is_dense_in_every_phase(tiny: Configure) -> None:
    phases: Phases = [{"share": 0.5, "context": 32}, {"share": 0.5, "density": 0.5}]
    config = tiny(phases, kind=PipelineConfig, run_dir="pipeline")
    prepare(config.data)
    runs = {run.name: run for run in plan_of(config).runs}
    assert [phase.densities for phase in runs["dense/pretrain"].phases] == [(1.0, 1.0)] * 2
    assert [phase.densities for phase in runs["sparse-0.75/pretrain"].phases] == [(0.25, 0.25), (0.5, 0.5)]
    assert [phase.context for phase in runs["dense/pretrain"].phases] == [32, 16]
    assert config.stage_config(config.of_arm(config.arms[1])[1], config.arms[1]).budget.phases is None
