"""Probes of what a model finds in a long text: pairs of keys and values, a needle in filler, the title of an abstract.

A probe is a text of a given number of bytes, the question at its end, and a few answers of which one is right. It is a
function of its seed, kind, size and number alone, and for a title of the documents. The first two kinds are plain
ASCII, so that with a tokenizer of bytes their size is their number of tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from sparsetrain.data import Document, Tokenizer
from sparsetrain.data.sources.pairs import (
    DIGITS,
    LETTERS,
    MARKS,
    check_marks,
    distinct,
    most_pairs,
    row_bytes,
    rows,
)
from sparsetrain.errors import UserError, check_choice
from sparsetrain.models import Transformer
from sparsetrain.seeds import derive_seed
from sparsetrain.training.evaluate import evaluating, wilson

SIZES = (256, 512, 1024, 2048, 4096, 8192)
"""Usual sizes in bytes."""

CUE = "\nTitle:"
"""What stands between an abstract and its title."""

_CHOICES = 4
_COMMON = (
    "the a one this that old new small large quiet river stone garden window letter morning winter market bridge "
    "field road house boat bird tree wall light cloud walked carried opened crossed found kept turned passed "
    "over under near behind beside through after before and then while because slowly again often"
)
_WORDS = _COMMON.split()


@dataclass(frozen=True)
class Probe:
    """A text with a question at its end.

    Args:
        prompt: the text, with the question.
        choices: answers that could follow it; those of a made text are equally long.
        right: index of the right one.
        depth: where the answer stands in the text: 0 at its start, 1 at its end; None for a title, which is nowhere.
    """

    prompt: str
    choices: tuple[str, ...]
    right: int
    depth: float | None

    @property
    def answer(self) -> str:
        """The right answer."""
        return self.choices[self.right]


@dataclass(frozen=True)
class ProbeScore:
    """The share of ``n`` probes answered rightly, with its Wilson interval; guessing gives ``chance``."""

    n: int
    accuracy: float
    ci95: tuple[float, float]
    chance: float


def retrieval_probe(size: int, seed: int, index: int, marks: int = MARKS) -> Probe:
    """Return a list of pairs of a key and a value, then one of the keys: its value is asked for.

    The source ``key_values`` has documents of the same form, from which a model can learn to answer.

    Args:
        size: most bytes of the prompt and an answer together. Rows are equally long, so at most one row is missing.
        seed, index: the seed of a set of probes, and the number of the probe in it.
        marks: letters of a key, and digits of a value.

    Raises:
        UserError: ``marks`` is out of range, ``size`` has no room for as many pairs as there are answers to choose
            from, or for more pairs than there are values.
    """
    check_marks(marks)
    random, row = _random("retrieval", size, seed, index), row_bytes(marks)
    pairs = size // row - 1  # the question and its answer take a row
    if pairs < _CHOICES:
        raise UserError(f"size={size} is too small; a probe of {_CHOICES} pairs needs {row * (_CHOICES + 1)} bytes")
    if pairs > most_pairs(marks):
        raise UserError(f"size={size} has {pairs} pairs; marks={marks} gives only {most_pairs(marks)} different values")
    keys, values = (distinct(random, alphabet, pairs, marks) for alphabet in (LETTERS, DIGITS))
    asked, *others = (int(number) for number in random.permutation(pairs)[:_CHOICES])
    text = f"{rows(keys, values)}{keys[asked]}"
    return _probe(text, random, values[asked], [values[i] for i in others], asked / (pairs - 1))


def needle_probe(size: int, seed: int, index: int, filler: str | None = None) -> Probe:
    """Return a text in which one sentence gives the number of a name, then the beginning of that sentence.

    Args:
        size: bytes of the prompt and an answer together.
        seed, index: the seed of a set of probes, and the number of the probe in it.
        filler: ASCII text around the needle, cut from a random place; None draws sentences of common words.

    Raises:
        UserError: ``size`` has no room for the needle, or ``filler`` is not ASCII or too short.
    """
    random = _random("needle", size, seed, index)
    (name,), (number, *others) = distinct(random, LETTERS, 1), distinct(random, DIGITS, _CHOICES)
    question = f"The number of {name} is"
    needle = f" {question} {number}. "
    room = size - len(needle) - len(question) - 1 - MARKS - 1
    if room < 0:
        raise UserError(f"size={size} is too small; a needle needs {size - room} bytes")
    around = _sentences(random, room) if filler is None else _cut(random, filler, room)
    place = int(random.integers(room + 1))
    text = f"{around[:place]}{needle}{around[place:]}\n{question}"
    return _probe(text, random, number, others, place / max(1, room))


def title_probes(documents: Sequence[Document], size: int, count: int, seed: int = 0) -> list[Probe]:
    """Return beginnings of documents, each to be continued by its own title or by one of three others.

    The prompt is the text, cut at a space, and the line of `CUE`. Titles differ in length, so `probe_accuracy` has to
    compare log-probabilities ``per_byte``. A document takes part if it fills the size, and its title if it leaves the
    text at least half of it.

    Args:
        documents: of which those without a title are left out; no model should have been trained on them.
        size: most bytes of the prompt and the longest of its choices together.
        count: largest number of probes; a document has one.
        seed: of the order of the documents and of the other titles.

    Raises:
        UserError: ``count`` is below 1, or fewer than four documents with different titles take part.
    """
    if count < 1:
        raise UserError(f"count={count} is not a positive integer")
    room = size - len(CUE) - 1
    fitting = [
        document
        for document in documents
        if document.title.strip() and len(document.title.encode()) <= room // 2 and len(document.text.encode()) >= size
    ]
    titles = sorted({document.title.strip() for document in fitting})
    if len(titles) < _CHOICES:
        raise UserError(
            f"size={size}: {len(titles)} titles of held-out documents of that length are short enough; a probe "
            f"compares {_CHOICES}"
        )
    order = _random("title", size, seed, 0).permutation(len(fitting))[:count]
    return [_title_probe(fitting[at], titles, size, seed, index) for index, at in enumerate(order, start=1)]


def _title_probe(document: Document, titles: Sequence[str], size: int, seed: int, index: int) -> Probe:
    random, own = _random("title", size, seed, index), document.title.strip()
    drawn = [titles[int(at)] for at in random.choice(len(titles), size=_CHOICES, replace=False)]
    others = [title for title in drawn if title != own][: _CHOICES - 1]
    room = size - len(CUE) - 1 - max(len(title.encode()) for title in (own, *others))
    text = document.text.encode()[:room].decode(errors="ignore")
    if (space := text.rfind(" ")) > 0:
        text = text[:space]
    return _probe(f"{text}{CUE}", random, own, others, None)


RETRIEVAL, NEEDLE, TITLE = "retrieval", "needle", "title"
KINDS = (RETRIEVAL, NEEDLE, TITLE)
PROBES: dict[str, Callable[[int, int, int], Probe]] = {RETRIEVAL: retrieval_probe, NEEDLE: needle_probe}
"""Kinds that need no documents."""


def probes(kind: str, size: int, count: int, seed: int = 0, marks: int = MARKS) -> list[Probe]:
    """Return the first ``count`` probes of a kind, ``retrieval`` or ``needle``, with at most ``size`` bytes each.

    Args:
        kind, size: see `PROBES`.
        count, seed: how many, and of which set.
        marks: of ``retrieval``, see `retrieval_probe`.

    Raises:
        UserError: the kind is unknown, or a number is out of range.
    """
    check_choice("kind", kind, PROBES)
    if count < 1:
        raise UserError(f"count={count} is not a positive integer")
    if kind == RETRIEVAL:
        return [retrieval_probe(size, seed, index, marks) for index in range(count)]
    return [PROBES[kind](size, seed, index) for index in range(count)]


@torch.no_grad()
def probe_accuracy(
    model: Transformer, tokenizer: Tokenizer, asked: Sequence[Probe], per_byte: bool = False
) -> ProbeScore:
    """Return how often the right answer of a probe is the most likely of its choices.

    Args:
        model: the model, in evaluation mode during the call.
        tokenizer: its tokenizer.
        asked: at least one probe; all have the same number of choices.
        per_byte: divide the log-probability of a choice by its bytes in UTF-8, for choices of different lengths.

    Raises:
        UserError: there is no probe, or a prompt and its answer are longer than the model's learned positions.
    """
    if not asked:
        raise UserError("probes must not be empty: an accuracy needs some")
    right, device = 0, model.embed.weight.device
    with evaluating(model):
        for probe in asked:
            ids, answers = tokenizer.encode(probe.prompt), tokenizer.encode_continuations(probe.choices)
            embeddings = model.embed_tokens(torch.tensor([ids], device=device))
            scores = model.continuation_scores(embeddings, answers)[0]
            if per_byte:
                scores = scores / scores.new_tensor([len(choice.encode()) for choice in probe.choices])
            right += int(scores.argmax()) == probe.right and not bool(scores.isnan().any())
    n = len(asked)
    return ProbeScore(n, right / n, wilson(right, n), 1 / len(asked[0].choices))


def _random(kind: str, size: int, seed: int, index: int) -> np.random.Generator:
    return np.random.default_rng(derive_seed(seed, "probe", kind, size, index))


def _probe(text: str, random: np.random.Generator, answer: str, others: Sequence[str], depth: float | None) -> Probe:
    # The place of the right answer is drawn, so that a model which finds all alike is right by chance.
    right = int(random.integers(len(others) + 1))
    choices = [*others[:right], answer, *others[right:]]
    return Probe(text, tuple(f" {choice}" for choice in choices), right, depth)


def _sentences(random: np.random.Generator, room: int) -> str:
    """Return ``room`` bytes of sentences of common words."""
    parts, length = [], 0
    while length < room:
        words = " ".join(random.choice(_WORDS, size=int(random.integers(5, 12))))
        parts.append(f"{words.capitalize()}. ")
        length += len(parts[-1])
    return "".join(parts)[:room]


def _cut(random: np.random.Generator, filler: str, room: int) -> str:
    if not filler.isascii() or len(filler) < room:
        raise UserError(f"filler must be ASCII of at least {room} bytes; it has {len(filler.encode())}")
    start = int(random.integers(len(filler) - room + 1))
    return filler[start : start + room]
