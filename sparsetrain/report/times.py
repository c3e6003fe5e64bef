"""Measured and predicted time of training steps, side by side: for the tables of a report, and for ``results.csv``."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from sparsetrain.report.schema import Report
from sparsetrain.report.tables import Sheet
from sparsetrain.report.text import ABSENT, clean, duration

_MEASURED = "Seconds of the training steps alone: no evaluations, checkpoints, or compilation in the first step."
_HINT = "Not predicted: that needs sparsetrain calibrate on the machine that trains."

Row = tuple[str, str, Mapping[str, Any]]


def times(report: Report) -> Sheet:
    """Return the time of each stage of each arm; without rows if no run measured it, as in older reports."""
    rows: list[Row] = [
        (arm["name"], name, stage) for arm in report["arms"] for name, stage in arm.get("stages", {}).items()
    ]
    rows += [("once", name, stage) for name, stage in report.get("once", {}).items()]
    return sheet(rows)


def sheet(rows: Iterable[Row]) -> Sheet:
    """Return the table of the stages that measured the time of their steps.

    Args:
        rows: name of the arm, name of the stage, and its result.
    """
    known = [row for row in rows if row[2].get("step_seconds") is not None]
    found = [(arm, name, stage["step_seconds"], stage.get("predicted")) for arm, name, stage in known]
    columns: tuple[str, ...] = ("Arm", "Stage", "Measured")
    body: list[tuple[str, ...]] = []
    if not any(predicted for *_, predicted in found):
        body = [(clean(arm), clean(name), _seconds(measured)) for arm, name, measured, _ in found]
        return Sheet("Time of training steps", columns, tuple(body), f"{_MEASURED} {_HINT}")
    within = count = 0
    for arm, name, measured, predicted in found:
        cells = (ABSENT, ABSENT)
        if predicted:
            low, high = predicted["band"]
            within, count = within + (low <= measured <= high), count + 1
            band = f"{_seconds(predicted['seconds'])} [{_seconds(low)} to {_seconds(high)}]"
            cells = (band, f"{predicted['seconds'] / measured:.2f}" if measured else ABSENT)
        body.append((clean(arm), clean(name), _seconds(measured), *cells))
    places = dict.fromkeys(predicted_for(predicted) for *_, predicted in found if predicted)
    notes = dict.fromkeys(note for *_, predicted in found if predicted for note in predicted.get("notes", []))
    note = (
        f"{_MEASURED} Predicted for {'; '.join(places)}. In brackets: where 90 % of measured times lie, if they "
        f"scatter as in the calibration; {within} of {count} did."
    )
    columns += ("Predicted [90 % band]", "Predicted / measured")
    return Sheet("Time of training steps", columns, tuple(body), " ".join([note, *map(clean, notes)]))


def cells(result: Mapping[str, Any]) -> dict[str, Any]:
    """Return the columns of ``results.csv`` about the time of a run's steps, as far as its ``result.json`` has them.

    ``predicted_for`` names the machine and the date of its calibration.
    """
    measured, predicted = result.get("step_seconds"), result.get("predicted")
    found: dict[str, Any] = {} if measured is None else {"step_seconds": measured}
    if predicted:
        low, high = predicted["band"]
        ratio = predicted["seconds"] / measured if measured else None
        found |= {"predicted_seconds": predicted["seconds"], "predicted_low": low, "predicted_high": high}
        found |= {"predicted_over_measured": ratio, "predicted_for": predicted_for(predicted)}
    return found


def predicted_for(predicted: Mapping[str, Any]) -> str:
    """Return the machine of a prediction and the date of its calibration."""
    return f"{clean(predicted['machine'])}, calibrated on {clean(predicted['calibrated'])}"


def _seconds(value: float) -> str:
    return f"{value:.3g} s" if value < 9.995 else duration(value)
