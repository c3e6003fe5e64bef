"""The layouts of Hugging Face that hold our transformers: names of modules, order of rows, keys of ``config.json``.

A layout is a class of transformers, such as ``LlamaForCausalLM``. `misfits` says what of a model it cannot express.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from sparsetrain.errors import UserError, check_choice
from sparsetrain.models import ModelConfig
from sparsetrain.models.config import DYNAMIC

# Names that transformers gives to one function.
ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "silu": "swiglu",
    "swish": "swiglu",
}
_GELUS = {"gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh"}
_GATED = {"swiglu": "silu"}


@dataclass(frozen=True)
class Layout:
    """One class of transformers.

    Args:
        name: its ``model_type``.
        architecture: its name.
        base: prefix of the names of all modules but the head.
        block: prefix of the modules of a block, behind ``base``.
        embed, final_norm, attn_norm, mlp_norm, qkv, out, up, down, gate, learned: names of modules. ``qkv`` has one
            name, or those of the projections to queries, keys and values. ``learned`` are the positions.
        keys: names in ``config.json`` of ``d_model``, ``n_layers``, ``n_heads``, ``max_context``, ``norm_eps`` and,
            where they exist, ``n_kv_heads``, ``d_ff`` and ``act``.
        positions, norm: what the class computes; the values of `ModelConfig`.
        mlps: the values of ``mlp``, and how the class calls their activation.
        biases: whether linear layers have biases: ``always``, ``never`` or as the ``chosen`` ones of a configuration.
        norm_biases: whether norms have biases.
        by_head: whether the rows of ``qkv`` are queries, keys and values of one head after the other.
        transposed: whether linear layers store ``[in, out]``.
        grouped: whether key and value heads may be fewer than query heads.
        partial: whether RoPE may rotate a part of each head.
        fixed_ffn: whether the MLP has ``4 d_model`` features.
        tied: whether the head is tied where the configuration does not say it.
        embed_norm: name of a norm behind the embedding.
        head: name of the head.
        extra: further settings.
    """

    name: str
    architecture: str
    base: str
    block: str
    embed: str
    final_norm: str
    attn_norm: str
    mlp_norm: str
    qkv: tuple[str, ...]
    out: str
    up: str
    down: str
    keys: Mapping[str, str]
    positions: tuple[str, ...]
    mlps: Mapping[str, str]
    biases: str
    norm: str = "layernorm"
    norm_biases: bool = True
    gate: str | None = None
    learned: str | None = None
    by_head: bool = False
    transposed: bool = False
    grouped: bool = False
    partial: bool = False
    fixed_ffn: bool = False
    tied: bool = True
    embed_norm: str | None = None
    head: str = "lm_head"
    extra: Mapping[str, object] = field(default_factory=dict)

    def misfits(self, config: ModelConfig) -> list[str]:
        """Return what a model would have to have in place of what it has; empty if the layout holds it."""
        checks = {
            f"positions={' or '.join(self.positions)}": config.positions in self.positions,
            f"norm={self.norm}": config.norm == self.norm,
            f"mlp={' or '.join(self.mlps)}": config.mlp in self.mlps,
            "bias=false": self.biases != "never" or not config.bias,
            f"n_kv_heads={config.n_heads}": self.grouped or config.kv_heads == config.n_heads,
            "rope_fraction=1": self.partial or config.rope_fraction == 1.0,
            f"d_ff of at most {4 * config.d_model}": not self.fixed_ffn or config.ffn_width <= 4 * config.d_model,
            "positions_scale=1": config.positions != "alibi" or config.positions_scale in (1.0, DYNAMIC),
        }
        return [need for need, met in checks.items() if not met]


_GPT2 = Layout(
    *("gpt2", "GPT2LMHeadModel", "transformer.", "h.{}.", "wte", "ln_f", "ln_1", "ln_2"),
    *(("attn.c_attn",), "attn.c_proj", "mlp.c_fc", "mlp.c_proj"),
    keys={
        "d_model": "n_embd",
        "n_layers": "n_layer",
        "n_heads": "n_head",
        "max_context": "n_positions",
        "norm_eps": "layer_norm_epsilon",
        "d_ff": "n_inner",
        "act": "activation_function",
    },
    positions=("learned", "none"),
    mlps=_GELUS,
    biases="always",
    learned="wpe",
    transposed=True,
    extra={"embd_pdrop": 0.0, "resid_pdrop": 0.0, "attn_pdrop": 0.0},
)
_SEPARATE = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
_USUAL = {
    "d_model": "hidden_size",
    "n_layers": "num_hidden_layers",
    "n_heads": "num_attention_heads",
    "max_context": "max_position_embeddings",
    "d_ff": "intermediate_size",
    "act": "hidden_act",
}
_DECODER = ("model.", "layers.{}.", "embed_tokens", "norm", "input_layernorm", "post_attention_layernorm")
_LLAMA = Layout(
    *("llama", "LlamaForCausalLM", *_DECODER, _SEPARATE, "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj"),
    keys={**_USUAL, "n_kv_heads": "num_key_value_heads", "norm_eps": "rms_norm_eps"},
    positions=("rope",),
    mlps=_GATED,
    biases="chosen",
    norm="rmsnorm",
    norm_biases=False,
    gate="mlp.gate_proj",
    grouped=True,
    tied=False,
)
_MPT = Layout(
    *("mpt", "MptForCausalLM", "transformer.", "blocks.{}.", "wte", "norm_f", "norm_1", "norm_2"),
    *(("attn.Wqkv",), "attn.out_proj", "ffn.up_proj", "ffn.down_proj"),
    keys={
        "d_model": "d_model",
        "n_layers": "n_layers",
        "n_heads": "n_heads",
        "max_context": "max_seq_len",
        "norm_eps": "layer_norm_epsilon",
    },
    positions=("alibi",),
    mlps={"gelu": "gelu"},
    biases="never",
    norm_biases=False,
    fixed_ffn=True,
    extra={"expansion_ratio": 4, "no_bias": True, "learned_pos_emb": False, "attn_config": {"alibi": True}},
)
_BLOOM = Layout(
    *("bloom", "BloomForCausalLM", "transformer.", "h.{}.", "word_embeddings", "ln_f"),
    *("input_layernorm", "post_attention_layernorm", ("self_attention.query_key_value",), "self_attention.dense"),
    *("mlp.dense_h_to_4h", "mlp.dense_4h_to_h"),
    keys={
        "d_model": "hidden_size",
        "n_layers": "n_layer",
        "n_heads": "n_head",
        "max_context": "seq_length",
        "norm_eps": "layer_norm_epsilon",
    },
    positions=("alibi",),
    mlps={"gelu_tanh": "gelu_tanh"},
    biases="always",
    by_head=True,
    fixed_ffn=True,
    embed_norm="word_embeddings_layernorm",
    extra={"hidden_dropout": 0.0, "attention_dropout": 0.0},
)
_NEOX = Layout(
    *("gpt_neox", "GPTNeoXForCausalLM", "gpt_neox.", "layers.{}.", "embed_in", "final_layer_norm"),
    *("input_layernorm", "post_attention_layernorm", ("attention.query_key_value",), "attention.dense"),
    *("mlp.dense_h_to_4h", "mlp.dense_4h_to_h"),
    keys={**_USUAL, "norm_eps": "layer_norm_eps"},
    positions=("rope",),
    mlps=_GELUS,
    biases="always",
    by_head=True,
    partial=True,
    tied=False,
    head="embed_out",
    extra={"use_parallel_residual": False, "attention_bias": True, "hidden_dropout": 0.0, "attention_dropout": 0.0},
)
_STARCODER2 = Layout(
    *("starcoder2", "Starcoder2ForCausalLM", *_DECODER, _SEPARATE, "self_attn.o_proj", "mlp.c_fc", "mlp.c_proj"),
    keys={**_USUAL, "n_kv_heads": "num_key_value_heads", "norm_eps": "norm_epsilon"},
    positions=("rope",),
    mlps=_GELUS,
    biases="chosen",
    grouped=True,
    extra={"sliding_window": None, "residual_dropout": 0.0, "embedding_dropout": 0.0, "attention_dropout": 0.0},
)
_STABLELM = Layout(
    *("stablelm", "StableLmForCausalLM", *_DECODER, _SEPARATE, "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj"),
    keys={**_USUAL, "n_kv_heads": "num_key_value_heads", "norm_eps": "layer_norm_eps"},
    positions=("rope",),
    mlps=_GATED,
    biases="never",
    gate="mlp.gate_proj",
    grouped=True,
    partial=True,
    tied=False,
    extra={"use_qkv_bias": False, "use_parallel_residual": False, "hidden_dropout": 0.0, "attention_dropout": 0.0},
)
LAYOUTS = {each.name: each for each in (_GPT2, _LLAMA, _MPT, _BLOOM, _NEOX, _STARCODER2, _STABLELM)}
"""By name, in the order in which `choose` tries them."""

READ_AS = {"mistral": "llama", "qwen2": "llama"}
"""Classes that compute what that of another layout computes, with the same names of modules."""


def choose(config: ModelConfig, name: str | None = None) -> Layout:
    """Return a layout that holds a model: the one called ``name``, or the first.

    Raises:
        UserError: none holds it; the line says what the nearest ones need.
    """
    if name is not None:
        check_choice("layout", name, LAYOUTS)
        if needs := LAYOUTS[name].misfits(config):
            raise UserError(f"layout={name} cannot hold this model: it needs {', '.join(needs)}")
        return LAYOUTS[name]
    misfits = {layout.name: layout.misfits(config) for layout in LAYOUTS.values()}
    fewest = min(len(needs) for needs in misfits.values())
    nearest = [layout for layout, needs in misfits.items() if len(needs) == fewest]
    if fewest == 0:
        return LAYOUTS[nearest[0]]
    described = "; ".join(f"{layout} needs {', '.join(misfits[layout])}" for layout in nearest)
    has = f"positions={config.positions}, norm={config.norm}, mlp={config.mlp}, bias={str(config.bias).lower()}"
    raise UserError(f"no layout of Hugging Face holds a model with {has}: {described}")


class Part(NamedTuple):
    """A module of a class of transformers and the layer of ours that it holds.

    Args:
        theirs, ours: names.
        kind: ``embedding``, ``norm``, ``linear`` or ``head``.
        rows: the rows of our layer, in the order of theirs; None for all as they are.
    """

    theirs: str
    ours: str
    kind: str
    rows: Tensor | None = None


def parts(layout: Layout, config: ModelConfig) -> Iterator[Part]:
    """Yield the modules of a model in a layout; the rows of ours that they hold are all rows, each once."""
    yield Part(layout.base + layout.embed, "embed", "embedding")
    if layout.learned is not None:
        yield Part(layout.base + layout.learned, "positions", "embedding")
    for number in range(config.n_layers):
        theirs, ours = layout.base + layout.block.format(number), f"blocks.{number}."
        yield Part(theirs + layout.attn_norm, f"{ours}attn_norm", "norm")
        for name, rows in zip(layout.qkv, _rows(layout, config), strict=True):
            yield Part(theirs + name, f"{ours}attn.qkv", "linear", rows)
        yield Part(theirs + layout.out, f"{ours}attn.out", "linear")
        yield Part(theirs + layout.mlp_norm, f"{ours}mlp_norm", "norm")
        if layout.gate is not None:
            yield Part(theirs + layout.gate, f"{ours}mlp.gate", "linear")
        yield Part(theirs + layout.up, f"{ours}mlp.up", "linear")
        yield Part(theirs + layout.down, f"{ours}mlp.down", "linear")
    yield Part(layout.base + layout.final_norm, "final_norm", "norm")
    if not config.tie_embeddings:
        yield Part(layout.head, "head", "head")


def _rows(layout: Layout, config: ModelConfig) -> list[Tensor | None]:
    """Return the rows of our queries, keys and values that each of their matrices has."""
    queries, keys = config.n_heads * config.d_head, config.kv_heads * config.d_head
    every = torch.arange(queries + 2 * keys)
    if len(layout.qkv) > 1:
        return list(every.split((queries, keys, keys)))
    if layout.by_head:
        return [every.view(3, config.n_heads, config.d_head).transpose(0, 1).flatten()]
    return [None]
