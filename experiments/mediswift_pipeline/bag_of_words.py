"""The control that no language model is in: Naive Bayes on bags of words; bag_of_words.csv beside this file.

    python experiments/mediswift_pipeline/bag_of_words.py        # half a minute, most of it for reading the abstracts

The 500 labelled sentences and the 4,000 of the test are those of the fine-tuned models. Nothing is tuned: words are
runs of two or more letters and digits in lower case, and the smoothing adds one to every count. What varies is whether
pairs of neighbours count as words too, and whether a word counts once a sentence or as often as it comes.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from scipy.stats import binomtest

from sparsetrain.data.tasks.base import Example, Task
from sparsetrain.data.tasks.registry import TaskConfig, load_task
from sparsetrain.report.sweep import write_rows

HERE = Path(__file__).parent
WORD = re.compile(r"\b\w\w+\b")
CUE = "\nrole:"  # ends every example; it is no part of the sentence
N_TRAIN, N_VALIDATION, N_TEST, SEED = 500, 250, 4000, 0  # of conf/experiment/mediswift_pipeline.yaml


def words(sentence: str, longest: int, once: bool) -> list[str]:
    """Return the words of a sentence, with runs of up to ``longest`` of them, each once if ``once``."""
    single = WORD.findall(sentence.removesuffix(CUE).lower())
    runs = [" ".join(single[i : i + n]) for n in range(1, longest + 1) for i in range(len(single) - n + 1)]
    return sorted(set(runs)) if once else runs


def counts(examples: Sequence[Example], places: dict[str, int], longest: int, once: bool) -> np.ndarray:
    """Return how often each known word is in each example, ``[E, W]``."""
    found = np.zeros((len(examples), len(places)))
    for row, example in enumerate(examples):
        for word in words(example.source, longest, once):
            if word in places:
                found[row, places[word]] += 1
    return found


def right(task: Task, longest: int, once: bool) -> int:
    """Return how many test examples multinomial Naive Bayes with add-one smoothing answers rightly."""
    known = sorted({word for example in task.train for word in words(example.source, longest, once)})
    places = {word: place for place, word in enumerate(known)}
    labels = np.array([example.label for example in task.train])
    members = labels[None] == np.arange(len(task.labels))[:, None]  # [labels, E]
    smoothed = members @ counts(task.train, places, longest, once) + 1.0
    logs = np.log(smoothed / smoothed.sum(axis=1, keepdims=True))
    scores = counts(task.test, places, longest, once) @ logs.T + np.log(members.mean(axis=1))
    return int((scores.argmax(axis=1) == [example.label for example in task.test]).sum())


def main() -> None:
    """Write ``bag_of_words.csv`` beside this file and print it; intervals are Wilson's over the test sentences."""
    task = load_task(TaskConfig("section_roles", None, N_TRAIN, N_VALIDATION, N_TEST, SEED))
    rows = []
    for longest, once in itertools.product((1, 2), (False, True)):
        found = binomtest(right(task, longest, once), len(task.test))
        low, high = (round(float(end), 4) for end in found.proportion_ci(0.95, method="wilson"))
        row = {"longest": longest, "counted": "once" if once else "as often as it comes", "n_test": len(task.test)}
        rows.append({**row, "accuracy": found.statistic, "ci_low": low, "ci_high": high})
        print(rows[-1])
    write_rows(rows, HERE / "bag_of_words.csv")


if __name__ == "__main__":
    main()
