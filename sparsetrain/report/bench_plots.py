"""The figure of a bench: speed-ups of layers and of a model over sparsity, with their limits, and scaling series."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from sparsetrain.report.bench import amdahl, machine_line
from sparsetrain.report.contenders import DENSE, TITLES, Values, title
from sparsetrain.report.plots import INK, MARKERS, MUTED, SERIES, styled
from sparsetrain.report.text import percent, shorten, si, tick

_PANEL_INCHES = (4.2, 5.0)

Draw = Callable[[Axes], None]


def bench_figure(values: Values) -> bytes:
    """Return a PNG with a panel for each number of threads and each measured part of the bench."""
    panels = _panels(values["summary"], _profiles(values)) + _scaling_panels(values)
    with styled("bench"):
        columns = min(3, max(1, len(panels)))
        rows = max(1, -(-len(panels) // columns))
        size = (_PANEL_INCHES[0] * columns, _PANEL_INCHES[1] * rows + 0.3)
        figure = Figure(figsize=size, layout="constrained", dpi=150)
        for number, draw in enumerate(panels):
            draw(figure.add_subplot(rows, columns, number + 1))
        text = shorten(machine_line(values), 60 * columns)
        figure.supxlabel(text, fontsize=6.5, color=MUTED)
        target = io.BytesIO()
        FigureCanvasAgg(figure).print_png(target, metadata={"Software": None})
        return target.getvalue()


def _profiles(values: Values) -> dict[int, Values]:
    return {cell["threads"]: cell["profile"] for cell in values["cells"].values() if "profile" in cell}


def _panels(summary: Values, profiles: dict[int, Values]) -> list[Draw]:
    panels: list[Draw] = []
    for threads in _threads(summary["layers"]):
        entries = [e for e in summary["layers"] if e["threads"] == threads and e["speedup"] is not None]
        heading = f"Layer training step, {_count(threads)}"
        panels.append(partial(speedups, entries=entries, heading=heading, limit=lambda density: 1.0 / density))
    sparse = [entry for entry in summary["models"] if entry["sparsity"] is not None]
    for threads in _threads(sparse):
        entries = [entry for entry in sparse if entry["threads"] == threads]
        limit = partial(amdahl, profiles[threads]) if threads in profiles else None
        heading = f"GPT training step, {_count(threads)}"
        panels.append(partial(speedups, entries=entries, heading=heading, limit=limit, limit_name="Amdahl limit"))
    return panels


def speedups(
    axes: Axes,
    entries: Sequence[Values],
    heading: str,
    limit: Callable[[float], float] | None,
    limit_name: str = "limit, 1/density",
    key: str = "speedup",
    legend: bool = True,
) -> None:
    """Draw speed-ups over 1/density on logarithmic axes, where a limit of 1/density is a straight line.

    Args:
        entries: with ``contender``, ``sparsity`` and the speed-up under ``key``.
        limit: the limit by density; None to draw none.
        legend: whether a legend stands below the panel.
    """
    names = [name for name in dict.fromkeys(entry["contender"] for entry in entries) if name != DENSE]
    sparsities = sorted({entry["sparsity"] for entry in entries})
    x_of = {sparsity: 1.0 / (1.0 - sparsity) for sparsity in sparsities}
    if limit is not None:
        x = np.geomspace(x_of[sparsities[0]], x_of[sparsities[-1]], 50)
        axes.plot(x, [limit(1.0 / value) for value in x], color=INK, linestyle="--", linewidth=1.2, label=limit_name)
    axes.axhline(1.0, color=MUTED, linewidth=1.0)
    for name in names:
        number = _place(name)
        points = sorted((x_of[e["sparsity"]], e[key]) for e in entries if e["contender"] == name)
        axes.plot(
            *zip(*points, strict=True),
            color=SERIES[number % len(SERIES)],
            marker=MARKERS[number % len(MARKERS)],
            # Colours repeat after six contenders; the line is then dotted.
            linestyle="-" if number < len(SERIES) else ":",
            markersize=4.5,
            linewidth=1.6,
            label=title(name),
        )
    axes.set_xscale("log")
    axes.set_yscale("log")
    _ticks(axes, [x_of[s] for s in sparsities], [tick(percent(s)) for s in sparsities])
    low, high = axes.get_ylim()
    steps = [s for s in (0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 3, 4, 6, 8, 10, 15, 20, 50, 100) if low <= s <= high]
    axes.yaxis.set_major_locator(FixedLocator(steps))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}x"))
    axes.set_xlabel("sparsity")
    axes.set_ylabel("times as fast as torch dense float32")
    axes.set_title(heading)
    if legend:
        _legend(axes)


def _ticks(axes: Axes, places: Sequence[float], labels: Sequence[str]) -> None:
    axes.set_xticks(places, labels)
    axes.xaxis.set_minor_locator(NullLocator())


def _legend(axes: Axes) -> None:
    # The legend stands below the panel, since curves fill the panel, and has one column, since two may be too wide.
    axes.legend(loc="upper left", bbox_to_anchor=(-0.05, -0.13), handlelength=2.4, labelspacing=0.25)


def _threads(entries: list[Values]) -> list[int]:
    return sorted({entry["threads"] for entry in entries})


def _place(name: str) -> int:
    """Return the number of a contender's colour and marker, the same in every panel."""
    known = [other for other in TITLES if other != DENSE]
    return known.index(name) if name in known else len(known)


def _count(threads: int) -> str:
    return f"{threads} thread" if threads == 1 else f"{threads} threads"


def _scaling_panels(values: Values) -> list[Draw]:
    """Return a panel for each scaling series, with medians as points and the least-squares lines through them."""
    panels: list[Draw] = []
    for part, key, label in (("nnz", "stored_weights", "nonzeros"), ("tokens", "tokens", "tokens")):
        cells = [cell for cell in values["cells"].values() if cell["part"] == part]
        if cells:
            fits = {(e["threads"], e["contender"]): e.get(part) for e in values["summary"]["scaling"]}
            panels.append(partial(_growth, cells=cells, fits=fits, key=key, label=label))
    return panels


def _growth(axes: Axes, cells: list[Values], fits: dict[tuple[int, str], Values | None], key: str, label: str) -> None:
    number = 0
    for (threads, name), fit in fits.items():
        if not fit:
            continue
        members = [c for c in cells if c["threads"] == threads and name in c["results"]]
        points = sorted(
            (
                c["tokens"] if key == "tokens" else c["results"][name]["stored_weights"],
                1e3 * float(np.median(c["results"][name]["step_seconds"])),
            )
            for c in members
        )
        x = np.array([point[0] for point in points], dtype=float)
        colour = SERIES[number % len(SERIES)]
        axes.plot(*zip(*points, strict=True), MARKERS[number % len(MARKERS)], color=colour, markersize=4.5)
        name_and_fit = f"{title(name)}, {_count(threads)}: R² {fit['r_squared']:.4f}"
        axes.plot(x, 1e3 * (fit["slope"] * x + fit["intercept"]), color=colour, linewidth=1.2, label=name_and_fit)
        number += 1
    axes.set_xlim(left=0.0)
    axes.set_ylim(bottom=0.0)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: tick(si(value, ""))))
    axes.set_xlabel(label)
    axes.set_ylabel("step, ms")
    axes.set_title(f"Layer training step by {label}")
    _legend(axes)
