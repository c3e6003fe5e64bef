"""The figure of a sweep: the curves, the shifts of their optima, and the losses at a transferred value."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from sparsetrain.report.plots import MARKERS, MUTED, SERIES, log_axis, save_png, styled
from sparsetrain.report.sweep import SHAPE, Line, labels_of, own_loss

_MOST = 9  # curves whose long names fit below a panel
_LONG = 30  # letters of a label that leave room for three columns of them


def sweep_figure(lines: Sequence[Line], x: str, path: Path, extra: Sequence[str] = ()) -> None:
    """Draw a PNG: one panel of curves per parameterization, a panel of shifts, and a panel of transferred losses.

    It is one panel of curves above their own minima if there is no shift, because no base has an optimum inside its
    grid, or if there are more curves with long names than small panels can tell apart.
    """
    schemes = list(dict.fromkeys(line.scheme for line in lines))
    labels = labels_of(lines, extra)
    crowded = len(set(labels)) > _MOST and max(map(len, labels)) > _LONG
    if len(lines) > 1 and (crowded or not any(line.shift for line in lines)):
        _apart_figure(lines, labels, x, path)
        return
    # As in each parameterization: by depth, width and sparsity. One may have no model that is dense.
    by_size = sorted(zip(lines, labels, strict=True), key=lambda pair: pair[0].shape[: len(SHAPE)][::-1])
    order = list(dict.fromkeys(label for _, label in by_size))
    with styled():
        figure = Figure(figsize=(3.4 * (len(schemes) + 2), 4.6), layout="constrained")
        grid = figure.subplots(1, len(schemes) + 2)
        for index, scheme in enumerate(schemes):
            axes = grid[index]
            axes.sharex(grid[0])
            axes.sharey(grid[0])
            axes.set_title(scheme)
            for line, label in zip(lines, labels, strict=True):
                if line.scheme == scheme:
                    _curve(axes, line, order.index(label))
            axes.set_xlabel(x)
            axes.set_xscale("log", base=2)
            axes.tick_params(axis="x", labelrotation=60)
            log_axis(axes.xaxis)
            axes.grid(True)
        grid[0].set_ylabel("validation loss, nats")
        _fit(grid[0], lines)
        _shifts(grid[-2], lines, labels, order, schemes)
        _transfer(grid[-1], lines, labels, order, schemes)
        # Legends stand above the panels, since inside they would cover points.
        curves = [Line2D([], [], color=SERIES[place % len(SERIES)], marker="o", ms=3) for place in range(len(order))]
        wide = max(map(len, order)) > _LONG
        figure.legend(curves, order, loc="outside upper left", ncols=3 if wide else 4, fontsize=7)
        bounds = any(line.shift is not None and line.shift.at_least for line in lines)
        columns = 4 if len(schemes) > 1 else 2  # narrow figures have no room for both legends in one row
        figure.legend(handles=_keys(schemes, bounds), loc="outside upper right", ncols=columns, fontsize=7)
        save_png(figure, path)


def _apart_figure(lines: Sequence[Line], labels: Sequence[str], x: str, path: Path) -> None:
    """Draw the losses of each curve in percent above its own lowest mean; bars are the range of the seeds."""
    schemes = {line.scheme for line in lines}
    with styled():
        figure = Figure(figsize=(8.8, 4.6), layout="constrained")
        axes = figure.subplots()
        shown: list[float] = []
        for index, (line, label) in enumerate(zip(lines, labels, strict=True)):
            losses = line.curve.filled()
            means = losses.mean(axis=1)
            finite = np.isfinite(means)
            if not finite.any():
                continue
            lowest = means[finite].min()
            percents = 100.0 * (means[finite] / lowest - 1.0)
            # Seeds differ in level; what they have in common is taken out before their range is drawn.
            apart = (
                100.0
                * (losses[finite] - losses[finite].mean(axis=0) + means[finite].mean() - means[finite, None])
                / lowest
            )
            ends = np.abs([apart.min(axis=1), apart.max(axis=1)])
            colour, turn = SERIES[index % len(SERIES)], index // len(SERIES)
            name = label if len(schemes) == 1 else f"{line.scheme}, {label}"
            marker, style = MARKERS[turn % len(MARKERS)], ("-", "--", ":")[turn % 3]
            xs = 2 ** line.curve.log2[finite]
            axes.errorbar(xs, percents, ends, ms=4, lw=1.2, label=name, color=colour, marker=marker, ls=style)
            shown += sorted(percents)[:3]
        axes.set_ylim(-0.1 * max([0.1, *shown]), 1.1 * max([0.1, *shown]))
        axes.set_xlabel(x)
        axes.set_xscale("log", base=2)
        log_axis(axes.xaxis)
        axes.set_ylabel("validation loss, % above the curve's lowest mean")
        axes.grid(True)
        figure.legend(loc="outside right upper", fontsize=7)
        save_png(figure, path)


def _keys(schemes: Sequence[str], bounds: bool) -> list[Line2D]:
    """Return the legend of the two panels on the right; ``bounds`` adds the marker of a lower bound."""
    looks = [(SERIES[index % len(SERIES)], MARKERS[index % len(MARKERS)]) for index in range(len(schemes))]
    keys = [
        Line2D([], [], color=colour, marker=marker, ms=5, label=scheme)
        for (colour, marker), scheme in zip(looks, schemes, strict=True)
    ]
    own = Line2D([], [], color=MUTED, marker="o", ms=5, ls="--", mfc="none", label="own best")
    bar = Line2D([], [], color=MUTED, lw=1.4, label="95 %, Student's t over seeds")
    bound = Line2D([], [], color=MUTED, marker="^", ms=8, ls="", mfc="none", label="shift: at least")
    return [*keys, own, bar, bound] if bounds else [*keys, own, bar]


def _curve(axes: Axes, line: Line, index: int) -> None:
    colour = SERIES[index % len(SERIES)]
    means = line.curve.filled().mean(axis=1)
    shown = np.isfinite(means)
    axes.plot(2 ** line.curve.log2[shown], means[shown], color=colour, marker="o", ms=3, lw=1.2)
    for seed in range(len(line.curve.seeds)):
        axes.plot(2**line.curve.log2, line.curve.losses[:, seed], "o", color=colour, ms=2, alpha=0.4)
    found = line.optimum
    if found.log2 is not None:
        axes.plot(2**found.log2, found.loss, "*", color=colour, ms=10, zorder=3)
    elif math.isfinite(found.loss):
        axes.plot(2**found.best, found.loss, "<" if found.edge == "low" else ">", color=colour, ms=9, mfc="none")


def _fit(axes: Axes, lines: Sequence[Line]) -> None:
    """Limit the axis to losses around the minima, since a diverging end would flatten the curves."""
    lowest = [line.optimum.loss for line in lines if math.isfinite(line.optimum.loss)]
    if lowest:
        low, high = min(lowest), max(lowest)
        axes.set_ylim(low - 0.05 * (high - low + 0.1), high + 1.5 * (high - low) + 0.15)


def _shifts(axes: Axes, lines: Sequence[Line], labels: Sequence[str], order: list[str], schemes: list[str]) -> None:
    axes.set_title("shift of the optimum, grid steps")
    axes.axhspan(-1, 1, color=MUTED, alpha=0.12, lw=0)
    for index, scheme in enumerate(schemes):
        colour, marker = SERIES[index % len(SERIES)], MARKERS[index % len(MARKERS)]
        for line, label in zip(lines, labels, strict=True):
            if line.scheme != scheme or line.shift is None:
                continue
            place = order.index(label) + 0.1 * (index - (len(schemes) - 1) / 2)
            if line.shift.at_least:
                axes.plot(place, line.shift.steps, "^" if line.shift.steps > 0 else "v", color=colour, mfc="none", ms=8)
                continue
            axes.plot(place, line.shift.steps, marker, color=colour, ms=5)
            if line.shift.interval is not None and all(map(math.isfinite, line.shift.interval)):
                axes.plot([place, place], line.shift.interval, color=colour, lw=1.4)
    _named(axes, order)


def _transfer(axes: Axes, lines: Sequence[Line], labels: Sequence[str], order: list[str], schemes: list[str]) -> None:
    axes.set_title("loss: base's best value, own best")
    for index, scheme in enumerate(schemes):
        own = {label: line for line, label in zip(lines, labels, strict=True) if line.scheme == scheme}
        places = [order.index(label) for label in own]
        moved = [float(np.mean(list(line.at_base.values()))) if line.at_base else np.nan for line in own.values()]
        best = [own_loss(line) for line in own.values()]
        colour, marker = SERIES[index % len(SERIES)], MARKERS[index % len(MARKERS)]
        axes.plot(places, moved, color=colour, marker=marker, ms=5, lw=1.4)
        axes.plot(places, best, color=colour, marker=marker, ms=5, lw=1.0, ls="--", mfc="none")
    _named(axes, order)


def _named(axes: Axes, order: list[str]) -> None:
    names = [name.replace(", ", ",\n") for name in order]
    axes.set_xticks(range(len(order)), names, rotation=60, ha="right", rotation_mode="anchor")
    axes.set_xlim(-0.5, len(order) - 0.5)
    axes.grid(True)
