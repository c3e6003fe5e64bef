"""A bag of words on a labelled task: what counting words gives, beside which a language model is to be judged.

Multinomial Naive Bayes (scikit-learn, extra ``eval``) reads the counts of words, or of words and pairs of words, in the
sources of the very training examples. The better of the two, and the best smoothing, are those of the highest accuracy
on the validation examples; the test examples are then classified once. For several labels there is one classifier for
each label.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from sparsetrain.data import Example, Task
from sparsetrain.training.task_scores import held, score_task

MOST = 50_000  # training and validation examples that are read; they come in random order
_CHUNK = 10_000  # test examples whose counts are in memory at a time
_SMOOTHING = (1.0, 0.3, 0.1, 0.03, 0.01)  # the first of equally good ones is taken
_NGRAMS = (1, 2)
_SCORES = ("accuracy", "ci95", "macro_f1", "micro_f1")
KINDS = ("one_label", "several_labels")
EXTRA = "pip install 'sparsetrain[eval]'"

_known: dict[str, dict[str, Any] | None] = {}
"""What was found for the task that was asked for last, by its fingerprint, since the arms of a pipeline share it."""


def is_installed() -> bool:
    """Whether scikit-learn is there."""
    return importlib.util.find_spec("sklearn") is not None


def bag_of_words(task: Task) -> dict[str, Any] | None:
    """Return the scores of a bag of words on the test examples, as `score_task` has them, and how they were found.

    None without scikit-learn, for a kind of task without labels, and where the sources have no words.
    """
    if task.kind not in KINDS or not is_installed():
        return None
    key = task.fingerprint()
    if key not in _known:
        _known.clear()
        _known[key] = _scores(task)
    return _known[key]


def _scores(task: Task) -> dict[str, Any] | None:
    from sklearn.feature_extraction.text import CountVectorizer

    train, validation = task.train[:MOST], task.validation[:MOST]
    truth, wanted = _truth(task, train), _truth(task, validation)
    best: tuple[float, int, float, Any, Any] | None = None
    for most in _NGRAMS:
        counter = CountVectorizer(ngram_range=(1, most), token_pattern=r"\w+", dtype=np.float64)
        try:
            counts = counter.fit_transform([example.source for example in train])
        except ValueError:  # there are no words
            return None
        held_out = counter.transform([example.source for example in validation])
        for smoothing in _SMOOTHING:
            models = _fitted(counts, truth, smoothing)
            right = float((_predict(models, held_out) == wanted).all(axis=1).mean())
            if best is None or right > best[0]:
                best = (right, most, smoothing, counter, models)
    assert best is not None
    accuracy, most, smoothing, counter, models = best
    parts = [_predict(models, counter.transform([example.source for example in some])) for some in _parts(task.test)]
    found = _answers(task, np.concatenate(parts))
    scores = score_task(task, task.test, found)
    how = {"n_train": len(train), "validation_accuracy": accuracy, "ngrams": most, "smoothing": smoothing}
    return {**{key: scores[key] for key in _SCORES if key in scores}, **how}


def _parts(examples: Sequence[Example]) -> Iterator[Sequence[Example]]:
    for start in range(0, len(examples), _CHUNK):
        yield examples[start : start + _CHUNK]


def _truth(task: Task, examples: Sequence[Example]) -> np.ndarray:
    """Return int ``[E, C]``, what each of C classifiers is to say: one of labels, or a zero or one for each label."""
    if task.kind == "several_labels":
        return held([example.holds for example in examples], len(task.labels)).astype(np.int64)
    return np.array([[example.label] for example in examples])


def _fitted(counts: Any, truth: np.ndarray, smoothing: float) -> list[Any]:
    from sklearn.naive_bayes import MultinomialNB

    return [MultinomialNB(alpha=smoothing).fit(counts, column) for column in truth.T]


def _predict(models: Sequence[Any], counts: Any) -> np.ndarray:
    return np.stack([model.predict(counts) for model in models], axis=1)


def _answers(task: Task, found: np.ndarray) -> list[Any]:
    if task.kind == "several_labels":
        return [frozenset(np.flatnonzero(row).tolist()) for row in found]
    return found[:, 0].tolist()
