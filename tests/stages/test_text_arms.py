"""Pipelines of text stages become tables: made-up results of every kind of stage, and a trained pipeline."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console
from shell import Shell

from sparsetrain.cost.flops import matrices
from sparsetrain.errors import UserError
from sparsetrain.models.config import ModelConfig
from sparsetrain.report.arms import read_arms
from sparsetrain.stages.arms import load_arms, show_arms

MODEL = {"d_model": 32, "n_layers": 2, "n_heads": 2, "vocab_size": 50, "max_context": 64, "mlp": "swiglu"}
RESULT = {"status": "complete", "parameterization": "sp", "width": 32, "depth": 2, "lr": 0.5, "commit": "abc"}
STAGES = [{"name": "pretrain"}, {"name": "adapt", "run": "pretrain", "from": "pretrain"}]


def scores(loss: float) -> dict[str, float]:
    return {"val_loss": loss, "bits_per_byte": loss / 2}


def adapted(seed: int) -> dict[str, Any]:
    """The entry of an adaptation on two corpora."""
    moments = {"before": 4.0 + seed, "initialised": 5.0 + seed, "after": 3.0 + seed}
    entry = {"val_loss": moments, "bits_per_byte": {name: loss / 2 for name, loss in moments.items()}}
    tokens = {"tokens_per_word": {"old": 3.5, "new": 1.25}, "tokens_per_byte": {"old": 1.0, "new": 0.25}}
    corpora = {name: {"bytes": 9, **tokens, **entry} for name in ("english", "arabic")}
    counts = {"new_tokens": 4, "new_rows": 4, "new_blocks": 0}
    norms = {"initialised": {}, "after": {}}
    return {"first": "english", "forgetting": -0.5, **counts, "row_norms": norms, "corpora": corpora, "origin": {}}


def position(**row: Any) -> dict[str, Any]:
    every = {"corpus": "english", "scale": "1", "length": 16, "loss": 2.0, "standard_error": None}
    return {**every, "difference": 0.0, "difference_error": None, **row}


def probe(**row: Any) -> dict[str, Any]:
    every = {"kind": "repeat", "size": 64, "tokens": 64, "scale": "1", "n": 9, "accuracy": None}
    return {**every, "ci_low": None, "ci_high": None, "chance": 0.25, "why": "", **row}


def write_stage(directory: Path, seed: int, kind: str, rules: str | None = None, **more: Any) -> None:
    directory.mkdir(parents=True)
    trained = {"steps": 10, "tokens": 49152, "flops": {"total": 1e9}} if kind != "evaluate" else {}
    result = {**RESULT, **trained, "stage": kind, "seed": seed, "sparsity": 0.5, "density": 0.5, "model": MODEL}
    result |= {"loss_last": 3.0 + seed, "bits_per_byte": 1.5 + seed, "masks": {"rule": rules or "Static"}, **more}
    (directory / "config.yaml").write_text(yaml.safe_dump({"seed": seed, "data": {"context": 16}}))
    (directory / "result.json").write_text(json.dumps(result))


def write_pipeline(home: Path, seed: int) -> None:
    """Arms whose order is not that of their names, each with three stages of text."""
    pipeline = {"arms": {"model.positions": ["rope", "alibi"]}, "stages": STAGES}
    shape = {name: MODEL[name] for name in ("d_model", "n_layers", "n_heads")}
    for arm in ("positions-rope", "positions-alibi"):
        corpora = {"english": scores(3.0 + seed), "arabic": scores(6.0 + seed)}
        write_stage(home / arm / "pretrain", seed, "pretrain", corpora=corpora, rules="GMP")
        write_stage(home / arm / "adapt", seed, "adapt", corpora=corpora, adaptation=adapted(seed))
        score = {"context": 16, "loss": 2.0, "bits_per_byte": 1.0, "tokens": 9}
        texts = [{"corpus": name, **score} for name in ("english", "arabic")]
        positions = [
            position(scale=scale, length=length, loss=2.0 + seed) for scale in ("2", "dynamic") for length in (16, 32)
        ]
        probes = [probe(blocks=[1, 2])]
        write_stage(home / arm / "evaluate", seed, "evaluate", texts=texts, positions=positions, probes=probes)
    (home / "config.yaml").write_text(yaml.safe_dump({"seed": seed, "model": shape, "pipeline": pipeline}))
    (home / "result.json").write_text(json.dumps({"stage": "pipeline", "status": "complete"}))


def test_every_stage_of_text_is_a_row_and_evaluations_have_tables(tmp_path: Path) -> None:
    for seed in (0, 1):
        write_pipeline(tmp_path / "runs" / f"seed{seed}", seed)
    table, *_ = load_arms([tmp_path / "runs"])
    by_key = {(row["arm"], row["stage"], row["seed"]): row for row in table.rows}
    arms = ("positions-rope", "positions-alibi")  # as in the pipeline, and its stages in running order
    assert list(by_key) == [
        (arm, stage, seed) for seed in (0, 1) for arm in arms for stage in ("pretrain", "adapt", "evaluate")
    ]
    first, adaptation, evaluation = (by_key["positions-rope", name, 1] for name in ("pretrain", "adapt", "evaluate"))
    weights = sum(matrix.numel for matrix in matrices(ModelConfig(**MODEL)))  # type: ignore[arg-type]
    assert (first["weights"], first["tokens_per_weight"]) == (weights, 49152 / weights)
    assert (first["nonzeros"], first["tokens_per_nonzero"]) == (None, None)  # GMP prunes while it trains
    assert (adaptation["nonzeros"], adaptation["tokens_per_nonzero"]) == (weights // 2, 2 * 49152 / weights)
    assert (evaluation["nonzeros"], evaluation["tokens_per_nonzero"]) == (weights // 2, None)
    assert (first["loss_arabic"], first["bits_per_byte_arabic"]) == (7.0, 3.5)
    # After an adaptation the text is the one that was scored before it.
    assert [adaptation[f"bits_per_byte{moment}_arabic"] for moment in ("_before", "_initialised", "")] == [
        2.5,
        3.0,
        2.0,
    ]
    assert [adaptation[name] for name in ("tokens_per_word_before_arabic", "tokens_per_word_arabic", "forgetting")] == [
        3.5,
        1.25,
        -0.5,
    ]
    assert evaluation["bits_per_byte_english"] == 1.0
    assert [(row["scale"], row["length"]) for row in table.measured["positions"][:4]] == [
        (scale, length) for scale in (2, "dynamic") for length in (16, 32)
    ]
    run = {"arm": "positions-rope", "stage": "evaluate", "seed": 0}
    assert table.measured["probes"][0] == run | probe(scale=1)


def test_a_table_gives_what_its_directories_gave(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for seed in (0, 1):
        write_pipeline(tmp_path / "runs" / f"seed{seed}", seed)
    show_arms([tmp_path / "runs"], tmp_path / "out", Console(width=200))
    said = capsys.readouterr().out.partition("written")[0]
    show_arms([tmp_path / "out" / "results.csv"], None, Console(width=200))
    assert capsys.readouterr().out == said
    for words in ("positions-alibi - positions-rope, adapt, bits per byte, arabic", "Adaptation", "Loss by length"):
        assert words in said
    # Rows of a directory take the place of an earlier table's, of evaluations too.
    path = tmp_path / "out" / "positions.csv"
    path.write_text(path.read_text().replace("32,3.0", "32,9.0"))
    assert {row["loss"] for row in read_arms(path.with_name("results.csv")).measured["positions"]} == {2.0, 3.0, 9.0}
    joined, *_ = load_arms([path.with_name("results.csv"), tmp_path / "runs" / "seed1"])
    assert {row["loss"] for row in joined.measured["positions"]} == {2.0, 3.0}
    assert len(joined.measured["positions"]) == 2 * 2 * 4


@pytest.mark.parametrize(
    ("entries", "said"),
    [
        ({"positions": [position(length=0)]}, r"positions\[0\].length=0 must be a whole number of at least 1"),
        ({"positions": [position()] * 2}, "positions has two rows of arm='dense', stage='evaluate'"),
        ({"probes": [probe(accuracy=2)]}, r"probes\[0\].accuracy=2 must be a number of at most 1"),
        ({"corpora": {"english": {"val_loss": "low"}}}, "corpora.english.val_loss='low' must be a number or null"),
        ({"adaptation": {**adapted(0), "corpora": {"a": {"bytes": 9}}}}, "adaptation.corpora.a.tokens_per_byte is"),
    ],
)
def test_a_result_that_holds_something_else_is_one_line(entries: dict[str, Any], said: str, tmp_path: Path) -> None:
    write_stage(tmp_path / "dense" / "evaluate", 0, "evaluate", **entries)
    (tmp_path / "config.yaml").write_text("seed: 0\n")
    with pytest.raises(UserError, match=said):
        load_arms([tmp_path])


def test_runs_that_are_not_compared_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_stage(tmp_path / "runs" / "other", 0, "adapt")
    said = "no finished run besides 1 that is neither a pre-training nor a stage of a pipeline .*other shows one"
    with pytest.raises(UserError, match=said):
        load_arms([tmp_path / "runs"])
    write_pipeline(tmp_path / "seed0", 0)
    show_arms([tmp_path / "runs", tmp_path / "seed0"], None, Console(width=200))
    assert "not compared: 1 that is neither" in capsys.readouterr().out


def test_a_pipeline_of_two_corpora_without_a_task_reports_each(notes: Path, shell: Shell) -> None:
    other = shell.home / "digits.txt"
    other.write_text("\n\n".join(" ".join(str(number**3) for number in range(at, at + 24)) for at in range(80)))
    words = [word for word in shell.tiny if not word.startswith("data.path")]
    words += [f"data.sources={{prose: {{path: {notes}}}, digits: {{path: {other}}}}}", "pipeline=pretrain"]
    words += ["pipeline.arms={sparsity.sparsity: [0.5], model.positions: [rope]}", "budget.steps=2"]
    words += ["pipeline.stages=[{name: pretrain}, {name: longer, run: pretrain, from: pretrain, budget: {steps: 1}}]"]
    status, out, err = shell.run("pipeline", *words, "run_dir=p")
    assert (status, err) == (0, "")
    assert "Stages of text" in out
    assert "loss-text-0-" in (shell.home / "p" / "report.html").read_text()
    report = json.loads((shell.home / "p" / "report.json").read_text())
    for arm in report["arms"]:
        assert list(arm["texts"]) == ["pretrain", "longer"]
        for name in ("prose", "digits"):
            own = arm["stages"]["longer"]["corpora"][name]
            assert arm["texts"]["longer"]["corpora"][name]["bits_per_byte"] == own["bits_per_byte"]
    status, out, err = shell.run("report", "p/sparse-0.5_positions-rope/pretrain")
    assert (status, err) == (0, "")
    assert "Passes" in out
    status, out, err = shell.run("report", "p", "--out", "table")
    assert (status, err) == (0, "")
    assert "2 finished runs" in out
    assert {path.name for path in (shell.home / "table").iterdir()} == {"results.csv", "figure.png"}
    rows = read_arms(shell.home / "table" / "results.csv").rows
    assert [(row["arm"], row["stage"]) for row in rows] == [
        ("sparse-0.5_positions-rope", stage) for stage in ("pretrain", "longer")
    ]
    assert rows[1]["bits_per_byte_digits"] == report["arms"][0]["texts"]["longer"]["corpora"]["digits"]["bits_per_byte"]
