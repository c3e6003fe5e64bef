"""Scores of answers to a labelled task, by the kind of the task, and the file of its predictions.

Shapes: E examples, L labels. What was predicted of an example is of the same type as `Task.truth`: the index of a
label or a choice, the frozen set of the labels that hold, or the text of an answer.
"""

from __future__ import annotations

import csv
import io
import re
import string
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sparsetrain.data import Example, Task
from sparsetrain.files import write_text
from sparsetrain.training.evaluate import macro_f1, wilson

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_WITHOUT_PUNCTUATION = str.maketrans("", "", string.punctuation)


def score_task(task: Task, examples: Sequence[Example], predicted: Sequence[Any]) -> dict[str, Any]:
    """Return the scores of predictions: what ``result.json`` says of a task.

    ``accuracy`` is the share of examples that are right as a whole, with its Wilson interval of 95 % as ``ci95``: the
    label, the set of labels, the choice, or the answer after `normalised`. The other entries depend on the kind:

    - ``one_label``: ``macro_f1``, the mean F1 over the labels that occur in the test set or among the predictions;
      ``per_label``, with precision, recall, F1 and the number n of test examples; and ``confusion``, whose ``counts``
      have a row for each true label and a column for each predicted one.
    - ``several_labels``: the same, ``micro_f1`` over all labels together, and as ``counts`` for each label
      ``[[true negatives, false positives], [false negatives, true positives]]``.
    - ``free_answer``: ``token_f1``, the mean of `token_f1`.
    """
    truth = [task.truth(example) for example in examples]
    if task.kind == "free_answer":
        right = sum(normalised(found) == normalised(said) for found, said in zip(predicted, truth, strict=True))
        overlaps = [token_f1(found, said) for found, said in zip(predicted, truth, strict=True)]
        return {**_accuracy(right, len(truth)), "token_f1": float(np.mean(overlaps))}
    right = sum(found == said for found, said in zip(predicted, truth, strict=True))
    scores = _accuracy(right, len(truth))
    if task.kind == "several_labels":
        return {**scores, **_of_sets(held(predicted, len(task.labels)), held(truth, len(task.labels)), task.labels)}
    if task.kind == "multiple_choice":
        return scores
    found, said = np.array(predicted), np.array(truth)
    counts = np.zeros((len(task.labels), len(task.labels)), dtype=np.int64)
    np.add.at(counts, (said, found), 1)
    hits, n = np.diag(counts), counts.sum(1)
    return {
        **scores,
        "macro_f1": macro_f1(found, said),
        "per_label": _per_label(task.labels, hits, counts.sum(0), n),
        "confusion": {"labels": list(task.labels), "counts": counts.tolist()},
    }


def held(sets: Sequence[frozenset[int]], labels: int) -> np.ndarray:
    """Return bool ``[E, L]``: which labels are in each set."""
    found = np.zeros((len(sets), labels), dtype=bool)
    for row, members in enumerate(sets):
        found[row, list(members)] = True
    return found


def _accuracy(right: int, n: int) -> dict[str, Any]:
    return {"n_test": n, "accuracy": right / n, "ci95": list(wilson(right, n))}


def _of_sets(predicted: np.ndarray, truth: np.ndarray, labels: Sequence[str]) -> dict[str, Any]:
    """Return the scores of bool arrays ``[E, L]``."""
    hits, positive, n = (predicted & truth).sum(0), predicted.sum(0), truth.sum(0)
    per_label = _per_label(labels, hits, positive, n)
    seen = [per_label[label]["f1"] for label, size in zip(labels, positive + n, strict=True) if size]
    negatives = (~predicted & ~truth).sum(0)
    tables = np.stack([np.stack([negatives, positive - hits], 1), np.stack([n - hits, hits], 1)], 1)
    return {
        "macro_f1": float(np.mean(seen)) if seen else 0.0,
        "micro_f1": _f1(int(hits.sum()), int(positive.sum()), int(n.sum())),
        "per_label": per_label,
        "confusion": {"labels": list(labels), "counts": tables.tolist()},
    }


def _per_label(
    labels: Sequence[str], hits: np.ndarray, predicted: np.ndarray, truth: np.ndarray
) -> dict[str, dict[str, Any]]:
    """Return precision, recall, F1 and the number of examples of each label; what has no examples is 0."""
    rows = zip(labels, hits.tolist(), predicted.tolist(), truth.tolist(), strict=True)
    return {
        label: {"precision": hit / max(1, found), "recall": hit / max(1, n), "f1": _f1(hit, found, n), "n": n}
        for label, hit, found, n in rows
    }


def _f1(hits: int, predicted: int, truth: int) -> float:
    """Return F1; 0 where there is nothing to find and nothing was found."""
    return 2 * hits / (predicted + truth) if predicted + truth else 0.0


def normalised(answer: str) -> str:
    """Return an answer as SQuAD compares it: in lower case, without punctuation and articles, words one space apart."""
    bare = _ARTICLES.sub(" ", answer.lower().translate(_WITHOUT_PUNCTUATION))
    return " ".join(bare.split())


def token_f1(predicted: str, truth: str) -> float:
    """Return the F1 of the words of two answers after `normalised`; two empty answers agree fully."""
    found, said = normalised(predicted).split(), normalised(truth).split()
    if not found or not said:
        return float(found == said)
    return _f1(sum((Counter(found) & Counter(said)).values()), len(found), len(said))


def write_predictions(
    path: Path, task: Task, examples: Sequence[Example], predicted: Sequence[Any], probabilities: np.ndarray | None
) -> None:
    """Write ``predictions.csv``: a row for each example, in their order.

    The columns are ``id``, ``label``, ``predicted`` and a ``score_LABEL`` for each label: the probability of the label
    among the labels or, for several labels, that it holds. Several labels stand in a cell with `Form.separator`
    between them. A multiple choice has the texts of the choices, and a score for each place; a free answer has the
    columns ``exact``, 1 or 0, and ``f1`` instead of scores.

    Args:
        probabilities: ``[E, L]``; None for free answers.
    """
    stream = io.StringIO(newline="")
    writer = csv.writer(stream, lineterminator="\n")
    free = probabilities is None
    writer.writerow(["id", "label", "predicted", *(("exact", "f1") if free else map("score_{}".format, task.labels))])
    for row, (example, found) in enumerate(zip(examples, predicted, strict=True)):
        said = task.truth(example)
        cells = [_named(task, example, said), _named(task, example, found)]
        if probabilities is None:
            scores = [str(int(normalised(found) == normalised(said))), f"{token_f1(found, said):.6g}"]
        else:
            used = len(example.choices) or len(task.labels)
            scores = [f"{value:.6g}" for value in probabilities[row, :used]] + [""] * (len(task.labels) - used)
        writer.writerow([example.id, *cells, *scores])
    write_text(path, stream.getvalue())


def _named(task: Task, example: Example, found: Any) -> str:
    if task.kind == "several_labels":
        return task.separator.join(task.labels[index] for index in sorted(found))
    if task.kind == "multiple_choice":
        return example.choices[found].strip()
    return found.strip() if task.kind == "free_answer" else task.labels[found]
