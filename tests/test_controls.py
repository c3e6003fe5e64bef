"""The experiments that are controls of others, and the table of what all runs cost: remade from the rows on file."""

from __future__ import annotations

import csv
import itertools
import json
import math
import runpy
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
from tests.helpers.claims import control_claims

from sparsetrain.cli import main

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


def test_the_gaps_of_the_pipeline_at_equal_flops_are_those_of_scipy() -> None:
    """On rows that are made up: three seeds, five labelled samples."""
    arms = {"dense": "finetune-{}", "dense-equal": "finetune-{}", "sparse-0.75": "finetune-{}"}
    arms["pruned"] = "finetune-pruned-{}"
    draws = np.random.default_rng(0)
    rows, accuracies = [], {}
    words = draws.uniform(0.5, 0.7, 5)
    for seed, sample in itertools.product(range(3), range(5)):
        stages = [(arm, stage.format(sample)) for arm, stage in arms.items()] + [(f"scratch-{sample}", "finetune")]
        for arm, stage in stages:
            score = accuracies[arm.partition("-")[0] if "scratch" in arm else arm, seed, sample] = draws.uniform()
            rows.append({"arm": arm, "stage": stage, "seed": seed, "accuracy": score, "bag_of_words": words[sample]})
    bits = {(arm, seed): draws.uniform(1.5, 2.0) for arm in arms for seed in range(3)}
    for (arm, seed), value in bits.items():
        stage = "prune" if arm == "pruned" else "pretrain"
        rows.append({"arm": arm, "stage": stage, "seed": seed, "accuracy": None, "reported_bits_per_byte": value})

    made = runpy.run_path(str(EXPERIMENTS / "pipeline_equal_flops" / "gaps.py"))["gaps"](rows)
    found = {(row["what"], row["arm"], row["minus"]): row for row in made}
    for one, other in (("sparse-0.75", "dense-equal"), ("pruned", "scratch"), ("dense", "bag of words")):
        between = np.empty((3, 5))
        for seed, sample in itertools.product(range(3), range(5)):
            minus = words[sample] if other == "bag of words" else accuracies[other, seed, sample]
            between[seed, sample] = 100.0 * (accuracies[one, seed, sample] - minus)
        row, apart = found["accuracy", one, other], []
        assert row["mean"] == pytest.approx(between.mean())
        for name, axis in (("seeds", 1), ("samples", 0)):
            low, high = scipy.stats.ttest_1samp(between.mean(axis=axis), 0.0).confidence_interval()
            assert (row[f"{name}_low"], row[f"{name}_high"]) == pytest.approx((low, high))
            apart.append(low > 0 or high < 0)
        assert row["told_apart"] == all(apart)
    logs = [np.log(bits["sparse-0.75", seed] / bits["pruned", seed]) for seed in range(3)]
    low, high = scipy.stats.ttest_1samp(logs, 0.0).confidence_interval()
    row = found["bits per byte", "sparse-0.75", "pruned"]
    ends = [100.0 * (math.exp(value) - 1.0) for value in (np.mean(logs), low, high)]
    assert [row[name] for name in ("mean", "seeds_low", "seeds_high")] == pytest.approx(ends)


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
