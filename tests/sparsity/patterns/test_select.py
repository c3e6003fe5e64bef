"""Selections against sorted Python lists, with ties."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sparsetrain import seeds
from sparsetrain.errors import UserError
from sparsetrain.sparsity.patterns.select import bands, largest_remainder, random_entries, split_evenly, top_entries


@given(scores=st.lists(st.integers(-3, 3), min_size=1, max_size=30), data=st.data())
def test_top_entries_match_a_stable_sort(scores: list[int], data: st.DataObject) -> None:
    count = data.draw(st.integers(0, len(scores)))
    expected = sorted(range(len(scores)), key=lambda index: (-scores[index], index))[:count]
    chosen = top_entries(torch.tensor(scores, dtype=torch.float32), count)
    assert chosen.nonzero()[:, 0].tolist() == sorted(expected)


def test_top_entries_take_infinite_scores_and_keep_the_shape() -> None:
    scores = torch.tensor([[-torch.inf, 1.0], [torch.inf, 1.0]])
    assert top_entries(scores, 2).tolist() == [[False, True], [True, False]]
    with pytest.raises(ValueError, match="count=5 must lie between 0 and 4"):
        top_entries(scores, 5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.int64])
@pytest.mark.parametrize("spread", [0.0, 3.0, 1e30])
def test_top_entries_of_a_large_matrix_match_a_stable_sort(dtype: torch.dtype, spread: float) -> None:
    # Several runs of rows, every digit of the keys, both signs, both zeros, tiny numbers and infinities.
    scores = torch.randn(300, 500, generator=seeds.generator(0), dtype=torch.float64)
    scores = (scores * spread).to(dtype) if spread < 1e9 or dtype != torch.int64 else (scores * 1e6).to(dtype)
    if dtype.is_floating_point:
        scores[::7] *= 1e-37
        scores[5:9], scores[9:11], scores[11], scores[12] = 0.0, -0.0, torch.inf, -torch.inf
    order = scores.view(-1).argsort(descending=True, stable=True)
    for count in (1, 2, 500, 501, 70_000, 75_001, 149_000, 149_999, 150_000):
        expected = torch.zeros(scores.numel(), dtype=torch.bool)
        expected[order[:count]] = True
        assert torch.equal(top_entries(scores, count).view(-1), expected)
        assert torch.equal(top_entries(scores.view(-1), count), expected)


def test_random_entries_are_those_of_a_permutation_of_the_candidates() -> None:
    candidates = torch.rand(700, 300, generator=seeds.generator(0)) < 0.4
    source, again = seeds.generator(1), seeds.generator(1)
    for count in (0, 1, 5000, int(candidates.sum())):  # with one generator, which goes on
        expected = torch.zeros(candidates.numel(), dtype=torch.bool)
        if count:
            places = candidates.view(-1).nonzero()[:, 0]
            expected[places[torch.randperm(len(places), generator=again)[:count]]] = True
        assert torch.equal(random_entries(candidates, count, source).view(-1), expected)


def test_random_entries_are_candidates_and_every_one_is_as_likely() -> None:
    candidates = torch.tensor([[True, False, True], [True, True, False]])
    counts = torch.zeros(2, 3)
    source = seeds.generator(0)
    for _ in range(4000):
        drawn = random_entries(candidates, 2, source)
        assert int(drawn.sum()) == 2
        assert not bool((drawn & ~candidates).any())
        counts += drawn
    assert float((counts[candidates] / 2000 - 1).abs().max()) < 0.06
    with pytest.raises(ValueError, match="only 4 candidates"):
        random_entries(candidates, 5, source)


@given(st.integers(0, 1000), st.integers(1, 40))
def test_split_evenly_is_exact(total: int, parts: int) -> None:
    split = split_evenly(total, parts)
    assert sum(split) == total
    assert max(split) - min(split) <= 1


@given(st.lists(st.integers(1, 50), min_size=1, max_size=10), st.floats(0.0, 1.0))
def test_largest_remainder_is_exact_and_near(limits: list[int], part: float) -> None:
    total = round(part * sum(limits))
    shares = [limit * total / sum(limits) for limit in limits]
    counts = largest_remainder(shares, total, limits)
    assert sum(counts) == total
    assert all(count <= limit for count, limit in zip(counts, limits, strict=True))
    assert all(abs(count - share) <= 1 for count, share in zip(counts, shares, strict=True))


def test_bands_cover_the_grid_once() -> None:
    seen = torch.zeros(6, 8, dtype=torch.int64)
    for part in bands((6, 8), (3, 2)):
        seen[part] += 1
    assert bool((seen == 1).all())
    with pytest.raises(UserError, match=r"bands=\[4, 1\] do not divide the 6x8 matrix"):
        bands((6, 8), (4, 1))
