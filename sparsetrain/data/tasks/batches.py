"""Batches of a task's examples for training; `sparsetrain.data.tasks.scoring` has those for scoring.

Shapes: B rows, T tokens of the longest row, rounded up to a multiple of 8 but at most the context. A row is

    source tokens, soft-prompt slots, answer tokens, end of document

and has a loss only on the answer and the end. A source that is too long loses tokens on its left.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch

from sparsetrain.data.tasks.base import Example
from sparsetrain.data.tasks.form import Asked, Form
from sparsetrain.data.tokenizer import Tokenizer
from sparsetrain.data.tokens import IGNORED, Batch
from sparsetrain.errors import UserError
from sparsetrain.seeds import derive_seed

_POOL_BATCHES = 16  # batches among which rows are sorted by length
_MULTIPLE = 8
CHUNK = 1024  # texts that are encoded at a time
_OWN_ANSWERS = ("multiple_choice", "free_answer")  # kinds whose questions have answers of their own


class Rows:
    """Makes rows for a context and a number of soft-prompt slots."""

    def __init__(self, tokenizer: Tokenizer, context: int, n_slots: int) -> None:
        self._eos = tokenizer.eos_id
        self._context = context
        self._n_slots = n_slots

    def room(self, longest: int) -> int:
        """Return the number of tokens that an answer of ``longest`` tokens leaves for its source.

        The end of the document is only a target and takes no room.

        Raises:
            UserError: it leaves none.
        """
        room = self._context - self._n_slots - longest
        if room < 1:
            raise UserError(
                f"context={self._context} leaves no room for a source beside {self._n_slots} soft-prompt slots and an "
                f"answer of {longest} tokens; use at least {self._n_slots + longest + 1}"
            )
        return room

    def lengths(self, sources: np.ndarray, answers: np.ndarray) -> np.ndarray:
        """Return the numbers of input tokens of rows, from those of their sources and answers."""
        found: np.ndarray = sources + self._n_slots + answers
        return found

    def width(self, length: int) -> int:
        """Return the padded width of a batch whose longest row has ``length`` tokens."""
        return min(-(-length // _MULTIPLE) * _MULTIPLE, self._context)

    def collate(self, sources: Sequence[Sequence[int]], answers: Sequence[Sequence[int]]) -> Batch:
        """Return a batch of rows, padded on the right."""
        lengths = self.lengths(np.array(list(map(len, sources))), np.array(list(map(len, answers))))
        shape = (len(sources), self.width(int(lengths.max())))
        tokens = np.full(shape, self._eos, dtype=np.int64)
        targets = np.full(shape, IGNORED, dtype=np.int64)
        slots = np.full(shape, -1, dtype=np.int64) if self._n_slots else None
        for row, (source, answer) in enumerate(zip(sources, answers, strict=True)):
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


class Encoded:
    """Token lists in one array, since as lists of integers they would take ten times the memory."""

    def __init__(self) -> None:
        self._tokens = array("i")
        self._ends = array("q", [0])

    def add(self, ids: Sequence[int]) -> None:
        self._tokens.extend(ids)
        self._ends.append(len(self._tokens))

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, index: int) -> Sequence[int]:
        return self._tokens[self._ends[index] : self._ends[index + 1]]

    def lengths(self) -> np.ndarray:
        """Return the number of tokens of each list."""
        return np.diff(np.frombuffer(self._ends, dtype=np.int64))


class Sources:
    """The tokens of the sources of questions, each cut on the left to the room that its longest answer leaves.

    All answers of a question therefore follow the same tokens, in training and when they are compared.
    """

    def __init__(self, rows: Rows, tokenizer: Tokenizer, max_new_tokens: int) -> None:
        self.tokens = Encoded()
        self._rows, self._tokenizer = rows, tokenizer
        self._generated = max_new_tokens
        self._longest: dict[tuple[str, ...], int] = {}

    def extend(self, asked: Sequence[Asked], names: Sequence[str]) -> None:
        """Add questions; ``names`` has what an error calls each of them.

        Raises:
            UserError: a source is empty, or the context leaves no room for it.
        """
        encoded = self._tokenizer.encode_batch([each.source for each in asked])
        for each, ids, name in zip(asked, encoded, names, strict=True):
            if not ids:
                raise UserError(f"example {name} has an empty source")
            self.tokens.add(ids[-self._room(each.answers) :])

    def _room(self, answers: tuple[str, ...]) -> int:
        if not answers:
            return self._rows.room(self._generated)
        if answers not in self._longest:
            if len(self._longest) >= CHUNK:  # each question may have answers of its own
                self._longest.clear()
            self._longest[answers] = max(map(len, self._tokenizer.encode_continuations(answers)))
        return self._rows.room(self._longest[answers])


class TaskBatches:
    """Training batches of a task.

    Each epoch has every example once, in random order. Within pools of 16 batches, rows are sorted by length to save
    padding; the batches then come in random order. A row is a function of (seed, phase, global example index) alone.

    Args:
        examples: the training examples. An example of several labels makes one row for each label, whose answer is no
            or yes; the others make one row each.
        tokenizer: the tokenizer of the model.
        form: how the task asks, `Task.form`; or the text of each label, for a task with one label.
        context: largest number of input tokens of a row.
        batch_size: rows of the batches that are sorted by length; `batch` takes any count.
        seed: of the order.
        phase: the purpose of the batches; two phases with the same seed have different orders.
        n_slots: soft-prompt vectors between source and answer.

    Attributes:
        examples_per_epoch: the number of rows.

    Raises:
        UserError: there are no examples, a source is empty, an answer is longer than `Form.max_new_tokens`,
            ``batch_size`` is below 1, or ``context`` leaves no room.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        tokenizer: Tokenizer,
        form: Form | Sequence[str],
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
        if not isinstance(form, Form):
            form = Form("", tuple(form), tuple(form))
        self._rows = Rows(tokenizer, context, n_slots)
        self._sources = Encoded()
        self._answers: list[Sequence[int]] = []
        self._encode(examples, form, tokenizer)
        lengths = [len(answer) for answer in self._answers]
        self._lengths = self._rows.lengths(self._sources.lengths(), np.array(lengths))
        self._batch_size = batch_size
        self._seed = seed
        self._phase = phase
        self.examples_per_epoch: int = len(self._sources)
        self._order = lru_cache(maxsize=2)(self._order_of_epoch)

    def _encode(self, examples: Sequence[Example], form: Form, tokenizer: Tokenizer) -> None:
        sources = Sources(self._rows, tokenizer, form.max_new_tokens)
        known: dict[str, list[int]] = {}  # rows with the same answer share its tokens
        per_example = len(form.labels) if form.kind == "several_labels" else 1
        for start in range(0, len(examples), CHUNK):
            some = examples[start : start + CHUNK]
            asked = [each for example in some for each in example.asked(form)]
            sources.extend(asked, [example.id for example in some for _ in range(per_example)])
            texts = [
                some[number].answer if each.right is None else each.answers[each.right]
                for number, each in enumerate(asked)
            ]
            fresh = [text for text in dict.fromkeys(texts) if text not in known]
            known.update(zip(fresh, tokenizer.encode_continuations(fresh), strict=True))
            self._answers += [known[text] for text in texts]
            if form.kind in _OWN_ANSWERS:
                known.clear()
        self._sources = sources.tokens
        if form.kind == "free_answer":
            longest = max(range(len(examples)), key=lambda index: len(self._answers[index]))
            if (length := len(self._answers[longest])) > form.max_new_tokens:
                raise UserError(
                    f"task.max_new_tokens={form.max_new_tokens}: the answer of example {examples[longest].id} has "
                    f"{length} tokens; use at least {length}"
                )

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
        return self._rows.collate([self._sources[index] for index in indices], [self._answers[i] for i in indices])
