"""The loop against itself: repeated, interrupted, killed, split, diverging; and against losses on file.

``python tests/training/test_loop.py`` writes the golden losses anew, after a change that is meant to move them.
"""

from __future__ import annotations

import dataclasses
import errno
import io
import json
import math
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor

from sparsetrain import files
from sparsetrain.data import Batch, PackedSamples
from sparsetrain.errors import UserError
from sparsetrain.models import ModelConfig, Transformer
from sparsetrain.stages import PretrainConfig, pretrain
from sparsetrain.stages.config import as_plain, build
from sparsetrain.training import checkpoint
from sparsetrain.training.checkpoint import list_checkpoints, load_checkpoint
from sparsetrain.training.loop import load_weights
from sparsetrain.training.metrics import TIMED, read_metrics
from sparsetrain.training.state import Diverged, Interrupted

GOLDEN = Path(__file__).with_name("golden_losses.json")

Configure = Callable[..., Any]


def records(directory: Path) -> list[dict[str, Any]]:
    """Return the metrics of a run without what the clock says."""
    found = read_metrics(directory / "metrics.jsonl")
    return [{key: value for key, value in record.items() if key not in TIMED} for record in found]


def tensors(directory: Path) -> dict[str, Tensor]:
    """Return all tensors of the newest checkpoint, the optimizer's with a prefix."""
    last = load_checkpoint(directory / "checkpoints")
    return {**last.model, **{f"optimizer {name}": value for name, value in last.optimizer.tensors.items()}}


def assert_same_run(one: Path, other: Path) -> None:
    assert records(one) == records(other)
    first, second = tensors(one), tensors(other)
    assert first.keys() == second.keys()
    assert [name for name in first if not torch.equal(first[name], second[name])] == []


def on_loss(monkeypatch: pytest.MonkeyPatch, call: int, act: Callable[[Tensor], Tensor]) -> None:
    """Replace the result of the ``call``-th training loss from now on by ``act`` of it."""
    true_loss, calls = Transformer.loss, 0

    def loss(self: Transformer, *arguments: Any) -> Tensor:
        nonlocal calls
        calls += 1
        value = true_loss(self, *arguments)
        return act(value) if calls == call else value

    monkeypatch.setattr(Transformer, "loss", loss)


def send(number: int) -> Callable[[Tensor], Tensor]:
    def act(value: Tensor) -> Tensor:
        os.kill(os.getpid(), number)
        return value

    return act


def test_same_seed_gives_the_same_metrics_and_weights(configure: Configure, tmp_path: Path, screen: Console) -> None:
    changes = {"model.dropout": 0.1}
    for name in ("one", "other"):
        pretrain(configure(PretrainConfig, changes, run_dir=tmp_path / name), screen)
    assert_same_run(tmp_path / "one", tmp_path / "other")
    seen = records(tmp_path / "one")
    assert [record["step"] for record in seen if "loss" in record] == list(range(1, 13))
    assert [record["step"] for record in seen if "val_loss" in record] == [0, 6, 12]
    assert seen[-2]["tokens"] == 12 * 4 * 64
    pretrain(configure(PretrainConfig, changes, run_dir=tmp_path / "next", seed=1), screen)
    assert records(tmp_path / "next") != seen


def golden_losses(directory: Path, notes: Path) -> dict[str, float]:
    """Train the run that the losses on file are of; its text is that of the fixture ``notes``."""
    values = {
        "model": {"d_model": 32, "n_layers": 2, "n_heads": 2, "max_context": 64, "dropout": 0.1},
        "data": {"path": str(notes), "context": 64, "vocab_size": 300},
        "sparsity": {"sparsity": 0.75},
        "parameterization": {"scheme": "supar", "base_width": 16},
        "optimizer": {"lr": 4e-3},
        "schedule": {"steps": 30},
        "stage": {"batch_size": 4, "accumulation": 2, "log_every": 1, "eval_every": 10, "precision": "fp32"},
        "run_dir": str(directory),
        "device": "cpu",
    }
    pretrain(build(PretrainConfig, values), Console(quiet=True))
    return {
        f"{record['step']} {key}": record[key]
        for record in records(directory)
        for key in ("loss", "val_loss")
        if key in record
    }


