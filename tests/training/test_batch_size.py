"""Runs whose batch size changes: against a run in phases, resumed, and led by a noise scale that a test gives."""

from __future__ import annotations

import io
import json
import signal
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console
from runs import assert_same_run, records, stop_after, tensors

from sparsetrain.data import PackedSamples
from sparsetrain.errors import UserError
from sparsetrain.runs.checkpoint import load_checkpoint
from sparsetrain.runs.optimizer_state import JSON
from sparsetrain.runs.result import RunResult
from sparsetrain.stages import PretrainConfig, pretrain
from sparsetrain.training.observers import Observer, StepDone, noise_scale_of
from sparsetrain.training.state import Interrupted

Configure = Callable[..., Any]

SMALL: dict[str, Any] = {"model": {"d_model": 16, "n_layers": 1, "n_heads": 2, "max_context": 32}, "data.context": 16}
SMALL |= {"sparsity.sparsity": 0.5}
RAMP = {"start": 2, "end": 8, "points": 3, "multiple": 2}
LED = {"led_by": "gns", "start": 2, "end": 16, "points": 5, "ratio": 0.5}


def changes(size: Any, **more: Any) -> dict[str, Any]:
    length = {"steps": None, "tokens": 1600, "batch_size": size}
    return {**SMALL, "budget": length, "loop.checkpoint_every": 3, **more}


class Measured(Observer):
    """A noise scale of twice the number of steps, which it must remember; it is unknown at first."""

    name = "noise_scale"

    def __init__(self) -> None:
        self.scale = SimpleNamespace(value=float("nan"))
        self.steps = 0

    def step(self, done: StepDone) -> None:
        self.steps += 1
        if self.steps >= 12:
            self.scale.value = 2.0 * self.steps

    def state(self) -> dict[str, JSON]:
        return {"steps": self.steps, "value": None if self.steps < 12 else self.scale.value}

    def restore(self, state: Mapping[str, JSON]) -> None:
        self.steps = int(state["steps"])  # type: ignore[arg-type]
        if state["value"] is not None:
            self.scale.value = float(state["value"])  # type: ignore[arg-type]


def run(config: Any, *observers: Observer) -> RunResult:
    return pretrain(config, Console(file=io.StringIO()), observers)


def test_a_ramp_reads_what_phases_of_the_same_sizes_read(
    configure: Configure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[int, int]] = []
    true_batch = PackedSamples.batch

    def batch(self: PackedSamples, first: int, count: int) -> Any:
        seen.append((first, count))
        return true_batch(self, first, count)

    monkeypatch.setattr(PackedSamples, "batch", batch)
    constant = {"schedule.name": "constant", "schedule.warmup": 0.0}
    result = run(configure(PretrainConfig, changes(RAMP, **constant), run_dir=tmp_path / "ramp"))
    read, seen = seen, []
    phases = [{"tokens": phase["tokens"], "batch_size": phase["batch_size"]} for phase in result["phases"]]
    in_phases = {"budget": {"steps": None, "batch_size": 2, "phases": phases}}
    run(configure(PretrainConfig, {**changes(2, **constant), **in_phases}, run_dir=tmp_path / "phases"))
    assert read == seen
    assert [count for _, count in read] == sorted(count for _, count in read)
    assert [first for first, _ in read] == [sum(count for _, count in read[:index]) for index in range(len(read))]
    one, other = tensors(tmp_path / "ramp"), tensors(tmp_path / "phases")
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert [phase["batch_size"] for phase in result["phases"]] == [2, 6, 8]
    assert result["tokens"] == sum(phase["tokens"] for phase in result["phases"]) >= 1600
    assert sum(phase["flops"] for phase in result["phases"]) == pytest.approx(result["flops"]["total"])
    sizes = [record["batch_size"] for record in records(tmp_path / "ramp") if "loss" in record]
    assert sizes == [count for _, count in read]


