"""The loop against itself: repeated, interrupted, killed, split. The golden losses are in tests/golden."""

from __future__ import annotations

import io
import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fresh import Fresh
from rich.console import Console
from runs import assert_same_run, on_loss, records, send, tensors

from sparsetrain.data import Batch, PackedSamples
from sparsetrain.errors import UserError
from sparsetrain.runs.checkpoint import list_checkpoints
from sparsetrain.stages import PretrainConfig, pretrain
from sparsetrain.stages.config import as_plain
from sparsetrain.training.state import Interrupted

Configure = Callable[..., Any]
Trained = Callable[..., Path]

DROPOUT = {"model.dropout": 0.1}


def test_same_seed_gives_the_same_metrics_and_weights(
    configure: Configure, trained: Trained, tmp_path: Path, screen: Console
) -> None:
    pretrain(configure(PretrainConfig, DROPOUT, run_dir=tmp_path / "again"), screen)
    assert_same_run(trained(DROPOUT), tmp_path / "again")
    seen = records(tmp_path / "again")
    assert [record["step"] for record in seen if "loss" in record] == list(range(1, 13))
    assert [record["step"] for record in seen if "val_loss" in record] == [0, 6, 12]
    assert seen[-2]["tokens"] == 12 * 4 * 64
    pretrain(configure(PretrainConfig, DROPOUT, run_dir=tmp_path / "next", seed=1), screen)
    assert records(tmp_path / "next") != seen


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_resume_is_bitwise(
    configure: Configure,
    trained: Trained,
    tmp_path: Path,
    screen: Console,
    monkeypatch: pytest.MonkeyPatch,
    number: signal.Signals,
) -> None:
    config = configure(PretrainConfig, DROPOUT, run_dir=tmp_path / "cut")
    with monkeypatch.context() as patch:
        on_loss(patch, 7, send(number))
        with pytest.raises(Interrupted, match=r"stopped after step 7 of 12, saved in .*; the same command") as caught:
            pretrain(config, screen)
    assert caught.value.exit_code == 128 + number
    assert list_checkpoints(tmp_path / "cut" / "checkpoints")[-1] == "step-00000007"
    assert not (tmp_path / "cut" / "result.json").exists()
    assert pretrain(config, screen).complete
    assert "resuming after step 7 of 12" in screen.file.getvalue()  # type: ignore[attr-defined]
    assert_same_run(trained(DROPOUT), tmp_path / "cut")


