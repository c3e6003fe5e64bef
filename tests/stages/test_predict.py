"""Labels of new rows: as the run's own evaluation predicts them, from its directory alone, in every format."""

from __future__ import annotations

import csv
import io
import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from rich.console import Console

import sparsetrain
from sparsetrain.cli import main
from sparsetrain.data import TaskConfig, load_task
from sparsetrain.errors import UserError
from sparsetrain.stages import (
    FinetuneConfig,
    GenerateConfig,
    PredictConfig,
    PromptConfig,
    finetune,
    generate,
    predict,
    prompt,
)
from sparsetrain.stages.loaded import load
from sparsetrain.stages.task_form import FORMS, run_form

COLOURS = ("red", "redder", 'blue, "dark"')  # one begins another, and one has a comma and quotes
ANSWERS = dict(zip(COLOURS, (" k", " kz", " q"), strict=True))
COUNT = 90
# Large initial weights give a model whose answers differ from text to text.
VARIED = {"model.init_std": 1.0, "budget.steps": 1}


def rows(kind: str) -> list[dict[str, Any]]:
    """Return rows of a task, a third to test with, whose texts have every mark that a cell may need to protect."""
    draw, found = random.Random(kind), []
    for number in range(COUNT):
        split = ("train", "train", "test", "train", "validation", "test")[number % 6]
        colour = draw.choice(COLOURS)
        # Some texts are longer than the context, and lose their beginning.
        text = f'{"long " * draw.choice([0, 1, 30])}{colour[0] * draw.randint(1, 3)}, "{number}"\n{colour[-1] * 3}'
        row: dict[str, Any] = {"id": f"r{number // 2 * 2}", "text": text, "split": split, "n": number}
        if kind == "several_labels":
            row["label"] = [name for name in COLOURS if draw.random() < 0.4] or [COLOURS[0]]
        elif kind == "multiple_choice":
            row |= {"a": f"{number * 37 % 89} it", "b": f"{number * 53 % 97} at", "label": draw.choice("ab")}
        else:
            row["label"] = colour
        found.append(row)
    return found


RUNS: dict[str, tuple[str, dict[str, Any]]] = {
    "one_label": ("finetune", {"mode": "dense", "task.answers": ANSWERS, "task.template": "{n}: {text}"}),
    "several_labels": (
        "finetune",
        {
            "mode": "sparse",
            "task.label_separator": "; ",
            "task.length_rule": "byte",
            "task.template": "{label}? {text}",
        },
    ),
    "multiple_choice": ("prompt", {"n_tokens": 3, "position": "front", "train": "both", "task.choices": ["a", "b"]}),
    "free_answer": (
        "prompt",
        {"n_tokens": 2, "train": "prompt", "task.kind": "free_answer", "task.max_new_tokens": 14},
    ),
}


@pytest.fixture(scope="module")
def run_on(
    trained: Callable[..., Path], configure: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Path]:
    """Return a finished run on rows of a kind, alone in a directory of its own; what it was made from is gone."""
    home = tmp_path_factory.mktemp("tasks")
    done: dict[str, Path] = {}

    def train(kind: str) -> Path:
        if kind not in done:
            verb, changes = RUNS[kind]
            labelled = home / f"{kind}.jsonl"
            labelled.write_text("".join(json.dumps(row) + "\n" for row in rows(kind)))
            base = shutil.copytree(trained(VARIED), home / f"base-{kind}")
            given = {
                **changes,
                "task.name": "file",
                "task.path": str(labelled),
                "budget.steps": 12,
                "optimizer.lr": 1e-2,
            }
            top = {"init_from": base, "run_dir": home / f"made-{kind}"}
            config = configure(FinetuneConfig if verb == "finetune" else PromptConfig, given, **top)
            (finetune if verb == "finetune" else prompt)(config, Console(file=io.StringIO()))
            done[kind] = (home / f"made-{kind}").rename(home / f"moved-{kind}")
            labelled.unlink()
            shutil.rmtree(base)
        return done[kind]

    return train


