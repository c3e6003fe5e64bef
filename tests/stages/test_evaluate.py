"""Evaluation: its rows are those of direct calls on the loaded model; as a stage of a pipeline; what it refuses."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from sparsetrain.cli.resolve import load
from sparsetrain.data import prepare_corpora
from sparsetrain.errors import UserError
from sparsetrain.models import Transformer
from sparsetrain.report.schema import validate_report
from sparsetrain.report.show import show_run
from sparsetrain.runs.origin import run_tokenizer
from sparsetrain.runs.result import RunResult, load_result
from sparsetrain.stages import EvaluateConfig, PipelineConfig, PretrainConfig, evaluate, pipeline, pretrain
from sparsetrain.stages.arms import load_arms, show_arms
from sparsetrain.stages.evaluate import held_out_titles
from sparsetrain.stages.evaluate_config import check_evaluation, last_context, trained_length
from sparsetrain.stages.generate import load_run, run_config
from sparsetrain.stages.plan import plan_of
from sparsetrain.training.position_losses import position_losses
from sparsetrain.training.probes import ProbeScore, probe_accuracy, probes

Configure = Callable[..., Any]
LENGTHS, SCALES = [32, 64, 128], [1, "dynamic", 2]
ASKED = {"lengths": LENGTHS, "scales": SCALES, "width": 16, "blocks": 5, "probes": ["needle"], "n_probes": 4}


def test_the_rows_are_those_of_direct_calls(sparse: RunResult, tmp_path: Path, screen: Console) -> None:
    config = EvaluateConfig(init_from=str(sparse.directory), sizes=[64, 96], run_dir=str(tmp_path / "seen"), **ASKED)
    result = evaluate(config, screen)
    assert result.values == load_result(result.directory / "result.json")
    assert result["loss_last"] == pytest.approx(sparse["loss_last"], rel=1e-6)
    assert result["bits_per_byte"] == pytest.approx(sparse["bits_per_byte"], rel=1e-6)
    assert (result["trained_length"], result["density"]) == (64, sparse["density"])

    (corpus,) = prepare_corpora(run_config(sparse.directory).data, console=screen).values()
    model, _ = load_run(sparse.directory, torch.device("cpu"))
    rows = {(row["scale"], row["length"]): row for row in result["positions"]}
    asked = {size: {(row["scale"]): row for row in result["probes"] if row["size"] == size} for size in (64, 96)}
    best = max(row["accuracy"] for row in asked[64].values())
    for scale in SCALES:
        model.config.positions_scale = scale
        found = position_losses(
            model, lambda batch: model.token_losses(batch.tokens, batch.targets), corpus.validation, LENGTHS, 16, 5
        )
        for length in LENGTHS:
            row = rows[str(scale), length]
            assert row["loss"] == found.loss(length)
            assert (row["difference"], row["difference_error"]) == found.difference(length, 64)
        for size, of_scale in asked.items():
            score = probe_accuracy(model, run_tokenizer(sparse.directory), probes("needle", size, 4))
            row, measured = of_scale[str(scale)], size == 64 or best >= 0.5
            assert row["accuracy"] == (score.accuracy if measured else None)
            assert (row["why"] == "") == measured
    for length in (32, 64):
        assert {**rows["dynamic", length], "scale": "1"} == rows["1", length]
    assert rows["dynamic", 128]["loss"] != rows["1", 128]["loss"]

    for name in ("positions", "probes"):
        with (result.directory / f"{name}.csv").open(newline="") as stream:
            texts = [{key: "" if value is None else str(value) for key, value in row.items()} for row in result[name]]
            assert list(csv.DictReader(stream)) == texts
    assert (result.directory / "evaluation.png").read_bytes().startswith(b"\x89PNG")
    before = {path: path.stat().st_mtime_ns for path in result.directory.iterdir()}
    assert evaluate(config, screen).values == result.values
    assert {path: path.stat().st_mtime_ns for path in result.directory.iterdir()} == before
    show_run(result.directory, screen)
    shown = screen.file.getvalue()  # type: ignore[attr-defined]
    assert "evaluate: already done" in shown
    assert shown.count("Loss over length") == shown.count("Guessing is right in 25 %") == 3


def test_the_verb_takes_the_text_of_the_run_or_another_one(
    sparse: RunResult, tmp_path: Path, screen: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "other.txt").write_text("\n\n".join(f"Line {n} is of another text than before." for n in range(200)))
    small = [f"init_from={sparse.directory}", "probes=[]", "blocks=3", "scales=[1]"]
    own = evaluate(load("evaluate", small), screen)
    assert own.directory.parent == Path("runs")
    assert own.directory.name.startswith("evaluate-sparse-seed0-")
    assert own["corpus"] == sparse["corpus"]
    assert [row["length"] for row in own["positions"]] == [32, 64, 80, 128, 256]
    same = evaluate(EvaluateConfig(str(sparse.directory), probes=[], blocks=3, scales=[1]), screen)
    assert same.directory == own.directory
    other = evaluate(load("evaluate", [*small, "data.path=other.txt", "lengths=[64]"]), screen)
    assert other["corpus"] != own["corpus"]
    assert other["loss_last"] > own["loss_last"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["init_from=null"], "init_from is missing: an evaluation needs a trained model"),
        (["init_from=nowhere"], "init_from=nowhere: no such run directory"),
        (["lengths=[16]"], "lengths: 16 is shorter than width=32"),
        (["lengths=[64,100000]"], "lengths: a pass of 100000 tokens is longer than the validation text of file with"),
        (["lengths=many"], "lengths=many must be a list of positive whole numbers"),
        (["scales=[0.5]"], "scales: 0.5 is neither a number of at least 1 nor dynamic"),
        (["scales=[often]"], "scales: often is neither"),
        (["probes=[needles]"], "probes='needles' is not one of retrieval, needle, title"),
        (["probes=[title]"], "probes: title needs documents with titles"),
        (["sizes=[60]"], "sizes: retrieval: size=60 is too small; a probe of 4 pairs needs 70 bytes"),
        (["n_probes=0"], "n_probes=0 must be at least 1"),
        (["width=65", "lengths=[65]"], "width=65 is more than the trained length of 64 tokens"),
    ],
)
def test_what_cannot_be_evaluated_is_refused(
    sparse: RunResult, words: list[str], message: str, tmp_path: Path, screen: Console
) -> None:
    where = [] if words[0].startswith("init_from") else [f"init_from={sparse.directory}"]
    with pytest.raises(UserError, match=message) as caught:
        evaluate(load("evaluate", [*where, *words, f"run_dir={tmp_path / 'refused'}"]), screen)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "refused").exists()


def test_learned_positions_have_neither_more_tokens_nor_a_scale(configure: Configure) -> None:
    run = configure(PretrainConfig, {"model.positions": "learned"})
    assert check_evaluation(EvaluateConfig("run"), run, None) == ([1.0], [32, 64])
    with pytest.raises(UserError, match="a pass of 65 tokens is longer than the learned positions of the model; at mo"):
        check_evaluation(EvaluateConfig("run", lengths=[65]), run, None)
    with pytest.raises(UserError, match="scales: dynamic needs positions=alibi or rope; the run has positions=learned"):
        check_evaluation(EvaluateConfig("run", scales=[1, "dynamic"]), run, None)


def test_the_trained_length_is_the_models_or_the_longest_context(configure: Configure) -> None:
    phases = [{"share": 0.5, "context": 48}, {"share": 0.5, "context": 24}]
    run = configure(PretrainConfig, {"budget.phases": phases})
    assert (trained_length(run), last_context(run)) == (64, 24)
    run.model["max_context"] = None
    assert trained_length(run) == 48


def test_a_pipeline_evaluates_its_arms(configure: Configure, tmp_path: Path, screen: Console) -> None:
    positions = {"name": "positions", "run": "evaluate", "from": "pretrain", **ASKED, "probes": []}
    changes = {
        "budget.steps": 2,
        "pipeline.arms": {"sparsity.sparsity": [0.0, 0.75]},
        "pipeline.stages": [{"name": "pretrain"}, positions],
    }
    config = configure(PipelineConfig, changes, run_dir=tmp_path / "run")
    planned = [(run.name, run.status, run.trains) for run in plan_of(config).runs]
    assert planned[1] == ("dense/positions", "new", False)
    result = pipeline(config, screen)
    assert result.complete
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    validate_report(report)
    for arm in report["arms"]:
        own = load_result(tmp_path / "run" / arm["name"] / "positions" / "result.json")
        assert arm["stages"]["positions"]["positions"] == own["positions"]
        assert own["loss_last"] == pytest.approx(arm["pretrain"]["loss_last"], rel=1e-6)
        assert len(own["positions"]) == 9
        assert not (tmp_path / "run" / arm["name"] / "positions" / "checkpoints").exists()
    assert report["settings"]["positions"]["lengths"] == LENGTHS
    table, *_ = load_arms([tmp_path / "run"])
    assert {(row["arm"], row["stage"]) for row in table.rows} >= {("dense", "positions"), ("sparse-0.75", "positions")}
    show_arms([tmp_path / "run"], None, screen)

    (tmp_path / "run" / "result.json").unlink()
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").glob("*/*/result.json")}
    assert pipeline(config, screen).complete
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "run").glob("*/*/result.json")} == before


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ([{"name": "seen", "run": "evaluate"}], "stages.1.: an evaluation needs a trained model; add from: STAGE"),
        ([{"name": "evaluate", "from": "pretrain", "lengths": [8]}], "evaluate: lengths: 8 is shorter than width=32"),
        ([{"name": "evaluate", "from": "pretrain", "optimizer": {"lr": 1}}], "optimizer is not a setting of evaluate"),
        (
            [{"name": "evaluate", "from": "pretrain"}, {"name": "finetune", "from": "evaluate"}],
            "stages.2..from=evaluate is an evaluation, which has no weights to start from",
        ),
        (
            [{"name": "evaluate", "from": "pretrain", "lengths": [64, 90000]}],
            "pipeline.stages: evaluate: lengths: a pass of 90000 tokens is longer than",
        ),
        (
            [{"name": "evaluate", "from": "pretrain", "probes": ["title"]}],
            "pipeline.stages: evaluate: probes: title needs documents with titles",
        ),
    ],
)
def test_a_pipeline_refuses_an_evaluation_before_it_trains(
    configure: Configure, stages: list[dict[str, Any]], message: str, tmp_path: Path, screen: Console
) -> None:
    changes = {"pipeline.arms": {}, "pipeline.stages": [{"name": "pretrain"}, *stages]}
    with pytest.raises(UserError, match=message):
        pipeline(configure(PipelineConfig, changes, run_dir=tmp_path / "run"), screen)
    assert not (tmp_path / "run").exists()


def article(number: int) -> str:
    text = f"Patient {number} was seen in the clinic. {'It was a fine day. ' * 12}"
    return (
        f"<PubmedArticle><MedlineCitation><PMID Version='1'>{number}</PMID><Article>"
        f"<ArticleTitle>The title of study {number}.</ArticleTitle><Abstract><AbstractText>{text}</AbstractText>"
        "</Abstract></Article></MedlineCitation></PubmedArticle>"
    )


def test_titles_are_those_of_held_out_abstracts(
    make_wheel: Callable[..., object], tiny: Configure, tmp_path: Path, screen: Console
) -> None:
    make_wheel([article(number) for number in range(10_000, 10_120)], [])
    data = {"tokenizer": "bytes", "context": 16}
    changes = {"data": data, "sparsity.sparsity": 0.0, "budget": {"steps": 1, "batch_size": 4}}
    run = pretrain(tiny(None, changes, run_dir=tmp_path / "run"), screen)
    seen = (run.directory / "train_ids.txt").read_text().split()
    documents = held_out_titles(run_config(run.directory).data, set(seen))
    assert 0 < len(documents) == 120 - len(seen)
    asked = {"probes": ["title"], "sizes": [200], "n_probes": 5, "blocks": 1, "lengths": [16], "width": 8}
    result = evaluate(EvaluateConfig(str(run.directory), run_dir=str(tmp_path / "seen"), **asked), screen)
    # Every size is beyond 32 trained tokens, so that nothing is asked, and the row says why.
    (row,) = [row for row in result["probes"] if row["scale"] == "1"]
    assert (row["n"], row["accuracy"]) == (5, None)
    assert row["why"] == "longer than the trained 32 tokens, and no size lies within"
    assert result["positions"][0]["standard_error"] is None  # of a single block


def test_every_scale_is_measured_beyond_the_trained_length(
    sparse: RunResult, tmp_path: Path, screen: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    accuracies = {1: 0.9, "dynamic": 0.6, 4: 0.7}
    module = sys.modules["sparsetrain.stages.evaluate"]

    def score(model: Transformer, *_: object, per_byte: bool = False) -> ProbeScore:
        return ProbeScore(10, accuracies[model.config.positions_scale], (0.0, 1.0), 0.25)  # type: ignore[index]

    monkeypatch.setattr(module, "probe_accuracy", score)
    config = EvaluateConfig(
        init_from=str(sparse.directory), scales=[1, "dynamic", 4], lengths=[32], width=16, blocks=1,
        probes=["needle"], sizes=[64, 96], n_probes=4, run_dir=str(tmp_path / "scales"),
    )  # fmt: skip
    found = {(row["size"], row["scale"]): row["accuracy"] for row in evaluate(config, screen)["probes"]}
    assert [found[96, scale] for scale in ("1", "dynamic", "4")] == [0.9, 0.6, 0.7]
    assert [found[64, scale] for scale in ("1", "dynamic", "4")] == [0.9, 0.9, 0.7]  # dynamic is 1 within the length
