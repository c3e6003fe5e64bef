"""Tiny transformers models: with their weights our model gives the same logits."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import pytest
import torch
from torch import Tensor
from transformers import (
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MptConfig,
    MptForCausalLM,
    PreTrainedModel,
)

from sparsetrain.models import ModelConfig, Transformer

VOCAB, LAYERS = 61, 2


def _assert_same_logits(ours: Transformer, theirs: PreTrainedModel, state: dict[str, Tensor]) -> None:
    if ours.config.tie_embeddings:
        state["head.weight"] = state["embed.weight"]
    ours.load_state_dict(state)
    tokens = torch.randint(0, VOCAB, (2, 29))
    with torch.no_grad():
        expected = theirs(tokens).logits
        torch.testing.assert_close(ours.eval()(tokens), expected, atol=2e-5, rtol=1e-4)
    # Nearly constant logits would match trivially.
    assert expected.std() > 0.1


def test_learned_positions_gelu_and_biases_match_transformers_gpt2(
    gpt2_pair: tuple[Transformer, GPT2LMHeadModel],
) -> None:
    ours, theirs = gpt2_pair
    _assert_same_logits(ours, theirs, dict(ours.state_dict()))


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_rope_swiglu_rmsnorm_and_grouped_queries_match_transformers_llama(
    kv_heads: int,
    scramble: Callable[[PreTrainedModel], Mapping[str, Tensor]],
    llama_state: Callable[[Mapping[str, Tensor]], dict[str, Tensor]],
) -> None:
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=kv_heads,
        rms_norm_eps=1e-5,
        rope_theta=10000.0,
        tie_word_embeddings=False,
    )
    theirs = LlamaForCausalLM(config)
    source = scramble(theirs)
    model = Transformer(
        ModelConfig(
            32,
            LAYERS,
            4,
            VOCAB,
            n_kv_heads=kv_heads,
            positions="rope",
            mlp="swiglu",
            d_ff=48,
            norm="rmsnorm",
            tie_embeddings=False,
            seed=0,
        )
    )
    _assert_same_logits(model, theirs, llama_state(source))


@pytest.mark.parametrize("n_heads", [4, 8])
def test_alibi_matches_transformers_mpt(
    n_heads: int,
    scramble: Callable[[PreTrainedModel], Mapping[str, Tensor]],
    mpt_state: Callable[[Mapping[str, Tensor]], dict[str, Tensor]],
) -> None:
    config = MptConfig(
        vocab_size=VOCAB, d_model=32, n_heads=n_heads, n_layers=LAYERS, expansion_ratio=4, max_seq_len=64
    )
    theirs = MptForCausalLM(config)
    source = scramble(theirs)
    _assert_same_logits(Transformer(ModelConfig(32, LAYERS, n_heads, VOCAB, seed=0)), theirs, mpt_state(source))
