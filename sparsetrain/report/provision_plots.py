"""The figure of ``sparsetrain provision``: loss over time and over cost of the Pareto set, by machine and sparsity."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from sparsetrain.report.plots import INK, MARKERS, SERIES, log_axis, save_png, styled

_LINEAR = 20.0  # largest over smallest value, up to which an axis is linear


def provision_figure(rows: Sequence[Mapping[str, Any]], kind: str, path: Path) -> None:
    """Draw a PNG: a panel of loss over hours and, if any machine has a price, one over USD.

    Args:
        rows: of ``results.csv``, at least one. kind: which budget was given. path: of the file.
    """
    machines = list(dict.fromkeys(f"{row['devices']} x {row['machine']}" for row in rows))
    sparsities = sorted({row["sparsity"] for row in rows})
    panels = [("seconds", 3600.0, "time, hours")]
    if any(row["cost"] is not None for row in rows):
        panels.append(("cost", 1.0, "cost, USD"))
    with styled():
        figure = Figure(figsize=(1.2 + 3.6 * len(panels), 4.2), layout="constrained")
        grid = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
        for axes, (name, unit, label) in zip(grid, panels, strict=True):
            known = [row for row in rows if row[name] is not None]
            _points(axes, known, name, unit, machines, sparsities)
            axes.set_xlabel(label)
            axes.grid(True)
        grid[0].set_ylabel("loss by the law, nats per token")
        handles = [
            Line2D([], [], color=SERIES[index % len(SERIES)], marker="o", ls="", label=machine)
            for index, machine in enumerate(machines)
        ]
        handles += [
            Line2D(
                [], [], color=INK, marker=MARKERS[index % len(MARKERS)], ls="", mfc="none", label=f"sparsity {each:g}"
            )
            for index, each in enumerate(sparsities)
        ]
        figure.legend(handles=handles, loc="outside upper left", ncols=4, fontsize=7)
        figure.suptitle(f"Pareto set of a budget in {kind}", fontsize=9, x=0.99, ha="right")
        save_png(figure, path)


def _points(
    axes: Axes,
    rows: Sequence[Mapping[str, Any]],
    name: str,
    unit: float,
    machines: Sequence[str],
    sparsities: Sequence[float],
) -> None:
    for row in rows:
        look = machines.index(f"{row['devices']} x {row['machine']}"), sparsities.index(row["sparsity"])
        color, marker = SERIES[look[0] % len(SERIES)], MARKERS[look[1] % len(MARKERS)]
        axes.plot([row[name] / unit], [row["loss"]], color=color, marker=marker, ls="", ms=5, mfc="none")
    places = [row[name] for row in rows]
    if max(places) > _LINEAR * min(places):
        axes.set_xscale("log")
        log_axis(axes.xaxis)
    else:
        axes.set_xlim(left=0.0)
