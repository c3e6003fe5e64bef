"""Sweeps: rows, optima and figures of made-up runs whose answers are known."""

from __future__ import annotations

import csv
import io
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.stats
import yaml
from made_runs import write_run
from rich.console import Console

from sparsetrain.cli.resolve import load
from sparsetrain.report.run_files import COLUMNS
from sparsetrain.report.sweep import (
    findings,
    labels_of,
    lines_of,
    next_commands,
    optima_sheet,
    write_optima,
)
from sparsetrain.studies.sweep import SweepRows, read_sweep, show_sweep

# Best learning rates, log2: SμPar's is constant, SP's shifts by two grid steps from dense to sparse.
CENTERS = {("supar", 0.0): -8.25, ("supar", 0.75): -8.0, ("sp", 0.0): -9.0, ("sp", 0.75): -7.0}
FLOORS = {("supar", 0.0): 2.0, ("supar", 0.75): 2.1, ("sp", 0.0): 2.0, ("sp", 0.75): 2.2}
GRID = range(-10, -5)


def loss(scheme: str, sparsity: float, log2: float, seed: int) -> float:
    return FLOORS[scheme, sparsity] + 0.05 * (log2 - CENTERS[scheme, sparsity]) ** 2 + 0.01 * seed


@pytest.fixture(scope="module")
def made_up(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The runs of a whole sweep: two schemes, two sparsities, five learning rates, one or two seeds."""
    place = tmp_path_factory.mktemp("runs")
    template = write_run(place, [])
    plain = yaml.safe_load((template / "config.yaml").read_text())
    result = json.loads((template / "result.json").read_text())
    for path in template.iterdir():
        path.unlink()
    template.rmdir()
    for (scheme, sparsity), center in CENTERS.items():
        for log2 in GRID:
            for seed in (0, 1) if abs(log2 - center) < 1.6 else (0,):
                directory = place / f"{scheme}-{sparsity}-{log2}-{seed}"
                directory.mkdir()
                config = {**plain, "seed": seed, "sparsity": {**plain["sparsity"], "sparsity": sparsity}}
                config["parameterization"] = {**plain["parameterization"], "scheme": scheme}
                config["optimizer"] = {**plain["optimizer"], "lr": 2.0**log2}
                (directory / "config.yaml").write_text(yaml.safe_dump(config))
                values = {"parameterization": scheme, "sparsity": sparsity, "lr": 2.0**log2, "seed": seed}
                found = loss(scheme, sparsity, log2, seed)
                (directory / "result.json").write_text(json.dumps({**result, **values, "loss_last": found}))
    return place


@pytest.fixture(scope="module")
def found(made_up: Path) -> SweepRows:
    """What is read of that sweep, once for all tests that only look at it."""
    return read_sweep([made_up])


@pytest.fixture(scope="module")
def shown(made_up: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The files that are written of that sweep, and what the screen says."""
    place, screen = tmp_path_factory.mktemp("shown"), Console(file=io.StringIO(), width=200)
    show_sweep([made_up], "lr", place, 3, False, screen)
    return place, screen.file.getvalue()  # type: ignore[attr-defined]


def test_rows_have_the_columns_of_a_results_file(made_up: Path, found: SweepRows) -> None:
    assert list(found.rows[0])[: len(COLUMNS)] == list(COLUMNS)
    assert (found.varied, found.unfinished) == ([], [])
    assert {row["parameterization"] for row in found.rows} == {"sp", "supar"}
    assert found.rows == read_sweep(sorted(made_up.iterdir(), reverse=True)).rows  # in any order of arguments


def test_optima_and_shifts_of_made_up_curves_are_the_ones_they_were_made_with(found: SweepRows) -> None:
    lines = lines_of(found.rows, "lr")
    assert [(line.scheme, line.shape[0]) for line in lines] == [
        ("sp", 0.0),
        ("sp", 0.75),
        ("supar", 0.0),
        ("supar", 0.75),
    ]
    for line in lines:
        assert line.optimum.log2 == pytest.approx(CENTERS[line.scheme, line.shape[0]])
        assert line.optimum.interval == pytest.approx((line.optimum.log2, line.optimum.log2))
    shifts = [line.shift.steps for line in lines if line.shift is not None]
    assert shifts == pytest.approx([0.0, 2.0, 0.0, 0.25])
    # At 0.75: SμPar with the dense optimum, -8.25, and SP with its own, -9.
    supar, sp = loss("supar", 0.75, CENTERS["supar", 0.0], 0), loss("sp", 0.75, CENTERS["sp", 0.0], 0)
    said = findings(lines)
    assert said[0] == "sp: the farthest optimum is 2.00 grid steps from the base's."
    gap = f"{100 * (1 - supar / sp):.1f} % below SP with its base's (1 seed)"  # the only seed that both have there
    assert [text for text in said if text.startswith("sparsity 0.75") and gap in text]


@pytest.mark.parametrize(("control", "steps"), [("mup", 2.25), ("sp", 0.0)])
def test_a_parameterization_without_dense_runs_starts_from_those_that_are_the_same_when_dense(
    control: str, steps: float, found: SweepRows
) -> None:
    """A dense model under muP is one under SμPar, but not one under SP."""
    rows = [row for row in found.rows if row["parameterization"] == "supar"]
    sparse = [row for row in found.rows if (row["parameterization"], row["sparsity"]) == ("sp", 0.75)]
    rows += [{**row, "parameterization": control, "lr": 2 * row["lr"]} for row in sparse]
    lines = lines_of(rows, "lr")
    (line,) = (line for line in lines if line.scheme == control)
    assert line.shift is not None
    assert line.shift.steps == pytest.approx(steps)
    said = [text for text in findings(lines) if text.startswith(f"{control}: ")]
    assert said == ([f"{control}: the farthest optimum is 2.25 grid steps from the base's."] if steps else [])


def made_of(
    floors: dict[tuple[str, float], list[float]], log2s: tuple[int, ...] = (-9, -8, -7)
) -> list[dict[str, Any]]:
    """Return rows of curves whose minimum is at 2^-8, with the given losses there, one per seed."""
    return [
        {
            "parameterization": scheme,
            "sparsity": sparsity,
            "width": 64,
            "depth": 2,
            "seed": seed,
            "lr": 2.0**log2,
            "loss": floor + 0.1 * abs(log2 + 8),
        }
        for (scheme, sparsity), of_seeds in floors.items()
        for seed, floor in enumerate(of_seeds)
        for log2 in (-9, -8, -7)
    ]


def test_gaps_say_how_sure_they_are_and_what_is_left_of_them_beside_the_bases() -> None:
    sparse = [2.0, 2.4, 2.8]
    floors = {("sp", 0.0): [2.2] * 3, ("sp", 0.75): sparse, ("supar", 0.0): [2.0] * 3, ("supar", 0.75): [2.0] * 3}
    said = findings(lines_of(made_of(floors), "lr"))
    ours = "supar with its base's best value has a loss {} below SP tuned again"
    for sparsity, text, ratios in (
        ("0", ours, np.full(3, 2.0 / 2.2)),
        ("0.75", ours, 2.0 / np.array(sparse)),
        ("0.75", "relative to the gap of the two bases that is {} below", 2.2 / np.array(sparse)),
    ):
        logs = np.log(ratios)
        half = scipy.stats.t.ppf(0.975, 2) * scipy.stats.sem(logs)
        gap, low, high = 100 * np.expm1([logs.mean(), logs.mean() - half, logs.mean() + half])
        unsure = ", not told apart" if low < 0 < high else ""
        assert (
            f"sparsity {sparsity}: {text.format(f'{-gap:.1f} %')} [{low:.1f} %, {high:.1f} %] (3 seeds{unsure})."
            in said
        )
    assert [text for text in said if text.startswith("sparsity 0: relative")] == []


def test_a_loss_that_fewer_seeds_have_than_the_curve_says_so(tmp_path: Path) -> None:
    rows = made_of({("sp", 0.0): [2.0] * 3})
    moved = [{**row, "lr": 4 * row["lr"], "sparsity": 0.75} for row in rows]
    rows += [*moved, {**moved[0], "lr": 2.0**-8, "loss": 2.3}]
    lines = lines_of(rows, "lr")
    assert [row[4] for row in optima_sheet(lines, "lr").rows] == ["2.0000", "2.3000 (1 seed)"]
    write_optima(lines, tmp_path / "optima.csv")
    with (tmp_path / "optima.csv").open() as stream:
        found = [(row["seeds"], row["seeds_at_base_optimum"]) for row in csv.DictReader(stream)]
    assert found == [("3", "3"), ("3", "1")]


def test_show_writes_tables_and_a_figure_that_do_not_depend_on_the_day(
    made_up: Path, shown: tuple[Path, str], tmp_path: Path, screen: Console
) -> None:
    place, text = shown
    show_sweep([made_up], "lr", tmp_path, 3, False, screen)
    files = sorted(path.name for path in place.iterdir())
    assert files == ["figure.png", "optima.csv", "results.csv"]
    assert all((place / name).read_bytes() == (tmp_path / name).read_bytes() for name in files)
    with (place / "optima.csv").open() as stream:
        rows = {(row["parameterization"], row["sparsity"]): row for row in csv.DictReader(stream)}
    moved = rows["sp", "0.75"]
    assert (float(moved["optimum"]), float(moved["shift_steps"])) == pytest.approx((2**-7.0, 2.0), rel=1e-5)
    assert (moved["edge"], moved["shift_at_least"], moved["seeds"]) == ("", "0", "2")
    assert f"{len(list(made_up.iterdir()))} finished runs, 0 of them diverged; 0 unfinished" in text
    assert "to run next" in text


def test_what_to_run_next_uses_the_values_of_the_runs_and_the_names_of_the_settings(found: SweepRows) -> None:
    lines = lines_of(found.rows, "lr")
    commands = next_commands(lines, "lr", [], (0, 1))
    # Both seeds exist at the three points of each minimum.
    assert commands == []
    commands = next_commands(lines, "lr", [], (0, 1, 2))
    assert f"parameterization=sp sparsity.sparsity=0.75 optimizer.lr={2.0**-8},{2.0**-7},{2.0**-6} seed=2" in commands


def test_an_edge_is_extended_and_never_called_an_optimum(tmp_path: Path) -> None:
    for lr, found in ((0.001, 3.0), (0.002, 2.5), (0.004, 2.0)):
        write_run(tmp_path, [f"optimizer.lr={lr}"], loss_last=found)
    lines = lines_of(read_sweep([tmp_path]).rows, "lr")
    assert (lines[0].optimum.log2, lines[0].shift, lines[0].at_base) == (None, None, {})
    assert "beyond 0.004 (high edge)" in optima_sheet(lines, "lr").rows[0][1]
    assert next_commands(lines, "lr", [], (0,)) == ["optimizer.lr=0.008,0.016 seed=0"]
    assert findings(lines) == ["supar: the base has no optimum inside the grid, so no shift is known."]


def test_points_beyond_the_grid_are_powers_of_two_to_the_last_digit() -> None:
    def row(lr: float, loss: float) -> dict[str, Any]:
        shape = {"parameterization": "supar", "sparsity": 0.5, "width": 64, "depth": 2}
        return {**shape, "lr": lr, "seed": 0, "loss": loss}

    falling = [row(2.0**-6, 3.0), row(2.0**-7, 2.0), row(2.0**-8, 1.0)]
    assert next_commands(lines_of(falling, "lr"), "lr", [], (0,)) == ["optimizer.lr=0.001953125,0.0009765625 seed=0"]


def test_an_end_of_an_interval_beyond_the_grid_is_open_and_the_grid_is_to_grow_there(tmp_path: Path) -> None:
    # One seed's own optimum lies beyond the left end; with two seeds the right end is uncertain as well.
    rows = [
        {"parameterization": "sp", "sparsity": 0.0, "width": 64, "depth": 2, "lr": rate, "seed": seed, "loss": loss}
        for seed, losses in enumerate(([1.6, 1.0, 2.0], [1.2, 1.5, 2.0]))
        for rate, loss in zip((0.001, 0.002, 0.004), losses, strict=True)
    ]
    lines = lines_of(rows, "lr")
    assert "[open, open]" in optima_sheet(lines, "lr").rows[0][1]
    write_optima(lines, tmp_path / "optima.csv")
    with (tmp_path / "optima.csv").open() as stream:
        (row,) = csv.DictReader(stream)
    assert (row["low"], row["high"]) == ("", "")
    assert next_commands(lines, "lr", (), (0, 1)) == ["optimizer.lr=0.0005 seed=0,1"]


def test_diverged_runs_bracket_and_a_curve_of_them_alone_has_no_optimum(tmp_path: Path) -> None:
    for scheme in ("sp", "mup"):
        for lr, found in ((0.001, 3.0), (0.002, 2.5), (0.004, None)):
            status = "diverged" if found is None or scheme == "mup" else "complete"
            value = None if status == "diverged" else found
            words = [f"optimizer.lr={lr}", f"parameterization.scheme={scheme}"]
            write_run(tmp_path, words, loss_last=value, status=status)
    mup, sp = lines_of(read_sweep([tmp_path]).rows, "lr")
    assert (sp.optimum.best, sp.optimum.log2, sp.optimum.interpolated) == (math.log2(0.002), math.log2(0.002), False)
    assert mup.optimum.log2 is None
    assert optima_sheet([mup, sp], "lr").rows[0][1] == "none"
    show_sweep([tmp_path], "lr", tmp_path / "out", 1, False, Console(quiet=True))
    assert (tmp_path / "out" / "figure.png").exists()


def test_a_base_of_diverged_runs_leaves_the_other_curves_without_a_shift(tmp_path: Path) -> None:
    for sparsity in (0.0, 0.5):
        for lr in (0.001, 0.002, 0.004):
            value = None if sparsity == 0.0 else 2.0 + abs(math.log2(lr / 0.002))
            status = "diverged" if value is None else "complete"
            words = [f"optimizer.lr={lr}", f"sparsity.sparsity={sparsity}"]
            write_run(tmp_path, words, loss_last=value, status=status)
    base, sparse = lines_of(read_sweep([tmp_path]).rows, "lr")
    assert (base.optimum.log2, sparse.shift, sparse.at_base) == (None, None, {})
    assert sparse.optimum.log2 == pytest.approx(math.log2(0.002))
    assert findings([base, sparse]) == ["supar: the base has no optimum inside the grid, so no shift is known."]


def test_a_setting_that_follows_from_another_is_not_in_the_labels() -> None:
    extra = ["evolution.start", "evolution.rule"]
    same = {"parameterization": "supar", "sparsity": 0.9, "width": 32, "depth": 2, "seed": 0, "loss": 2.0}
    rows = [
        {**same, "lr": lr, "evolution.start": start, "evolution.rule": rule}
        for rule, start in (("static", 0.0), ("rigl", 0.0), ("gmp", 0.1))
        for lr in (0.01, 0.02)
    ]
    assert set(labels_of(lines_of(rows, "lr", extra), extra)) == {"rule static", "rule rigl", "rule gmp"}


def test_a_search_is_ranked(tmp_path: Path, screen: Console) -> None:
    for number in range(6):
        words = ["experiment=base_tuning", f"draw={number}"]
        write_run(tmp_path / "runs", words, loss_last=None if number == 5 else 3.0 - number)
    show_sweep([tmp_path / "runs"], "lr", tmp_path / "out", 3, True, screen)
    text = screen.file.getvalue()  # type: ignore[attr-defined]
    assert "6 points, 1 diverged" in text
    best = load("pretrain", ["experiment=base_tuning", "draw=4"])
    tuned = (best.optimizer.lr, best.parameterization.alpha_in, best.parameterization.embedding_lr_multiplier)
    assert any("-1.0000" in line and all(f"{value:.3g}" in line for value in tuned) for line in text.splitlines())
    assert {row["parameterization"] for row in read_sweep([tmp_path / "runs"], apart=True).rows} == {"mup"}
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["figure.png", "results.csv"]


def test_a_table_stands_for_runs_whose_directories_are_gone(
    made_up: Path, found: SweepRows, shown: tuple[Path, str], tmp_path: Path, screen: Console
) -> None:
    table = shown[0] / "results.csv"
    assert read_sweep([table]).rows == found.rows
    part = sorted(made_up.glob("supar-*"))[::4]
    assert read_sweep([*part, table]).rows == found.rows  # each run once
    show_sweep([*part, table], "lr", tmp_path, 3, False, screen)
    for name in ("results.csv", "optima.csv"):
        assert (tmp_path / name).read_bytes() == (shown[0] / name).read_bytes()
