"""How the predictions of a calibrated machine differ from measured steps: lines, a sheet and a figure."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from sparsetrain.cost.simulate import NORMAL_90
from sparsetrain.files import file_errors, write_json, write_text
from sparsetrain.report.plots import MARKERS, MUTED, SERIES, log_axis, save_png, styled
from sparsetrain.report.text import percent

Row = Mapping[str, Any]


def validation_lines(found: Mapping[str, Row]) -> Iterator[str]:
    """Yield a sentence for each group of steps."""
    for name, each in found.items():
        yield (
            f"{name}: {each['count']}, median error {percent(each['median'])}, 90th percentile "
            f"{percent(each['ninetieth'])}, bias {100 * each['bias']:+.1f} %, {each['inside']} inside the band of 90 %"
        )


def write_validation(rows: Sequence[Row], found: Mapping[str, Row], label: str, spread: float, out: Path) -> None:
    """Write ``results.csv``, ``errors.json`` and ``figure.png`` into a directory.

    Raises:
        UserError: a file cannot be written.
    """
    text = io.StringIO()
    sheet = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    sheet.writeheader()
    sheet.writerows(rows)
    with file_errors(out):
        out.mkdir(parents=True, exist_ok=True)
        write_text(out / "results.csv", text.getvalue())
        write_json(out / "errors.json", {"processor": label, "spread": spread, "errors": found})
        _figure(rows, label, spread, out / "figure.png")


def _figure(rows: Sequence[Row], label: str, spread: float, path: Path) -> None:
    """Draw predicted over measured times of all steps, and of the ratios of sparse to dense."""
    with styled():
        figure = Figure(figsize=(9.6, 4.2), layout="constrained")
        left, right = figure.subplots(1, 2)
        steps = {
            "dense": [(row["dense_measured"], row["dense_predicted"]) for row in rows],
            "sparse": [(row["measured"], row["predicted"]) for row in rows],
        }
        threads = sorted({row["threads"] for row in rows})
        ratios = {
            f"{count} thread{'s' * (count != 1)}": [
                (row["measured"] / row["dense_measured"], row["predicted"] / row["dense_predicted"])
                for row in rows
                if row["threads"] == count
            ]
            for count in threads
        }
        factor = math.exp(NORMAL_90 * spread)
        for axes, groups, unit in ((left, steps, "seconds of a step"), (right, ratios, "sparse over dense")):
            for index, (name, points) in enumerate(groups.items()):
                x, y = [point[0] for point in points], [point[1] for point in points]
                axes.scatter(x, y, s=16, color=SERIES[index], marker=MARKERS[index], label=name)
            ends = [min(axes.get_xlim()[0], 1e9), axes.get_xlim()[1]]
            ends[0] = min(point[0] for points in groups.values() for point in points)
            axes.plot(ends, ends, color=MUTED, lw=1)
            axes.fill_between(
                ends, [e / factor for e in ends], [e * factor for e in ends], color=MUTED, alpha=0.15, lw=0
            )
            axes.set_xscale("log")
            axes.set_yscale("log")
            log_axis(axes.xaxis)
            log_axis(axes.yaxis)
            axes.set_xlabel(f"measured: {unit}")
            axes.set_ylabel("predicted")
            axes.legend()
        left.set_title(f"{len(rows)} sparse steps and their dense twins, {label}", loc="left")
        save_png(figure, path)
