"""The tables of a stage on a labelled task: its accuracy beside baselines, the scores of each label, and the errors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sparsetrain.report.schema import Report
from sparsetrain.report.tables import Sheet
from sparsetrain.report.text import ABSENT, brackets, clean

MOST_LABELS = 20  # of a table of errors
_SEVERAL = "several_labels"
_COUNTED = ("one_label", _SEVERAL)  # kinds with a bag of words
_F1 = {"macro_f1": "Macro F1", "micro_f1": "Micro F1", "token_f1": "Token F1"}


def task_sheets(result: Mapping[str, Any], title: str = "") -> list[Sheet]:
    """Return the tables of a result: none if it has no accuracy.

    Args:
        result: the content of a ``result.json``, or the part of it in a report.
        title: the name of the stage, which the titles end with.
    """
    if result.get("accuracy") is None:
        return []
    behind = f": {title}" if title else ""
    found = [_beside(result, behind)]
    if per_label := result.get("per_label"):
        found.append(_labels(per_label, behind))
    if confusion := result.get("confusion"):
        found.append(_confusion(confusion, behind))
    return found


def _beside(result: Mapping[str, Any], behind: str) -> Sheet:
    bag = result.get("bag_of_words")
    names = [name for name in _F1 if result.get(name) is not None]
    rows = [("this model", *_cells(result, names))]
    if bag is not None:
        rows.append(("bag of words", *_cells(bag, names)))
    if (majority := result.get("majority")) is not None:
        rows.append(("majority class", f"{100 * majority:.1f}", *[ABSENT] * len(names)))
    columns = ("On the test examples", "Accuracy %", *(_F1[name] for name in names))
    return Sheet(f"Accuracy{behind}", columns, tuple(rows), " ".join(_sentences(result, bag)))


def _cells(scores: Mapping[str, Any], names: list[str]) -> list[str]:
    interval = scores.get("ci95")
    accuracy = f"{100 * scores['accuracy']:.1f}" + (f" {brackets(interval)}" if interval else "")
    return [accuracy, *(ABSENT if scores.get(name) is None else f"{scores[name]:.3f}" for name in names)]


def _sentences(result: Mapping[str, Any], bag: Mapping[str, Any] | None) -> list[str]:
    found = []
    if result.get("kind") == _SEVERAL:
        found.append("An example is right if all of its labels are.")
    if bag is not None and result.get("ci95") and result["ci95"][0] <= bag["accuracy"]:
        found.append("This model is not clearly above counting words.")
    if bag is None and result.get("kind") in _COUNTED:
        found.append("Without scikit-learn no words were counted beside it: pip install 'sparsetrain[eval]'.")
    return [*found, *overlap_sentences(result)]


def overlap_sentences(result: Mapping[str, Any]) -> list[str]:
    """Return what a result says about test rows in the training text; nothing for a task without texts of its own."""
    entry = result.get("overlap_text")
    if entry is None:
        return []
    if entry.get("rows") is None:
        return [f"Test rows were not looked for in the training text: {entry['why']}."]
    return [
        f"{entry['rows']:,} of {entry['compared']:,} test rows with words enough stand in the training text "
        f"({entry['words']} words in a row)."
    ]


def _labels(per_label: Mapping[str, Mapping[str, Any]], behind: str) -> Sheet:
    rows = [
        (clean(label), *(f"{scores[key]:.3f}" for key in ("precision", "recall", "f1")), f"{scores['n']:,}")
        for label, scores in per_label.items()
    ]
    return Sheet(f"Labels{behind}", ("Label", "Precision", "Recall", "F1", "Test examples"), tuple(rows))


def _confusion(confusion: Mapping[str, Any], behind: str) -> Sheet:
    labels, counts = [clean(label) for label in confusion["labels"]], confusion["counts"]
    if counts and isinstance(counts[0][0], list):
        rows = [
            (label, *(str(cell) for row in table for cell in row)) for label, table in zip(labels, counts, strict=True)
        ]
        columns = ("Label", "True negatives", "False positives", "False negatives", "True positives")
        return Sheet(f"Errors{behind}", columns, tuple(rows))
    if len(labels) > MOST_LABELS:
        return Sheet(f"Errors{behind}", (), (), f"There are {len(labels)} labels: see confusion in result.json.")
    rows = [(label, *map(str, row)) for label, row in zip(labels, counts, strict=True)]
    note = "A row is a true label, a column a predicted one."
    return Sheet(f"Errors{behind}", ("True label", *labels), tuple(rows), note)


def labels(report: Report) -> list[Sheet]:
    """Return the tables of every stage of a pipeline on a task."""
    groups = [("once", report.get("once", {})), *((arm["name"], arm.get("stages", {})) for arm in report["arms"])]
    return [
        sheet
        for name, runs in groups
        for stage, result in runs.items()
        for sheet in task_sheets(result, f"{clean(name)}/{clean(stage)}")
        if sheet.rows
    ]
