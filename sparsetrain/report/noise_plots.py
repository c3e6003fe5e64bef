"""The figure of noise scales over a training: of the norm layers and of all parameters."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from sparsetrain.report.plots import INK, SERIES, log_axis, save_png, styled
from sparsetrain.report.text import si, tick


@dataclass(frozen=True)
class NoiseCourse:
    """The noise scales of a run.

    Args:
        label: of the group of runs that share a colour.
        tokens, norms, whole: ``[n]``; noise scales in sequences, of the norm layers and of all parameters, NaN where
            there is none.
    """

    label: str
    tokens: np.ndarray
    norms: np.ndarray
    whole: np.ndarray


def noise_figure(courses: Sequence[NoiseCourse], path: Path) -> None:
    """Draw a PNG with a line for each run and noise scale: dashed for the norm layers, solid for all parameters."""
    labels = list(dict.fromkeys(course.label for course in courses))
    with styled():
        figure = Figure(figsize=(5.6, 4.4), layout="constrained")
        axes = figure.subplots()
        for course in courses:
            colour = SERIES[labels.index(course.label) % len(SERIES)]
            axes.plot(course.tokens, course.whole, color=colour, lw=1.3)
            axes.plot(course.tokens, course.norms, color=colour, lw=1.0, ls="--")
        axes.set_yscale("log", base=2)
        log_axis(axes.yaxis)
        axes.set_xlabel("tokens")
        axes.set_ylabel("gradient noise scale, sequences")
        axes.xaxis.set_major_formatter(lambda value, _: tick(si(value, "")))
        axes.grid(True)
        keys = [Line2D([], [], color=SERIES[at % len(SERIES)], lw=1.3) for at in range(len(labels))]
        keys += [Line2D([], [], color=INK, lw=1.2, ls=style) for style in ("-", "--")]
        figure.legend(keys, [*labels, "all parameters", "norm layers"], loc="outside upper left", ncols=2, fontsize=7)
        save_png(figure, path)
