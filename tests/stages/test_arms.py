"""Tables of arms from directories: the committed experiments are written as runs and read back."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console

from sparsetrain.errors import UserError
from sparsetrain.report.arms import Arms, read_arms
from sparsetrain.report.arms_plots import arms_figure
from sparsetrain.report.bars import bars, markdown
from sparsetrain.stages.arms import load_arms, show_arms, shows_arms

EXPERIMENTS = Path(__file__).parents[2] / "experiments"
MEDISWIFT, MASKS = (EXPERIMENTS / name for name in ("mediswift_pipeline", "dynamic_masks"))
MODEL = {"d_model": 128, "n_layers": 4, "n_heads": 4, "vocab_size": 2048, "max_context": 256, "sparsity": 0.0}


def write_run(directory: Path, row: dict[str, Any], config: dict[str, Any], **result: Any) -> None:
    directory.mkdir(parents=True)
    interval = None if row.get("ci_low") is None else [row["ci_low"], row["ci_high"]]
    content = {**row, "loss_last": row["loss"], "flops": {"total": row["flops"]}, "ci95": interval, **result}
    (directory / "config.yaml").write_text(yaml.safe_dump({"seed": row["seed"], **config}))
    (directory / "result.json").write_text(json.dumps(content))


def one_pipeline(row: dict[str, Any]) -> str:
    """One pipeline per seed; stages on another task have its name as prefix."""
    prefix = f"{row['task']}-" if row["task"] == "pubmedqa" else ""
    return f"seed{row['seed']}/{row['arm']}/{prefix}{row['stage']}"


def beside_pipeline(row: dict[str, Any]) -> str:
    """Stages that a three-stage pipeline lacks lie beside it, in one directory per task."""
    inside = row["stage"] in ("pretrain", "finetune", "prompt") and row["task"] != "pubmedqa"
    return f"seed{row['seed']}{'' if inside else '-' + row['task']}/{row['arm']}/{row['stage']}"


def write_pipelines(out: Path, table: Arms, place: Callable[[dict[str, Any]], str] = one_pipeline) -> None:
    for row in table.rows:
        stage = row["stage"].partition("-")[0]
        config = {"data": {"context": 256}, "source": f"of seed {row['seed']}"}
        write_run(out / place(row), row, config, stage=stage, model=MODEL)
    for seed in {row["seed"] for row in table.rows}:
        (out / f"seed{seed}" / "config.yaml").write_text(yaml.safe_dump({"seed": seed, "optimizer": {"lr": 0.008}}))
        (out / f"seed{seed}" / "result.json").write_text(json.dumps({"stage": "pipeline", "status": "complete"}))


def write_masks(out: Path) -> Arms:
    table = read_arms(MASKS / "results.csv")
    for number, row in enumerate(table.rows):
        directory = out / f"{number:02}"
        layers = {"a": {"dead_rows": row["dead_rows"]}, "b": {"dead_rows": 0}}
        masks = {key: row[key] for key in ("itop_rate", "mask_overlap")} | {"layers": layers}
        config = {"sparsity": {"evolution": {"rule": row["rule"]}}, "optimizer": {"lr": row["lr"]}}
        write_run(directory, row, config, stage="pretrain", masks=masks)
        records = [
            {"step": step, "density": row["density"], "itop_rate": step / row["steps"]} for step in (0, row["steps"])
        ]
        (directory / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return table


@pytest.mark.parametrize("place", [one_pipeline, beside_pipeline])
def test_pipelines_give_the_rows_and_bars_on_file(place: Callable[[dict[str, Any]], str], tmp_path: Path) -> None:
    table = read_arms(MEDISWIFT / "results.csv")
    write_pipelines(tmp_path, table, place)
    found, unfinished, _ = load_arms([tmp_path])
    assert unfinished == []
    expected = dict(zip(table.identities(), table.rows, strict=True))
    assert sorted(found.identities(), key=str) == sorted(expected, key=str)
    for key, row in zip(found.identities(), found.rows, strict=True):
        ratio = expected[key].pop("flop_ratio_formula")
        assert row.pop("flop_ratio_formula") == (pytest.approx(ratio, rel=1e-12) if ratio else None)
        assert {name: row[name] for name in expected[key] if name != "how"} == {
            name: value for name, value in expected[key].items() if name != "how"
        }


def test_bars_of_pipelines_are_those_on_file(tmp_path: Path) -> None:
    write_pipelines(tmp_path / "runs", read_arms(MEDISWIFT / "results.csv"))
    show_arms([tmp_path / "runs"], tmp_path / "out", Console(width=200))
    assert (tmp_path / "out" / "bars.md").read_text() == (MEDISWIFT / "bars.md").read_text()
    again = read_arms(tmp_path / "out" / "results.csv")
    assert markdown(bars(again.rows)) == (MEDISWIFT / "bars.md").read_text()


def test_runs_replace_the_rows_of_an_earlier_table(tmp_path: Path) -> None:
    whole = read_arms(MEDISWIFT / "results.csv")
    some = Arms([dict(row) for row in whole.rows if row["seed"] == 1], whole.columns, "")
    for row in some.rows:
        row["seconds"] = 1.0
    write_pipelines(tmp_path, some)
    found, *_ = load_arms([MEDISWIFT / "results.csv", tmp_path])
    assert len(found.rows) == len(whole.rows)
    assert "how" not in found.columns  # an older name of the column stage
    assert {row["seed"] for row in found.rows if row["seconds"] == 1.0} == {1}
    assert len([row for row in found.rows if row["seconds"] == 1.0]) == len(some.rows)


def test_runs_of_masks_give_the_table_on_file_and_their_courses(tmp_path: Path) -> None:
    write_masks(tmp_path / "runs")
    found, *_ = load_arms([tmp_path / "runs"])
    found.write(tmp_path / "results.csv")
    assert (tmp_path / "results.csv").read_bytes() == (MASKS / "results.csv").read_bytes()
    assert found.courses["rigl", 2] == [(0.0, found.rows[8]["density"], 0.0), (1.0, found.rows[8]["density"], 1.0)]
    for name, table in (("course", found), ("ends", Arms(found.rows, found.columns, ""))):
        arms_figure(table, tmp_path / f"{name}.png")
    assert (tmp_path / "course.png").read_bytes() != (tmp_path / "ends.png").read_bytes()


def test_what_differs_in_more_than_the_seed_is_refused(tmp_path: Path) -> None:
    write_pipelines(tmp_path / "p", read_arms(MEDISWIFT / "results.csv"))
    (tmp_path / "p" / "seed1" / "config.yaml").write_text("{seed: 1, optimizer: {lr: 0.004}}")
    write_masks(tmp_path / "m")
    with pytest.raises(UserError, match=r"p/seed1 and .*p/seed0 differ in more than the seed: optimizer.lr=0.004 \("):
        load_arms([tmp_path / "p"])
    with pytest.raises(UserError, match="report them one at a time"):
        load_arms([tmp_path / "p" / "seed0", tmp_path / "m"])
    config = {"seed": 2, "sparsity": {"evolution": {"rule": "set", "every": 25}}, "optimizer": {"lr": 0.5}}
    (tmp_path / "m" / "05" / "config.yaml").write_text(yaml.safe_dump(config))
    with pytest.raises(UserError, match=r"differ in more than seed and masks: optimizer.lr=0.5 \(there: 0.008\)"):
        load_arms([tmp_path / "m"])


def test_what_is_not_finished_is_counted(tmp_path: Path) -> None:
    (tmp_path / "runs" / "one").mkdir(parents=True)
    with pytest.raises(UserError, match="runs holds no run"):
        load_arms([tmp_path / "runs"])
    (tmp_path / "runs" / "one" / "config.yaml").write_text("seed: 0\n")
    with pytest.raises(UserError, match=r"no finished run \(1 unfinished\)"):
        load_arms([tmp_path / "runs"])


def test_a_single_place_is_compared_only_if_it_holds_several_runs(tmp_path: Path) -> None:
    write_pipelines(tmp_path / "p", read_arms(MEDISWIFT / "results.csv"))
    write_masks(tmp_path / "m")
    compared = [MASKS / "results.csv", tmp_path / "p", tmp_path / "m"]
    alone = [tmp_path / "p" / "seed0", tmp_path / "m" / "00", tmp_path / "nowhere"]
    assert [shows_arms(place) for place in [*compared, *alone]] == [True] * 3 + [False] * 3
