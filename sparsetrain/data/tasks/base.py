"""Labelled tasks: examples in three splits, and the text of each answer."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Set
from dataclasses import dataclass

from sparsetrain.data.split import position
from sparsetrain.data.tasks.form import Form
from sparsetrain.errors import UserError


@dataclass(frozen=True)
class Example:
    """One question.

    Args:
        id: the id of the document that the example was made from, with a suffix ``/...`` if it has several examples.
        source: the text that the model reads.
        label: index of the right answer; unused for several labels and for a free answer.
        group: the document that the example was made from; None for the part of ``id`` before a ``/``.
        after: for several labels, the text behind the asked label.
        holds: for several labels, the indices of the labels that hold.
        choices: for a multiple choice, its answers, with their leading spaces.
        answer: for a free answer, the text of the answer, with its leading space.
    """

    id: str
    source: str
    label: int = 0
    group: str | None = None
    after: str = ""
    holds: frozenset[int] = frozenset()
    choices: tuple[str, ...] = ()
    answer: str = ""

    @property
    def document(self) -> str:
        """The id of the document that the example was made from."""
        return self.id.partition("/")[0] if self.group is None else self.group


@dataclass(frozen=True)
class Task:
    """A labelled task for a language model.

    Args:
        name: the name of the task.
        labels: the names of the labels.
        answers: ``answers[label]`` is the text that continues the source of an example, with its leading space.
        train: the training examples.
        validation: the validation examples.
        test: the test examples.
        template: how a row of a table becomes a source, see `Form`; for rows that the task itself does not have.
        kind: the kind of the task, see `Form`.
        length_rule: how answers of different lengths compare, see `Form`.
        choices: for a multiple choice, the columns of the choices.
    """

    name: str
    labels: tuple[str, ...]
    answers: tuple[str, ...]
    train: list[Example]
    validation: list[Example]
    test: list[Example]
    template: str = "{text}"
    kind: str = "one_label"
    length_rule: str = "sum"
    choices: tuple[str, ...] = ()

    @property
    def form(self) -> Form:
        """How the task asks its questions."""
        return Form(self.name, self.labels, self.answers, self.template, self.kind, self.length_rule, self.choices)

    def check(self) -> None:
        """Raise `UserError` unless a model can be trained and tested on the task."""
        if len(self.labels) < 2 or len(self.answers) != len(self.labels):
            raise UserError(
                f"task {self.name}: {len(self.labels)} labels and {len(self.answers)} answers; a task has at least two "
                "labels, each with an answer"
            )
        for split in ("train", "validation", "test"):
            examples: list[Example] = getattr(self, split)
            if not examples:
                raise UserError(f"task {self.name}: no {split} example")
            for example in examples:
                if not 0 <= example.label < len(self.labels):
                    raise UserError(
                        f"task {self.name}: example {example.id!r} has label {example.label}; it must be at least 0 "
                        f"and below {len(self.labels)}"
                    )

    def majority(self) -> float:
        """Return the test accuracy of a constant answer: the most frequent label of the training examples."""
        counts = Counter(example.label for example in self.train)
        best = min(counts, key=lambda label: (-counts[label], label))
        return sum(example.label == best for example in self.test) / len(self.test)

    def fingerprint(self) -> str:
        """Return 16 hexadecimal digits: a hash of the answers, and of the examples with their splits."""
        splits = [[[e.id, e.source, e.label] for e in split] for split in (self.train, self.validation, self.test)]
        text = json.dumps([self.name, self.labels, self.answers, splits])
        return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()

    def describe(self) -> str:
        """Return one line with the labels, the number of examples and the accuracy of the majority label."""
        counts = f"{len(self.train):,} to train on, {len(self.validation):,} to validate, {len(self.test):,} to test"
        return f"{self.name} ({', '.join(self.labels)}): {counts}; majority {self.majority():.1%}"

    def overlap(self, train_ids: Set[str]) -> int:
        """Return the number of documents of test examples that are in ``train_ids``, for one `Corpus.train_ids`."""
        return len({example.document for example in self.test} & train_ids)


def take(examples: Iterable[Example], count: int, seed: int) -> list[Example]:
    """Return at most ``count`` examples in random order; those of a smaller count come first in a larger one."""
    return sorted(examples, key=lambda example: (position(f"{seed}/{example.id}", "task"), example.id))[:count]
