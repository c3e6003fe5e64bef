"""The experiments that are controls of others, and the table of what all runs cost: remade from the rows on file."""

from __future__ import annotations

import csv
import json
import runpy
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
from tests.helpers.claims import control_claims

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


def test_the_gaps_of_the_pipeline_at_equal_flops_follow_from_its_rows() -> None:
    """By the script, whose table is on file, and by SciPy."""
    folder = EXPERIMENTS / "pipeline_equal_flops"
    with (folder / "results.csv").open(newline="", encoding="utf-8") as stream:
        rows = list(csv.DictReader(stream))
    with (folder / "gaps.csv").open(newline="", encoding="utf-8") as stream:
        filed = list(csv.DictReader(stream))
    made = runpy.run_path(str(folder / "gaps.py"))["gaps"](read_arms(folder / "results.csv").rows)
    for row, there in zip(made, filed, strict=True):
        assert (row["what"], row["arm"], row["minus"]) == (there["what"], there["arm"], there["minus"])
        assert str(row["told_apart"]) == there["told_apart"]
        for name in ("mean", "seeds_low", "seeds_high"):
            assert row[name] == pytest.approx(float(there[name]), abs=1e-9)

    def accuracies(arm: str) -> np.ndarray:
        """``[seeds, samples]``."""
        where = ("{0}-{1}", "finetune") if arm == "scratch" else ("{0}", "finetune{2}-{1}")
        kind = "-pruned" if arm == "pruned" else ""
        names = [tuple(part.format(arm, sample, kind) for part in where) for sample in range(5)]
        cells = {(row["seed"], row["arm"], row["stage"]): row for row in rows}
        return np.array([[float(cells[str(seed), *name]["accuracy"]) for name in names] for seed in range(3)])

    primary = next(row for row in made if (row["arm"], row["minus"]) == ("sparse-0.75", "dense-equal"))
    between = 100.0 * (accuracies("sparse-0.75") - accuracies("dense-equal"))
    for name, axis in (("seeds", 1), ("samples", 0)):
        interval = scipy.stats.ttest_1samp(between.mean(axis=axis), 0.0).confidence_interval()
        assert (row_ends := (primary[f"{name}_low"], primary[f"{name}_high"])) == pytest.approx(tuple(interval)), (
            row_ends
        )
    fresh = next(row for row in made if (row["arm"], row["minus"]) == ("pruned", "scratch"))
    assert fresh["mean"] == pytest.approx(100.0 * float((accuracies("pruned") - accuracies("scratch")).mean()))


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