def write(path: Path, content: list[dict[str, Any]]) -> None:
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in content))
    elif path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(content), path)
    else:
        with path.open("w", newline="", encoding="utf-8-sig") as stream:
            writer = csv.DictWriter(stream, content[0])
            writer.writeheader()
            writer.writerows(content)


def read(path: Path) -> list[dict[str, Any]]:
    if path.suffix == ".jsonl":
        return [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    if path.suffix == ".parquet":
        found: list[dict[str, Any]] = pq.read_table(path).to_pylist()
        return found
    with path.open(newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream, strict=True))


def apply(run: Path, source: Path, target: Path, **settings: Any) -> list[dict[str, Any]]:
    predict(PredictConfig(str(run), str(source), str(target), **settings), Console(file=io.StringIO()))
    return read(target)


@pytest.mark.parametrize(
    ("kind", "suffix"),
    [("one_label", ".csv"), ("several_labels", ".jsonl"), ("multiple_choice", ".parquet"), ("free_answer", ".csv")],
)
def test_labels_of_test_rows_are_those_of_the_evaluation(
    run_on: Callable[[str], Path], tmp_path: Path, kind: str, suffix: str
) -> None:
    run, content = run_on(kind), [{k: v for k, v in row.items() if k != "label"} for row in rows(kind)]
    with (run / "predictions.csv").open(newline="") as stream:
        told = list(csv.DictReader(stream))
    tested = [row for row in content if row["split"] == "test"]
    assert [row["id"] for row in told] == [row["id"] for row in tested]
    # The test rows alone and, for one kind, among all rows, where the batches are others.
    for name, given in (("tested", tested), ("all", content))[: 1 + (kind == "one_label")]:
        write(tmp_path / f"{name}{suffix}", given)
        found = apply(run, tmp_path / f"{name}{suffix}", tmp_path / f"labelled-{name}{suffix}")
        assert [list(row)[: len(given[0])] for row in found] == [list(row) for row in given]
        plain = {".csv": lambda row: {key: str(value) for key, value in row.items()}}.get(suffix, dict)
        assert [{key: row[key] for key in given[0]} for row in found] == [plain(row) for row in given]
        found = [row for row, before in zip(found, given, strict=True) if before["split"] == "test"]
        labels = [row["label"] for row in found]
        labels = ["; ".join(label) if isinstance(label, list) else label for label in labels]
        assert labels == [row["predicted"] for row in told]
        scores = [key for key in found[0] if key.startswith("score_")]
        assert scores == [key for key in told[0] if key.startswith("score_")]
        assert len(scores) == {"free_answer": 0, "multiple_choice": 2}.get(kind, 3)
        for row, before in zip(found, told, strict=True):
            for key in scores:
                assert float(row[key]) == pytest.approx(float(before[key]), rel=1e-4, abs=1e-6)
        if scores:  # else equal labels would say little
            assert len({tuple(row[key] for key in scores) for row in found}) > 1


def test_a_run_is_loaded_from_its_directory_alone(run_on: Callable[[str], Path]) -> None:
    run = run_on("one_label")
    found = sparsetrain.load(run)
    ids = found.tokenizer.encode("red")
    assert isinstance(ids, list)
    assert found.model(torch.tensor([ids])).shape == (1, len(ids), found.tokenizer.vocab_size)
    assert found.task is not None
    assert found.task.labels == tuple(sorted(COLOURS))
    assert found.prompt is None
    with (run / "predictions.csv").open(newline="") as stream:
        told = [row["predicted"] for row in csv.DictReader(stream)]
    tested = [row for row in rows("one_label") if row["split"] == "test"]
    labelled = found.predict(tested, batch=7)
    assert [each.label for each in labelled] == told
    assert all(sum(each.scores.values()) == pytest.approx(1.0) for each in labelled)
    assert found.predict([]) == []
    with pytest.raises(UserError, match=r"a row has the columns n, text; give them by their names"):
        found.predict(["text"])
    with pytest.raises(UserError, match=r"row 1: no column 'text' of the template"):
        found.predict([tested[0], {"n": 1}])


