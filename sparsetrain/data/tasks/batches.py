"""Batches of a task's examples, for training and for scoring.

Shapes: B rows, T tokens of the longest row, rounded up to a multiple of 8 but at most the context. A row is

    source tokens, soft-prompt slots, answer tokens, end of document

and has a loss only on the answer and the end. A source that is too long loses tokens on its left.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch

from sparsetrain.data.tasks.base import Example, Task
from sparsetrain.data.tokenizer import Tokenizer
from sparsetrain.data.tokens import IGNORED, Batch
from sparsetrain.errors import UserError
from sparsetrain.seeds import derive_seed

_POOL_BATCHES = 16  # batches among which rows are sorted by length
_MULTIPLE = 8


class _Rows:
    """Makes rows for a context, a number of soft-prompt slots and the answers of a task."""

    def __init__(self, tokenizer: Tokenizer, answers: Sequence[str], context: int, n_slots: int) -> None:
        self.answers = tokenizer.encode_batch(answers)
        self._eos = tokenizer.eos_id
        self._context = context
        self._n_slots = n_slots
        self._tokenizer = tokenizer
        # The longest answer sets the room for every source, so that all answers of a question follow the same tokens.
        # The end of the document is only a target and takes no room.
        self._room = context - n_slots - max(len(answer) for answer in self.answers)
        if self._room < 1:
            longest = context - n_slots - self._room
            raise UserError(
                f"context={context} leaves no room for a source beside {n_slots} soft-prompt slots and an answer of "
                f"{longest} tokens; use at least {n_slots + longest + 1}"
            )

    def sources(self, examples: Sequence[Example]) -> list[list[int]]:
        """Return the tokens of each example's source, cut on the left to the room that the longest answer leaves."""
        encoded = self._tokenizer.encode_batch([example.source for example in examples])
        for example, ids in zip(examples, encoded, strict=True):
            if not ids:
                raise UserError(f"example {example.id} has an empty source")
        return [ids[-self._room :] for ids in encoded]

    def length(self, source: Sequence[int], label: int) -> int:
        """Return the number of input tokens of a row."""
        return len(source) + self._n_slots + len(self.answers[label])

    def width(self, length: int) -> int:
        """Return the padded width of a batch whose longest row has ``length`` tokens."""
        return min(-(-length // _MULTIPLE) * _MULTIPLE, self._context)

    def collate(self, sources: Sequence[Sequence[int]], labels: Sequence[int]) -> Batch:
        """Return a batch of rows, padded on the right."""
        lengths = [self.length(source, label) for source, label in zip(sources, labels, strict=True)]
        shape = (len(sources), self.width(max(lengths)))
        tokens = np.full(shape, self._eos, dtype=np.int64)
        targets = np.full(shape, IGNORED, dtype=np.int64)
        slots = np.full(shape, -1, dtype=np.int64) if self._n_slots else None
        for row, (source, label) in enumerate(zip(sources, labels, strict=True)):
            answer = self.answers[label]
            start = len(source) + self._n_slots
            tokens[row, : len(source)] = source
            tokens[row, start : start + len(answer)] = answer
            targets[row, start - 1 : start - 1 + len(answer)] = answer
            targets[row, start - 1 + len(answer)] = self._eos
            if slots is not None:
                slots[row, len(source) : start] = np.arange(self._n_slots)
        return Batch(
            tokens=torch.from_numpy(tokens),
            targets=torch.from_numpy(targets),
            slots=None if slots is None else torch.from_numpy(slots),
        )

    def questions(self, sources: Sequence[Sequence[int]]) -> Batch:
        """Return a batch of sources of equal length, each followed by its slots, without targets."""
        tokens = torch.tensor([[*source, *[self._eos] * self._n_slots] for source in sources])
        slots = None
        if self._n_slots:
            slots = torch.full_like(tokens, -1)
            slots[:, -self._n_slots :] = torch.arange(self._n_slots)
        return Batch(tokens, torch.full_like(tokens, IGNORED), slots)


class TaskBatches:
    """Training batches of a task.

    Each epoch has every example once, in random order. Within pools of 16 batches, rows are sorted by length to save
    padding; the batches then come in random order. A row is a function of (seed, phase, global example index) alone.

    Args:
        examples: the training examples.
        tokenizer: the tokenizer of the model.
        answers: the text of each label, for example `Task.answers`.
        context: largest number of input tokens of a row.
        batch_size: rows of the batches that are sorted by length; `batch` takes any count.
        seed: of the order.
        phase: the purpose of the batches; two phases with the same seed have different orders.
        n_slots: soft-prompt vectors between source and answer.

    Raises:
        UserError: there are no examples, a source is empty, ``batch_size`` is below 1, or ``context`` leaves no room.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        tokenizer: Tokenizer,
        answers: Sequence[str],
        context: int,
        batch_size: int,
        seed: int,
        phase: str | int,
        n_slots: int = 0,
    ) -> None:
        if not examples:
            raise UserError("the task has no examples to train on")
        if batch_size < 1:
            raise UserError(f"batch_size={batch_size} is too small; the least is 1")
        self._rows = _Rows(tokenizer, answers, context, n_slots)
        self._sources = self._rows.sources(examples)
        self._labels = [example.label for example in examples]
        self._lengths = np.array([self._rows.length(*row) for row in zip(self._sources, self._labels, strict=True)])
        self._batch_size = batch_size
        self._seed = seed
        self._phase = phase
        self.examples_per_epoch: int = len(examples)
        self._order = lru_cache(maxsize=2)(self._order_of_epoch)

    def _order_of_epoch(self, epoch: int) -> list[int]:
        random = np.random.default_rng(derive_seed(self._seed, "task", self._phase, epoch))
        order = random.permutation(self.examples_per_epoch)
        # The first rows of an epoch complete the last batch of the epoch before, so they are not sorted.
        filling = -epoch * self.examples_per_epoch % self._batch_size
        head, rest = order[:filling], order[filling:]
        pool = _POOL_BATCHES * self._batch_size
        batches: list[list[int]] = []
        for start in range(0, len(rest), pool):
            members = rest[start : start + pool]
            members = members[np.argsort(self._lengths[members], kind="stable")]
            batches.extend(
                members[first : first + self._batch_size].tolist() for first in range(0, len(members), self._batch_size)
            )
        full = [batch for batch in batches if len(batch) == self._batch_size]
        tail = [index for batch in batches if len(batch) < self._batch_size for index in batch]
        shuffled = [index for place in random.permutation(len(full)).tolist() for index in full[place]]
        return [*head.tolist(), *shuffled, *tail]

    @property
    def widths(self) -> tuple[int, int]:
        """Padded widths, in tokens, of a batch of the shortest row and of a batch of the longest."""
        return self._rows.width(int(self._lengths.min())), self._rows.width(int(self._lengths.max()))

    def indices(self, first: int, count: int) -> list[int]:
        """Return the example index of rows ``first`` to ``first + count - 1`` of the run."""
        size = self.examples_per_epoch
        return [self._order(index // size)[index % size] for index in range(first, first + count)]

    def tokens(self, first: int, count: int) -> int:
        """Return the number of tokens of `batch` for the same rows, padding included, without making the batch."""
        return count * self._rows.width(int(self._lengths[self.indices(first, count)].max()))

    def batch(self, first: int, count: int) -> Batch:
        """Return rows ``first`` to ``first + count - 1`` of the run; tensors are [count, T]."""
        indices = self.indices(first, count)
        sources, labels = [self._sources[index] for index in indices], [self._labels[index] for index in indices]
        return self._rows.collate(sources, labels)


@dataclass
class ScoringBatch:
    """Sources of equal length, without answers.

    Args:
        batch: the sources, without padding and without targets.
        examples: LongTensor [B], the index of each row's example.
    """

    batch: Batch
    examples: torch.Tensor


def answer_tokens(task: Task, tokenizer: Tokenizer) -> list[list[int]]:
    """Return the tokens to score for each label.

    They include the end of the document only if the tokens of one answer are a prefix of another's. Otherwise the
    answers exclude each other without it.
    """
    answers = tokenizer.encode_batch(task.answers)
    ordered = sorted(answers)
    if any(after[: len(before)] == before for before, after in itertools.pairwise(ordered)):
        return [[*answer, tokenizer.eos_id] for answer in answers]
    return answers


def scoring_batches(
    examples: Sequence[Example],
    task: Task,
    tokenizer: Tokenizer,
    context: int,
    n_slots: int = 0,
    batch_size: int = 64,
) -> Iterator[ScoringBatch]:
    """Yield the source of every example once, with its soft-prompt slots, in batches of equal length.

    Sources are cut as in `TaskBatches`, so that an example is scored after the same tokens as in training.

    Args:
        examples: the examples to score.
        task: the task; its answers set the room for the sources.
        tokenizer: the tokenizer of the model.
        context: largest number of tokens of a row, answer included.
        n_slots: soft-prompt vectors after the source.
        batch_size: largest number of rows of a batch.

    Raises:
        UserError: a source is empty, or ``context`` leaves no room for a source.
    """
    rows = _Rows(tokenizer, task.answers, context, n_slots)
    by_length: dict[int, list[int]] = {}
    sources = rows.sources(examples)
    for index, source in enumerate(sources):
        by_length.setdefault(len(source), []).append(index)
    for length in sorted(by_length):
        members = by_length[length]
        for start in range(0, len(members), batch_size):
            indices = members[start : start + batch_size]
            yield ScoringBatch(rows.questions([sources[index] for index in indices]), torch.tensor(indices))
