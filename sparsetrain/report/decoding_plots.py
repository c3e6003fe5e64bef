"""The figure of few tokens: speed-ups over sparsity beside what memory gives, a column for each number of tokens."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from sparsetrain.report.bench import machine_line
from sparsetrain.report.bench_plots import speedups
from sparsetrain.report.contenders import DECODING, DENSE, Values, grouped, title
from sparsetrain.report.plots import MUTED, styled
from sparsetrain.report.text import shorten

_PANEL_INCHES = (3.6, 3.2)
_NAMES = {"decoding": ("Layers", "token"), "generation": ("Generation", "row")}
_LIMITED = ("csr", "bsr", DENSE)  # the first of these that was measured is the contender whose limit is drawn


def decoding_figure(values: Values) -> bytes:
    """Return a PNG with a row of panels for each kind and number of threads, and a column for each number of tokens."""
    entries = values["summary"]["decoding"]
    rows = sorted({(DECODING.index(e["part"]), e["threads"]) for e in entries})
    columns = sorted({e["tokens"] for e in entries})
    with styled("bench"):
        size = (_PANEL_INCHES[0] * len(columns), _PANEL_INCHES[1] * len(rows) + 0.9)
        figure = Figure(figsize=size, layout="constrained", dpi=150)
        for (part, threads, tokens), members in grouped(entries, "part", "threads", "tokens"):
            row, column = rows.index((DECODING.index(part), threads)), columns.index(tokens)
            axes = figure.add_subplot(len(rows), len(columns), row * len(columns) + column + 1)
            heading = f"{_NAMES[part][0]}, {_count(tokens, _NAMES[part][1])}, {_count(threads, 'thread')}"
            limited = next(name for name in _LIMITED if any(entry["contender"] == name for entry in members))
            limit = _limit([entry for entry in members if entry["contender"] == limited])
            text = f"limit of memory, {title(limited)}"
            speedups(axes, members, heading, limit, text, "forward_speedup", legend=False)
        lines = {
            text: line for axes in figure.axes for line, text in zip(*axes.get_legend_handles_labels(), strict=True)
        }
        figure.legend(lines.values(), lines.keys(), loc="outside lower center", ncols=min(4, len(lines) or 1))
        figure.suptitle(shorten(machine_line(values), 45 * len(columns)), fontsize=6.5, color=MUTED)
        target = io.BytesIO()
        FigureCanvasAgg(figure).print_png(target, metadata={"Software": None})
        return target.getvalue()


def _limit(entries: Sequence[Values]) -> Callable[[float], float] | None:
    """Return the limit of a contender by density, through the measured sparsities; None if its bytes are not known."""
    points = sorted((np.log(1.0 - entry["sparsity"]), np.log(entry["limit"])) for entry in entries if entry["limit"])
    if not points:
        return None
    places, limits = zip(*points, strict=True)
    return lambda density: float(np.exp(np.interp(np.log(density), places, limits)))


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"