def test_losses_match_those_on_file(tmp_path: Path, notes: Path) -> None:
    expected = json.loads(GOLDEN.read_text())
    found = golden_losses(tmp_path / "run", notes)
    assert found.keys() == expected.keys()
    # Other processors add in another order; a change of method moves losses by far more.
    assert {key: found[key] for key in found if abs(found[key] - expected[key]) > 1e-4} == {}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_resume_is_bitwise(
    configure: Configure, tmp_path: Path, screen: Console, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    changes = {"model.dropout": 0.1}
    pretrain(configure(PretrainConfig, changes, run_dir=tmp_path / "whole"), screen)
    with monkeypatch.context() as patch:
        on_loss(patch, 7, send(number))
        with pytest.raises(Interrupted, match=r"stopped after step 7 of 12, saved in .*; the same command") as caught:
            pretrain(configure(PretrainConfig, changes, run_dir=tmp_path / "cut"), screen)
    assert caught.value.exit_code == 128 + number
    assert list_checkpoints(tmp_path / "cut" / "checkpoints")[-1] == "step-00000007"
    assert not (tmp_path / "cut" / "result.json").exists()
    assert pretrain(configure(PretrainConfig, changes, run_dir=tmp_path / "cut"), screen).complete
    assert "resuming after step 7 of 12" in screen.file.getvalue()  # type: ignore[attr-defined]
    assert_same_run(tmp_path / "whole", tmp_path / "cut")


def test_a_signal_in_the_last_step_stops_too(
    configure: Configure, tmp_path: Path, screen: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        on_loss(patch, 12, send(signal.SIGTERM))
        with pytest.raises(Interrupted, match="after step 12 of 12"):
            pretrain(configure(PretrainConfig, run_dir=tmp_path / "run"), screen)
    assert pretrain(configure(PretrainConfig, run_dir=tmp_path / "run"), screen)["steps"] == 12


@pytest.mark.slow
def test_ten_kills_at_random_moments_give_identical_weights(configure: Configure, tmp_path: Path) -> None:
    changes = {"schedule.steps": 40, "stage.checkpoint_every": 4, "model.dropout": 0.1, "model.n_layers": 1}
    settings = as_plain(configure(PretrainConfig, changes))
    (tmp_path / "settings.json").write_text(json.dumps(settings))
    script = Path(__file__).with_name("killed_runs.py")
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path / "settings.json"), str(tmp_path), "10"],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert int(done.stdout) >= 5  # the others were too fast for their kill


@pytest.mark.parametrize("accumulation", [2, 4])
def test_accumulation_does_not_change_the_step(
    configure: Configure, tmp_path: Path, screen: Console, accumulation: int
) -> None:
    for name, parts in (("whole", 1), ("parts", accumulation)):
        pretrain(configure(PretrainConfig, {"stage.accumulation": parts}, run_dir=tmp_path / name), screen)
    one, other = records(tmp_path / "whole"), records(tmp_path / "parts")
    assert [record["step"] for record in one] == [record["step"] for record in other]
    for first, second in zip(one, other, strict=True):
        assert second == pytest.approx(first, rel=2e-4)


