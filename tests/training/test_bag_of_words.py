"""A bag of words against Naive Bayes written from its formula, and without scikit-learn."""

from __future__ import annotations

import math
import random
import re
from collections import Counter

import pytest

from sparsetrain.data import Example, Task
from sparsetrain.training import bag_of_words as module
from sparsetrain.training.bag_of_words import bag_of_words

WORDS = {"good": ["bright", "warm", "fine"], "bad": ["dark", "cold", "fine"]}


def rows(count: int, seed: int) -> list[Example]:
    draw = random.Random(seed)
    found = []
    for n in range(count):
        label = draw.randrange(2)
        words = draw.choices(WORDS[("good", "bad")[label]], k=2) + draw.choices(["a", "house", "dark"], k=4)
        found.append(Example(f"{seed}/{n}", " ".join(words), label, holds=frozenset({label, 2})))
    return found


def task_of(kind: str = "one_label") -> Task:
    labels, answers = ("good", "bad"), (" good", " bad")
    if kind == "several_labels":
        labels, answers = (*labels, "always"), (" no", " yes")
    template = "{text}{label}" if kind == "several_labels" else "{text}"
    return Task(f"t{kind}", labels, answers, rows(120, 0), rows(60, 1), rows(80, 2), template, kind)


def pairs(text: str, most: int) -> list[str]:
    words = re.findall(r"\w+", text.lower())
    return words + [" ".join(words[n : n + 2]) for n in range(len(words) - 1)] * (most - 1)


def naive_bayes(train: list[Example], test: list[Example], most: int, smoothing: float) -> list[int]:
    vocabulary = {word for example in train for word in pairs(example.source, most)}
    counts = [Counter(w for e in train if e.label == label for w in pairs(e.source, most)) for label in range(2)]
    priors = [math.log(sum(e.label == label for e in train) / len(train)) for label in range(2)]
    found = []
    for example in test:
        scores = [
            priors[label]
            + sum(
                math.log((counts[label][word] + smoothing) / (counts[label].total() + smoothing * len(vocabulary)))
                for word in pairs(example.source, most)
                if word in vocabulary
            )
            for label in range(2)
        ]
        found.append(max(range(2), key=scores.__getitem__))
    return found


def test_it_is_naive_bayes_with_what_is_best_on_the_validation_rows() -> None:
    task = task_of()
    found = bag_of_words(task)
    assert found is not None

    def accuracy(split: list[Example], most: int, smoothing: float) -> float:
        said = naive_bayes(task.train, split, most, smoothing)
        return sum(label == example.label for label, example in zip(said, split, strict=True)) / len(split)

    most, smoothing = found["ngrams"], found["smoothing"]
    assert found["validation_accuracy"] == pytest.approx(accuracy(task.validation, most, smoothing))
    best = max(accuracy(task.validation, n, s) for n in (1, 2) for s in (1.0, 0.3, 0.1, 0.03, 0.01))
    assert found["validation_accuracy"] == pytest.approx(best)
    assert found["accuracy"] == pytest.approx(accuracy(task.test, most, smoothing))
    assert found["accuracy"] > task.majority() + 0.1
    assert found["n_train"] == 120


def test_each_of_several_labels_has_a_classifier_of_its_own() -> None:
    one, several = bag_of_words(task_of()), bag_of_words(task_of("several_labels"))
    assert one is not None
    assert several is not None
    # Two of the three labels exclude each other, and the third always holds.
    assert several["accuracy"] == pytest.approx(one["accuracy"], abs=0.05)
    assert several["micro_f1"] > several["accuracy"]


def test_there_is_none_without_scikit_learn_words_or_labels(monkeypatch: pytest.MonkeyPatch) -> None:
    examples = [Example(str(n), "?!", n % 2) for n in range(4)]
    assert bag_of_words(Task("t", ("a", "b"), (" a", " b"), examples, examples, examples)) is None
    free = [Example("1", "q", answer=" a")]
    assert bag_of_words(Task("t", (), (), free, free, free, kind="free_answer")) is None
    monkeypatch.setattr(module, "is_installed", lambda: False)
    assert bag_of_words(task_of()) is None
