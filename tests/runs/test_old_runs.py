"""Runs of an earlier version, moved together with their text: found again, resumed, extended.

``tests/data/old_runs/README.md`` describes how they were made. The path of the text that they recorded is gone.
"""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from fresh import Fresh

OLD = Path(__file__).parents[1] / "data" / "old_runs"
TINY = [
    *("model=tiny", "model.d_model=16", "model.n_layers=1", "data.tokenizer=bytes", "data.context=16"),
    *("parameterization.base_width=8", "budget.batch_size=4", "loop.log_every=1", "loop.eval_every=3"),
    *("loop.eval_sequences=4", "loop.keep_last=1", "device=cpu", "threads=1"),
]
FINISHED = ["budget.steps=6", "sparsity.sparsity=0.75"]
STOPPED = ["sparsity=rigl", "sparsity.sparsity=0.75", "sparsity.evolution.every=2", "model.dropout=0.1"]
NAMED = ["budget.tokens=256", "sparsity=dense", "loop.accumulation=2"]
SWEEP = ["model.d_model=8", "budget.epochs=0.1", "sparsity.sparsity=0.5"]
PIPELINE = [
    *("model.d_model=4", "parameterization.base_width=4", "data.context=32", "sparsity.sparsity=0.5", "budget.steps=4"),
    "task=pubmedqa",
    "pipeline.stages=[{name: pretrain}, {name: finetune, from: pretrain, budget: {epochs: 1, batch_size: 4}}, "
    "{name: prompt, from: pretrain, train: both, n_tokens: 2, budget: {steps: 3, batch_size: 4}}]",
]


@pytest.fixture
def moved(tmp_path: Path) -> Path:
    """The old runs and their text in another place."""
    return Path(shutil.copytree(OLD, tmp_path / "moved"))


