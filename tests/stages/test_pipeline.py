"""The pipeline: its files, its report, what it skips, and what happens when it is stopped in between."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from sparsetrain.config import load
from sparsetrain.errors import UserError
from sparsetrain.report.schema import validate_report
from sparsetrain.stages import PipelineConfig, PretrainConfig, pipeline
from sparsetrain.stages.run import run_weights
from sparsetrain.training.state import Interrupted

Configure = Callable[..., Any]

# The name `sparsetrain.stages.pipeline` is the function's.
pipeline_module = sys.modules["sparsetrain.stages.pipeline"]

STAGE_FILES = {".lock", "config.yaml", "tokenizer.json", "train_ids.txt", "metrics.jsonl", "result.json", "checkpoints"}


def test_two_arms_write_the_documented_report(configure: Configure, tmp_path: Path, screen: Console) -> None:
    home = tmp_path / "run"
    result = pipeline(configure(PipelineConfig, {"schedule.steps": 20}, run_dir=home), screen)
    assert result.complete

    files = {path.name for path in home.iterdir()}
    assert files == {
        ".lock",
        "config.yaml",
        "result.json",
        "report.json",
        "report.html",
        "dense",
        "sparse-0.75",
        "scratch",
    }
    assert {path.name for path in (home / "scratch").iterdir()} == {"finetune"}
    for arm in ("dense", "sparse-0.75"):
        assert {path.name for path in (home / arm).iterdir()} == {"pretrain", "finetune", "prompt"}
    for stage in home.glob("*/*/config.yaml"):
        assert {path.name for path in stage.parent.iterdir()} - {"backends.json"} == STAGE_FILES

    report = json.loads((home / "report.json").read_text())
    validate_report(report)
    top = {"arms", "scratch", "majority", "peak_rss_bytes", "seconds", "commit", "overlap_train_test"}
    assert top <= report.keys()
    assert report["overlap_train_test"] == 0
    assert {"accuracy", "ci95"} <= report["scratch"].keys()
    assert [(arm["name"], arm["sparsity"], arm["density"]) for arm in report["arms"]] == [
        ("dense", 0.0, 1.0),
        ("sparse-0.75", 0.75, 0.25),
    ]
    for arm in report["arms"]:
        assert {"name", "sparsity", "density", "train_flops", "pretrain", "finetune", "prompt"} <= arm.keys()
        assert arm["pretrain"].keys() == {"tokens", "loss_first", "loss_last", "bits_per_byte"}
        for stage in ("finetune", "prompt"):
            assert arm[stage].keys() == {"task", "n_test", "accuracy", "ci95", "macro_f1"}
            assert (arm[stage]["task"], arm[stage]["n_test"]) == ("pubmedqa", 20)
            stored = json.loads((home / arm["name"] / stage / "result.json").read_text())
            assert arm[stage]["accuracy"] == stored["accuracy"]
        assert arm["pretrain"]["loss_last"] < arm["pretrain"]["loss_first"]
    dense, sparse = report["arms"]
    # 6 (nnz + V d + 2 L T d) a token, with V = 257, d = 32, L = 2, T = 64
    shared = 257 * 32 + 2 * 2 * 64 * 32
    for arm, nnz in ((dense, 24 * 32 * 32), (sparse, 6 * 32 * 32)):
        assert arm["train_flops"] == 6 * (nnz + shared) * arm["pretrain"]["tokens"]
    assert report["majority"] == pytest.approx(
        json.loads((home / "scratch/finetune/result.json").read_text())["majority"]
    )
    assert "report: " in screen.file.getvalue()  # type: ignore[attr-defined]
    assert "<html" in (home / "report.html").read_text()
    assert "prompt.vectors" in run_weights(home / "dense" / "prompt")

    with pytest.raises(UserError, match=r"is a pipeline; choose one of its stages: .*sparse-0\.75/finetune") as caught:
        load("prompt", [f"init_from={home}"])
    assert "\n" not in str(caught.value)


def test_a_finished_pipeline_is_shown_and_not_run(configure: Configure, tmp_path: Path, screen: Console) -> None:
    config = configure(
        PipelineConfig, {"pipeline.sparsities": [0.5], "pipeline.scratch": False, "pipeline.prompt": None},
        run_dir=tmp_path / "run",
    )  # fmt: skip
    first = pipeline(config, screen)
    assert {path.name for path in (tmp_path / "run").glob("*/*")} == {"pretrain", "finetune"}
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["scratch"] is None
    assert "prompt" not in report["arms"][0]
    before = {path: path.stat().st_mtime_ns for path in first.directory.rglob("*") if path.is_file()}
    assert pipeline(config, screen).values == first.values
    shown = screen.file.getvalue()  # type: ignore[attr-defined]
    assert f"pipeline: already done in {first.directory}" in shown
    assert shown.count("report: ") == 2
    assert {path: path.stat().st_mtime_ns for path in first.directory.rglob("*") if path.is_file()} == before


def test_a_pipeline_stopped_between_stages_goes_on(
    configure: Configure, tmp_path: Path, screen: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = {"pipeline.sparsities": [0.75]}
    whole = pipeline(configure(PipelineConfig, changes, run_dir=tmp_path / "whole"), screen)

    def stopped(*_: Any) -> None:
        raise Interrupted("stopped", 15)

    config = configure(PipelineConfig, changes, run_dir=tmp_path / "cut")
    for stage in ("finetune", "prompt"):
        with monkeypatch.context() as patch:
            # By name, since the function of the same name hides the module.
            patch.setattr(sys.modules["sparsetrain.stages.pipeline"], stage, stopped)
            with pytest.raises(Interrupted):
                pipeline(config, screen)
        assert not (tmp_path / "cut" / "result.json").exists()
    pretrained = tmp_path / "cut" / "sparse-0.75" / "pretrain" / "result.json"
    before = pretrained.stat().st_mtime_ns
    assert pipeline(config, screen).complete
    assert pretrained.stat().st_mtime_ns == before
    for stage in ("sparse-0.75/pretrain", "sparse-0.75/finetune", "sparse-0.75/prompt", "scratch/finetune"):
        one, other = run_weights(whole.directory / stage), run_weights(tmp_path / "cut" / stage)
        assert all(torch.equal(one[name], other[name]) for name in one), stage


def test_arms_follow_from_the_sparsity_section(configure: Configure) -> None:
    assert configure(PipelineConfig).arms == [0.0, 0.75]
    assert configure(PipelineConfig, {"sparsity.sparsity": 0.0}).arms == [0.0]
    assert configure(PipelineConfig, {"pipeline.sparsities": [0.0, 0.5, 0.9]}).arms == [0.0, 0.5, 0.9]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pipeline.sparsities": []}, "pipeline.sparsities=.* must name at least one"),
        ({"pipeline.sparsities": [0.5, 0.5]}, "none twice"),
        ({"pipeline.sparsities": [1.0]}, r"pipeline\.sparsities=1\.0 must .*\[0, 1\)"),
        ({"init_from": "run"}, "init_from=run: a pipeline pre-trains its own models"),
        (
            {"pipeline.prompt.start": "pretrian"},
            "'pretrian' is not one of pretrain, finetune .*did you mean 'pretrain'",
        ),
        ({"pipeline.prompt.train": "all"}, "train='all' is not one of prompt, both"),
        ({"pipeline.prompt.n_tokens": 0}, "n_tokens=0"),
        ({"pipeline.prompt.init": "wrods"}, "init='wrods' is not one of words, random .*did you mean 'words'"),
        ({"pipeline.finetune.mode": "dens"}, "mode='dens' is not one of dense, sparse .*did you mean 'dense'"),
    ],
)
def test_pipeline_settings_are_refused_before_anything_runs(
    configure: Configure, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        configure(PipelineConfig, changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"task.path": "nowhere"}, "task.path=nowhere"),
        ({"pipeline.prompt.n_tokens": 60}, "context=64 leaves no room for a source beside 60 soft-prompt slots"),
        ({"pipeline.finetune.schedule": {}}, "set schedule.steps, schedule.tokens or stage.epochs"),
    ],
)
def test_what_later_stages_could_not_do_is_found_before_the_first(
    configure: Configure, tmp_path: Path, screen: Console, changes: dict[str, Any], message: str
) -> None:
    config = configure(PipelineConfig, changes, run_dir=tmp_path / "run")
    with pytest.raises(UserError, match=message):
        pipeline(config, screen)
    assert "pretrain s=" not in screen.file.getvalue()  # type: ignore[attr-defined]
    assert not (tmp_path / "run").exists()


def test_an_arm_that_diverges_does_not_stop_the_others(
    configure: Configure, tmp_path: Path, screen: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = pipeline_module.pretrain

    def unlucky(config: PretrainConfig, console: Console) -> Any:
        if config.sparsity.sparsity == 0:
            config.optimizer = dataclasses.replace(config.optimizer, lr=1e30, clip=0.0)
        return real(config, console)

    monkeypatch.setattr(pipeline_module, "pretrain", unlucky)
    result = pipeline(configure(PipelineConfig, run_dir=tmp_path / "run"), screen)
    assert result["diverged"] == ["dense"]
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    validate_report(report)
    dense, sparse = report["arms"]
    assert dense["pretrain"]["loss_last"] is None
    assert "finetune" not in dense
    assert sparse["finetune"]["n_test"] > 0
    assert "diverged" in (tmp_path / "run" / "report.html").read_text()
