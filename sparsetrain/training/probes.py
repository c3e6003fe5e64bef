"""Probes of what a model finds in a long text: pairs of keys and values, and a needle in filler.

A probe is a text of a given number of bytes, the question at its end, and a few answers of which one is right. It is a
function of its seed, kind, size and number alone, and plain ASCII, so that with a tokenizer of bytes its size is its
number of tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from sparsetrain.data import Tokenizer
from sparsetrain.errors import UserError, check_choice
from sparsetrain.models import Transformer
from sparsetrain.seeds import derive_seed
from sparsetrain.training.evaluate import evaluating, wilson

SIZES = (256, 512, 1024, 2048, 4096, 8192)
"""Usual sizes in bytes."""

_LETTERS, _DIGITS, _MARKS = "abcdefghijklmnopqrstuvwxyz", "0123456789", 6
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
        choices: answers of equal length that could follow it.
        right: index of the right one.
        depth: where the answer stands in the text: 0 at its start, 1 at its end.
    """

    prompt: str
    choices: tuple[str, ...]
    right: int
    depth: float

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


def retrieval_probe(size: int, seed: int, index: int) -> Probe:
    """Return a list of pairs of a key and a value, then one of the keys: its value is asked for.

    Args:
        size: most bytes of the prompt and an answer together. Rows are equally long, so at most one row is missing.
        seed, index: the seed of a set of probes, and the number of the probe in it.

    Raises:
        UserError: ``size`` has no room for as many pairs as there are answers to choose from.
    """
    random = _random("retrieval", size, seed, index)
    row = 2 * (_MARKS + 1)
    pairs = size // row - 1  # the question and its answer take a row
    if pairs < _CHOICES:
        raise UserError(f"size={size} is too small; a probe of {_CHOICES} pairs needs {row * (_CHOICES + 1)} bytes")
    keys, values = _distinct(random, _LETTERS, pairs), _distinct(random, _DIGITS, pairs)
    asked, *others = (int(number) for number in random.permutation(pairs)[:_CHOICES])
    text = "".join(f"{key} {value}\n" for key, value in zip(keys, values, strict=True))
    return _probe(f"{text}{keys[asked]}", random, values[asked], [values[i] for i in others], asked / (pairs - 1))


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
    (name,), (number, *others) = _distinct(random, _LETTERS, 1), _distinct(random, _DIGITS, _CHOICES)
    question = f"The number of {name} is"
    needle = f" {question} {number}. "
    room = size - len(needle) - len(question) - 1 - _MARKS - 1
    if room < 0:
        raise UserError(f"size={size} is too small; a needle needs {size - room} bytes")
    around = _sentences(random, room) if filler is None else _cut(random, filler, room)
    place = int(random.integers(room + 1))
    text = f"{around[:place]}{needle}{around[place:]}\n{question}"
    return _probe(text, random, number, others, place / max(1, room))


PROBES: dict[str, Callable[[int, int, int], Probe]] = {"retrieval": retrieval_probe, "needle": needle_probe}


def probes(kind: str, size: int, count: int, seed: int = 0) -> list[Probe]:
    """Return the first ``count`` probes of a kind, ``retrieval`` or ``needle``, with at most ``size`` bytes each.

    Raises:
        UserError: the kind is unknown, or a number is out of range.
    """
    check_choice("kind", kind, PROBES)
    if count < 1:
        raise UserError(f"count={count} is not a positive integer")
    return [PROBES[kind](size, seed, index) for index in range(count)]


@torch.no_grad()
def probe_accuracy(model: Transformer, tokenizer: Tokenizer, asked: Sequence[Probe]) -> ProbeScore:
    """Return how often the right answer of a probe is the most likely of its choices.

    Args:
        model: the model, in evaluation mode during the call.
        tokenizer: its tokenizer.
        asked: at least one probe; all have the same number of choices.

    Raises:
        UserError: there is no probe, or a prompt and its answer are longer than the model's learned positions.
    """
    if not asked:
        raise UserError("probes must not be empty: an accuracy needs some")
    right, device = 0, model.embed.weight.device
    with evaluating(model):
        for probe in asked:
            ids, answers = tokenizer.encode(probe.prompt), [tokenizer.encode(choice) for choice in probe.choices]
            embeddings = model.embed_tokens(torch.tensor([ids], device=device))
            scores = model.continuation_scores(embeddings, answers)[0]
            right += int(scores.argmax()) == probe.right and not bool(scores.isnan().any())
    n = len(asked)
    return ProbeScore(n, right / n, wilson(right, n), 1 / len(asked[0].choices))


def _random(kind: str, size: int, seed: int, index: int) -> np.random.Generator:
    return np.random.default_rng(derive_seed(seed, "probe", kind, size, index))


def _distinct(random: np.random.Generator, marks: str, count: int) -> list[str]:
    """Return ``count`` different words of six marks."""
    numbers = random.choice(len(marks) ** _MARKS, size=count, replace=False, shuffle=False)
    return ["".join(marks[int(number) // len(marks) ** i % len(marks)] for i in range(_MARKS)) for number in numbers]


def _probe(text: str, random: np.random.Generator, answer: str, others: Sequence[str], depth: float) -> Probe:
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
