"""Tiny models of the transformers library, their weights put into ours: the same logits."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MptConfig,
    MptForCausalLM,
    PreTrainedModel,
)

from sparsetrain.models import ModelConfig, Transformer

VOCAB, LAYERS = 61, 2


def _scramble(model: PreTrainedModel) -> Mapping[str, Tensor]:
    """Give every parameter, norms and biases too, a value that matters."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            gain = name.endswith("weight") and ("norm" in name or ".ln_" in name)
            parameter.copy_(float(gain) + 0.1 * torch.randn_like(parameter))
    return model.eval().state_dict()


def _assert_same_logits(ours: Transformer, theirs: PreTrainedModel, state: dict[str, Tensor]) -> None:
    if ours.config.tie_embeddings:
        state["head.weight"] = state["embed.weight"]
    ours.load_state_dict(state)
    tokens = torch.randint(0, VOCAB, (2, 29))
    with torch.no_grad():
        expected = theirs(tokens).logits
        torch.testing.assert_close(ours.eval()(tokens), expected, atol=2e-5, rtol=1e-4)
    # A match of nearly equal logits would prove nothing.
    assert expected.std() > 0.1


def test_learned_positions_gelu_and_biases_match_transformers_gpt2() -> None:
    config = GPT2Config(
        vocab_size=VOCAB, n_positions=32, n_embd=24, n_layer=LAYERS, n_head=3, activation_function="gelu"
    )
    theirs = GPT2LMHeadModel(config)
    source = _scramble(theirs)
    state = {"embed.weight": source["transformer.wte.weight"], "positions.weight": source["transformer.wpe.weight"]}
    for leaf in ("weight", "bias"):
        state[f"final_norm.{leaf}"] = source[f"transformer.ln_f.{leaf}"]
        for i in range(LAYERS):
            for ours, other in (
                ("attn_norm", "ln_1"),
                ("attn.qkv", "attn.c_attn"),
                ("attn.out", "attn.c_proj"),
                ("mlp_norm", "ln_2"),
                ("mlp.up", "mlp.c_fc"),
                ("mlp.down", "mlp.c_proj"),
            ):
                tensor = source[f"transformer.h.{i}.{other}.{leaf}"]
                state[f"blocks.{i}.{ours}.{leaf}"] = tensor.t() if tensor.ndim == 2 else tensor
    model = Transformer(ModelConfig(24, LAYERS, 3, VOCAB, positions="learned", bias=True, max_context=32, seed=0))
    _assert_same_logits(model, theirs, state)


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_rope_swiglu_rmsnorm_and_grouped_queries_match_transformers_llama(kv_heads: int) -> None:
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
    source = _scramble(theirs)
    state = {
        "embed.weight": source["model.embed_tokens.weight"],
        "final_norm.weight": source["model.norm.weight"],
        "head.weight": source["lm_head.weight"],
    }
    for i in range(LAYERS):
        layer = f"model.layers.{i}."
        state[f"blocks.{i}.attn.qkv.weight"] = torch.cat(
            [source[f"{layer}self_attn.{part}_proj.weight"] for part in "qkv"]
        )
        for ours, other in (
            ("attn_norm", "input_layernorm"),
            ("attn.out", "self_attn.o_proj"),
            ("mlp_norm", "post_attention_layernorm"),
            ("mlp.gate", "mlp.gate_proj"),
            ("mlp.up", "mlp.up_proj"),
            ("mlp.down", "mlp.down_proj"),
        ):
            state[f"blocks.{i}.{ours}.weight"] = source[f"{layer}{other}.weight"]
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
    _assert_same_logits(model, theirs, state)


@pytest.mark.parametrize("n_heads", [4, 8])
def test_alibi_matches_transformers_mpt(n_heads: int) -> None:
    config = MptConfig(
        vocab_size=VOCAB, d_model=32, n_heads=n_heads, n_layers=LAYERS, expansion_ratio=4, max_seq_len=64
    )
    theirs = MptForCausalLM(config)
    source = _scramble(theirs)
    state = {
        "embed.weight": source["transformer.wte.weight"],
        "final_norm.weight": source["transformer.norm_f.weight"],
    }
    for i in range(LAYERS):
        for ours, other in (
            ("attn_norm", "norm_1"),
            ("attn.qkv", "attn.Wqkv"),
            ("attn.out", "attn.out_proj"),
            ("mlp_norm", "norm_2"),
            ("mlp.up", "ffn.up_proj"),
            ("mlp.down", "ffn.down_proj"),
        ):
            state[f"blocks.{i}.{ours}.weight"] = source[f"transformer.blocks.{i}.{other}.weight"]
    _assert_same_logits(Transformer(ModelConfig(32, LAYERS, n_heads, VOCAB, seed=0)), theirs, state)
