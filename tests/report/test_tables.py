"""The tables have every arm and number, and show hostile names as text."""

from __future__ import annotations

import io
import json
import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from sparsetrain.report.findings import cautions, findings
from sparsetrain.report.schema import validate_report
from sparsetrain.report.tables import Sheet, cost, flops, memory, print_report, results, run_metrics, sheets


def text_of(sheet: Sheet, width: int = 200) -> str:
    console = Console(file=io.StringIO(), width=width, color_system=None)
    console.print(sheet.rich())
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_every_arm_is_in_every_table_and_form(content: dict[str, Any]) -> None:
    found = sheets(validate_report(content))
    assert [sheet.title for sheet in found] == [
        "Results",
        "Cost",
        "Training FLOPs by term",
        "Bytes of the training state",
    ]
    for sheet in found:
        for arm in content["arms"]:
            assert arm["name"] in text_of(sheet)
            assert f"| {arm['name']} |" in sheet.markdown()
        assert {len(row) for row in sheet.rows} == {len(sheet.columns)}


def test_results_hold_intervals_and_both_baselines(content: dict[str, Any]) -> None:
    rows = {row[0]: row[1:] for row in results(validate_report(content)).rows}
    assert rows["s75"] == ("75.0 %", "4.2975", "1.5435", "70.5 [68.4, 72.5]", "0.655", "70.9 [68.8, 72.9]", "0.660")
    assert "58.0 [55.8, 60.2]" in rows["no pre-training"]
    assert "35.5" in rows["majority class"]


def test_cost_keeps_formula_and_measurement_apart(content: dict[str, Any]) -> None:
    sheet = cost(validate_report(content))
    assert sheet.columns[1:4] == ("Training FLOPs (formula)", "FLOPs of dense / arm", "Wall time (measured)")
    assert "a reduction by the formula is not a speed-up here" in sheet.note
    assert [row[2] for row in sheet.rows] == ["1.00x", "1.50x", "2.00x"]
    assert sheet.rows[0][3:] == ("12 min 24 s", "10 min 40 s", "1 min 11 s", "33.5 s")


def test_terms_add_up_and_unknown_ones_are_shown(content: dict[str, Any]) -> None:
    arm = content["arms"][1]
    arm["flops"]["adapters"] = 1e12
    arm["flops"]["total"] = arm["train_flops"] = arm["train_flops"] + 1e12
    sheet = flops(validate_report(content))
    assert sheet.columns == ("Arm", "hidden matrices", "output head", "attention", "adapters", "total")
    assert sheet.rows[0][4] == "-"
    assert sheet.rows[1][4] == "1.00 TFLOP"


@pytest.mark.parametrize("key", ["finetune", "prompt", "curves", "flops", "bytes", "seconds"])
def test_what_was_not_run_is_absent(content: dict[str, Any], key: str) -> None:
    for arm in content["arms"]:
        del arm[key]
    report = validate_report(content)
    for sheet in (results(report), cost(report), flops(report), memory(report)):
        assert {len(row) for row in sheet.rows} <= {len(sheet.columns)}
        text_of(sheet)
    assert (flops(report).rows == ()) == (key == "flops")
    assert (memory(report).rows == ()) == (key == "bytes")


def test_pretraining_alone_has_no_accuracy_rows(content: dict[str, Any]) -> None:
    for arm in content["arms"]:
        del arm["finetune"], arm["prompt"]
    sheet = results(validate_report(content))
    assert [row[0] for row in sheet.rows] == ["dense", "s50", "s75"]
    assert len(sheet.columns) == 4


def test_diverged_arm_says_so(content: dict[str, Any]) -> None:
    content["arms"][1]["pretrain"] |= {"loss_last": float("nan"), "bits_per_byte": None}
    report = validate_report(content)
    assert results(report).rows[1][2:4] == ("diverged", "diverged")
    assert any("s50: pre-training diverged" in sentence for sentence in cautions(report))


def test_findings_give_ratio_and_whether_intervals_overlap(content: dict[str, Any]) -> None:
    content["arms"][2]["finetune"] |= {"accuracy": 0.6, "ci95": [0.58, 0.62]}
    found = findings(validate_report(content))
    assert len(found) == 3
    assert "1.50x fewer training FLOPs by the formula than dense" in found[1]
    assert "71.0 % [68.9, 73.0] after fine-tuning, an interval that overlaps dense's" in found[1]
    assert "60.0 % [58.0, 62.0] after fine-tuning, an interval that does not overlap dense's" in found[2]


def test_sound_report_has_no_cautions(content: dict[str, Any]) -> None:
    assert cautions(validate_report(content)) == []


def test_cautions_name_leakage_missing_dense_arm_and_weak_accuracy(content: dict[str, Any]) -> None:
    content["overlap_train_test"] = 7
    content["arms"] = content["arms"][1:]
    content["arms"][0]["finetune"] |= {"accuracy": 0.36, "ci95": [0.34, 0.38]}
    content["arms"][1]["prompt"] |= {"accuracy": 0.59, "ci95": [0.57, 0.61]}
    told = "\n".join(cautions(validate_report(content)))
    assert "7 test examples also occur in the training text" in told
    assert "no dense arm; FLOPs are compared with s50" in told
    assert "s50 after fine-tuning is not clearly above the majority class (35.5 %)" in told
    assert "s75 after soft prompt is not clearly different from training without pre-training" in told


def test_terminal_report_holds_sentences_and_tables(content: dict[str, Any]) -> None:
    content["overlap_train_test"] = 1
    console = Console(file=io.StringIO(), width=160, color_system=None)
    print_report(validate_report(content), console)
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    for part in ("2.00x fewer training FLOPs", "! 1 test examples", "Results", "Cost", "Training FLOPs by term"):
        assert part in shown


@given(name=st.text(min_size=1, max_size=40))
def test_hostile_names_reach_terminal_and_markdown_as_text(report_json: str, name: str) -> None:
    content = json.loads(report_json)
    content["arms"] = content["arms"][:1]
    content["arms"][0]["name"] = f"n{name}"
    content["arms"][0]["finetune"]["task"] = name
    for sheet in sheets(validate_report(content)):
        shown = text_of(sheet, width=400)
        assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]", shown)
        lines = sheet.markdown().splitlines()
        table = [line for line in lines if line.startswith("|")]
        bars = {len(re.findall(r"(?<!\\)(?:\\\\)*\|", line)) for line in table}
        assert bars == {len(sheet.columns) + 1}


def test_markup_in_a_name_is_shown_not_obeyed(content: dict[str, Any]) -> None:
    content["arms"][0]["name"] = "[red]a|b[/red] <b>"
    sheet = results(validate_report(content))
    assert "[red]a|b[/red] <b>" in text_of(sheet)
    assert r"\[red\]a\|b\[/red\] \<b\>" in sheet.markdown()


@given(
    rows=st.integers(0, 300),
    every=st.integers(1, 50),
    limit=st.integers(1, 40),
)
def test_run_metrics_keep_both_ends_and_stay_short(rows: int, every: int, limit: int) -> None:
    metrics: list[dict[str, Any]] = [{"step": i, "tokens": 10 * i, "loss": 1.0} for i in range(rows)]
    for row in metrics[::every][1:]:
        row["val_loss"] = 2.0
    sheet = run_metrics(metrics, limit)
    steps = [int(row[0].replace(",", "")) for row in sheet.rows]
    assert len(steps) <= limit + 2
    assert steps == sorted(set(steps))
    if rows:
        assert (steps[0], steps[-1]) == (0, rows - 1)
        assert ("Validation loss" in sheet.columns) == (len(metrics[::every]) > 1)
