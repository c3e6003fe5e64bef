"""Probes: their texts are taken apart, and models that know or guess answer them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binom
from torch import Tensor

from sparsetrain.data import Document, Tokenizer
from sparsetrain.errors import UserError
from sparsetrain.models import ModelConfig, Transformer
from sparsetrain.training.probes import SIZES, needle_probe, probe_accuracy, probes, retrieval_probe, title_probes

BYTES = Tokenizer.bytes()


@given(size=st.sampled_from(SIZES), seed=st.integers(0, 99), index=st.integers(0, 99))
@settings(max_examples=15, deadline=None)
def test_the_value_behind_the_key_answers_a_retrieval_probe(size: int, seed: int, index: int) -> None:
    probe = retrieval_probe(size, seed, index)
    *lines, key = probe.prompt.split("\n")
    pairs = dict(line.split(" ") for line in lines)
    assert len(pairs) == len(lines) == len(set(pairs.values()))
    assert probe.answer == f" {pairs[key]}"
    assert {choice[1:] for choice in probe.choices} <= set(pairs.values())
    assert len(set(probe.choices)) == 4
    assert size - 14 < len(BYTES.encode(probe.prompt + probe.answer)) <= size
    assert probe.depth == lines.index(f"{key}{probe.answer}") / (len(lines) - 1)


@given(size=st.sampled_from(SIZES), seed=st.integers(0, 99), index=st.integers(0, 99))
@settings(max_examples=15, deadline=None)
def test_the_number_in_the_needle_answers_a_needle_probe(size: int, seed: int, index: int) -> None:
    probe = needle_probe(size, seed, index)
    (found,) = re.finditer(r"The number of (\w+) is (\d{6})\.", probe.prompt)
    assert probe.prompt.endswith(f"\nThe number of {found[1]} is")
    assert probe.answer == f" {found[2]}"
    assert len(set(probe.choices)) == 4
    assert all(choice not in probe.prompt for choice in set(probe.choices) - {probe.answer})
    assert len(BYTES.encode(probe.prompt + probe.answer)) == size
    assert probe.depth == pytest.approx(found.start() / size, abs=90 / size)


@pytest.mark.parametrize("kind", ["retrieval", "needle"])
def test_a_probe_is_a_function_of_its_seed_and_number(kind: str) -> None:
    many = probes(kind, 512, 9, seed=3)
    assert probes(kind, 512, 4, seed=3) == many[:4]
    assert len({probe.prompt for probe in many}) == 9
    assert not {probe.prompt for probe in many} & {probe.prompt for probe in probes(kind, 512, 9, seed=4)}


def test_filler_is_cut_from_a_text() -> None:
    text = "".join(chr(97 + i % 26) for i in range(2000))
    probe = needle_probe(300, 0, 0, filler=text)
    (found,) = re.finditer(r" The number of \w+ is \d{6}\. ", probe.prompt)
    rest = probe.prompt[: found.start()] + probe.prompt[found.end() : probe.prompt.rindex("\n")]
    assert rest in text
    for bad in ("short", "é" * 2000):
        with pytest.raises(UserError, match="filler must be ASCII of at least"):
            needle_probe(300, 0, 0, filler=bad)


class Searching(Transformer):
    """A model that finds the question's last word earlier in the text, and knows that its answer follows there."""

    def embed_tokens(self, tokens: Tensor) -> Tensor:
        self.text = BYTES.decode(tokens[0].tolist())
        return super().embed_tokens(tokens)

    def continuation_scores(self, embeddings: Tensor, continuations: Sequence[Sequence[int]]) -> Tensor:
        question = self.text.rpartition("\n")[2]
        return torch.tensor([[float(question + BYTES.decode(list(ids)) in self.text) for ids in continuations]])