def test_a_soft_prompt_is_loaded_and_used(run_on: Callable[[str], Path]) -> None:
    found, without = sparsetrain.load(run_on("multiple_choice")), load(run_on("multiple_choice"), soft_prompt=False)
    assert found.prompt is not None
    assert found.prompt.vectors.shape == (3, 32)
    row = {"text": "red", "a": "one", "b": "other"}
    assert found.predict([row])[0].scores != without.predict([row])[0].scores
    assert list(found.predict([row])[0].scores) == ["a", "b"]
    assert without.prompt is None


def test_runs_of_other_kinds_are_loaded(trained: Callable[..., Path], tmp_path: Path) -> None:
    base = shutil.copytree(trained(), tmp_path / "base")
    found = load(base)
    assert (found.task, found.prompt, found.context) == (None, None, 64)
    text = generate(GenerateConfig(str(base), prompt="Note", temperature=0.0, max_new_tokens=9))
    assert text == "Note" + found.generate("Note", max_new_tokens=9)
    with pytest.raises(UserError, match="was trained on no task"):
        found.predict(["Note"])
    with pytest.raises(UserError, match=r"question: .* has no task"):
        found.generate("Note", question="why")
    with pytest.raises(UserError, match=r"init_from=.*nowhere: no such run directory"):
        load(tmp_path / "nowhere")
    (tmp_path / "pipeline" / "arm").mkdir(parents=True)
    base.rename(tmp_path / "pipeline" / "arm" / "pretrain")
    with pytest.raises(UserError, match=r"is a pipeline, .* one of its runs: arm/pretrain"):
        load(tmp_path / "pipeline")
    assert load(tmp_path / "pipeline" / "arm" / "pretrain").context == 64


@pytest.fixture(scope="module")
def on_questions(trained: Callable[..., Path], configure: Callable[..., Any], tmp_path_factory: Any) -> Path:
    """A run on PubMedQA as an older version left it, without ``task.json``."""
    directory: Path = tmp_path_factory.mktemp("questions") / "run"
    config = configure(FinetuneConfig, {"budget.steps": 2}, init_from=trained(VARIED), run_dir=directory)
    finetune(config, Console(file=io.StringIO()))
    assert run_form(directory) == FORMS["pubmedqa"] == load_task(config.task).form
    (directory / "task.json").unlink()
    return directory


def test_a_run_without_task_json_has_the_form_of_its_task(
    on_questions: Path, questions: Path, tmp_path: Path, small_medline: object
) -> None:
    assert load_task(TaskConfig("section_roles")).form == FORMS["section_roles"]
    content = json.loads((questions / "ori_pqal.json").read_text())
    tested = json.loads((questions / "test_ground_truth.json").read_text())
    write(
        tmp_path / "new.jsonl",
        [{"pmid": i, "context": content[i]["CONTEXTS"], "question": content[i]["QUESTION"]} for i in tested],
    )
    found = {row["pmid"]: row["label"] for row in apply(on_questions, tmp_path / "new.jsonl", tmp_path / "out.jsonl")}
    with (on_questions / "predictions.csv").open(newline="") as stream:
        assert found == {row["id"]: row["predicted"] for row in csv.DictReader(stream)}
    other = shutil.copytree(on_questions, tmp_path / "own")
    (other / "config.yaml").write_text((other / "config.yaml").read_text().replace("name: pubmedqa", "name: mine"))
    with pytest.raises(UserError, match=r"it has no task\.json, so that its labels are unknown"):
        apply(other, tmp_path / "new.jsonl", tmp_path / "out.jsonl")
    assert load(other).task is None


