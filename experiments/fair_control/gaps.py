"""SμPar beside its controls, from the rows on file: gaps.csv and gaps.png beside this file.

    python experiments/fair_control/gaps.py

Every choice (a rate of the grid, a point of the search) is the one with the lowest mean validation loss. Every loss in
a gap is the reported one, over text that no choice has seen. A gap is a mean log ratio over seeds, paired by seed, with
Student's interval.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from sparsetrain.report.plots import MARKERS, MUTED, SERIES, save_png, styled
from sparsetrain.report.sweep import REPORTED, write_rows
from sparsetrain.scaling.transfer import Gap, Row, gap_beyond, make_curves, optimum, relative_gap
from sparsetrain.studies.sweep import read_sweep

HERE = Path(__file__).parent
SPARSEST = 0.9375
KNOBS = ("model.init_std", "parameterization.alpha_in", "parameterization.alpha_out")
KNOBS += ("parameterization.embedding_lr_multiplier",)
Losses = dict[int, float]


def reported(rows: Sequence[Mapping[str, Any]]) -> Losses:
    """Return the reported loss of each seed; infinite if the run diverged."""
    return {row["seed"]: math.inf if row[REPORTED] is None else row[REPORTED] for row in rows}


def of(rows: Sequence[Mapping[str, Any]], **wanted: Any) -> list[Mapping[str, Any]]:
    return [row for row in rows if all(row[name] == value for name, value in wanted.items())]


def best_rate(rows: Sequence[Mapping[str, Any]]) -> float:
    """Return the rate of the grid with the lowest mean validation loss."""
    data = [Row(0, row["lr"], row["seed"], math.inf if row["loss"] is None else row["loss"]) for row in rows]
    return float(2.0 ** optimum(make_curves(data)[0]).best)


def tuned(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Return the runs of all seeds at the point of a search whose seed 0 has the lowest validation loss."""
    best = min((row for row in of(rows, seed=0) if row["loss"] is not None), key=lambda row: float(row["loss"]))
    return of(rows, **{name: best[name] for name in ("lr", *KNOBS)})


def gap_row(what: str, sparsity: float, gap: Gap | None, **more: Any) -> dict[str, Any]:
    if gap is None or gap.interval is None:
        raise SystemExit(f"{what} at {sparsity}: too few common seeds")
    low, high = gap.interval
    found = {"gap": what, "sparsity": sparsity, "relative": gap.relative, "low": low, "high": high, "seeds": gap.seeds}
    return found | more


def gaps() -> list[dict[str, Any]]:
    """Return a row for each gap of the rule, and for what the dense rate costs where it has three seeds."""
    curves = read_sweep([HERE / "results.csv"]).rows
    drawn, more = (read_sweep([HERE / name / "results.csv"], apart=True).rows for name in ("search", "tuned"))
    sparsities = sorted({row["sparsity"] for row in curves})
    dense = of(curves, parameterization="supar", sparsity=0.0)
    rate = best_rate(dense)
    transferred = {s: reported(of(curves, parameterization="supar", sparsity=s, lr=rate)) for s in sparsities}
    found = []
    for s in sparsities[1:]:
        own: dict[str, Losses] = {}
        for scheme in ("supar", "mup"):
            runs = of(curves, parameterization=scheme, sparsity=s)
            best = best_rate(runs)
            own[scheme] = reported(of(runs, lr=best))
            at_dense = reported(of(runs, lr=rate))
            if len(at_dense) > 1:
                found.append(gap_row(f"{scheme}: dense rate over own", s, relative_gap(at_dense, own[scheme]), lr=best))
        found.append(gap_row("supar transferred over mup at its own rate", s, relative_gap(transferred[s], own["mup"])))
    controls = {}
    for s in (0.0, SPARSEST):
        best = tuned([*of(drawn, sparsity=s), *of(more, sparsity=s)])
        controls[s] = reported(best)
        goal = of(curves, parameterization="supar", sparsity=s, lr=rate, seed=0)[0]["loss"]
        points = of(drawn, sparsity=s)
        reached = sum(row["loss"] is not None and row["loss"] <= goal for row in points)
        about = {"lr": best[0]["lr"], "reached": reached, "points": len(points)}
        gap = relative_gap(transferred[s], controls[s])
        found.append(gap_row("supar transferred over sp tuned jointly", s, gap, **about))
    beyond = gap_beyond(transferred[SPARSEST], controls[SPARSEST], transferred[0.0], controls[0.0])
    found.append(gap_row("difference in differences with sp tuned jointly", SPARSEST, beyond))
    return found


def draw(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draw the gaps over sparsity, in percent, with their intervals."""
    kinds = [name for name in dict.fromkeys(row["gap"] for row in rows) if "dense rate" not in name]
    with styled():
        figure = Figure(figsize=(6.4, 3.6), layout="constrained")
        axes = figure.subplots()
        axes.axhline(0.0, color=MUTED, lw=1)
        for place, name in enumerate(kinds):
            chosen = [row for row in rows if row["gap"] == name]
            middle = [100 * row["relative"] for row in chosen]
            ends = [[100 * abs(row["relative"] - row[end]) for row in chosen] for end in ("low", "high")]
            xs = [100 * row["sparsity"] + 0.6 * (place - 1) for row in chosen]
            look = {"color": SERIES[place], "marker": MARKERS[place], "linestyle": "none", "capsize": 3}
            axes.errorbar(xs, middle, yerr=ends, label=name, **look)
        axes.set_xlabel("sparsity, %")
        axes.set_ylabel("reported loss, % above the control")
        axes.legend(fontsize="small")
        save_png(figure, path)


def main() -> None:
    rows = gaps()
    columns = list(dict.fromkeys(name for row in rows for name in row))
    write_rows([{name: row.get(name) for name in columns} for row in rows], HERE / "gaps.csv", columns)
    draw(rows, HERE / "gaps.png")
    for row in rows:
        print(*(f"{value:.4g}" if isinstance(value, float) else value for value in row.values()))


if __name__ == "__main__":
    main()
