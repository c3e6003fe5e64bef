"""A calibration on small grids: the file it writes, what it predicts, and what it refuses."""

from __future__ import annotations

import csv
import itertools
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_calibration import make_small

from sparsetrain import Machine, UserError, calibrate, simulate
from sparsetrain.bench import calibrate as calibration
from sparsetrain.bench.calibrate import CalibrateConfig, step_cases
from sparsetrain.bench.steps import StepCase
from sparsetrain.bench.validate import Errors, held_out
from sparsetrain.cost.hardware import calibrated_path
from sparsetrain.models import ModelConfig


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    make_small(monkeypatch, tmp_path)
    return tmp_path


def test_a_calibration_is_kept_and_predicts_steps(quick: Path) -> None:
    threads = torch.get_num_threads()
    machine = calibrate(1e-3, threads=[1], dtypes=["float32", "bfloat16"])
    assert torch.get_num_threads() == threads
    assert calibrated_path().is_file()
    again = Machine.load("this")
    assert again == machine
    assert set(again.peak) == {"float32", "bfloat16"}
    assert not again.roofline
    config = ModelConfig(d_model=48, n_layers=2, n_heads=2, vocab_size=64, sparsity=0.5)
    for dtype in again.peak:
        found = simulate(config, "this", 32, 2, dtype=dtype, threads=1)
        assert 1e-4 < found.seconds < 10.0
        assert found.energy is None
        assert "cannot skip" not in " ".join(found.notes)
    with pytest.raises(UserError, match=r"sparsity\.backend='triton' is not one of masked, csr, auto"):
        simulate(config, "this", 32, 2, backend="triton")


def test_the_command_validates_and_writes_what_it_found(quick: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = quick / "out"
    calibration.calibrate_this(CalibrateConfig(1e-3, [1], validate=2, out=str(out)))
    said = capsys.readouterr().out
    assert "sparse over dense: 2, median error" in said
    rows = (out / "results.csv").read_text().splitlines()
    assert len(rows) == 3
    assert rows[0].startswith("d_model,n_layers")
    assert (out / "figure.png").stat().st_size > 1000
    assert (out / "errors.json").is_file()


def test_held_out_steps_share_no_width_and_tokens_with_fitted_ones() -> None:
    def places(cases: Iterator[StepCase]) -> set[tuple[int, int]]:
        return {(case.model.d_model, case.context * case.batch) for case in itertools.islice(cases, 200)}

    assert not places(step_cases()) & places(held_out())


def test_errors_against_numpy() -> None:
    generator = np.random.default_rng(0)
    measured = generator.uniform(0.1, 1.0, 101)
    ratio = np.exp(generator.normal(0.02, 0.1, 101))
    found = Errors.of(list(measured * ratio), list(measured), 0.1)
    assert found.median == pytest.approx(np.percentile(abs(ratio - 1), 50))
    assert found.ninetieth == pytest.approx(np.percentile(abs(ratio - 1), 90))
    assert found.bias == pytest.approx(np.percentile(ratio, 50) - 1)
    assert found.inside == int((abs(np.log(ratio)) <= 0.16449).sum())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"budget_seconds": 1.0}, r"budget_seconds=1.0 must be a number of at least 20"),
        ({"budget_seconds": float("nan")}, "budget_seconds=nan must be"),
        ({"threads": [2, 1]}, r"threads=\[2, 1\] must be increasing numbers from 1 on"),
        ({"dtypes": ["bfloat16"]}, "must have float32"),
        ({"dtypes": ["float32", "int8"]}, "dtypes='int8' is not one of float32, bfloat16"),
        ({"validate": -1}, "validate=-1 must be at least 0"),
        ({"out": "x"}, "validate=0 must be at least 1"),
    ],
)
def test_bad_settings_are_one_line(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        CalibrateConfig(**settings)


def test_the_page_of_the_experiment_says_what_its_rows_say() -> None:
    folder = Path(__file__).parents[2] / "experiments" / "simulator_here"
    spread = json.loads((folder / "errors.json").read_text())["spread"]
    rows = list(csv.DictReader((folder / "results.csv").read_text().splitlines()))
    page = (folder / "README.md").read_text()
    for dtype in ("float32", "bfloat16"):
        own = [row for row in rows if row["dtype"] == dtype]
        sparse, dense = (
            [[float(row[f"{prefix}{name}"]) for row in own] for name in ("predicted", "measured")]
            for prefix in ("", "dense_")
        )
        ratios = [[a / b for a, b in zip(*pair, strict=True)] for pair in zip(sparse, dense, strict=True)]
        groups = {"sparse": sparse, "dense": dense, "sparse over dense": ratios}
        groups["all"] = [a + b for a, b in zip(sparse, dense, strict=True)]
        for name, (predicted, measured) in groups.items():
            found = Errors.of(predicted, measured, spread)
            line = f"| {dtype} | {name} | {found.count} | {100 * found.median:.1f} % | {100 * found.ninetieth:.1f} % "
            assert f"{line}| {100 * found.bias:+.1f} % | {found.inside} |" in page


def test_the_stored_machine_repeats_the_predictions_of_the_experiment() -> None:
    folder = Path(__file__).parents[2] / "experiments" / "simulator_here"
    machine = Machine.load(folder / "machine.yaml")
    for row, case in zip(csv.DictReader((folder / "results.csv").read_text().splitlines()), held_out(), strict=False):
        config = replace(case.model, sparsity=case.sparsity)
        options = {"dtype": row["dtype"], "threads": int(row["threads"]), "backend": case.backend}
        found = simulate(config, machine, case.context, case.batch, **options)
        assert found.seconds == pytest.approx(float(row["predicted"]), rel=1e-9)
