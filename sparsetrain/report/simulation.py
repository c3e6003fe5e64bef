"""The table, the files and the figure of ``sparsetrain simulate``, from its plain result."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
from rich.console import Console

from sparsetrain.files import file_errors, write_json, write_text
from sparsetrain.report.plots import MARKERS, SERIES, log_axis, save_png, styled
from sparsetrain.report.text import byte_size, percent

Content = Mapping[str, Any]

_ESTIMATED = ("seconds", "low", "high", "flops", "bytes", "peak_memory", "energy", "cost", "steps", "tokens", "devices")
_JOULES = 3.6e6  # of a kWh


def show_simulation(content: Content, console: Console | None = None) -> None:
    """Print rows, sentences and break-even sparsities."""
    console = console or Console()
    rows: Sequence[Mapping[str, Any]] = content["rows"]
    several = any(row["estimate"] is not None and row["estimate"]["steps"] > 1 for row in rows)
    names = list(rows[0]["settings"])
    with_loss = any(row["loss"] is not None for row in rows)
    titles = [
        "machine",
        *(name.rpartition(".")[2] for name in names),
        "step",
        *(["run"] if several else []),
        "90 % band",
        "FLOPs",
        "memory",
        "kWh",
        "USD",
        *(["loss"] if with_loss else []),
    ]
    lines = [titles, *([*_cells(row, names, several, with_loss)] for row in rows)]
    widths = [max(len(line[place]) for line in lines) for place in range(len(titles))]
    for line in lines:
        cells = [
            cell.ljust(width) if at == 0 else cell.rjust(width)
            for at, (cell, width) in enumerate(zip(line, widths, strict=True))
        ]
        console.print("  ".join(cells), highlight=False, soft_wrap=True, markup=False)
    for sentence in sentences(content):
        console.print(sentence, highlight=False, soft_wrap=True, markup=False)


def sentences(content: Content) -> Iterator[str]:
    """Yield what the rows have to say beside their numbers."""
    notes = dict.fromkeys(note for row in content["rows"] for note in (row["estimate"] or {}).get("notes", ()))
    yield from notes
    for row in content["rows"]:
        if row["refused"]:
            settings = ", ".join(f"{name}={value}" for name, value in row["settings"].items())
            yield f"{row['machine']}{', ' if settings else ''}{settings}: {row['refused']}"
    for name, sparsity in content["break_even"].items():
        said = "at no sparsity" if sparsity is None else f"from a sparsity of {percent(sparsity, 0)} on"
        yield f"{name}: sparsity saves at least 1 % of a step {said}."


def _cells(row: Mapping[str, Any], names: Sequence[str], several: bool, with_loss: bool) -> Iterator[str]:
    yield row["machine"]
    yield from (str(row["settings"][name]) for name in names)
    estimate = row["estimate"]
    if estimate is None:
        yield from ("-" for _ in range(6 + several + with_loss))
        return
    yield _time(row["step"])
    if several:
        yield _time(estimate["seconds"])
    yield _band(*estimate["band"])
    yield f"{estimate['flops']:.3g}"
    yield byte_size(estimate["peak_memory"])
    yield "-" if estimate["energy"] is None else f"{estimate['energy'] / _JOULES:.3g}"
    yield "-" if estimate["cost"] is None else f"{estimate['cost']:.3g}"
    if with_loss:
        yield "-" if row["loss"] is None else f"{row['loss']:.4f}"


_UNITS = {"us": 1e-6, "ms": 1e-3, "s": 1.0, "min": 60.0, "h": 3600.0, "d": 86400.0, "y": 31557600.0}


def _unit(seconds: float) -> str:
    """Return the largest unit that a time has at least one of, two for units above a second."""
    fitting = [name for name, size in _UNITS.items() if seconds >= size * (2.0 if size > 1.0 else 1.0)]
    return fitting[-1] if fitting else "us"


def _time(seconds: float) -> str:
    """Return a time of any size with three digits, from microseconds of a step to years of a run."""
    unit = _unit(seconds)
    return f"{seconds / _UNITS[unit]:.3g} {unit}"


def _band(low: float, high: float) -> str:
    """Return two times with one unit."""
    unit = _unit(high)
    return f"{low / _UNITS[unit]:.3g} to {high / _UNITS[unit]:.3g} {unit}"


def write_simulation(content: Content, out: Path) -> None:
    """Write ``simulation.json``, ``results.csv`` and ``figure.png`` into a directory.

    Raises:
        UserError: a file cannot be written.
    """
    with file_errors(out):
        out.mkdir(parents=True, exist_ok=True)
        write_json(out / "simulation.json", dict(content))
        write_text(out / "results.csv", _sheet(content["rows"]))
        simulation_figure(content["rows"], out / "figure.png")


def _sheet(rows: Sequence[Mapping[str, Any]]) -> str:
    terms = next(list(row["estimate"]["terms"]) for row in rows if row["estimate"] is not None)
    names = list(rows[0]["settings"])
    text = io.StringIO()
    sheet = csv.writer(text, lineterminator="\n")
    sheet.writerow(["machine", *names, "sparsity", "nonzeros", "step_seconds", *_ESTIMATED, *terms, "loss", "refused"])
    for row in rows:
        estimate = row["estimate"] or {}
        low, high = estimate.get("band", (None, None))
        flat = {**estimate, "low": low, "high": high}
        sheet.writerow(
            [
                row["machine"],
                *(row["settings"][name] for name in names),
                row["sparsity"],
                row["nonzeros"],
                row["step"],
                *(flat.get(name) for name in _ESTIMATED),
                *(estimate.get("terms", {}).get(name) for name in terms),
                row["loss"],
                row["refused"],
            ]
        )
    return text.getvalue()


def simulation_figure(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draw time and, where machines have a price, cost over sparsity, with a line and a band for each machine."""
    machines = list(dict.fromkeys(row["machine"] for row in rows))
    known = [row for row in rows if row["estimate"] is not None]
    priced = any(row["estimate"]["cost"] is not None for row in known)
    with styled():
        figure = Figure(figsize=(9.6 if priced else 5.2, 4.2), layout="constrained")
        panels = figure.subplots(1, 2 if priced else 1, squeeze=False)[0]
        for index, machine in enumerate(machines):
            own = sorted((row for row in known if row["machine"] == machine), key=lambda row: row["sparsity"])
            if own:
                _line(panels, machine, own, SERIES[index % len(SERIES)], MARKERS[index % len(MARKERS)])
        for axes, label in zip(panels, ("seconds", "USD"), strict=False):
            axes.set_yscale("log")
            log_axis(axes.yaxis)
            axes.set_xlabel("sparsity of the hidden matrices")
            axes.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
            axes.set_ylabel(label)
        panels[0].set_title("predicted time, with the band of 90 %")
        if priced:
            panels[1].set_title("predicted cost")
        panels[0].legend()
        save_png(figure, path)


def _line(panels: Sequence[Axes], name: str, rows: Sequence[Mapping[str, Any]], color: str, marker: str) -> None:
    x = [row["sparsity"] for row in rows]
    estimates = [row["estimate"] for row in rows]
    panels[0].plot(x, [each["seconds"] for each in estimates], color=color, marker=marker, label=name)
    bands = [each["band"] for each in estimates]
    panels[0].fill_between(x, [low for low, _ in bands], [high for _, high in bands], color=color, alpha=0.15, lw=0)
    if len(panels) > 1 and all(each["cost"] is not None for each in estimates):
        panels[1].plot(x, [each["cost"] for each in estimates], color=color, marker=marker, label=name)
