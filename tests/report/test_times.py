"""Measured and predicted times side by side in reports and rows."""

from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console

from sparsetrain.errors import UserError
from sparsetrain.report.html import render_html
from sparsetrain.report.schema import validate_report
from sparsetrain.report.tables import print_sheets
from sparsetrain.report.times import cells, times

PREDICTED = {"machine": "A <processor>", "calibrated": "2026-01-02", "seconds": 90.0, "band": [80.0, 101.0]}
FOR = "A <processor>, calibrated on 2026-01-02"


def with_times(content: dict[str, Any], **stages: dict[str, Any]) -> Any:
    content["arms"][0]["stages"] = stages
    return validate_report(content)


def test_reports_without_times_have_no_such_table(content: dict[str, Any]) -> None:
    for stages in ({}, {"pretrain": {"seconds": 3.0}}, {"pretrain": {"step_seconds": None, "predicted": None}}):
        report = with_times(content, **stages)
        assert not times(report).rows
        assert "Time of training steps" not in render_html(report)


def test_without_a_prediction_the_table_says_how_to_get_one(content: dict[str, Any]) -> None:
    found = times(with_times(content, pretrain={"step_seconds": 100.0}, evaluate={"seconds": 1.0}))
    assert found.columns == ("Arm", "Stage", "Measured")
    assert found.rows == (("dense", "pretrain", "1 min 40 s"),)
    assert "sparsetrain calibrate" in found.note


def test_predictions_have_a_band_a_ratio_and_their_machine(content: dict[str, Any]) -> None:
    tuned = {"step_seconds": 0.125, "predicted": PREDICTED | {"seconds": 0.25, "band": [0.2, 0.3], "notes": ["So."]}}
    content["once"] = {"scratch": {"step_seconds": 8.0}}
    report = with_times(content, pretrain={"step_seconds": 100.0, "predicted": PREDICTED}, finetune=tuned)
    found = times(report)
    assert found.columns[2:] == ("Measured", "Predicted [90 % band]", "Predicted / measured")
    assert found.rows == (
        ("dense", "pretrain", "1 min 40 s", "1 min 30 s [1 min 20 s to 1 min 41 s]", "0.90"),
        ("dense", "finetune", "0.125 s", "0.25 s [0.2 s to 0.3 s]", "2.00"),
        ("once", "scratch", "8 s", "-", "-"),
    )
    assert f"Predicted for {FOR}." in found.note
    assert "1 of 2 did" in found.note
    assert found.note.endswith(" So.")
    assert "calibrate " not in found.note
    page = render_html(report)
    assert "A &lt;processor&gt;, calibrated on 2026-01-02" in page
    assert "1 min 30 s [1 min 20 s to 1 min 41 s]" in page
    screen = io.StringIO()
    print_sheets([found], Console(file=screen, width=100, force_terminal=True, color_system=None))
    lines = screen.getvalue().splitlines()
    assert max(map(len, lines)) <= 100
    assert any("1 min 30 s [1 min 20 s to 1 min 41 s]" in line and line.rstrip().endswith("0.90") for line in lines)


def test_rows_of_a_table() -> None:
    assert cells({}) == cells({"step_seconds": None, "predicted": None}) == {}
    assert cells({"step_seconds": 2.0}) == {"step_seconds": 2.0}
    found = cells({"step_seconds": 100.0, "predicted": PREDICTED})
    assert found == {
        "step_seconds": 100.0,
        "predicted_seconds": 90.0,
        "predicted_low": 80.0,
        "predicted_high": 101.0,
        "predicted_over_measured": 0.9,
        "predicted_for": FOR,
    }
    assert cells({"step_seconds": 0.0, "predicted": PREDICTED})["predicted_over_measured"] is None


@pytest.mark.parametrize(
    ("change", "named"), [({"seconds": -1.0}, "seconds"), ({"band": [1.0]}, "band"), ({"machine": 3}, "machine")]
)
def test_a_damaged_prediction_is_refused(content: dict[str, Any], change: dict[str, Any], named: str) -> None:
    with pytest.raises(UserError, match=rf"stages.*predicted\.{named}"):
        with_times(content, pretrain={"step_seconds": 1.0, "predicted": PREDICTED | change})
