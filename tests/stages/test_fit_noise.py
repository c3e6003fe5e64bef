"""`sparsetrain fit law=noise`: the noise scale of all parameters over that of the norm layers."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.stats
from rich.console import Console
from shell import Shell

import sparsetrain as st
from sparsetrain.errors import UserError
from sparsetrain.report import law_plots
from sparsetrain.report.run_files import COLUMNS
from sparsetrain.report.sweep import write_rows
from sparsetrain.scaling.noise import proportion
from sparsetrain.studies.fit import FitRequest, fit_sweep

SEEDS = (0, 1, 2)


def series(sparsity: float, slope: float) -> list[dict[str, Any]]:
    """Return logged steps of three runs, whose noise scales double twice and whose slopes differ by a few percent."""
    rng, rows = np.random.default_rng(1), []
    for seed in SEEDS:
        usual = {"parameterization": "supar", "sparsity": sparsity, "width": 32, "depth": 2, "lr": 0.01, "seed": seed}
        usual |= {"steps": 1000, "loss": 2.0, "commit": "abc", "run": f"run-{sparsity}-{seed}"}
        own = slope * np.exp(rng.normal(0.0, 0.02))
        for step in (1, *range(10, 1001, 10)):
            norms = 4.0 * 4.0 ** (step / 1000) * np.exp(rng.normal(0.0, 0.05))
            whole = own * norms * np.exp(rng.normal(0.0, 0.05))
            hidden = step < 30  # the first values are none
            rows.append(
                usual
                | {"step": step, "tokens": 128 * step, "noise_scale": None if hidden else norms}
                | {"noise_scale_all": None if hidden else whole}
            )
    return rows


def fitted(path: Path, **request: Any) -> tuple[dict[str, Any], str]:
    stream = io.StringIO()
    laws = fit_sweep(FitRequest([path], "noise", **request), Console(file=stream, width=160))
    return laws, stream.getvalue()


def test_a_table_gives_the_law_of_each_sparsity_and_is_written_again(tmp_path: Path) -> None:
    rows = [*series(0.0, 1.4), *series(0.75, 2.0)]
    write_rows(rows, tmp_path / "noise_scale.csv")
    laws, out = fitted(tmp_path / "noise_scale.csv", out=tmp_path / "laws")
    assert laws.keys() == {"sparsity 0", "sparsity 0.75"}
    for law, slope in zip(laws.values(), (1.4, 2.0), strict=True):
        low, high = law.interval(0.95, "coefficient")
        assert low < slope < high
        assert law.coefficient == pytest.approx(slope, rel=0.05)
        assert law(10.0) == pytest.approx(10.0 * law.coefficient)
        assert (law.kind, law.runs, law.seeds) == ("noise", 3, 3)
    # The growth of the noise from 10 % of the tokens to the end, in truth 4^0.9 = 3.5, with its interval.
    said = " ".join(out.split())  # the note may be broken into lines anywhere
    assert said.count("95 %, over 3 seeds: slope") == 2
    assert said.count(", growth 3.") == 2
    written = {path.name for path in (tmp_path / "laws").iterdir()}
    assert written == {"law-s0.yaml", "law-s0.75.yaml", "law.png", "noise_scale.csv", "noise_scale.png"}
    assert st.Law.load(tmp_path / "laws" / "law-s0.yaml").interval(0.95, "coefficient") == pytest.approx(
        laws["sparsity 0"].interval(0.95, "coefficient")
    )
    assert (tmp_path / "laws" / "noise_scale.csv").read_bytes() == (tmp_path / "noise_scale.csv").read_bytes()
    again, _ = fitted(tmp_path / "laws" / "noise_scale.csv")
    assert [law.parameters for law in again.values()] == [law.parameters for law in laws.values()]


def test_a_figure_shows_points_over_three_decades_and_the_ends_of_all_laws(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limits = []
    monkeypatch.setattr(law_plots, "save_png", lambda figure, path: limits.append(figure.axes[0].get_ylim()))
    x = np.array([1.0, 30.0, 1000.0])
    drawn = [
        law_plots.DrawnLaw(
            str(level),
            st.fit_power_law(x, level * x),
            [law_plots.LawPoint((a,), level * a, (0.0, np.inf)) for a in x],
        )
        for level in (1.0, 0.01)
    ]
    law_plots.law_figure(drawn, tmp_path / "law.png")
    ((low, high),) = limits
    assert 1e-4 < low < 0.01
    assert 1000.0 < high < 1e5


def test_steps_in_another_order_give_the_same_and_early_is_said(tmp_path: Path) -> None:
    rows = series(0.0, 1.4)
    write_rows(rows, tmp_path / "noise_scale.csv")
    _, out = fitted(tmp_path / "noise_scale.csv")
    write_rows(rows[::-1], tmp_path / "reversed.csv")
    _, other = fitted(tmp_path / "reversed.csv")
    lines = [line for line in out.splitlines() if line.startswith(" seed")]
    assert len(lines) == 3
    assert all("at 10 %" in line for line in lines)
    assert {line for line in other.splitlines() if line.startswith(" seed")} == set(lines)
    write_rows([row for row in rows if row["step"] <= 400], tmp_path / "short.csv")
    assert fitted(tmp_path / "short.csv")[1].count("at 25 %") == 3


def test_the_interval_of_the_slope_is_students_over_seeds(tmp_path: Path) -> None:
    rows = series(0.0, 1.4)
    write_rows(rows, tmp_path / "noise_scale.csv")
    laws, out = fitted(tmp_path / "noise_scale.csv")
    slopes, correlations = [], []
    for seed in SEEDS:
        kept = [row for row in rows if row["seed"] == seed and row["step"] >= 100]
        x, y = (np.array([row[name] for row in kept]) for name in ("noise_scale", "noise_scale_all"))
        slopes.append(np.linalg.lstsq(x[:, None], y, rcond=None)[0][0])
        correlations.append(scipy.stats.pearsonr(x, y).statistic)
        one = proportion(x, y)
        assert one.slope == pytest.approx(slopes[-1])
        assert one.correlation == pytest.approx(correlations[-1])
        assert one.variation == pytest.approx(scipy.stats.variation(y / x, ddof=1))
    logs = np.log(slopes)
    expected = scipy.stats.t.interval(0.95, 2, logs.mean(), scipy.stats.sem(logs))
    assert laws["sparsity 0"].interval(0.95, "coefficient") == pytest.approx(np.exp(expected))
    assert all(f"{correlation:.3g}" in out for correlation in correlations)


def test_runs_are_read_and_join_an_earlier_table(shell: Shell) -> None:
    small = ["model.d_model=16", "model.n_layers=1", "data.context=8", "budget.steps=140", "loop.eval_every=0"]
    run = shell.trained(*small, "observe=noise_scale_all", "threads=1", run_dir="runs/one")
    status, out, err = shell.run("fit", "runs", "law=noise", "out=laws")
    assert status == 0, err
    assert "written: law.yaml, law.png, noise_scale.csv, noise_scale.png in laws" in out
    with (shell.home / "laws" / "noise_scale.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    measured = [
        (str(record["step"]), record["noise_scale_all"])
        for record in map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
        if "noise_scale_all" in record
    ]
    texts = [(row["step"], row["noise_scale_all"]) for row in rows]
    assert [(step, float(text) if text else None) for step, text in texts] == measured
    assert list(rows[0]) == [*COLUMNS, "run", "step", "tokens", "noise_scale", "noise_scale_all"]
    assert shell.run("fit", "runs", "laws/noise_scale.csv", "law=noise", "out=both")[0] == 0
    same = [(shell.home / place / "noise_scale.csv").read_bytes() for place in ("laws", "both")]
    assert same[0] == same[1]
    shell.trained("budget.steps=2", "threads=1", run_dir="plain/one")
    assert "observe=noise_scale_all" in shell.refused("fit", "plain", "law=noise")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"noise_scale_all": "-1"}, "row 1: noise_scale_all"),
        ({"step": "x"}, "row 1: step"),
        ({"noise_scale": "inf"}, "row 1: noise_scale"),
        ({"tokens": None}, "row 1: tokens= must be at least 1"),
    ],
)
def test_a_damaged_table_is_refused(tmp_path: Path, change: dict[str, str], message: str) -> None:
    rows = series(0.0, 1.4)
    write_rows([rows[5] | change, *rows], tmp_path / "noise_scale.csv")
    with pytest.raises(UserError, match=message):
        fitted(tmp_path / "noise_scale.csv")


def test_too_few_steps_and_runs_without_the_observer_are_one_line(tmp_path: Path) -> None:
    rows = [row for row in series(0.0, 1.4) if row["step"] < 120]
    write_rows(rows, tmp_path / "noise_scale.csv")
    with pytest.raises(UserError, match="fewer than 3 logged steps from step 100 on"):
        fitted(tmp_path / "noise_scale.csv")
    (tmp_path / "results.csv").write_text(",".join(COLUMNS) + "\n")
    with pytest.raises(UserError, match="has no column"):
        fitted(tmp_path / "results.csv")
