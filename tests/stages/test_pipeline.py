"""The pipeline: its files, its report, skipping of finished stages, and interruption."""

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

from sparsetrain.cli.resolve import load
from sparsetrain.errors import UserError
from sparsetrain.report import register_section
from sparsetrain.report.registry import SECTIONS
from sparsetrain.report.schema import validate_report
from sparsetrain.runs.weights import read_weights
from sparsetrain.sparsity import EvolutionConfig, SparsityConfig
from sparsetrain.stages import PipelineConfig, pipeline
from sparsetrain.stages.pipeline_config import canonical
from sparsetrain.stages.stage import train
from sparsetrain.training.state import Interrupted

Configure = Callable[..., Any]

# `sparsetrain.stages.pipeline` is the function, so the module must be imported by name.
pipeline_module = sys.modules["sparsetrain.stages.pipeline"]

TUNED = {"name": "finetune", "from": "pretrain", "budget": {"steps": 12, "batch_size": 4}}
STAGE_FILES = {".lock", "config.yaml", "tokenizer.json", "train_ids.txt", "metrics.jsonl", "result.json", "checkpoints"}


def test_two_arms_write_the_documented_report(configure: Configure, tmp_path: Path, screen: Console) -> None:
    home = tmp_path / "run"
    result = pipeline(configure(PipelineConfig, {"budget.steps": 20}, run_dir=home), screen)
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
        more = set() if stage.parent.name == "pretrain" else {"task.json", "predictions.csv"}
        assert {path.name for path in stage.parent.iterdir()} - {"backends.json"} == STAGE_FILES | more

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
            assert arm["stages"][stage]["accuracy"] == stored["accuracy"]
        assert arm["stages"].keys() == {"pretrain", "finetune", "prompt"}
        assert arm["stages"]["pretrain"]["loss_last"] == arm["pretrain"]["loss_last"]
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
    assert read_weights(home / "dense" / "prompt").prompt is not None

    with pytest.raises(UserError, match=r"is a pipeline; choose one of its stages: .*sparse-0\.75/finetune") as caught:
        load("prompt", [f"init_from={home}"])
    assert "\n" not in str(caught.value)


def test_a_finished_pipeline_is_shown_and_not_run(configure: Configure, tmp_path: Path, screen: Console) -> None:
    config = configure(
        PipelineConfig,
        {"pipeline.arms": {"sparsity.sparsity": [0.5]}, "pipeline.stages": [{"name": "pretrain"}, TUNED]},
        run_dir=tmp_path / "run",
    )
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
    changes = {"pipeline.arms": {"sparsity.sparsity": [0.75]}}
    whole = pipeline(configure(PipelineConfig, changes, run_dir=tmp_path / "whole"), screen)

    config = configure(PipelineConfig, changes, run_dir=tmp_path / "cut")
    for kind in ("finetune", "prompt"):

        def stopped(stage: Any, kind: str = kind) -> Any:
            if stage.kind == kind:
                raise Interrupted("stopped", 15)
            return train(stage)

        with monkeypatch.context() as patch:
            patch.setattr(pipeline_module, "train", stopped)
            with pytest.raises(Interrupted):
                pipeline(config, screen)
        assert not (tmp_path / "cut" / "result.json").exists()
    pretrained = tmp_path / "cut" / "sparse-0.75" / "pretrain" / "result.json"
    before = pretrained.stat().st_mtime_ns
    assert pipeline(config, screen).complete
    assert pretrained.stat().st_mtime_ns == before
    for stage in ("sparse-0.75/pretrain", "sparse-0.75/finetune", "sparse-0.75/prompt", "scratch/finetune"):
        one, other = (read_weights(place / stage).model for place in (whole.directory, tmp_path / "cut"))
        assert all(torch.equal(one[name], other[name]) for name in one), stage


def test_arms_follow_from_the_sparsity_section(configure: Configure) -> None:
    def names(*words: str) -> list[str]:
        return [arm.name for arm in load("pipeline", ["model=tiny", *words]).arms]

    assert names() == ["dense", "sparse-0.75"]
    assert names("sparsity.sparsity=0.9") == ["dense", "sparse-0.9"]
    assert names("sparsity=dense") == ["dense"]
    assert names("pipeline.arms={sparsity.sparsity: [0, 0.5, 0.5], seed: [0, 1]}") == [
        "dense_seed-0",
        "dense_seed-1",
        "sparse-0.5_seed-0",
        "sparse-0.5_seed-1",
    ]
    assert names("pipeline=pretrain") == ["run"]
    # A dense arm ignores the rest of the section that makes the others sparse.
    config = load("pipeline", ["model=tiny", "sparsity=rigl", "sparsity.seed=3"])
    dense, sparse = (config.stage_config(config.stages[0], arm).sparsity for arm in config.arms)
    assert dense == SparsityConfig(seed=3)
    assert sparse == config.sparsity


