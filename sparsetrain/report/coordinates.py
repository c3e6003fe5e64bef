"""The figure and the table of a coordinate check."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from sparsetrain.parameterization.coordinates import Spread
from sparsetrain.report.plots import MARKERS, SERIES, log_axis, save_png, styled
from sparsetrain.report.tables import Sheet

SHOWN = ("activation", "update", "gradient")


def coordinates_figure(spreads: Sequence[Spread], axis: str, path: Path) -> None:
    """Draw the RMS over the axis as a PNG: rows are quantities, columns are schemes, lines are kinds of layer."""
    schemes = list(dict.fromkeys(spread.scheme for spread in spreads))
    kinds = list(dict.fromkeys(spread.kind for spread in spreads if spread.quantity in SHOWN))
    with styled():
        figure = Figure(figsize=(2.9 * len(schemes) + 2.0, 7.2), layout="constrained")
        grid = figure.subplots(len(SHOWN), len(schemes), sharex=True, sharey="row", squeeze=False)
        for row, quantity in enumerate(SHOWN):
            for column, scheme in enumerate(schemes):
                axes = grid[row][column]
                of = {s.kind: s for s in spreads if s.scheme == scheme and s.quantity == quantity}
                _panel(axes, of, kinds)
                if row == 0:
                    axes.set_title(scheme)
                if row == len(SHOWN) - 1:
                    axes.set_xlabel(axis)
                if column == 0:
                    axes.set_ylabel(f"RMS of {quantity}")
        steps = sorted({spread.step for spread in spreads if spread.quantity in SHOWN})
        figure.suptitle(f"Coordinate check over {axis}, after {steps[-1]} steps", ha="left", x=0.012)
        handles, labels = grid[0][0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside right upper")
        save_png(figure, path)


def _panel(axes: Axes, of: Mapping[str, Spread], kinds: Sequence[str]) -> None:
    for index, kind in enumerate(kinds):
        points = [(x, y) for x, y in of[kind].rms if 0 < y < math.inf] if kind in of else []
        colour, marker = SERIES[index % len(SERIES)], MARKERS[(index + index // len(SERIES)) % len(MARKERS)]
        xs, ys = [x for x, _ in points], [y for _, y in points]
        axes.plot(xs, ys, color=colour, marker=marker, ms=3.5, lw=1.2, label=kind)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    values = sorted({x for spread in of.values() for x, _ in spread.rms})
    log_axis(axes.xaxis, values)
    axes.tick_params(axis="x", labelrotation=60 if len(values) > 4 else 0)
    log_axis(axes.yaxis)
    axes.grid(True)


def coordinates_sheets(spreads: Sequence[Spread], axis: str) -> list[Sheet]:
    """Return a table for each scheme, with ratio and slope of every kind of layer."""
    columns = tuple(f"{quantity} {what}" for quantity in SHOWN for what in ("max/min", "slope"))
    note = f"max/min of the RMS over {axis}, and the slope of log RMS against log {axis}; means over seeds, last step"
    sheets = []
    for scheme in dict.fromkeys(spread.scheme for spread in spreads):
        rows = []
        for kind in dict.fromkeys(s.kind for s in spreads if s.scheme == scheme and s.quantity in SHOWN):
            of = {s.quantity: s for s in spreads if (s.scheme, s.kind) == (scheme, kind)}
            cells = [_cell(of.get(quantity)) for quantity in SHOWN]
            rows.append((kind, *(cell for pair in cells for cell in pair)))
        sheets.append(Sheet(scheme, ("layers", *columns), tuple(rows)))
    return [*sheets[:-1], replace(sheets[-1], note=note)] if sheets else []


def _cell(spread: Spread | None) -> tuple[str, str]:
    if spread is None:
        return "-", "-"
    return f"{spread.ratio:.2f}", f"{spread.slope:+.2f}"
