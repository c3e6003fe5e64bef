"""The linearisation slope of CompleteP: linearisation.csv and linearisation.png beside this file, in half a minute.

    python experiments/completep_depth/linearisation.py

What is measured: `sparsetrain.parameterization.linearisation`.
"""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from sparsetrain.parameterization import Parameterization
from sparsetrain.parameterization.linearisation import Linearisation, linearisation_slope, linearisation_table
from sparsetrain.report.plots import MARKERS, SERIES, log_axis, save_png, styled

HERE = Path(__file__).parent
WIDTH, DEPTHS, SEEDS = 128, (2, 4, 8, 16, 32, 64, 128, 256), range(20)
EXPECTED = {0.5: "-1/2", 1.0: "0"}


def main() -> None:
    """Measure both exponents, print their slopes, write the table and the figure."""
    found = {
        alpha: linearisation_table([Parameterization.completep(WIDTH, 2, alpha)], DEPTHS, SEEDS, WIDTH)
        for alpha in EXPECTED
    }
    with (HERE / "linearisation.csv").open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(["parameterization", "alpha", "depth", "seed", "ratio"])
        for rows in found.values():
            writer.writerows([row.scheme, row.alpha, row.depth, row.seed, f"{row.ratio:.6g}"] for row in rows)
    draw(found)
    for alpha, rows in found.items():
        print(f"alpha {alpha:g}: slope {linearisation_slope(rows):+.3f} (expected {EXPECTED[alpha]})")


def draw(found: dict[float, list[Linearisation]]) -> None:
    """Draw the median over seeds with its quartiles."""
    with styled():
        figure = Figure(figsize=(5.2, 3.6), layout="constrained")
        axes = figure.add_subplot()
        for index, (alpha, rows) in enumerate(found.items()):
            ratios = np.array([[row.ratio for row in rows if row.depth == depth] for depth in DEPTHS])
            low, middle, high = np.quantile(ratios, (0.25, 0.5, 0.75), axis=1)
            label = f"alpha {alpha:g}: slope {linearisation_slope(rows):+.2f}"
            axes.fill_between(DEPTHS, low, high, color=SERIES[index], alpha=0.2, lw=0)
            axes.plot(DEPTHS, middle, color=SERIES[index], marker=MARKERS[index], ms=4.5, label=label)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        log_axis(axes.xaxis, DEPTHS)
        log_axis(axes.yaxis)
        axes.set_xlabel("layers")
        axes.set_ylabel("second-order over first-order change")
        axes.grid(True)
        axes.legend()
        save_png(figure, HERE / "linearisation.png")


if __name__ == "__main__":
    main()
