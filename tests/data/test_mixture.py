"""Mixtures: exact shares of tokens, and samples that are functions of their index alone."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import sparsetrain
from sparsetrain.data import Batch, Mixture
from sparsetrain.errors import UserError


class Numbered:
    """Samples of four tokens, each the number of the sample plus the number of its corpus times a million."""

    def __init__(self, corpus: int) -> None:
        self.corpus = corpus

    def batch(self, first: int, count: int) -> Batch:
        rows = torch.arange(first, first + count)[:, None] + 1_000_000 * self.corpus
        return Batch(rows.expand(-1, 4), rows.expand(-1, 4) + 1)


def corpora(count: int) -> dict[str, Numbered]:
    return {chr(ord("a") + corpus): Numbered(corpus) for corpus in range(count)}


WEIGHTS = st.lists(st.floats(0.0, 1.0), min_size=1, max_size=5).filter(lambda weights: sum(weights) > 0.01)


@settings(max_examples=40)
@given(WEIGHTS, st.integers(0, 4000), st.integers(1, 700), st.integers(0, 3))
def test_every_stretch_has_its_shares(weights: list[float], n: int, window: int, seed: int) -> None:
    mixture = Mixture(corpora(len(weights)), weights, seed, window=window)
    found, total = mixture.shares(n), math.fsum(weights)
    counted = Counter(place.name for place in mixture.places(0, n))
    assert found == {name: counted[name] for name in mixture.names}
    for share, name in zip(weights, mixture.names, strict=True):
        assert abs(found[name] - n * share / total) <= len(weights) + 1
        if share == 0.0:
            assert found[name] == 0
    whole = n - n % window
    for share, name in zip(weights, mixture.names, strict=True):
        assert abs(mixture.shares(whole)[name] - whole * share / total) < 1.0 + 1e-3 * (len(weights) > 2)


def test_the_long_run_is_exact() -> None:
    mixture = sparsetrain.Mixture(corpora(3), {"a": 0.37, "b": 0.6299, "c": 0.0001}, seed=5)
    assert mixture.shares(100_000) == {"a": 37_000, "b": 62_990, "c": 10}
    assert mixture.shares(1_000_000) == {"a": 370_000, "b": 629_900, "c": 100}


@settings(max_examples=20)
@given(WEIGHTS, WEIGHTS, st.integers(1, 300), st.integers(0, 500), st.integers(0, 60))
def test_a_sample_depends_on_its_index_alone(
    early: list[float], late: list[float], border: int, first: int, count: int
) -> None:
    count_of = min(len(early), len(late))
    early, late = early[:count_of], late[:count_of]
    if not (sum(early) and sum(late)):
        return
    names = list(corpora(count_of))
    later = dict(zip(names, late, strict=True))
    mixture = Mixture(corpora(count_of), early, 3, changes=[(border, later)], window=50)
    batch = mixture.batch(first, count) if count else Batch(torch.empty(0, 4), torch.empty(0, 4))
    again = Mixture(corpora(count_of), early, 3, changes=[(border, later)], window=50)
    for row in reversed(range(count)):  # out of order, one by one, by a mixture that has computed nothing yet
        single = again.batch(first + row, 1)
        assert torch.equal(single.tokens[0], batch.tokens[row])
        assert torch.equal(single.targets[0], batch.targets[row])
    # Each corpus is read in its order, also across the border.
    seen: dict[str, int] = {}
    for place in mixture.places(0, first + count):
        assert place.number == seen.get(place.name, 0)
        seen[place.name] = place.number + 1


def test_corpora_take_turns() -> None:
    one, other = (Mixture(corpora(2), [1, 1], seed).places(0, 1000) for seed in (0, 1))
    assert [place.name for place in one] != [place.name for place in other]
    longest, run = 0, 0
    for before, place in itertools.pairwise(one):
        run = run + 1 if place.name == before.name else 0
        longest = max(longest, run)
    assert longest <= 4  # each half of a window has the same share, and so has each smaller part


def test_weights_change_at_their_sample() -> None:
    mixture = Mixture(corpora(2), {"a": 1}, changes=[(100, {"a": 1, "b": 3}), (300, {"b": 1})])
    assert mixture.shares(100) == {"a": 100, "b": 0}
    assert mixture.shares(300)["a"] == pytest.approx(150, abs=2)
    assert mixture.shares(400)["a"] == mixture.shares(300)["a"]
    assert mixture.weights_at(99) == {"a": 1.0, "b": 0.0}
    assert mixture.weights_at(100) == {"a": 0.25, "b": 0.75}


@pytest.mark.parametrize(
    ("weights", "changes", "message"),
    [
        ({"a": 0.0}, [], r"weights={a: 0, b: 0} must have a positive and finite sum, not 0"),
        ({"a": 1e308, "b": 1e308}, [], "must have a positive and finite sum, not inf"),
        ({"a": -1, "b": 2}, [], r"weights.a=-1 must be at least 0 and finite"),
        ({"a": math.nan}, [], r"weights.a=nan must be at least 0"),
        ({"a": "x"}, [], r"weights.a='x' must be a number"),
        ({"aa": 1}, [], r"weights.aa is no corpus \(did you mean 'a'\?\); the corpora are a, b"),
        ({"a": True}, [], r"weights.a=True must be a number"),
        (None, [], "weights=None are neither numbers by name nor a list"),
        ([1, 2, 3], [], "weights has 3 numbers; there are 2 corpora"),
        ({"a": 1}, [(0, {"b": 1})], "must ascend from 1 on"),
        ({"a": 1}, [(5, {"b": 1}), (5, {"a": 1})], r"changes begin at the samples \[5, 5\]; they must ascend"),
        ({"a": 1}, [(5, 3)], "weights=3 must be weights by name"),
    ],
)
def test_weights_that_cannot_be_used_are_one_line(weights: object, changes: list[object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Mixture(corpora(2), weights, changes=changes)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("samples", "message"),
    [
        ({}, "a mixture is of at least one corpus"),
        ([1], r"samples=\[1\]: a mixture is of at least one corpus, each by its name"),
        ({"a": None}, "samples: a is a NoneType without a method batch"),
    ],
)
def test_what_is_no_corpus_is_one_line(samples: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Mixture(samples, [1.0])
