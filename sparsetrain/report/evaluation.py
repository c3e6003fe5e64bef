"""Tables and the figure of an evaluation: loss over the length of a pass, and accuracy of probes over their size."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsetrain.report.tables import Sheet
from sparsetrain.report.text import ABSENT, brackets, clean, percent
from sparsetrain.runs.result import PositionRow, ProbeRow, TextRow

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SCALE_TITLE = "Positions"


def evaluation_sheets(result: Mapping[str, Any]) -> list[Sheet]:
    """Return the tables of the ``result.json`` of an evaluation; none for another result."""
    trained = result.get("trained_length")
    candidates = (
        texts_sheet(result.get("texts") or []),
        positions_sheet(result.get("positions") or [], trained),
        probes_sheet(result.get("probes") or []),
    )
    return [sheet for sheet in candidates if sheet.rows]


def texts_sheet(rows: Sequence[TextRow]) -> Sheet:
    """Return the loss on each corpus at the context of the run."""
    body = tuple(
        (clean(row["corpus"]), str(row["context"]), f"{row['loss']:.4f}", f"{row['bits_per_byte']:.4f}") for row in rows
    )
    return Sheet("Validation", ("Corpus", "Context", "Loss", "Bits per byte"), body, "Loss in nats per token.")


def positions_sheet(rows: Sequence[PositionRow], trained: int | None) -> Sheet:
    """Return the loss over lengths, with a row for each corpus, scale of the positions and length."""
    body = tuple(
        (
            clean(row["corpus"]),
            clean(row["scale"]),
            str(row["length"]),
            _with_error(row["loss"], row["standard_error"]),
            ABSENT if row["length"] == trained else _with_error(row["difference"], row["difference_error"], sign="+"),
        )
        for row in rows
    )
    note = f"The same targets at the end of each pass, in nats, with standard errors; trained length {trained}."
    columns = ("Corpus", SCALE_TITLE, "Length", "Loss", "Difference to the trained length")
    return Sheet("Loss over length", columns, body, note)


def probes_sheet(rows: Sequence[ProbeRow]) -> Sheet:
    """Return the accuracy of the probes, with a row for each kind, size and scale of the positions."""
    body: tuple[tuple[str, ...], ...] = tuple(
        (
            clean(row["kind"]),
            f"{row['size']:,}",
            str(row["tokens"]),
            clean(row["scale"]),
            str(row["n"]),
            ABSENT if row["accuracy"] is None else percent(row["accuracy"]),
            ABSENT if row["ci_low"] is None or row["ci_high"] is None else brackets([row["ci_low"], row["ci_high"]]),
            clean(row["why"]),
        )
        for row in rows
    )
    chance = max((row["chance"] for row in rows), default=0.0)
    note = f"Guessing is right in {percent(chance, 0)}. Sizes in bytes, accuracies with their interval of 95 %."
    columns: tuple[str, ...]
    columns = ("Probe", "Size", "Tokens", SCALE_TITLE, "n", "Accuracy", "95 %", "Not measured because")
    if all(not row[-1] for row in body):
        columns, body = columns[:-1], tuple(row[:-1] for row in body)
    return Sheet("Probes", columns, body, note)


def evaluation_figure(positions: Sequence[PositionRow], probes: Sequence[ProbeRow], trained: int, path: Path) -> None:
    """Draw a PNG: the loss over the length of a pass, and beside it the accuracy of probes, if there are any."""
    from matplotlib.figure import Figure  # slow to import

    from sparsetrain.report.plots import save_png, styled

    measured = [row for row in probes if row["accuracy"] is not None]
    with styled():
        figure = Figure(figsize=(8.4 if measured else 5.0, 3.6), layout="constrained")
        panels = figure.subplots(1, 2 if measured else 1, squeeze=False)[0]
        scales = list(dict.fromkeys(row["scale"] for row in (*positions, *probes)))
        _losses(panels[0], positions, scales, trained)
        if measured:
            _accuracies(panels[1], measured, scales)
        save_png(figure, path)


def _losses(axes: Axes, rows: Sequence[PositionRow], scales: Sequence[str], trained: int) -> None:
    from sparsetrain.report.plots import MARKERS, MUTED, SERIES, log_axis

    corpora = list(dict.fromkeys(row["corpus"] for row in rows))
    for at, scale in enumerate(scales):
        for number, corpus in enumerate(corpora):
            line = [row for row in rows if (row["scale"], row["corpus"]) == (scale, corpus)]
            label = f"{corpus}, {SCALE_TITLE.lower()} {scale}" if len(corpora) > 1 else f"{SCALE_TITLE.lower()} {scale}"
            axes.errorbar(
                [row["length"] for row in line],
                [row["loss"] for row in line],
                yerr=[_positive(row["difference_error"]) for row in line],
                color=SERIES[at % len(SERIES)],
                marker=MARKERS[number % len(MARKERS)],
                ls=("-", "--", ":", "-.")[number % 4],
                lw=1.3,
                ms=4,
                label=clean(label),
            )
    axes.axvline(trained, color=MUTED, lw=0.8)
    axes.set_xscale("log", base=2)
    log_axis(axes.xaxis, sorted({row["length"] for row in rows}))
    axes.set_xlabel("tokens in a pass; line: the trained length")
    axes.set_ylabel("loss of the same targets, nats")
    axes.legend(fontsize=7)


def _accuracies(axes: Axes, rows: Sequence[ProbeRow], scales: Sequence[str]) -> None:
    from sparsetrain.report.plots import MARKERS, MUTED, SERIES, log_axis

    kinds = list(dict.fromkeys(row["kind"] for row in rows))
    for number, kind in enumerate(kinds):
        for at, scale in enumerate(scales):
            line = [row for row in rows if (row["kind"], row["scale"]) == (kind, scale)]
            values = [_positive(row["accuracy"]) for row in line]
            below = [value - _positive(row["ci_low"]) for value, row in zip(values, line, strict=True)]
            above = [_positive(row["ci_high"]) - value for value, row in zip(values, line, strict=True)]
            if line:
                axes.errorbar(
                    [row["size"] for row in line],
                    values,
                    yerr=[[max(0.0, each) for each in below], [max(0.0, each) for each in above]],
                    color=SERIES[at % len(SERIES)],
                    marker=MARKERS[number % len(MARKERS)],
                    ls=("-", "--", ":")[number % 3],
                    lw=1.3,
                    ms=4,
                    label=clean(f"{kind}, {SCALE_TITLE.lower()} {scale}"),
                )
    axes.axhline(rows[0]["chance"], color=MUTED, lw=0.8)
    axes.set_xscale("log", base=2)
    log_axis(axes.xaxis, sorted({row["size"] for row in rows}))
    axes.set_ylim(0.0, 1.02)
    axes.set_xlabel("bytes of a probe")
    axes.set_ylabel("accuracy; line: guessing")
    axes.legend(fontsize=7)


def _with_error(value: float, error: float | None, sign: str = "") -> str:
    return f"{value:{sign}.4f}" if error is None else f"{value:{sign}.4f} ± {error:.4f}"


def _positive(value: float | None) -> float:
    return 0.0 if value is None or math.isnan(value) else value