def test_a_fixed_micro_batch_gives_the_same_gradients(configure: Configure, tmp_path: Path) -> None:
    whole = changes(RAMP)
    run(configure(PretrainConfig, whole, run_dir=tmp_path / "whole"))
    run(configure(PretrainConfig, {**whole, "loop.micro_batch": 2}, run_dir=tmp_path / "cut"))
    one, other = tensors(tmp_path / "whole"), tensors(tmp_path / "cut")
    assert all(torch.allclose(one[name], other[name], atol=2e-4) for name in one)
    with pytest.raises(
        UserError, match=r"budget.batch_size=5 is not divisible by loop.micro_batch=2; budget.batch_size"
    ):
        configure(PretrainConfig, {**changes({"start": 2, "end": 8, "points": 3}), "loop.micro_batch": 2})
    with pytest.raises(UserError, match=r"loop.micro_batch=2 and loop.accumulation=2: one follows from the other"):
        configure(PretrainConfig, {**whole, "loop.micro_batch": 2, "loop.accumulation": 2})


@pytest.mark.parametrize("size", [RAMP, LED], ids=["ramp", "led"])
def test_a_resumed_run_equals_an_uninterrupted_one(
    configure: Configure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: dict[str, Any]
) -> None:
    given = changes(size)
    given["model"] = {**SMALL["model"], "dropout": 0.1}
    given["budget"] |= {"lr_rule": "sqrt", "wd_rule": "tau"}
    straight = run(configure(PretrainConfig, given, run_dir=tmp_path / "straight"), Measured())
    for step in (13, 21):  # for LED before the first change and after it
        config = configure(PretrainConfig, given, run_dir=tmp_path / f"cut{step}")
        with monkeypatch.context() as patch:
            stop_after(patch, step)
            with pytest.raises(Interrupted) as caught:
                run(config, Measured())
            assert caught.value.exit_code == 128 + signal.SIGTERM
        again = run(config, Measured())
        assert_same_run(tmp_path / "straight", tmp_path / f"cut{step}")
        for key in ("steps", "samples", "tokens", "flops", "phases", *(["decisions"] if size is LED else [])):
            assert again[key] == straight[key]  # type: ignore[literal-required]


def test_the_noise_scale_leads_and_what_it_led_to_is_written_down(configure: Configure, tmp_path: Path) -> None:
    result = run(configure(PretrainConfig, changes(LED), run_dir=tmp_path / "led"), Measured())
    # Fifty steps of 2 sequences; looked at every 320 tokens, where it is unknown, 20, 2 * 25 and so on, halved.
    decisions = result["decisions"]
    assert decisions[0] == {"step": 10, "tokens": 320, "noise_scale": None, "batch_size": 2}
    assert decisions[1] == {"step": 20, "tokens": 640, "noise_scale": 40.0, "batch_size": 4}
    assert decisions[2] == {"step": 25, "tokens": 960, "noise_scale": 50.0, "batch_size": 8}
    assert decisions[3] == {"step": 28, "tokens": 1344, "noise_scale": 56.0, "batch_size": 16}
    assert [(phase["steps"], phase["batch_size"]) for phase in result["phases"]] == [(20, 2), (5, 4), (3, 8), (1, 16)]
    assert (result["steps"], result["tokens"]) == (29, 1600)
    written = [record for record in records(tmp_path / "led") if "next_batch_size" in record]
    assert [(record["step"], record["next_batch_size"]) for record in written] == [(10, 2), (20, 4), (25, 8), (28, 16)]
    assert load_checkpoint(tmp_path / "led" / "checkpoints").state["decisions"] == decisions
    # Its last step begins at 1,344 of the 1,600 tokens, of which 160 are a warmup.
    rates = [record["lr"] for record in records(tmp_path / "led") if "loss" in record]
    assert rates[-1] == pytest.approx(4e-3 * (1600 - 1344) / (1600 - 160))


def test_a_led_run_brings_the_observer_and_refuses_masks_that_move(configure: Configure, tmp_path: Path) -> None:
    directory = tmp_path / "led"
    run(configure(PretrainConfig, changes("gns"), run_dir=directory))
    result = json.loads((directory / "result.json").read_text())
    values = {record["step"]: record["noise_scale"] for record in records(directory) if "noise_scale_low" in record}
    assert result["decisions"]
    assert all(made["noise_scale"] == values[made["step"]] for made in result["decisions"])
    with pytest.raises(UserError, match="needs an observer that measures the noise scale"):
        noise_scale_of([])
    with pytest.raises(UserError, match=r"sparsity.evolution.rule=rigl acts at fractions of the steps, whose number"):
        configure(PretrainConfig, {**changes("gns"), "sparsity.evolution": {"rule": "rigl"}})
