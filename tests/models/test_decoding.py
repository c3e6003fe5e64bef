"""Generation and scoring with a model that is not a `Transformer`: a Markov chain with a known table."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from sparsetrain.errors import UserError
from sparsetrain.models.decoding.generate import generate
from sparsetrain.models.decoding.score import continuation_scores

WORDS = 5


class Count:
    """A cache that stores only the number of tokens read."""

    def __init__(self, capacity: int) -> None:
        self.capacity, self.length = capacity, 0

    def rewind(self, length: int) -> None:
        assert length <= self.length
        self.length = length


class Chain:
    """A Markov chain: the next token depends only on the last one, through ``table`` ``[WORDS, WORDS]``."""

    training = True
    max_positions = 8

    def __init__(self) -> None:
        self.table = torch.randn(WORDS, WORDS, generator=torch.Generator().manual_seed(0)).log_softmax(1)
        self.read: list[int] = []

    def train(self, mode: bool = True) -> Chain:
        self.training = mode
        return self

    def embed_tokens(self, tokens: Tensor) -> Tensor:
        return torch.eye(WORDS)[tokens]

    def new_cache(self, embeddings: Tensor, capacity: int) -> Count:
        return Count(capacity)

    def hidden(
        self, tokens: Tensor | None = None, embeddings: Tensor | None = None, cache: Count | None = None
    ) -> Tensor:
        if embeddings is None:
            assert tokens is not None
            embeddings = self.embed_tokens(tokens)
        assert cache is not None
        self.read.append(embeddings.shape[1])
        cache.length += embeddings.shape[1]
        assert cache.length <= cache.capacity
        return embeddings

    def logits(self, hidden: Tensor) -> Tensor:
        return hidden @ self.table


def test_generation_follows_the_table_and_reads_every_token_once() -> None:
    chain = Chain()
    result = generate(chain, torch.tensor([[1, 2], [0, 4]]), 5, temperature=0.0)
    for last, following in itertools.pairwise(result[:, 1:].unbind(1)):
        assert torch.equal(following, chain.table.argmax(1)[last])
    assert chain.read == [2, 1, 1, 1, 1]
    assert chain.training
    with pytest.raises(UserError, match="needs 9 positions, but the model has learned only 8"):
        generate(chain, torch.tensor([[1, 2]]), 8)


def test_scores_are_sums_over_the_table() -> None:
    chain, rows = Chain(), torch.tensor([[1, 2], [0, 4]])
    scores = continuation_scores(chain, chain.embed_tokens(rows), [[3], [4, 0, 0]])
    for row, last in enumerate((2, 4)):
        expected = [chain.table[last, 3], chain.table[last, 4] + chain.table[4, 0] + chain.table[0, 0]]
        torch.testing.assert_close(scores[row], torch.stack(expected))
    assert chain.read == [2, 2]
