"""The experiments that are controls of others, and the table of what all runs cost: remade from the rows on file."""

from __future__ import annotations

import csv
import json
import runpy
from pathlib import Path

import pytest
from tests.helpers.control_claims import control_claims, equal_flops_gaps
from tests.helpers.pictures import assert_same_picture

from sparsetrain.cli import main
from sparsetrain.report.arms import read_arms

EXPERIMENTS = Path(__file__).parents[1] / "experiments"


def test_the_gaps_of_fair_control_follow_from_its_rows() -> None:
    """By the script, whose table is on file, and by SciPy."""
    folder = EXPERIMENTS / "fair_control"
    with (folder / "gaps.csv").open(newline="", encoding="utf-8") as stream:
        filed = list(csv.DictReader(stream))
    made = runpy.run_path(str(folder / "gaps.py"))["gaps"]()
    claimed = [(claim.points[0], claim.low, claim.high) for claim in control_claims(folder)]
    for row, there in zip(made, filed, strict=True):
        assert (row["gap"], row["sparsity"], row["seeds"]) == (there["gap"], float(there["sparsity"]), 3)
        ends = tuple(100.0 * float(there[name]) for name in ("relative", "low", "high"))
        assert tuple(100.0 * row[name] for name in ("relative", "low", "high")) == pytest.approx(ends, abs=1e-9)
        assert any(each == pytest.approx(ends, abs=1e-6) for each in claimed), row["gap"]


def test_the_gaps_of_the_pipeline_at_equal_flops_follow_from_its_rows(tmp_path: Path) -> None:
    """By the script, whose table and figure are on file, and by SciPy."""
    folder = EXPERIMENTS / "pipeline_equal_flops"
    with (folder / "gaps.csv").open(newline="", encoding="utf-8") as stream:
        filed = list(csv.DictReader(stream))
    script, table = runpy.run_path(str(folder / "gaps.py")), read_arms(folder / "results.csv").rows
    expected = equal_flops_gaps(folder)
    for row, there in zip(script["gaps"](table), filed, strict=True):
        claims = expected[row["what"], row["arm"], row["minus"]]
        assert row["told_apart"] == all(claim.low > 0.0 or claim.high < 0.0 for claim in claims)
        assert there.keys() >= row.keys()
        for name, text in there.items():
            value = row.get(name, "")
            assert (float(text) == pytest.approx(value)) if isinstance(value, float) else (text == str(value))
        for claim, name in zip(claims, ("seeds", "samples"), strict=False):
            ends = (row["mean"], row[f"{name}_low"], row[f"{name}_high"])
            assert ends == pytest.approx((*claim.points, claim.low, claim.high))
    for halves, apart in (((0.5, 2.0), False), ((2.0, 0.5), False), ((0.5, 0.4), True)):
        assert script["gap"]("accuracy", "one", "other", -1.0, halves, "points")["told_apart"] == apart
    script["draw"](table, tmp_path / "gaps.png")
    assert_same_picture(tmp_path / "gaps.png", folder / "gaps.png")


def test_the_table_of_costs_is_that_of_the_rows() -> None:
    space = runpy.run_path(str(EXPERIMENTS / "cost.py"))
    assert (EXPERIMENTS / "cost.md").read_text() == space["HEAD"] + "\n".join(space["lines"]()) + "\n"


def test_the_coordinates_experiment_runs(
    notes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    narrow = ["model.d_model=32", "parameterization.base_width=32"]
    words = ["coord-check", "experiment=supar_coordinates", f"data.path={notes}", *narrow, "run_dir=run"]
    words += ["check.seeds=1", "check.steps=1", "check.values=[0,0.5]", "budget.batch_size=2", "data.context=24"]
    assert main(words) == 0
    assert "supar: worst max/min" in capsys.readouterr().out
    assert set(json.loads((tmp_path / "run" / "result.json").read_text())["schemes"]) == {"sp", "mup", "supar"}