def test_an_arm_may_be_a_named_choice_of_several_settings() -> None:
    recipes = "recipe: {long: {data.context: 64, budget.tokens: 4096}, swiglu: {model.mlp: swiglu}}"
    words = ["model=tiny", "pipeline=pretrain", "budget.steps=7"]
    config = load("pipeline", [*words, f"pipeline.arms={{sparsity.sparsity: [0, 0.5], {recipes}}}"])
    assert [arm.name for arm in config.arms] == ["dense_long", "dense_swiglu", "sparse-0.5_long", "sparse-0.5_swiglu"]
    dense, *_, sparse = (config.stage_config(config.stages[0], arm) for arm in config.arms)
    assert (dense.data.context, dense.budget.tokens, dense.budget.steps) == (64, 4096, None)
    assert (sparse.model["mlp"], sparse.budget.steps, sparse.sparsity.sparsity) == ("swiglu", 7, 0.5)
    # A value takes the place of the whole setting, even where that is a section.
    sources = "data.sources={a: {name: medline}, b: {name: python}}"
    mixed = "pipeline.arms={text: {a: {data.mixture: {a: 1}}, b: {data.mixture: {b: 2}}}}"
    config = load("pipeline", [*words, sources, mixed])
    found = [config.stage_config(config.stages[0], arm).data.mixture for arm in config.arms]
    assert found == [{"a": 1}, {"b": 2}]
    assert canonical({"arms": {"sparsity.sparsity": [0, 0.5, 0.0]}, "stages": [{"name": "pretrain"}]})["arms"] == {
        "sparsity.sparsity": [0.0, 0.5]
    }