def test_a_signal_in_the_last_step_stops_too(
    configure: Configure, tmp_path: Path, screen: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        on_loss(patch, 12, send(signal.SIGTERM))
        with pytest.raises(Interrupted, match="after step 12 of 12"):
            pretrain(configure(PretrainConfig, run_dir=tmp_path / "run"), screen)
    assert pretrain(configure(PretrainConfig, run_dir=tmp_path / "run"), screen)["steps"] == 12


@pytest.mark.slow
def test_five_kills_at_random_moments_give_identical_weights(
    configure: Configure, fresh: Fresh, tmp_path: Path
) -> None:
    changes = {"budget.steps": 20, "loop.checkpoint_every": 3, "model.dropout": 0.1, "model.n_layers": 1}
    changes |= {"model.d_model": 16, "data.context": 32}
    settings = as_plain(configure(PretrainConfig, changes))
    (tmp_path / "settings.json").write_text(json.dumps(settings))
    script = Path(__file__).with_name("killed_runs.py")
    done = fresh.run(script, str(tmp_path / "settings.json"), str(tmp_path), "5")
    assert done.returncode == 0, done.stdout + done.stderr
    assert int(done.stdout) == 5


@pytest.mark.parametrize("accumulation", [2, 4])
def test_accumulation_does_not_change_the_step(
    configure: Configure, trained: Trained, tmp_path: Path, screen: Console, accumulation: int
) -> None:
    pretrain(configure(PretrainConfig, {"loop.accumulation": accumulation}, run_dir=tmp_path / "parts"), screen)
    one, other = records(trained()), records(tmp_path / "parts")
    assert [record["step"] for record in one] == [record["step"] for record in other]
    for first, second in zip(one, other, strict=True):
        assert second == pytest.approx(first, rel=2e-4)


def test_accumulation_weighs_micro_batches_by_their_targets(
    configure: Configure, tmp_path: Path, screen: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    true_batch = PackedSamples.batch

    def uneven(self: PackedSamples, first: int, count: int) -> Batch:
        batch = true_batch(self, first, count)
        for row in range(count):  # the first rows have few targets
            if (first + row) % 4 < 2:
                batch.targets[row, 5:] = -100
        return batch

    monkeypatch.setattr(PackedSamples, "batch", uneven)
    for name, parts in (("whole", 1), ("parts", 2)):
        pretrain(configure(PretrainConfig, {"loop.accumulation": parts}, run_dir=tmp_path / name), screen)
    for first, second in zip(records(tmp_path / "whole"), records(tmp_path / "parts"), strict=True):
        assert second == pytest.approx(first, rel=2e-4)


@pytest.mark.parametrize("phases", [None, [{"share": 0.5, "batch_size": 4}, {"share": 0.5}]])
def test_a_batch_that_cannot_be_split_is_named(configure: Configure, phases: list[dict[str, Any]] | None) -> None:
    changes = {"budget.batch_size": 3 if phases else 4, "budget.phases": phases, "loop.accumulation": 3}
    name = r"budget\.phases\[0\]\.batch_size" if phases else r"budget\.batch_size"
    with pytest.raises(UserError, match=rf"^{name}=4 is not divisible by loop\.accumulation=3$"):
        configure(PretrainConfig, changes)


def test_clipping_bounds_the_update_and_zero_switches_it_off(
    configure: Configure, tmp_path: Path, screen: Console
) -> None:
    norms = {}
    for clip in (0.0, 1e9, 1e-6):
        directory = tmp_path / f"{clip}"
        pretrain(configure(PretrainConfig, {"optimizer.clip": clip, "optimizer.eps": 1e-3}, run_dir=directory), screen)
        norms[clip] = [record["grad_norm"] for record in records(directory) if "grad_norm" in record]
    assert norms[0.0] == norms[1e9]
    assert norms[0.0][0] == norms[1e-6][0] > 0.01  # the logged norm is the one before clipping
    assert norms[0.0] != norms[1e-6]
    first, last = (records(tmp_path / "1e-06")[place]["val_loss"] for place in (0, -1))
    assert abs(first - last) < 0.05  # gradients far below eps hardly change anything


def test_bf16_autocast_trains_near_fp32_and_keeps_fp32_weights(
    configure: Configure, trained: Trained, tmp_path: Path, screen: Console
) -> None:
    result = pretrain(configure(PretrainConfig, {"loop.precision": "bf16"}, run_dir=tmp_path / "bf16"), screen)
    assert result["precision"].startswith("bf16")
    one, other = records(trained({"loop.precision": "fp32"})), records(tmp_path / "bf16")
    assert one != other
    assert other[-1]["val_loss"] == pytest.approx(one[-1]["val_loss"], abs=0.05)
    kept = tensors(tmp_path / "bf16")
    assert {str(t.dtype) for t in kept.values() if t.is_floating_point()} == {"torch.float32"}
    assert "bf16 autocast: asked for" in screen.file.getvalue()  # type: ignore[attr-defined]


def test_training_runs_and_resumes_on_every_device(
    configure: Configure, tmp_path: Path, screen: Console, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = configure(PretrainConfig, {"loop.precision": "fp32"}, run_dir=tmp_path / "run", device=device.type)
    with monkeypatch.context() as patch:
        on_loss(patch, 6, send(signal.SIGTERM))
        with pytest.raises(Interrupted):
            pretrain(config, screen)
    assert pretrain(config, screen)["loss_last"] < records(tmp_path / "run")[0]["val_loss"]


def test_progress_lines_are_about_ten_and_name_everything(
    configure: Configure, tmp_path: Path, screen: Console
) -> None:
    pretrain(configure(PretrainConfig, {"budget.steps": 30}, run_dir=tmp_path / "run"), screen)
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