def contents(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def only(directory: Path) -> Path:
    (found,) = directory.iterdir()
    return found


def losses(directory: Path, key: str) -> dict[str, float]:
    records = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return {str(record["step"]): record[key] for record in records if key in record}


@pytest.mark.parametrize("missing", [[], ["corpus", "source"]], ids=["as it was", "of a still older version"])
def test_a_finished_run_is_found_by_what_it_is(moved: Path, shell: Any, missing: list[str]) -> None:
    """Its name ends in a hash that nothing computes today, and the recorded path of its text is gone."""
    run = only(moved / "finished")
    config = yaml.safe_load((run / "config.yaml").read_text())
    for key in missing:
        del config[key]
    (run / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    before = contents(run)
    words = [*TINY, *FINISHED, f"data.path={moved}/notes.txt", f"runs_dir={moved}/finished"]
    status, out, err = shell.run("pretrain", *words)
    assert (status, err) == (0, "")
    assert f"pretrain: already done in {run}" in "".join(out.split("\n"))
    assert only(moved / "finished") == run
    assert contents(run) == before


@pytest.mark.parametrize("change", ["setting", "text"])
def test_another_run_is_not_taken_for_it(moved: Path, shell: Any, change: str) -> None:
    old, text = only(moved / "finished"), moved / "notes.txt"
    settings = ["optimizer.lr=1e-3"] if change == "setting" else []
    if change == "text":
        text.write_text(text.read_text() + "\n\nOne paragraph more.\n")
    words = [*TINY, *FINISHED, *settings, f"data.path={text}", f"runs_dir={moved}/finished"]
    status, out, err = shell.run("pretrain", *words)
    assert status == 0, err
    assert "already done" not in out
    assert len([path for path in (moved / "finished").iterdir() if path != old]) == 1


def test_a_stopped_run_goes_on_to_the_numbers_of_an_uninterrupted_one(moved: Path, shell: Any) -> None:
    run = only(moved / "stopped")
    words = [*TINY, *STOPPED, "budget.steps=6", f"data.path={moved}/notes.txt", f"runs_dir={moved}/stopped"]
    status, out, err = shell.run("pretrain", *words)
    assert status == 0, err
    assert "resuming after step 3 of 6" in out
    assert only(moved / "stopped") == run
    expected = json.loads((OLD / "uninterrupted.json").read_text())
    for key, values in expected.items():
        assert losses(run, key) == pytest.approx(values, rel=1e-4), key
    assert json.loads((run / "result.json").read_text())["status"] == "complete"


def test_a_named_run_is_done_and_refuses_another_configuration(moved: Path, shell: Any) -> None:
    words = [*TINY, *NAMED, f"data.path={moved}/notes.txt", f"run_dir={moved}/named"]
    before = contents(moved / "named")
    status, out, err = shell.run("pretrain", *words)
    assert (status, err) == (0, "")
    assert "pretrain: already done in" in out
    status, _, err = shell.run("pretrain", *words, "budget.tokens=512")
    assert status == 2
    assert "budget.tokens=512 (there: 256)" in err
    assert contents(moved / "named") == before


def test_a_sweep_trains_the_new_point_alone(moved: Path, shell: Any) -> None:
    runs = moved / "sweep" / "runs"
    old = {path: contents(path) for path in runs.iterdir()}
    words = [*TINY, *SWEEP, "optimizer.lr=2e-3,4e-3,8e-3", f"data.path={moved}/notes.txt", f"runs_dir={runs}"]
    status, out, err = shell.run("pretrain", "-m", *words)
    assert status == 0, err
    assert "3 points, 2 already finished, 1 to run" in out
    assert {path: contents(path) for path in old} == old
    (new,) = (path for path in runs.iterdir() if path not in old)

    # Old runs give the same rows from their directories as from the old table.
    table = moved / "sweep" / "results.csv"
    before = list(csv.DictReader(table.read_text().replace("train_flops", "flops", 1).splitlines()))  # renamed since
    for places in ([runs], [table, new]):
        status, _, err = shell.run("sweep", *map(str, places), "--out", str(moved / "out"))
        assert status == 0, err
        after = list(csv.DictReader((moved / "out" / "results.csv").read_text().splitlines()))
        assert [{name: row[name] for name in before[0]} for row in after[:2]] == before
        # Renamed settings and moved files add no column. These are newer than the table.
        newer = {"weights", "nonzeros", "tau", "tokens_per_weight", "tokens_per_nonzero"}
        assert after[0].keys() - before[0].keys() == newer
        assert (after[0]["tau"] == "") == (places[0] == table)
        assert [row["lr"] for row in after] == ["0.002", "0.004", "0.008"]


@pytest.mark.parametrize("finished", [True, False])
def test_a_pipeline_is_done_or_goes_on_behind_its_last_stage(moved: Path, shell: Any, finished: bool) -> None:
    directory = moved / "pipeline"
    if not finished:
        report = json.loads((directory / "report.json").read_text())
        for name in ("result.json", "report.json"):
            (directory / name).unlink()
    stages = {path: contents(path) for path in directory.glob("*/*")}
    assert len(stages) == 6
    words = [*TINY, *PIPELINE, f"data.path={moved}/notes.txt", f"task.path={moved}/questions", f"run_dir={directory}"]
    status, out, err = shell.run("pipeline", *words)
    assert status == 0, err
    assert out.count("already done in") == (1 if finished else 6)
    assert {path: contents(path) for path in directory.glob("*/*")} == stages
    if not finished:
        again = json.loads((directory / "report.json").read_text())
        assert [arm["curves"] for arm in again["arms"]] == [arm["curves"] for arm in report["arms"]]


def test_another_run_starts_from_an_old_one(moved: Path, shell: Any) -> None:
    words = ["task=pubmedqa", f"task.path={moved}/questions", "budget.steps=2", "budget.batch_size=4", "device=cpu"]
    start = f"init_from={only(moved / 'finished')}"
    status, _, err = shell.run("finetune", start, *words, "mode=sparse", "run_dir=tuned", "data.context=32")
    assert status == 0, err
    result = json.loads((shell.home / "tuned" / "result.json").read_text())
    assert (result["steps"], result["density"]) == (2, 0.25)


LATER = """
import dataclasses, json, sys
import sparsetrain.training.state as state
later = [("average", float, dataclasses.field(default=0.99))]
state.LoopConfig = dataclasses.make_dataclass("LoopConfig", later, bases=(state.LoopConfig,))
from sparsetrain.cli import main
for words in json.loads(sys.argv[1]):
    print("status", main(words))
    print("status", main([*words, "loop.average=0.5"]))
"""


@pytest.mark.slow
def test_a_setting_that_came_later_orphans_neither_a_run_nor_a_sweep(fresh: Fresh, moved: Path) -> None:
    """A field of the loop that no old directory records changes nothing at its default, which is not None."""
    given = {
        moved / "finished": ["pretrain", *TINY, *FINISHED],
        moved / "sweep" / "runs": ["pretrain", "-m", *TINY, *SWEEP, "optimizer.lr=2e-3,4e-3"],
    }
    before = {place: set(place.iterdir()) for place in given}
    commands = [[*words, f"data.path={moved}/notes.txt", f"runs_dir={place}"] for place, words in given.items()]
    run = fresh.run(LATER, json.dumps(commands), cwd=moved)
    assert run.returncode == 0, run.stderr
    *said, _ = run.stdout.split("status 0")
    for place, first, second in zip(given, said[::2], said[1::2], strict=True):
        assert first.count("already done in") == len(before[place])
        assert "already done" not in second
        # A value other than the default is another run.
        assert len(set(place.iterdir()) - before[place]) == len(before[place])
