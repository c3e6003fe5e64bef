"""The table and the figure of a random search over several settings at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from sparsetrain.errors import UserError
from sparsetrain.report.plots import MUTED, SERIES, log_axis, save_png, styled
from sparsetrain.report.tables import Sheet

SHOWN = 10
BEST = 5


def search_knobs(rows: Sequence[Mapping[str, Any]], candidates: Sequence[str]) -> list[str]:
    """Return the ``candidates`` that vary over the runs and are positive numbers in every run.

    Args:
        rows: one row per run, by column.
        candidates: names of columns.

    Raises:
        UserError: no candidate does.
    """
    knobs = [
        name
        for name in candidates
        if all(isinstance(row.get(name), int | float) and row[name] > 0 for row in rows)
        and len({row[name] for row in rows}) > 1
    ]
    if not knobs:
        raise UserError(f"no setting varies over the {len(rows)} runs, so there is no search to show")
    return knobs


def search_sheet(rows: Sequence[Mapping[str, Any]], knobs: Sequence[str]) -> Sheet:
    """Return the best points of a search, best first; diverged points are counted but not shown."""
    ranked = sorted((row for row in rows if row["loss"] is not None), key=lambda row: row["loss"])
    body = [(str(place), f"{row['loss']:.4f}", *(f"{row[name]:.3g}" for name in knobs)) for place, row in _top(ranked)]
    note = f"{len(rows)} points, {len(rows) - len(ranked)} diverged. One seed a point: take what the best few agree on."
    columns = ("place", "loss", *(name.rpartition(".")[2] for name in knobs))
    return Sheet("Random search", columns, tuple(body), note)


def _top(ranked: Sequence[Mapping[str, Any]]) -> list[tuple[int, Mapping[str, Any]]]:
    return list(enumerate(ranked[:SHOWN], start=1))


def search_figure(rows: Sequence[Mapping[str, Any]], knobs: Sequence[str], path: Path) -> None:
    """Draw the loss of every point over each setting as a PNG; the best five points are filled."""
    ranked = sorted((row for row in rows if row["loss"] is not None), key=lambda row: row["loss"])
    with styled():
        figure = Figure(figsize=(2.8 * len(knobs), 3.2), layout="constrained")
        grid = figure.subplots(1, len(knobs), sharey=True, squeeze=False)[0]
        for axes, name in zip(grid, knobs, strict=True):
            axes.plot([r[name] for r in ranked], [r["loss"] for r in ranked], "o", color=MUTED, ms=4, mfc="none")
            best = ranked[:BEST]
            axes.plot([r[name] for r in best], [r["loss"] for r in best], "o", color=SERIES[0], ms=6)
            axes.set_xscale("log")
            log_axis(axes.xaxis)
            axes.tick_params(axis="x", labelrotation=60)
            axes.set_xlabel(name.rpartition(".")[2])
            axes.grid(True)
        grid[0].set_ylabel("validation loss, nats")
        if ranked:
            low, middle = ranked[0]["loss"], ranked[len(ranked) // 2]["loss"]
            grid[0].set_ylim(low - 0.1 * (middle - low) - 1e-3, middle + 0.2 * (middle - low) + 1e-3)
        save_png(figure, path)
