"""Runs on rows of a user's file, of every kind of task: what they write, and that they learn it."""

from __future__ import annotations

import csv
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sparsetrain.data import load_task
from sparsetrain.data.tasks.form import Form
from sparsetrain.report.show import show_run
from sparsetrain.stages import FinetuneConfig, PipelineConfig, PromptConfig, finetune, pipeline, prompt

FILE = {"name": "file", "n_train": None, "n_validation": None, "n_test": None}


def rows_of(kind: str) -> list[dict[str, Any]]:
    draw = random.Random(0)
    found = []
    for n in range(60):
        marks = [mark for mark in "+-" if draw.random() < 0.5]
        truth: Any = marks
        if kind == "one_label":
            truth = {"": "no", "+": "non", "-": "none", "+-": "none"}["".join(marks)]
        elif kind != "several_labels":
            truth = "yes" if "+" in marks else "no"
        choices = {"A": "yes", "B": "no", "C": "it is so" if n % 2 else ""} if kind == "multiple_choice" else {}
        found.append({"id": f"r{n}", "text": f"{n} {''.join(marks)}", "label": truth, **choices})
    return found


def settings(path: Path, kind: str, **more: Any) -> dict[str, Any]:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows_of(kind)))
    choices = {"choices": ["A", "B", "C"]} if kind == "multiple_choice" else {}
    free = {"kind": kind, "max_new_tokens": 5} if kind == "free_answer" else {}
    return {"task": {**FILE, "path": str(path), **choices, **free, **more}, "budget.steps": 8, "loop.eval_every": 4}


def predictions(directory: Path) -> list[dict[str, str]]:
    with (directory / "predictions.csv").open(newline="") as stream:
        return list(csv.DictReader(stream))


@pytest.mark.parametrize("kind", ["one_label", "several_labels", "multiple_choice", "free_answer"])
@pytest.mark.parametrize("soft", [False, True])
def test_a_run_of_every_kind_is_scored_and_writes_its_predictions(
    kind: str, soft: bool, trained: Callable[..., Path], configure: Any, tmp_path: Path, screen: Any
) -> None:
    changes = settings(tmp_path / "a.jsonl", kind, length_rule="byte" if kind == "multiple_choice" else None)
    config, run = (PromptConfig, prompt) if soft else (FinetuneConfig, finetune)
    if soft:
        changes |= {"n_tokens": 2, "train": "both"}
    made = configure(config, changes, init_from=trained(), run_dir=tmp_path / "run")
    result = run(made, screen)
    task = load_task(made.task)
    rows = predictions(result.directory)
    assert [row["id"] for row in rows] == [example.id for example in task.test]
    said = {row["id"]: row["label"] for row in rows_of(kind)}
    for row in rows:
        truth = said[row["id"]]
        assert row["label"] == ("|".join(sorted(truth)) if kind == "several_labels" else truth)
    if kind == "free_answer":
        right = sum(int(row["exact"]) for row in rows)
        assert result["token_f1"] == pytest.approx(sum(float(row["f1"]) for row in rows) / len(rows), abs=1e-5)
    else:
        right = sum(row["label"] == row["predicted"] for row in rows)
        check_scores(kind, rows, task.labels)
    assert (result["n_test"], result["kind"]) == (len(rows), kind)
    assert result["accuracy"] == pytest.approx(right / len(rows))
    assert ("bag_of_words" in result.values) == (kind in ("one_label", "several_labels"))
    assert Form.load(result.directory / "task.json") == task.form
    show_run(result.directory, screen)
    shown = screen.file.getvalue()
    assert "this model" in shown
    assert ("Labels" in shown) == ("per_label" in result.values) == (kind in ("one_label", "several_labels"))


def check_scores(kind: str, rows: list[dict[str, str]], labels: tuple[str, ...]) -> None:
    """Check that what is predicted follows from the scores of a row."""
    for row in rows:
        scores = [row[f"score_{label}"] for label in labels]
        shares = [float(score) for score in scores if score]
        if kind == "several_labels":
            held = [label for label, share in zip(labels, shares, strict=True) if share > 0.5]
            assert row["predicted"] == "|".join(held)
            continue
        assert sum(shares) == pytest.approx(1.0, abs=1e-4)
        best = labels[shares.index(max(shares))]
        texts = {"A": "yes", "B": "no", "C": "it is so"}
        assert row["predicted"] == (texts[best] if kind == "multiple_choice" else best)


def test_a_file_is_learned(trained: Callable[..., Path], configure: Any, tmp_path: Path, screen: Any) -> None:
    rows = [{"text": f"{n} {'+-'[n % 2] * 6}", "label": ("good", "bad")[n % 2]} for n in range(80)]
    path = tmp_path / "a.csv"
    with path.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, ["text", "label"])
        writer.writeheader()
        writer.writerows(rows)
    changes = {"task": {**FILE, "path": str(path)}, "budget.steps": 80, "loop.eval_every": 0}
    changes |= {"optimizer.lr": 1.5e-2, "budget.batch_size": 8}
    result = finetune(configure(FinetuneConfig, changes, init_from=trained(), run_dir=tmp_path / "run"), screen)
    assert result["accuracy"] >= 0.9
    assert result["overlap_text"] == {"rows": None, "why": "the training text is not in the cache"}


def test_artificial_questions_come_first_and_then_the_labelled_ones(
    configure: Any, tmp_path: Path, questions: Path, screen: Any
) -> None:
    folder = tmp_path / "questions"
    folder.mkdir()
    for name in ("ori_pqal.json", "test_ground_truth.json"):
        (folder / name).write_text((questions / name).read_text())
    made = {
        str(number): {"QUESTION": f"{number}: {'+-'[number % 2]}", "CONTEXTS": [], "final_decision": said}
        for number in range(40)
        for said in [("yes", "no")[number % 2]]
    }
    known = next(iter(json.loads((questions / "ori_pqal.json").read_text())))
    (folder / "ori_pqaa.json").write_text(json.dumps(made | {known: made["0"]}))
    run = {"optimizer": {"lr": 4e-3}, "budget": {"steps": 4, "batch_size": 4}}
    task = {"name": "pubmedqa", "path": str(folder)}
    stages = [
        {"name": "pretrain"},
        {"name": "artificial", "run": "finetune", "from": "pretrain", "task": {**task, "subset": "artificial"}, **run},
        {"name": "finetune", "from": "artificial", "task": task, **run},
    ]
    changes = {"pipeline.stages": stages, "pipeline.arms": {"sparsity.sparsity": [0.75]}, "budget.steps": 4}
    result = pipeline(configure(PipelineConfig, changes, run_dir=tmp_path / "p"), screen)
    arm = result.directory / "sparse-0.75"
    first, second = (json.loads((arm / name / "result.json").read_text()) for name in ("artificial", "finetune"))
    assert second["init_from"] == str(arm / "artificial")
    # A tenth of the made questions is held out, and the one that has a labelled question's PMID is left out.
    assert (first["n_train"], second["n_train"], first["n_test"], second["n_test"]) == (36, 36, 20, 20)
    assert [row["label"] for row in predictions(arm / "artificial")] == [
        row["label"] for row in predictions(arm / "finetune")
    ]
    report = json.loads((result.directory / "report.json").read_text())
    assert report["majority"] == second["majority"]
    assert report["bag_of_words"] == second["bag_of_words"]
    shown = screen.file.getvalue()
    assert "bag of words" in shown
    assert "sparse-0.75/artificial" in (result.directory / "report.html").read_text()
