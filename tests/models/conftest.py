"""Pairs of a transformers model and ours with the same weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import pytest
import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel

from sparsetrain.models import ModelConfig, Transformer, norm

VOCAB, LAYERS, WIDTH, HEADS = 61, 2, 24, 3


@pytest.fixture
def every_norm(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give small inputs of norms to the kernels too."""
    monkeypatch.setattr(norm, "LEAST", {"LayerNorm": 1, "RMSNorm": 1})


def _scramble(model: PreTrainedModel) -> Mapping[str, Tensor]:
    """Give all parameters, including norms and biases, values that affect the output."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            gain = name.endswith("weight") and ("norm" in name or ".ln_" in name)
            parameter.copy_(float(gain) + 0.1 * torch.randn_like(parameter))
    return model.eval().state_dict()


@pytest.fixture
def scramble() -> Callable[[PreTrainedModel], Mapping[str, Tensor]]:
    """Random values for every parameter of a transformers model."""
    return _scramble


def _llama_state(source: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights of transformers' Llama under our names; the head is not tied."""
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
    return state


@pytest.fixture
def llama_state() -> Callable[[Mapping[str, Tensor]], dict[str, Tensor]]:
    """The weights of transformers' Llama under our names."""
    return _llama_state


def _mpt_state(source: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights of transformers' MPT under our names."""
    state = {
        "embed.weight": source["transformer.wte.weight"],
        "head.weight": source["transformer.wte.weight"],
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
    return state


@pytest.fixture
def mpt_state() -> Callable[[Mapping[str, Tensor]], dict[str, Tensor]]:
    """The weights of transformers' MPT under our names."""
    return _mpt_state


@pytest.fixture
def gpt2_pair() -> tuple[Transformer, GPT2LMHeadModel]:
    """Our model and transformers' GPT-2: learned positions, exact GELU, biases, tied embeddings."""
    theirs = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=VOCAB,
            n_positions=48,
            n_embd=WIDTH,
            n_layer=LAYERS,
            n_head=HEADS,
            activation_function="gelu",
            bos_token_id=0,
            eos_token_id=0,
        )
    )
    source = _scramble(theirs)
    state = {"embed.weight": source["transformer.wte.weight"], "positions.weight": source["transformer.wpe.weight"]}
    state["head.weight"] = state["embed.weight"]
    for leaf in ("weight", "bias"):
        state[f"final_norm.{leaf}"] = source[f"transformer.ln_f.{leaf}"]
        for i in range(LAYERS):
            for name, other in (
                ("attn_norm", "ln_1"),
                ("attn.qkv", "attn.c_attn"),
                ("attn.out", "attn.c_proj"),
                ("mlp_norm", "ln_2"),
                ("mlp.up", "mlp.c_fc"),
                ("mlp.down", "mlp.c_proj"),
            ):
                tensor = source[f"transformer.h.{i}.{other}.{leaf}"]
                state[f"blocks.{i}.{name}.{leaf}"] = tensor.t() if tensor.ndim == 2 else tensor
    ours = Transformer(ModelConfig(WIDTH, LAYERS, HEADS, VOCAB, positions="learned", bias=True, max_context=48, seed=0))
    ours.load_state_dict(state)
    return ours.eval(), theirs
