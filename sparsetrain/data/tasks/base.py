"""Labelled tasks: examples in three splits, and the text of each answer."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Set
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from sparsetrain.data.sources.base import content_id
from sparsetrain.data.split import position
from sparsetrain.data.tasks.form import Asked, Form
from sparsetrain.errors import UserError

_SHOWN = 10  # most names of labels in a line


@dataclass(frozen=True, slots=True)
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
        text: the text of a user's row without what the template adds, to look for it in other text; else empty.
    """

    id: str
    source: str
    label: int = 0
    group: str | None = None
    after: str = ""
    holds: frozenset[int] = frozenset()
    choices: tuple[str, ...] = ()
    answer: str = ""
    text: str = ""

    @property
    def document(self) -> str:
        """The id of the document that the example was made from."""
        return self.id.partition("/")[0] if self.group is None else self.group

    def asked(self, form: Form) -> list[Asked]:
        """Return the questions about the example, see `Form.asked`."""
        return form.asked((self.source, self.after), self.label, self.holds, self.choices)

    @property
    def names(self) -> set[str]:
        """The ids that a document of training text would have if it were this example's, see `Task.overlap`."""
        return {self.document, content_id(self.text)} if self.text else {self.document}


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
        separator: for several labels, the text between two of them, see `Form`.
        max_new_tokens: for a free answer, the most tokens of an answer.
        repeated: the number of test examples whose text or group training examples of the task have too.
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
    separator: str = "|"
    max_new_tokens: int = 32
    repeated: int = 0

    @property
    def form(self) -> Form:
        """How the task asks its questions."""
        return Form(
            *(self.name, self.labels, self.answers, self.template, self.kind, self.length_rule, self.choices),
            *(self.separator, self.max_new_tokens),
        )

    @property
    def rows_per_epoch(self) -> int:
        """The number of training rows: one for each example, or for each label of each example."""
        return len(self.train) * (len(self.labels) if self.kind == "several_labels" else 1)

    def check(self) -> None:
        """Raise `UserError` unless a model can be trained and tested on the task."""
        if self.kind == "one_label" and (len(self.labels) < 2 or len(self.answers) != len(self.labels)):
            raise UserError(
                f"task {self.name}: {len(self.labels)} labels and {len(self.answers)} answers; a task has at least two "
                "labels, each with an answer"
            )
        _ = self.form  # raises
        for split in ("train", "validation", "test"):
            examples: list[Example] = getattr(self, split)
            if not examples:
                raise UserError(f"task {self.name}: no {split} example")
            for example in examples:
                self._check_truth(example)

    def _check_truth(self, example: Example) -> None:
        kind = self.kind
        count = len(example.choices) if kind == "multiple_choice" else len(self.labels)
        given = example.holds if kind == "several_labels" else [] if kind == "free_answer" else [example.label]
        for label in given:
            if not 0 <= label < count:
                raise UserError(
                    f"task {self.name}: example {example.id!r} has label {label}; it must be at least 0 and below "
                    f"{count}"
                )

    def truth(self, example: Example) -> Any:
        """Return what is right about an example: a label's index, a frozen set of indices, or the text of an answer."""
        return {"several_labels": example.holds, "free_answer": example.answer}.get(self.kind, example.label)

    def majority(self) -> float:
        """Return the test accuracy of a constant answer: the most frequent label of the training examples.

        For several labels it is the most frequent set of labels, for a free answer the most frequent text.
        """
        counts = Counter(self.truth(example) for example in self.train)
        best = min(counts, key=lambda truth: (-counts[truth], _ordered(truth)))
        return sum(self.truth(example) == best for example in self.test) / len(self.test)

    def asked(self, examples: Iterable[Example]) -> Iterator[Asked]:
        """Yield the questions about examples, see `Form.asked`; for several labels, one for each label."""
        form = self.form
        for example in examples:
            yield from example.asked(form)

    def fingerprint(self) -> str:
        """Return what identifies the task, see `_fingerprint`; many examples take long, so it is computed once."""
        return self._fingerprint

    @cached_property
    def _fingerprint(self) -> str:
        """Return 16 hexadecimal digits: a hash of the answers, and of the examples with their splits.

        It is that of the JSON of all of it, which is never in memory as a whole.
        """
        found = hashlib.blake2b(digest_size=8)
        found.update(f"{json.dumps([self.name, self.labels, self.answers])[:-1]}, [".encode())
        for number, split in enumerate((self.train, self.validation, self.test)):
            found.update(b"[" if number == 0 else b", [")
            for place, example in enumerate(split):
                found.update(((", " if place else "") + json.dumps(self._essence(example))).encode())
            found.update(b"]")
        more: list[Any] = [] if (self.kind, self.length_rule) == ("one_label", "sum") else [self.kind, self.length_rule]
        more += [self.max_new_tokens] if self.kind == "free_answer" else []
        found.update(f"]{''.join(f', {json.dumps(value)}' for value in more)}]".encode())
        return found.hexdigest()

    def _essence(self, example: Example) -> list[Any]:
        """Return what a model learns of an example and is scored by; a new kind adds to what was there before."""
        if self.kind == "one_label":
            return [example.id, example.source, example.label]
        more: dict[str, list[Any]] = {
            "several_labels": [example.after, sorted(example.holds)],
            "multiple_choice": [example.choices],
            "free_answer": [example.answer],
        }
        return [example.id, example.source, example.label, *more[self.kind]]

    def describe(self) -> str:
        """Return one line with the labels, the number of examples and the accuracy of the majority label."""
        counts = f"{len(self.train):,} to train on, {len(self.validation):,} to validate, {len(self.test):,} to test"
        labels = ", ".join(self.labels[:_SHOWN]) + (
            f", … {len(self.labels)} in all" if len(self.labels) > _SHOWN else ""
        )
        kind = "" if self.kind == "one_label" else self.kind.replace("_", " ") + (": " if labels else "")
        told = f"; {self.repeated:,} to test are like one to train on" if self.repeated else ""
        return f"{self.name} ({kind}{labels}): {counts}{told}; majority {self.majority():.1%}"

    def overlap(self, train_ids: Set[str]) -> int:
        """Return the number of documents of test examples that are in ``train_ids``, for one `Corpus.train_ids`.

        A row of a user's file counts by its group or else its id, and by its text, whose hash is the id of a document
        without one.
        """
        return len({example.document for example in self.test if not train_ids.isdisjoint(example.names)})


def _ordered(truth: Any) -> Any:
    return sorted(truth) if isinstance(truth, frozenset) else truth


def take(examples: Iterable[Example], count: int | None, seed: int) -> list[Example]:
    """Return at most ``count`` examples, or all, in random order; a smaller count takes the first of a larger one's.

    Examples of one id have places of their own, by their order among each other.
    """
    met: Counter[str] = Counter()
    placed: list[tuple[float, str, int, Example]] = []
    for example in examples:
        again = f"#{met[example.id]}" if met[example.id] else ""
        met[example.id] += 1
        placed.append((position(f"{seed}/{example.id}{again}", "task"), example.id, len(placed), example))
    return [example for *_, example in sorted(placed, key=lambda entry: entry[:3])][:count]
