"""Scores of continuations against full passes over source and continuation."""

from __future__ import annotations

import pytest
import torch

from sparsetrain.errors import UserError
from sparsetrain.models import ModelConfig, SoftPrompt, Transformer
from sparsetrain.parameterization import Parameterization

CONTINUATIONS = [[3], [4, 1, 9], [4, 2], [7, 7, 7, 7]]


@pytest.mark.parametrize("positions", ["alibi", "rope", "learned", "none"])
def test_scores_match_token_losses_of_whole_rows(positions: str, device: torch.device) -> None:
    config = ModelConfig(32, 2, 4, 23, positions=positions, sparsity=0.5, init_std=0.3, seed=0, n_kv_heads=2)
    model = Transformer(config, Parameterization.mup(base_width=16, alpha_out=3.0)).to(device).eval()
    sources = torch.randint(0, 23, (5, 11), device=device)
    scores = model.continuation_scores(model.embed_tokens(sources), CONTINUATIONS)
    assert scores.shape == (5, 4)
    for place, continuation in enumerate(CONTINUATIONS):
        whole = torch.cat([sources, torch.tensor(continuation, device=device).expand(5, -1)], dim=1)
        targets = whole[:, 1:].clone()
        targets[:, : sources.shape[1] - 1] = -100
        expected = -model.token_losses(whole[:, :-1], targets).sum(1)
        torch.testing.assert_close(scores[:, place], expected, atol=1e-4, rtol=1e-4)


def test_all_single_tokens_sum_to_one() -> None:
    model = Transformer(ModelConfig(16, 1, 2, 11, init_std=0.3, seed=0)).eval()
    scores = model.continuation_scores(model.embed_tokens(torch.randint(0, 11, (3, 4))), [[v] for v in range(11)])
    torch.testing.assert_close(scores.exp().sum(1), torch.ones(3))


def test_a_soft_prompt_is_read_before_the_continuation() -> None:
    model = Transformer(ModelConfig(16, 1, 2, 11, init_std=0.3, seed=0)).eval()
    words = torch.tensor([5, 6])
    prompt = SoftPrompt.from_embeddings(model.embed.weight[words])
    sources = torch.randint(0, 11, (3, 4))
    padded = torch.cat([sources, torch.zeros(3, 2, dtype=torch.int64)], dim=1)
    slots = torch.tensor([-1] * 4 + [0, 1]).expand(3, -1)
    mixed = prompt.inject(model.embed_tokens(padded), slots)
    plain = model.embed_tokens(torch.cat([sources, words.expand(3, -1)], dim=1))
    torch.testing.assert_close(
        model.continuation_scores(mixed, CONTINUATIONS), model.continuation_scores(plain, CONTINUATIONS)
    )


def test_an_empty_continuation_is_refused() -> None:
    model = Transformer(ModelConfig(16, 1, 2, 11, seed=0))
    with pytest.raises(UserError, match="continuations must not be empty"):
        model.continuation_scores(model.embed_tokens(torch.zeros(1, 2, dtype=torch.int64)), [[1], []])