def test_accumulation_weighs_micro_batches_by_their_targets(
    configure: Configure, tmp_path: Path, screen: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    true_batch = PackedSamples.batch

    def uneven(self: PackedSamples, first: int, count: int) -> Batch:
        batch = true_batch(self, first, count)
        for row in range(count):  # the loss of the first rows counts for few targets
            if (first + row) % 4 < 2:
                batch.targets[row, 5:] = -100
        return batch

    monkeypatch.setattr(PackedSamples, "batch", uneven)
    for name, parts in (("whole", 1), ("parts", 2)):
        pretrain(configure(PretrainConfig, {"stage.accumulation": parts}, run_dir=tmp_path / name), screen)
    for first, second in zip(records(tmp_path / "whole"), records(tmp_path / "parts"), strict=True):
        assert second == pytest.approx(first, rel=2e-4)


def test_clipping_bounds_the_update_and_zero_switches_it_off(
    configure: Configure, tmp_path: Path, screen: Console
) -> None:
    norms = {}
    for clip in (0.0, 1e9, 1e-6):
        directory = tmp_path / f"{clip}"
        pretrain(configure(PretrainConfig, {"optimizer.clip": clip, "optimizer.eps": 1e-3}, run_dir=directory), screen)
        norms[clip] = [record["grad_norm"] for record in records(directory) if "grad_norm" in record]
    assert norms[0.0] == norms[1e9]
    assert norms[0.0][0] == norms[1e-6][0] > 0.01  # what is logged is the norm before clipping
    assert norms[0.0] != norms[1e-6]
    first, last = (records(tmp_path / "1e-06")[place]["val_loss"] for place in (0, -1))
    assert abs(first - last) < 0.05  # gradients far below eps move next to nothing


def test_a_loss_that_is_not_finite_stops_with_the_step_the_checkpoint_and_causes(
    configure: Configure, tmp_path: Path, screen: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = configure(PretrainConfig, run_dir=tmp_path / "run")
    with monkeypatch.context() as patch:
        on_loss(patch, 7, lambda value: value * math.nan)
        with pytest.raises(Diverged) as caught:
            pretrain(config, screen)
    message = str(caught.value)
    for part in ("loss nan", "at step 7", "step-00000004", "learning rate too high", "warmup", "clip=1", "bf16"):
        assert part in message
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert (result["status"], result["message"]) == ("diverged", message)
    assert all(torch.isfinite(value).all() for value in tensors(tmp_path / "run").values() if value.is_floating_point())
    assert [record["step"] for record in records(tmp_path / "run")][-1] == 6
    # The same run would end in the same way: it is not taken for one that is done.
    with pytest.raises(Diverged, match=r"loss nan .*as recorded in .*delete it to try again"):
        pretrain(config, screen)


def test_an_update_that_breaks_the_weights_is_not_saved(configure: Configure, tmp_path: Path, screen: Console) -> None:
    changes = {"optimizer.lr": 3e38, "optimizer.clip": 0.0, "stage.checkpoint_every": 1, "schedule.warmup": 0.0}
    with pytest.raises(Diverged, match="after step 1; last good checkpoint: none"):
        pretrain(configure(PretrainConfig, changes, run_dir=tmp_path / "run"), screen)
    assert list_checkpoints(tmp_path / "run" / "checkpoints") == []


def test_a_model_that_cannot_be_evaluated_has_diverged(configure: Configure, tmp_path: Path, screen: Console) -> None:
    changes = {
        "optimizer.lr": 1e25,
        "optimizer.clip": 0.0,
        "schedule.warmup": 0.0,
        "schedule.steps": 1,
        "stage.checkpoint_every": 0,
    }
    with pytest.raises(Diverged, match="val_loss nan after step 1"):
        pretrain(configure(PretrainConfig, changes, run_dir=tmp_path / "run"), screen)


def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(
    configure: Configure, tmp_path: Path, screen: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretrain(configure(PretrainConfig, run_dir=tmp_path / "whole"), screen)
    with monkeypatch.context() as patch:
        on_loss(patch, 9, send(signal.SIGTERM))
        with pytest.raises(Interrupted):
            pretrain(configure(PretrainConfig, run_dir=tmp_path / "cut"), screen)
    weights = tmp_path / "cut" / "checkpoints" / "step-00000009" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[len(content) // 2] ^= 1
    weights.write_bytes(content)
    with (tmp_path / "cut" / "metrics.jsonl").open("a") as stream:
        stream.write('{"step": 10, "lo')  # and the kill cut a line short
    pretrain(configure(PretrainConfig, run_dir=tmp_path / "cut"), screen)
    shown = screen.file.getvalue()  # type: ignore[attr-defined]
    assert "warning: checkpoint step-00000009 refused: " in shown
    assert "resuming after step 8 of 12" in shown
    assert_same_run(tmp_path / "whole", tmp_path / "cut")


def test_all_checkpoints_damaged_is_an_error_and_nothing_is_lost(
    configure: Configure, tmp_path: Path, screen: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        on_loss(patch, 5, send(signal.SIGTERM))
        with pytest.raises(Interrupted):
            pretrain(configure(PretrainConfig, run_dir=tmp_path / "run"), screen)
    for manifest in (tmp_path / "run" / "checkpoints").glob("*/manifest.json"):
        manifest.write_text("{}")
    before = sorted(path for path in tmp_path.rglob("*"))
    with pytest.raises(UserError, match=r"has no checkpoint that can be used .*step-00000005 refused"):
        pretrain(configure(PretrainConfig, run_dir=tmp_path / "run"), screen)
    assert sorted(path for path in tmp_path.rglob("*")) == before


def test_a_full_disk_is_one_line_and_the_run_goes_on_later(
    configure: Configure, tmp_path: Path, screen: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretrain(configure(PretrainConfig, run_dir=tmp_path / "whole"), screen)
    true_save = checkpoint.safetensors.torch.save_file

    def full(content: Any, path: Path) -> None:
        if "step-00000008" in str(path):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        true_save(content, path)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.safetensors.torch, "save_file", full)
        with pytest.raises(UserError, match=r"step-00000008 could not be saved .*No space left.* free some space"):
            pretrain(configure(PretrainConfig, run_dir=tmp_path / "run"), screen)
    pretrain(configure(PretrainConfig, run_dir=tmp_path / "run"), screen)
    assert_same_run(tmp_path / "whole", tmp_path / "run")


def test_a_full_disk_at_the_start_leaves_nothing(
    configure: Configure, tmp_path: Path, screen: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = configure(PretrainConfig, run_dir=tmp_path / "deep" / "run")

    def full(path: Path) -> None:
        if "tokenizer" in path.name:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    pretrain(dataclasses.replace(config, run_dir=str(tmp_path / "first")), screen)  # builds the corpus
    monkeypatch.setattr(files, "flush", full)
    with pytest.raises(UserError, match=r"no space left on .*deep/run"):
        pretrain(config, screen)
    assert not (tmp_path / "deep").exists()


def test_bf16_autocast_trains_near_fp32_and_keeps_fp32_weights(
    configure: Configure, tmp_path: Path, screen: Console
) -> None:
    for precision in ("fp32", "bf16"):
        result = pretrain(
            configure(PretrainConfig, {"stage.precision": precision}, run_dir=tmp_path / precision), screen
        )
        assert result["precision"].startswith(precision)
    one, other = records(tmp_path / "fp32"), records(tmp_path / "bf16")
    assert one != other
    assert other[-1]["val_loss"] == pytest.approx(one[-1]["val_loss"], abs=0.05)
    kept = tensors(tmp_path / "bf16")
    assert {str(t.dtype) for t in kept.values() if t.is_floating_point()} == {"torch.float32"}
    assert "bf16 autocast: asked for" in screen.file.getvalue()  # type: ignore[attr-defined]


def test_a_checkpoint_of_another_shape_is_one_line() -> None:
    small, large = (Transformer(shape(d_model=width), None) for width in (16, 32))
    with pytest.raises(UserError, match=r"checkpoint X does not fit this model: .*size mismatch") as caught:
        load_weights(large, small.state_dict(), "X")
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600


def shape(d_model: int) -> ModelConfig:
    return ModelConfig(d_model=d_model, n_layers=2, n_heads=2, vocab_size=20, seed=0, sparsity=0.5)


@pytest.mark.parametrize("damage", ["column out of range", "columns not sorted", "row pointer decreasing"])
def test_malformed_indices_in_a_checkpoint_are_one_line(damage: str) -> None:
    model = Transformer(shape(16), None)
    stored = {name: value.clone() for name, value in model.state_dict().items()}
    columns, rows = stored["blocks.1.mlp.up.col"], stored["blocks.1.mlp.up.row_ptr"]
    if damage == "column out of range":
        columns[-1] = 16
    elif damage == "columns not sorted":
        place = int(rows[(rows.diff() > 1).nonzero()[0, 0]])
        columns[place : place + 2] = columns[place : place + 2].flip(0)
    else:
        rows[1] = rows[2] + 1
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(UserError, match=r"blocks\.1\.mlp\.up") as caught:
        load_weights(model, stored, "X")
    assert "\n" not in str(caught.value)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items() if "up." in name)


def test_training_runs_and_resumes_on_every_device(
    configure: Configure, tmp_path: Path, screen: Console, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = configure(PretrainConfig, {"stage.precision": "fp32"}, run_dir=tmp_path / "run", device=device.type)
    with monkeypatch.context() as patch:
        on_loss(patch, 6, send(signal.SIGTERM))
        with pytest.raises(Interrupted):
            pretrain(config, screen)
    assert pretrain(config, screen)["loss_last"] < records(tmp_path / "run")[0]["val_loss"]


def test_progress_lines_are_about_ten_and_name_everything(
    configure: Configure, tmp_path: Path, screen: Console
) -> None:
    pretrain(configure(PretrainConfig, {"schedule.steps": 30}, run_dir=tmp_path / "run"), screen)
    lines = [line for line in screen.file.getvalue().splitlines() if "tok/s" in line]  # type: ignore[attr-defined]
    assert 10 <= len(lines) <= 11
    for part in ("30/30", "loss ", "lr ", "tok/s", "GFLOP/s", "ETA 0s"):
        assert part in lines[-1]


def test_on_a_terminal_there_is_a_bar(configure: Configure, tmp_path: Path) -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=160)
    pretrain(configure(PretrainConfig, run_dir=tmp_path / "run"), console)
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert "GFLOP/s" in shown
    assert "12/12" in shown


if __name__ == "__main__":
    import tempfile

    sys.path.insert(0, str(Path(__file__).parents[1]))
    from conftest import write_notes

    with tempfile.TemporaryDirectory() as folder:
        os.environ["SPARSETRAIN_CACHE"] = folder
        text = Path(folder) / "notes.txt"
        write_notes(text)
        losses = golden_losses(Path(folder) / "run", text)
    GOLDEN.write_text(json.dumps({key: round(value, 6) for key, value in losses.items()}, indent=1) + "\n")
