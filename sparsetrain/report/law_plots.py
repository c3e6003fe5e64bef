"""The figure of fitted laws: points with intervals, the law with its band, and the published law beside it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from sparsetrain.report.plots import MARKERS, MUTED, SERIES, log_axis, save_png, styled
from sparsetrain.scaling.law import Law, PowerLaw

_MANY = 30  # points from which their marks are small
_BEYOND = 1.5  # how far a law is drawn beyond its points, as a factor


@dataclass(frozen=True)
class LawPoint:
    """A point of a law.

    Args:
        x: its inputs, one or two.
        y: what was measured there.
        ends: its 95 % interval, or None; an end may be infinite or 0.
    """

    x: tuple[float, ...]
    y: float
    ends: tuple[float, float] | None = None


@dataclass(frozen=True)
class DrawnLaw:
    """A law with its name and its points."""

    label: str
    law: Law
    points: Sequence[LawPoint]


def law_figure(drawn: Sequence[DrawnLaw], path: Path, published: PowerLaw | None = None) -> None:
    """Draw a PNG; a law of two inputs is drawn as what it says over what was measured."""
    with styled():
        figure = Figure(figsize=(5.6, 4.4), layout="constrained")
        axes = figure.subplots()
        one = len(drawn[0].law.inputs) == 1
        if one:  # before anything is drawn: limits of a linear axis may be negative
            axes.set_xscale("log", base=2)
            axes.set_yscale("log", base=2)
        for index, each in enumerate(drawn):
            look = (SERIES[index % len(SERIES)], MARKERS[index % len(MARKERS)])
            (_over_input if one else _over_measured)(axes, each, *look)
        law = drawn[0].law
        if one:
            _intervals(axes, drawn)
            if published is not None:
                x = _inputs(drawn)
                axes.plot(x, [published(value) for value in x], color=MUTED, ls="--", lw=1.2, label=published.source)
            axes.set_xlabel(_axis(law.inputs[0].name, law.inputs[0].unit))
            axes.set_ylabel(_axis(law.output.name, law.output.unit))
            log_axis(axes.xaxis)
            log_axis(axes.yaxis)
        else:
            axes.set_xlabel(f"measured {_axis(law.output.name, law.output.unit)}")
            axes.set_ylabel("by the law")
            axes.axline((0.0, 0.0), slope=1.0, color=MUTED, lw=1.0, ls="--")
            _fit(axes, drawn)
        axes.grid(True)
        figure.legend(loc="outside upper left", ncols=2, fontsize=7)
        save_png(figure, path)


def _over_input(axes: Axes, drawn: DrawnLaw, colour: str, marker: str) -> None:
    law, x = drawn.law, _inputs([drawn])
    axes.plot(x, [law(value) for value in x], color=colour, lw=1.4, label=drawn.label)
    bands = [law.predict_interval(value) for value in x]
    if all(band is not None for band in bands):
        low, high = np.array(bands, dtype=float).T
        axes.fill_between(x, low, high, color=colour, alpha=0.15, lw=0)
    many = len(drawn.points) > _MANY
    for point in drawn.points:
        axes.plot(point.x[0], point.y, marker, color=colour, ms=2 if many else 5)


def _intervals(axes: Axes, drawn: Sequence[DrawnLaw]) -> None:
    """Draw the intervals of points, which may be open: they must not set the limits of the axis."""
    low, high = axes.get_ylim()
    for index, each in enumerate(drawn):
        for point in each.points:
            if point.ends is not None:
                ends = np.clip(point.ends, low / 2.0, high * 2.0)
                axes.plot([point.x[0]] * 2, ends, color=SERIES[index % len(SERIES)], lw=1.2)
    axes.set_ylim(low, high)


def _over_measured(axes: Axes, drawn: DrawnLaw, colour: str, marker: str) -> None:
    said = [drawn.law(*point.x) for point in drawn.points]
    axes.plot([point.y for point in drawn.points], said, marker, color=colour, ms=4, label=drawn.label)


def _fit(axes: Axes, drawn: Sequence[DrawnLaw]) -> None:
    values = [value for each in drawn for point in each.points for value in (point.y, each.law(*point.x))]
    margin = 0.05 * (max(values) - min(values)) or 0.05
    axes.set_xlim(min(values) - margin, max(values) + margin)
    axes.set_ylim(min(values) - margin, max(values) + margin)


def _inputs(drawn: Sequence[DrawnLaw]) -> np.ndarray:
    values = [point.x[0] for each in drawn for point in each.points]
    x: np.ndarray = np.geomspace(min(values) / _BEYOND, max(values) * _BEYOND, 60)
    return x


def _axis(name: str, unit: str) -> str:
    shown = name.replace("_", " ")
    return f"{shown}, {unit}" if unit and unit != shown and "_per_" not in name else shown