def test_an_arm_or_a_stage_of_another_rule_has_the_settings_of_that_rule() -> None:
    rules = "pipeline.arms={sparsity.evolution.rule: [set, gmp, static]}"
    config = load("pipeline", ["model=tiny", "sparsity=rigl", "sparsity.evolution.every=7", rules])
    found = [config.stage_config(config.stages[0], arm).sparsity.evolution for arm in config.arms]
    assert found == [EvolutionConfig("set", every=7), EvolutionConfig("gmp", every=7), EvolutionConfig()]
    stages = "pipeline.stages=[{name: pretrain, sparsity: {evolution: {rule: gmp, curve: linear}}}]"
    config = load("pipeline", ["model=tiny", "sparsity=rigl", "sparsity.evolution.every=7", stages])
    *_, sparse = (config.stage_config(config.stages[0], arm).sparsity.evolution for arm in config.arms)
    assert sparse == EvolutionConfig("gmp", every=7, curve="linear")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pipeline.arms": {"sparsity.sparsity": []}}, r"pipeline.arms: sparsity.sparsity=\[\] must be a list of"),
        ({"pipeline.arms": {"sparsity.sparsity": [1.0]}}, r"sparsity=1\.0 must .*\[0, 1\)"),
        ({"pipeline.arms": {"sparsity.sparsity": ["x"]}}, "sparsity.sparsity=x must be a number"),
        ({"pipeline.arms": {"sparsty.sparsity": [0.5]}}, "sparsty.sparsity is not a setting .*did you mean 'sparsity'"),
        ({"pipeline.arms": {"model.d_model": [31]}}, "pipeline.stages: pretrain: model: .*31"),
        ({"init_from": "run"}, "init_from=run: a pipeline makes its own models"),
        ({"pipeline.stages": []}, r"pipeline.stages=\[\]: a pipeline has at least one stage"),
        ({"pipeline.stages": ["pretrain"]}, r"pipeline.stages\[0\]=pretrain must be a stage with a name"),
        ({"pipeline.stages": [{"name": "a/b", "run": "pretrain"}]}, "cannot be a directory name"),
        ({"pipeline.stages": [{"name": "pretrain"}] * 2}, r"\[1\].name='pretrain' is the name of an earlier stage"),
        ({"pipeline.stages": [{"name": "pretrian"}]}, r"\[0\].run='pretrian' is not one of pretrain, adapt, finetune"),
        ({"pipeline.stages": [{"name": "pretrain", "lr": 1}]}, r"\[0\].lr is not a setting of pretrain"),
        ({"pipeline.stages": [{"name": "pretrain", "device": "cpu"}]}, "device is not a setting of pretrain"),
        ({"pipeline.stages": [{"name": "prompt"}]}, "a soft prompt needs a trained model; add from"),
        ({"pipeline.stages": [{"name": "adapt"}]}, "an adaptation needs a trained model; add from"),
        (
            {"pipeline.stages.prompt.from": "pretrian"},
            r"pipeline.stages\[2\].from=pretrian names no stage .*did you mean 'pretrain'",
        ),
        ({"pipeline.stages": [{"name": "pretrain", "budget": 4}]}, "budget=4 must be a section of settings"),
        ({"pipeline.stages": [{"name": "pretrain", "sparsity": 4}]}, "sparsity=4 must be a section of settings"),
        ({"pipeline.stages": [{"name": "pretrain", "budget": {"phases": 4}}]}, "budget.phases=4 must be a list of"),
        ({"pipeline.stages": [{"name": "a", "run": "pretrain", "from": [1]}]}, r"from=\[1\] must be the name of a"),
        ({"pipeline.stages": [{"name": "a", "run": [1]}]}, r"run='\[1\]' is not one of pretrain"),
        ({"pipeline.stages": [{"name": "report.json", "run": "pretrain"}]}, "cannot be a directory name"),
        ({"pipeline.arms": {"sparsity": ["dense"]}}, "pipeline.arms: sparsity is a section; name one of its settings"),
        ({"pipeline.arms": {"data.path": ["../x"]}}, "data.path=../x contains a slash"),
        ({"pipeline.arms": {"recipe": {}}}, "pipeline.arms: recipe has no choice"),
        ({"pipeline.arms": {"recipe": {"a/b": {"seed": 1}}}}, "recipe: the name 'a/b' of a choice must be letters"),
        ({"pipeline.arms": {"recipe": {"a": 1}}}, "recipe: a=1 must be settings by dotted names"),
        ({"pipeline.arms": {"recipe": {"a": {"modl.mlp": 1}}}}, "recipe: a: modl.mlp is not a setting.*'model'"),
        ({"pipeline.arms": {"recipe": {"a": {"model": 1}}}}, "recipe: a: model is a section; name one"),
        ({"pipeline.arms": {"recipe": {"a": {"model.mlp": "x"}}}}, "pipeline.stages: pretrain: model: mlp='x'"),
        (
            {"pipeline.arms": {"one": {"a": {"seed": 1}}, "seed": [1, 2]}},
            "a_seed-1: two entries set seed; one of them must not",
        ),
        (
            {"pipeline.arms": {"one": {"a": {"seed": 1}, "a_b": {"seed": 2}}, "two": {"b_c": {}, "c": {}}}},
            "two arms would be called a_b_c; rename a choice",
        ),
        (
            {"pipeline.stages.pretrain.arms": ["dense"]},
            "pipeline.stages: finetune: from=pretrain is not a stage of the arm sparse-0.75",
        ),
        ({"pipeline.stages.pretrain.from": "finetune"}, "pretrain from finetune from pretrain is a cycle"),
        ({"pipeline.stages.finetune.from": "finetune"}, "finetune from finetune is a cycle"),
        ({"pipeline.stages.scratch.from": "pretrain"}, "once=true cannot start from a stage that runs in every arm"),
        ({"pipeline.stages.finetune.budget.tokens": 5}, "pipeline.stages: finetune: budget.steps=12 and budget.tokens"),
        ({"pipeline.stages.prompt.train": "all"}, "train='all' is not one of prompt, both"),
        ({"pipeline.stages.prompt.n_tokens": 0}, "n_tokens=0"),
        ({"pipeline.stages.prompt.init": "wrods"}, "init='wrods' is not one of words, random .*did you mean 'words'"),
        ({"pipeline.stages.finetune.mode": "dens"}, "mode='dens' is not one of dense, sparse .*did you mean 'dense'"),
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
        ({"pipeline.stages.prompt.n_tokens": 60}, "context=64 leaves no room for a source beside 60 soft-prompt slots"),
        (
            {"pipeline.stages.finetune.budget": {"steps": 5}, "pipeline.stages.finetune.schedule": {"warmup_steps": 5}},
            "schedule.warmup_steps=5 must be below the 5 steps",
        ),
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
    def unlucky(stage: Any) -> Any:
        config = stage.config
        if stage.kind == "pretrain" and config.sparsity.sparsity == 0:
            config.optimizer = dataclasses.replace(config.optimizer, lr=1e30, clip=0.0)
        return train(stage)

    monkeypatch.setattr(pipeline_module, "train", unlucky)
    changes = {"pipeline.stages": [{"name": "pretrain"}, TUNED]}
    result = pipeline(configure(PipelineConfig, changes, run_dir=tmp_path / "run"), screen)
    assert result["diverged"] == ["dense"]
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    validate_report(report)
    dense, sparse = report["arms"]
    assert dense["pretrain"]["loss_last"] is None
    assert "finetune" not in dense
    assert sparse["finetune"]["n_test"] > 0
    assert "diverged" in (tmp_path / "run" / "report.html").read_text()


def test_a_section_of_the_page_that_fails_does_not_stop_the_pipeline(
    configure: Configure,
    tmp_path: Path,
    screen: Console,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(SECTIONS, "_things", dict(SECTIONS._things))

    @register_section("broken", "Broken", 45, "sections/cost.html.j2")
    def broken(report: Any) -> Any:
        return report["nope"]

    changes = {"pipeline.stages": [{"name": "pretrain"}], "budget.steps": 2}
    result = pipeline(configure(PipelineConfig, changes, run_dir=tmp_path / "run"), screen)
    assert result.complete
    page = (tmp_path / "run" / "report.html").read_text()
    assert "<h2>FLOPs by term</h2>" in page
    assert "<h2>Broken</h2>" not in page
    (line,) = [message for message in caplog.messages if "broken" in message]
    assert line.startswith("report section 'broken': KeyError: 'nope' (test_pipeline.py, line ")
    assert line.endswith("; the page omits it")