def test_generation_asks_with_the_cue_of_the_task(on_questions: Path, run_on: Callable[[str], Path]) -> None:
    def text(run: Path, prompt: str, **settings: Any) -> str:
        return generate(GenerateConfig(str(run), prompt=prompt, temperature=0.0, max_new_tokens=5, **settings))

    asked = "Drug 1.\nquestion: does it help?\nanswer:"
    told = text(on_questions, "Drug 1.", columns={"question": "does it help?"})
    assert told.startswith(asked)
    assert told == text(on_questions, asked, cue=False)
    assert told == asked + load(on_questions).generate("Drug 1.", max_new_tokens=5, question="does it help?")
    assert text(on_questions, "Drug 1. Does it?") == text(on_questions, "Drug 1. Does it?\nanswer:", cue=False)
    run = run_on("free_answer")
    assert text(run, "red") == text(run, "red\nanswer:", cue=False)
    several = run_on("several_labels")
    assert text(several, "red", columns={"label": "cold"}) == text(several, "cold? red", cue=False)
    for settings, said in (
        ({"columns": {"questions": "?"}}, r"columns\.questions: .* \(did you mean 'question'\?\)"),
        ({"columns": {"question": "?", "context": "!"}}, r"columns gives all that the task asks with"),
        ({"columns": {"question": "?"}, "cue": False}, r"columns=.*: cue=false, so that there is no template"),
    ):
        with pytest.raises(UserError, match=said):
            text(on_questions, "Drug 1.", **settings)
    with pytest.raises(UserError, match=r"asks with text and label; .* 'columns=\{label: \.\.\.\}'"):
        text(several, "red")


def test_columns_of_other_names_and_labels_that_are_there(run_on: Callable[[str], Path], tmp_path: Path) -> None:
    run, given = (
        run_on("one_label"),
        [{"n": row["n"], "abstract": row["text"], "label": "x"} for row in rows("one")[:3]],
    )
    write(tmp_path / "new.csv", given)
    found = apply(run, tmp_path / "new.csv", tmp_path / "one.jsonl", columns={"text": "abstract"})
    assert [list(row)[:4] for row in found] == [["n", "abstract", "label", "predicted"]] * 3
    again = {"columns": {"text": "abstract"}, "prefix": "second_"}
    found = apply(run, tmp_path / "one.jsonl", tmp_path / "two.csv", **again)
    assert list(found[0])[-5:-3] == [f"score_{sorted(COLOURS)[-1]}", "second_label"]
    assert [row["second_label"] for row in found] == [row["predicted"] for row in found]


@pytest.mark.parametrize(
    ("content", "settings", "said"),
    [
        ("", {}, "input=new.csv: the file is empty"),
        ("text\n", {}, "new.csv has no column 'n'; it has text"),
        ("n,text\n", {}, "input=new.csv: the file has no rows"),
        ("n,texts\n1,a\n", {}, "new.csv has no column 'text' (did you mean 'texts'?)"),
        ("n,text\n1,a\n2\n", {}, "new.csv, line 3: 1 cells, but the header has 2 columns"),
        ("n,text\n1,a\n", {"columns": "{text: body}"}, "columns.text=body: new.csv has no column 'body'"),
        ("n,text\n1,a\n", {"columns": "{txt: body}"}, "columns.txt: the task asks with n, text"),
        ("n,text,score_red\n1,a,1\n", {}, "has a column 'score_red' already; prefix=TEXT_"),
        ("n,text,label,predicted\n1,a,b,c\n", {}, "has a column 'predicted' already; prefix=TEXT_"),
        ("n,text\n1,a\n", {"output": "new.csv"}, "output=new.csv is the input"),
        ("n,text\n1,a\n", {"output": "out.txt"}, "output=out.txt: .txt is no table"),
        ("n,text\n1,a\n", {"output": "RUN/predictions.csv"}, "is the record of a run"),
        ("n,text\n1,a\n", {"input": "news.csv"}, "input=news.csv: no such file (did you mean 'new.csv'?)"),
        ("n,text\n1,a\n", {"init_from": "runs/none"}, "init_from=runs/none: no such run directory"),
        ("n,text\n1,a\n", {"input": None}, "input is missing"),
    ],
)
def test_what_cannot_be_labelled_gets_one_line(
    run_on: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    content: str,
    settings: dict[str, Any],
    said: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    run = run_on("one_label")
    Path("new.csv").write_text(content)
    given = {"init_from": run, "input": "new.csv", "output": "out.csv", **settings}
    words = [f"{name}={value}".replace("RUN", str(run)) for name, value in given.items() if value is not None]
    assert main(["predict", *words]) == 2
    error = capsys.readouterr().err.rstrip("\n")
    assert said in error
    assert "\n" not in error
    assert Path("new.csv").read_text() == content
    assert [path.name for path in Path().iterdir()] == ["new.csv"]
