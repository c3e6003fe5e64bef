"""Trained runs whose positions are stretched afterwards: in generation, in fine-tuning, and in older runs."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from sparsetrain.cli.resolve import load
from sparsetrain.errors import UserError
from sparsetrain.runs.origin import run_tokenizer
from sparsetrain.runs.result import RunResult
from sparsetrain.stages import FinetuneConfig, finetune, generate
from sparsetrain.stages.generate import load_run

CPU = torch.device("cpu")
OLD = Path(__file__).parents[1] / "data" / "old_runs" / "finished"


def test_generation_takes_another_scale_than_the_run(sparse: RunResult) -> None:
    text = "Note 7 says a word. " * 7  # 140 tokens, after training with at most 64
    given = [f"init_from={sparse.directory}", f"prompt={text}", "max_new_tokens=6", "temperature=0"]
    model, _ = load_run(sparse.directory, CPU)
    assert model.config.positions_scale == 1.0
    tokenizer = run_tokenizer(sparse.directory)
    for scale, length in (("dynamic", None), ("3", 3 * 64)):
        ids = tokenizer.encode(text)
        for _ in range(6):
            model.config.positions_scale = (length or len(ids)) / 64
            ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
        asked = load("generate", [*given, f"model.positions_scale={scale}"])
        assert generate(asked) == tokenizer.decode(ids)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.positions_scale=0.5", "model: positions_scale=0.5 is neither a number of at least 1 nor 'dynamic'"),
        ("model.positions_scale=often", "model: positions_scale='often' is neither"),
        ("model.rope_scaling=ntk", "model: rope_scaling=ntk needs positions=rope, not alibi"),
        ("model.rope_scaling=cubic", "rope_scaling='cubic' is not one of linear, ntk, yarn"),
        ("model.d_model=64", "d_model"),
    ],
)
@pytest.mark.parametrize("verb", ["generate", "finetune"])
def test_what_a_run_cannot_change_is_refused(sparse: RunResult, verb: str, override: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        generate(load(verb, [f"init_from={sparse.directory}", override]))
    assert "\n" not in str(caught.value)


def test_fine_tuning_at_a_fixed_factor_hands_it_on(
    sparse: RunResult, configure: Any, tmp_path: Path, screen: Console
) -> None:
    asked = load("finetune", [f"init_from={sparse.directory}", "model.positions_scale=2"]).model
    assert asked == {**sparse["config"]["model"], "positions_scale": 2}
    changes = {"budget.steps": 1, "model": asked}
    config = configure(FinetuneConfig, changes, run_dir=tmp_path / "tuned", init_from=sparse.directory)
    tuned = finetune(config, screen)
    assert tuned["model"]["positions_scale"] == 2
    assert load("finetune", [f"init_from={tuned.directory}"]).model["positions_scale"] == 2
    same = ["model=tiny", "model.max_context=64", "model.init_std=0.02"]
    assert load("finetune", [f"init_from={tuned.directory}", *same]).model["positions_scale"] == 2
    assert load("prompt", [f"init_from={tuned.directory}", "model.positions_scale=1"]).model["positions_scale"] == 1
    assert (
        load("finetune", [f"init_from={tuned.directory}", "model.positions_scale=null"]).model["positions_scale"] == 2
    )
    assert load_run(tuned.directory, CPU)[0].config.positions_scale == 2
    assert load_run(tuned.directory, CPU, {"positions_scale": "dynamic"})[0].config.positions_scale == "dynamic"


@pytest.mark.filterwarnings("ignore:.* have no weight")
def test_a_run_from_before_the_setting_is_read_as_before(tmp_path: Path) -> None:
    (source,) = OLD.iterdir()
    run = shutil.copytree(source, tmp_path / "run")
    assert "positions_scale" not in (run / "config.yaml").read_text()
    model, _ = load_run(run, CPU)
    assert (model.config.positions_scale, model.config.rope_fraction) == (1.0, 1.0)
    tokens = torch.arange(40)[None]
    stretched, _ = load_run(run, CPU, {"positions_scale": "dynamic"})
    length = model.config.max_context
    assert torch.equal(stretched(tokens[:, :length]), model(tokens[:, :length]))
