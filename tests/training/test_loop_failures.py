"""Failing runs: losses and weights that are not finite, damaged checkpoints, a full disk, weights of other models."""

from __future__ import annotations

import errno
import json
import math
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from runs import assert_same_run, on_loss, records, send, tensors

from sparsetrain import files
from sparsetrain.data import prepare
from sparsetrain.errors import UserError
from sparsetrain.models import ModelConfig, Transformer
from sparsetrain.runs import checkpoint
from sparsetrain.runs.checkpoint import list_checkpoints
from sparsetrain.stages import PretrainConfig, pretrain
from sparsetrain.training.loop import load_weights
from sparsetrain.training.state import Diverged, Interrupted

Configure = Callable[..., Any]
Trained = Callable[..., Path]


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
    # The same run would diverge again, so it does not count as complete.
    with pytest.raises(Diverged, match=r"loss nan .*as recorded in .*delete it to try again"):
        pretrain(config, screen)


def test_an_update_that_breaks_the_weights_is_not_saved(configure: Configure, tmp_path: Path, screen: Console) -> None:
    changes = {"optimizer.lr": 3e38, "optimizer.clip": 0.0, "loop.checkpoint_every": 1, "schedule.warmup": 0.0}
    with pytest.raises(Diverged, match="after step 1; last good checkpoint: none"):
        pretrain(configure(PretrainConfig, changes, run_dir=tmp_path / "run"), screen)
    assert list_checkpoints(tmp_path / "run" / "checkpoints") == []


def test_a_model_that_cannot_be_evaluated_has_diverged(configure: Configure, tmp_path: Path, screen: Console) -> None:
    changes = {
        "optimizer.lr": 1e25,
        "optimizer.clip": 0.0,
        "schedule.warmup": 0.0,
        "budget.steps": 1,
        "loop.checkpoint_every": 0,
    }
    with pytest.raises(Diverged, match="val_loss nan after step 1"):
        pretrain(configure(PretrainConfig, changes, run_dir=tmp_path / "run"), screen)


RANKING: dict[str, dict[str, Any]] = {
    "static": {},
    "set": {"rule": "set", "every": 1},
    "rigl": {"rule": "rigl", "every": 1},
    "staggered": {"rule": "rigl", "every": 8, "accumulation": "staggered", "drop_schedule": "constant"},
    "gmp": {"rule": "gmp", "every": 1},
    "vspdf": {"rule": "vspdf", "grow": "gradient", "phases": [{"at": 0.1, "sparsity": 0.5}]},
}


@pytest.mark.filterwarnings("ignore:.* have no weight")
@pytest.mark.parametrize("rule", RANKING)
@pytest.mark.parametrize("lr", [3e38, 1e25], ids=["weights", "gradients"])
def test_a_rule_that_can_rank_no_more_ends_like_static_masks(
    rule: str, lr: float, configure: Configure, tmp_path: Path, screen: Console
) -> None:
    """Weights or gradients that are not finite mean divergence under every rule; run and result are kept."""
    changes = {"optimizer.lr": lr, "optimizer.clip": 0.0, "schedule.warmup": 0.0, "loop.eval_every": 0}
    changes |= {"sparsity": {"sparsity": 0.75, "evolution": RANKING[rule]}}  # type: ignore[dict-item]
    with pytest.raises(Diverged, match=r"not finite|nan|inf"):
        pretrain(configure(PretrainConfig, changes, run_dir=tmp_path / "run"), screen)
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["status"] == "diverged"
    assert (tmp_path / "run" / "config.yaml").exists()
    assert list_checkpoints(tmp_path / "run" / "checkpoints") == []


def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(
    configure: Configure,
    trained: Trained,
    tmp_path: Path,
    screen: Console,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    with monkeypatch.context() as patch:
        on_loss(patch, 9, send(signal.SIGTERM))
        with pytest.raises(Interrupted):
            pretrain(configure(PretrainConfig, run_dir=tmp_path / "cut"), screen)
    weights = tmp_path / "cut" / "checkpoints" / "step-00000009" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[len(content) // 2] ^= 1
    weights.write_bytes(content)
    with (tmp_path / "cut" / "metrics.jsonl").open("a") as stream:
        stream.write('{"step": 10, "lo')  # the kill cut a line short
    pretrain(configure(PretrainConfig, run_dir=tmp_path / "cut"), screen)
    shown = screen.file.getvalue()  # type: ignore[attr-defined]
    assert [message for message in caplog.messages if message.startswith("checkpoint step-00000009 refused: ")]
    assert "resuming after step 8 of 12" in shown
    assert_same_run(trained(), tmp_path / "cut")


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
    configure: Configure, trained: Trained, tmp_path: Path, screen: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
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
    assert_same_run(trained(), tmp_path / "run")


def test_a_full_disk_at_the_start_leaves_nothing(
    configure: Configure, tmp_path: Path, screen: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = configure(PretrainConfig, run_dir=tmp_path / "deep" / "run")

    def full(path: Path) -> None:
        if "tokenizer" in path.name:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    prepare(config.data, progress=False)
    monkeypatch.setattr(files, "flush", full)
    with pytest.raises(UserError, match=r"no space left on .*deep/run"):
        pretrain(config, screen)
    assert not (tmp_path / "deep").exists()


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
