"""Scores of tasks against scikit-learn and hand calculations, and the file of predictions."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import (
    accuracy_score,
    confusion_matrix,
    f1_score,
    multilabel_confusion_matrix,
    precision_recall_fscore_support,
)

from sparsetrain.data import Example, Task
from sparsetrain.training.task_scores import normalised, score_task, token_f1, write_predictions

NAMES = ("a", "b", "A")
pairs = st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2)), min_size=1, max_size=30)
subsets = st.frozensets(st.integers(0, 2))


def task_of(examples: list[Example], kind: str = "one_label", labels: tuple[str, ...] = NAMES, **more: Any) -> Task:
    answers = {"one_label": tuple(f" {name}" for name in labels), "several_labels": (" no", " yes")}.get(kind, ())
    template = "{text} {label}" if kind == "several_labels" else "{text}"
    return Task("t", labels, answers, examples, examples, examples, template, kind, **more)


def check_labels(found: dict[str, Any], truth: Any, predicted: Any) -> None:
    said = precision_recall_fscore_support(truth, predicted, labels=range(3), zero_division=0)
    for index, name in enumerate(NAMES):
        scores = found["per_label"][name]
        assert [scores[key] for key in ("precision", "recall", "f1", "n")] == pytest.approx([v[index] for v in said])


@given(pairs)
def test_one_label_matches_scikit_learn(case: list[tuple[int, int]]) -> None:
    predicted, truth = zip(*case, strict=True)
    examples = [Example(str(n), "q", label) for n, label in enumerate(truth)]
    found = score_task(task_of(examples), examples, list(predicted))
    assert found["n_test"] == len(case)
    assert found["accuracy"] == pytest.approx(accuracy_score(truth, predicted))
    assert found["macro_f1"] == pytest.approx(f1_score(truth, predicted, average="macro", zero_division=0))
    assert found["confusion"] == {
        "labels": list(NAMES),
        "counts": confusion_matrix(truth, predicted, labels=range(3)).tolist(),
    }
    check_labels(found, truth, predicted)


@given(st.lists(st.tuples(subsets, subsets), min_size=1, max_size=30))
def test_several_labels_match_scikit_learn(case: list[tuple[frozenset[int], frozenset[int]]]) -> None:
    predicted, truth = zip(*case, strict=True)
    examples = [Example(str(n), "q", holds=held) for n, held in enumerate(truth)]
    found = score_task(task_of(examples, "several_labels"), examples, list(predicted))
    said, true = (np.array([[label in held for label in range(3)] for held in sets]) for sets in (predicted, truth))
    assert found["accuracy"] == pytest.approx(accuracy_score(true, said))
    assert found["micro_f1"] == pytest.approx(f1_score(true, said, average="micro", zero_division=0))
    seen = [label for label in range(3) if (said | true)[:, label].any()]
    macro = f1_score(true, said, labels=seen, average="macro", zero_division=0) if seen else 0.0
    assert found["macro_f1"] == pytest.approx(macro)
    assert found["confusion"]["counts"] == multilabel_confusion_matrix(true, said).tolist()
    check_labels(found, true, said)


@pytest.mark.parametrize(
    ("predicted", "truth", "exact", "f1"),
    [
        ("The cat, sat!", "a cat sat", 1, 1.0),
        ("cat sat down", "the cat sat", 0, 2 * (2 / 3) * 1 / (2 / 3 + 1)),
        ("cat cat", "cat", 0, 2 * 0.5 * 1 / 1.5),
        ("dog", "cat", 0, 0.0),
        ("the", "an", 1, 1.0),
        ("", "cat", 0, 0.0),
        ("another theory", "other theory", 0, 0.5),  # articles are whole words
    ],
)
def test_free_answers_match_calculations_by_hand(predicted: str, truth: str, exact: int, f1: float) -> None:
    assert (normalised(predicted) == normalised(truth)) == exact
    assert token_f1(predicted, truth) == pytest.approx(f1)
    examples = [Example("1", "q", answer=f" {truth}"), Example("2", "q", answer=" x")]
    found = score_task(task_of(examples, "free_answer", ()), examples, [predicted, "x"])
    assert (found["accuracy"], found["token_f1"]) == (pytest.approx((exact + 1) / 2), pytest.approx((f1 + 1) / 2))
    assert "macro_f1" not in found


def read(path: Path) -> list[list[str]]:
    with path.open(newline="", encoding="utf-8") as stream:
        return list(csv.reader(stream))


def test_predictions_name_labels_as_they_are(tmp_path: Path) -> None:
    path, shares = tmp_path / "p.csv", np.array([[0.25, 0.75], [1.0, 1e-9]])
    examples = [Example("d,1", "q", 1), Example("d,1", "q", 0)]
    write_predictions(path, task_of(examples, labels=('so, "so"', "a\nb")), examples, [1, 0], shares)
    assert read(path) == [
        ["id", "label", "predicted", 'score_so, "so"', "score_a\nb"],
        ["d,1", "a\nb", "a\nb", "0.25", "0.75"],
        ["d,1", 'so, "so"', 'so, "so"', "1", "1e-09"],
    ]
    examples = [Example("1", "q", holds=frozenset({2, 0})), Example("2", "q")]
    several = task_of(examples, "several_labels", separator="; ")
    write_predictions(path, several, examples, [frozenset({1}), frozenset({0, 1})], np.zeros((2, 3)))
    assert [row[1:3] for row in read(path)[1:]] == [["a; A", "b"], ["", "a; b"]]
    examples = [Example("1", "q", 1, choices=(" x", " y")), Example("2", "q", 0, choices=(" u", " v", " w"))]
    choice = task_of(examples, "multiple_choice", choices=NAMES)
    write_predictions(path, choice, examples, [0, 2], np.array([[0.5, 0.5, 0.0], [0.0, 0.0, 1.0]]))
    assert read(path)[1:] == [["1", "y", "x", "0.5", "0.5", ""], ["2", "u", "w", "0", "0", "1"]]
    examples = [Example("1", "q", answer=" the cat")]
    write_predictions(path, task_of(examples, "free_answer", ()), examples, ["cat sat"], None)
    assert read(path) == [["id", "label", "predicted", "exact", "f1"], ["1", "the cat", "cat sat", "0", "0.666667"]]