def test_a_model_that_searches_is_right_and_one_that_guesses_is_by_chance() -> None:
    config = ModelConfig(8, 1, 1, BYTES.vocab_size, max_context=256, positions_scale="dynamic", seed=0)
    for kind in ("retrieval", "needle"):
        asked = probes(kind, 256, 24)
        found = probe_accuracy(Searching(config), BYTES, asked)
        assert (found.n, found.accuracy, found.chance) == (24, 1.0, 0.25)
    guessed = probe_accuracy(Transformer(config).train(), BYTES, asked)
    assert binom.cdf(guessed.accuracy * 24, 24, 0.25) > 1e-4
    assert binom.sf(guessed.accuracy * 24 - 1, 24, 0.25) > 1e-4
    assert guessed.ci95[0] <= guessed.accuracy <= guessed.ci95[1]


def test_a_model_of_nan_is_wrong() -> None:
    model = Transformer(ModelConfig(8, 1, 1, BYTES.vocab_size, seed=0))
    with torch.no_grad():
        model.head.weight.fill_(torch.nan)
    assert probe_accuracy(model, BYTES, probes("retrieval", 128, 8)).accuracy == 0.0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("retrieval", 60, 1), "size=60 is too small; a probe of 4 pairs needs 70 bytes"),
        (("needle", 60, 1), "size=60 is too small"),
        (("needles", 256, 1), "kind='needles' is not one of retrieval, needle"),
        (("needle", 256, 0), "count=0"),
        (("retrieval", 256, 1, 0, 13), "marks=13 must be from 1 to 12"),
        (("retrieval", 2048, 1, 0, 2), "size=2048 has 340 pairs; marks=2 gives only 100 different values"),
    ],
)
def test_probes_that_cannot_be_made_are_refused(arguments: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        probes(*arguments)


def documents(count: int) -> list[Document]:
    text = "Été one was seen in the clinic and it was a fine day for all. "
    return [Document(str(n), f"{n} {text * 6}", title=f"Title {n} {'long ' * (n % 4)}") for n in range(count)]


def test_a_title_is_the_likeliest_per_byte_by_a_plain_softmax() -> None:
    model = Transformer(ModelConfig(16, 1, 2, BYTES.vocab_size, max_context=256, init_std=0.5, seed=0))
    asked = title_probes(documents(12), 200, 9, seed=1)
    assert len(asked) == 9
    right = []
    for probe in asked:
        scores = []
        for choice in probe.choices:
            prompt, answer = BYTES.encode(probe.prompt), BYTES.encode(choice)
            rows = model(torch.tensor([prompt + answer]))[0].detach().double().log_softmax(-1)
            picked = [float(rows[len(prompt) + at - 1, token]) for at, token in enumerate(answer)]
            scores.append(sum(picked) / len(choice.encode()))
        right.append(max(range(4), key=scores.__getitem__) == probe.right)
    found = probe_accuracy(model, BYTES, asked, per_byte=True)
    assert found.accuracy == sum(right) / 9
    assert found.accuracy != probe_accuracy(model, BYTES, asked).accuracy  # the shortest title would often win


def test_a_title_probe_ends_in_the_cue_and_fits() -> None:
    many = documents(30)
    for probe in title_probes(many, 160, 30):
        assert probe.prompt.endswith("\nTitle:")
        number = probe.prompt.split()[0]
        assert probe.answer.split()[1] == number
        assert len(set(probe.choices)) == 4
        longest = max(len(choice.encode()) for choice in probe.choices)
        assert 150 < len(probe.prompt.encode()) + longest + 10 <= 170
        assert many[int(number)].text.startswith(probe.prompt.removesuffix("\nTitle:"))
    assert title_probes(many, 160, 5) == title_probes(many, 160, 5)
    assert len(title_probes(many, 160, 50)) == 30


@pytest.mark.parametrize(("size", "count"), [(20, 4), (4000, 4), (160, 0)])
def test_titles_without_documents_are_refused(size: int, count: int) -> None:
    with pytest.raises(UserError, match=r"size=\d+: 0 titles of held-out documents|count=0"):
        title_probes(documents(9), size, count)
