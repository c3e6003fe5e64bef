"""Soft prompts: copied token embeddings act like the tokens; only the vectors get gradients."""

from __future__ import annotations

import pytest
import torch
from peft import PromptTuningConfig, get_peft_model
from transformers import GPT2LMHeadModel

from sparsetrain.errors import UserError
from sparsetrain.models import ModelConfig, SoftPrompt, Transformer


def test_inject_matches_a_loop() -> None:
    prompt = SoftPrompt(3, 4)
    embeddings = torch.randn(2, 5, 4)
    slots = torch.tensor([[0, -1, 2, -1, 1], [-1, -1, -1, 2, 2]])
    result = prompt.inject(embeddings, slots)
    for b in range(2):
        for t in range(5):
            slot = int(slots[b, t])
            expected = prompt.vectors[slot] if slot >= 0 else embeddings[b, t]
            assert torch.equal(result[b, t], expected)


@pytest.mark.parametrize("positions", ["alibi", "learned", "rope"])
def test_prompt_of_token_embeddings_equals_the_tokens(positions: str, device: torch.device) -> None:
    config = ModelConfig(16, 2, 2, 30, positions=positions, max_context=12, seed=0)
    model = Transformer(config).to(device)
    tokens, targets = torch.randint(0, 30, (2, 2, 10), device=device)
    prompt = SoftPrompt.from_embeddings(model.embed.weight[tokens[0, 3:6]]).to(device)
    slots = torch.full_like(tokens, -1)
    slots[0, 3:6] = torch.arange(3, device=device)
    blank = tokens.clone()
    blank[0, 3:6] = 0
    embeddings = prompt.inject(model.embed_tokens(blank), slots)
    torch.testing.assert_close(model.loss(blank, targets, embeddings), model.loss(tokens, targets))


def test_gradients_reach_the_vectors_of_a_frozen_model() -> None:
    model = Transformer(ModelConfig(16, 1, 2, 30, seed=0)).requires_grad_(False)
    prompt = SoftPrompt(2, 16)
    tokens, targets = torch.randint(0, 30, (2, 1, 6))
    slots = torch.tensor([[0, -1, -1, -1, -1, -1]])
    model.loss(tokens, targets, prompt.inject(model.embed_tokens(tokens), slots)).backward()
    assert prompt.vectors.grad is not None
    assert prompt.vectors.grad[0].abs().sum() > 0
    assert prompt.vectors.grad[1].abs().sum() == 0
    assert all(parameter.grad is None for parameter in model.parameters())


def test_from_embeddings_copies() -> None:
    rows = torch.randn(3, 4)
    prompt = SoftPrompt.from_embeddings(rows)
    assert torch.equal(prompt.vectors, rows)
    with torch.no_grad():
        prompt.vectors.zero_()
    assert rows.abs().sum() > 0


def test_bad_shapes_are_named() -> None:
    with pytest.raises(UserError, match="n_tokens=0"):
        SoftPrompt(0, 4)
    with pytest.raises(UserError, match="rows have shape \\(4,\\)"):
        SoftPrompt.from_embeddings(torch.zeros(4))
    with pytest.raises(UserError, match="do not fit a soft prompt of width 4"):
        SoftPrompt(2, 4).inject(torch.zeros(1, 3, 5), torch.zeros(1, 3, dtype=torch.long))


# peft 0.21 asks transformers 5.23 for a property by its old name.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_prompt_in_front_matches_peft_prompt_tuning(gpt2_pair: tuple[Transformer, GPT2LMHeadModel]) -> None:
    ours, theirs = gpt2_pair
    tokens = torch.randint(0, ours.config.vocab_size, (3, 11))
    tuned = get_peft_model(theirs, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5))
    vectors = tuned.get_prompt_embedding_to_save("default")
    prompt = SoftPrompt.from_embeddings(vectors)
    slots = torch.cat([torch.arange(5).expand(3, -1), torch.full((3, 11), -1)], dim=1)
    padded = torch.cat([torch.zeros(3, 5, dtype=torch.int64), tokens], dim=1)
    with torch.no_grad():
        mixed = prompt.inject(ours.embed_tokens(padded), slots)
        logits = ours.logits(ours.hidden(embeddings=mixed))
        torch.testing.assert_close(logits, tuned(tokens).logits, atol=2e-5, rtol=1e-4)
