"""``config.json`` of Hugging Face: written for a transformer of ours, and read.

It is written and read without transformers. Positions have the keys of older versions (``rope_theta``,
``rope_scaling``), which newer ones read too.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sparsetrain.errors import UserError
from sparsetrain.interop.layouts import ACTIVATIONS, LAYOUTS, READ_AS, Layout
from sparsetrain.models import ModelConfig
from sparsetrain.models.config import DYNAMIC

# MPT computes its ALiBi biases for this many tokens, and fails beyond.
_ALIBI_LENGTH = 2048

# What a key means where a file lacks it, by the class of transformers.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "gpt2": {"n_positions": 1024, "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5},
    "llama": {"max_position_embeddings": 2048, "hidden_act": "silu", "rms_norm_eps": 1e-6},
    "mistral": {
        "max_position_embeddings": 131072,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "num_key_value_heads": 8,
        "sliding_window": 4096,
    },
    "qwen2": {"max_position_embeddings": 32768, "hidden_act": "silu", "rms_norm_eps": 1e-6, "num_key_value_heads": 32},
    "mpt": {"max_seq_len": 2048, "layer_norm_epsilon": 1e-5},
    "bloom": {"seq_length": 2048, "layer_norm_epsilon": 1e-5},
    "gpt_neox": {
        "max_position_embeddings": 2048,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-5,
        "use_parallel_residual": True,
        "rotary_pct": 0.25,
        "rotary_emb_base": 10000.0,
    },
    "starcoder2": {
        "max_position_embeddings": 4096,
        "hidden_act": "gelu_pytorch_tanh",
        "norm_epsilon": 1e-5,
        "num_key_value_heads": 2,
    },
    "stablelm": {
        "max_position_embeddings": 4096,
        "hidden_act": "silu",
        "layer_norm_eps": 1e-5,
        "num_key_value_heads": 32,
        "partial_rotary_factor": 0.25,
    },
}
# Other names of a key.
_SYNONYMS = {
    "n_embd": "hidden_size",
    "hidden_size": "n_embed",
    "n_layer": "num_hidden_layers",
    "n_head": "num_attention_heads",
    "n_positions": "max_position_embeddings",
    "d_model": "hidden_size",
    "n_layers": "num_hidden_layers",
    "n_heads": "num_attention_heads",
}
# Settings with which a class computes what ours cannot, each with the values that ours can.
_ALLOWED: dict[str, dict[str, tuple[Any, ...]]] = {
    "gpt2": {"add_cross_attention": (False,)},
    "bloom": {"apply_residual_connection_post_layernorm": (False,)},
    "mpt": {
        "attn_config.alibi": (True,),
        "attn_config.clip_qkv": (None,),
        "attn_config.qk_ln": (False,),
        "attn_config.attn_type": ("multihead_attention",),
        "attn_config.alibi_bias_max": (8,),
        "attn_config.prefix_lm": (False,),
        "logit_scale": (None,),
    },
    "gpt_neox": {"use_parallel_residual": (False,)},
    "stablelm": {"use_parallel_residual": (False,), "qk_layernorm": (False,)},
}
USED_WIDTH = "used_ffn_size"
"""Our key for the features of an MLP that are not the zeros by which a layout widens it."""
_ROPE = ("default", "linear", "dynamic", "yarn")


def config_json(
    config: ModelConfig, layout: Layout, eos_id: int, used_width: int | None = None
) -> tuple[dict[str, Any], list[str]]:
    """Return the content of ``config.json``, and sentences about what it cannot say.

    Args:
        config: a model without multipliers that the layout holds.
        eos_id: the token that ends a document.
        used_width: features of the MLPs that are not zeros, if a layout has widened them.
    """
    ours = {
        "d_model": config.d_model,
        "n_layers": config.n_layers,
        "n_heads": config.n_heads,
        "n_kv_heads": config.kv_heads,
        "max_context": config.max_context,
        "d_ff": config.ffn_width,
        "norm_eps": config.norm_eps,
        "act": layout.mlps[config.mlp],
    }
    content: dict[str, Any] = {
        "architectures": [layout.architecture],
        "model_type": layout.name,
        "vocab_size": config.vocab_size,
        **{theirs: ours[name] for name, theirs in layout.keys.items()},
        **layout.extra,
        "tie_word_embeddings": config.tie_embeddings,
        "initializer_range": min(config.init_std, 1.0),
        "bos_token_id": eos_id,
        "eos_token_id": eos_id,
        "torch_dtype": "float32",
        "use_cache": True,
    }
    if layout.biases == "chosen":
        names = ("use_bias",) if layout.name == "starcoder2" else ("attention_bias", "mlp_bias")
        content |= dict.fromkeys(names, config.bias)
    if layout.name == "mpt":
        content |= {"max_seq_len": max(_ALIBI_LENGTH, 8 * config.max_context), "seq_length": config.max_context}
    if used_width is not None and used_width != config.ffn_width:
        content[USED_WIDTH] = used_width
    notes = []
    if config.positions == "rope":
        content |= _rope(config, layout)
    if config.positions_scale == DYNAMIC and (config.positions, config.rope_scaling) != ("rope", "ntk"):
        notes.append(
            f"positions_scale=dynamic is left out, since the layout has no such scaling: up to {config.max_context} "
            "tokens the model is the same, beyond them it is not."
        )
    return content, notes


def _rope(config: ModelConfig, layout: Layout) -> dict[str, Any]:
    base, scale, kind = config.rope_base, config.positions_scale, config.rope_scaling
    scaling: dict[str, Any] | None = None
    found: dict[str, Any] = {}
    if scale == DYNAMIC:
        # Their factor 1 makes the base grow by the tokens over the trained length, as ours does.
        scaling = {"rope_type": "dynamic", "factor": 1.0} if kind == "ntk" else None
    elif float(scale) != 1.0:
        if kind == "ntk":
            base *= float(scale) ** (config.d_rotary / max(1, config.d_rotary - 2))
        else:
            scaling = {"rope_type": kind, "factor": float(scale)}
        if kind == "yarn":
            scaling = {**(scaling or {}), "original_max_position_embeddings": config.max_context}
            found["max_position_embeddings"] = int(config.max_context * float(scale))
    if layout.name == "gpt_neox":
        return {**found, "rotary_emb_base": base, "rotary_pct": config.rope_fraction, "rope_scaling": scaling}
    if layout.partial:
        found["partial_rotary_factor"] = config.rope_fraction
    return {**found, "rope_theta": base, "rope_scaling": scaling}


def layout_of(content: Mapping[str, Any], where: str) -> Layout:
    """Return the layout of a ``config.json``.

    Raises:
        UserError: the class is none that our transformers compute.
    """
    kind = content.get("model_type")
    name = READ_AS.get(str(kind), str(kind))
    if name not in LAYOUTS:
        known = ", ".join([*LAYOUTS, *READ_AS])
        raise UserError(f"{where}: model_type={kind!r:.60} is none of the classes that can be read: {known}")
    return LAYOUTS[name]


def model_config_of(content: Mapping[str, Any], where: str) -> ModelConfig:
    """Return the shape of a model of transformers, without its biases.

    Raises:
        UserError: a setting is missing, or is one that our transformers cannot express.
    """
    layout, kind = layout_of(content, where), str(content["model_type"])
    read = _Reader(content, kind, where)
    if content.get("quantization_config") is not None:
        raise UserError(f"{where}: quantization_config: quantized weights are not read; give the model before it")
    for name, allowed in _ALLOWED.get(layout.name, {}).items():
        default = _DEFAULTS[kind].get(name, allowed[0])
        found = read.value(name, default)
        if found not in allowed:
            raise UserError(f"{where}: {name}={found!r:.60}: our transformers compute only {name}={allowed[0]}")
    _check_window(read)
    values: dict[str, Any] = {name: read.number(layout.keys[name]) for name in ("d_model", "n_layers", "n_heads")}
    values |= {"vocab_size": read.number("vocab_size"), "max_context": _trained_length(read, layout)}
    values["norm_eps"] = read.number(layout.keys["norm_eps"])
    values["n_kv_heads"] = read.number("num_key_value_heads", values["n_heads"]) if layout.grouped else None
    values["d_ff"] = read.number(layout.keys["d_ff"], 4 * values["d_model"]) if "d_ff" in layout.keys else None
    values["mlp"], values["init_std"] = _mlp(read, layout), read.number("initializer_range", 0.02)
    width = content.get("head_dim")
    if layout.grouped and width is not None and width * values["n_heads"] != values["d_model"]:
        raise UserError(f"{where}: head_dim={width!r:.30}: our heads have {layout.keys['d_model']} / heads features")
    positions = _positions(read) if layout.positions == ("rope",) else {"positions": layout.positions[0]}
    tied = read.value("tie_word_embeddings", layout.tied if kind == layout.name else False)
    try:
        return ModelConfig(**values, **positions, norm=layout.norm, tie_embeddings=bool(tied))
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


def attention_factor(content: Mapping[str, Any], config: ModelConfig, block: int) -> float:
    """Return the attention scale of a block of a model of transformers, divided by 1 / sqrt(d_head)."""
    usual, scale = config.d_head**-0.5, 1.0
    if content["model_type"] == "gpt2":
        if not content.get("scale_attn_weights", True):
            scale /= usual
        if content.get("scale_attn_by_inverse_layer_idx"):
            scale /= block + 1
    given = (content.get("attn_config") or {}).get("softmax_scale")
    return scale if given is None else float(given) / usual


class _Reader:
    """The values of a ``config.json`` by dotted names, with the defaults of its class."""

    def __init__(self, content: Mapping[str, Any], kind: str, where: str) -> None:
        self.content, self.where = content, where
        self.defaults = _DEFAULTS[kind]

    def value(self, name: str, default: Any = None) -> Any:
        found: Any = self.content
        for part in name.split("."):
            found = found.get(part) if isinstance(found, Mapping) else None
        other = _SYNONYMS.get(name)
        if found is None and other is not None:
            found = self.content.get(other)
        return self.defaults.get(name, default) if found is None else found

    def number(self, name: str, default: Any = None) -> Any:
        found = self.value(name, default)
        if isinstance(found, bool) or not isinstance(found, int | float):
            raise UserError(f"{self.where}: {name}={found!r:.60} must be a number")
        return found


def _mlp(read: _Reader, layout: Layout) -> str:
    if "act" not in layout.keys:
        return next(iter(layout.mlps))
    name = layout.keys["act"]
    given = read.value(name)
    found = ACTIVATIONS.get(given if isinstance(given, str) else "")
    if found is None or found not in layout.mlps:
        known = ", ".join(theirs for theirs, ours in ACTIVATIONS.items() if ours in layout.mlps)
        raise UserError(f"{read.where}: {name}={given!r:.60} is none of the activations that can be read: {known}")
    return found


def _trained_length(read: _Reader, layout: Layout) -> int:
    if layout.name == "mpt" and read.content.get("seq_length") is not None:
        return int(read.number("seq_length"))
    scaling = read.content.get("rope_parameters") or read.content.get("rope_scaling") or {}
    original = scaling.get("original_max_position_embeddings") if isinstance(scaling, Mapping) else None
    return int(read.number(layout.keys["max_context"]) if original is None else original)


def _check_window(read: _Reader) -> None:
    """Refuse attention to the last tokens alone, unless the window is as long as the longest sequence."""
    window = read.value("sliding_window")
    if "sliding_window" in read.content:
        window = read.content["sliding_window"]
    if read.content["model_type"] == "qwen2" and not read.content.get("use_sliding_window", False):
        return
    longest = read.value("max_position_embeddings") or 0
    if window is not None and (not isinstance(window, int) or window < longest):
        raise UserError(
            f"{read.where}: sliding_window={window!r:.30}: our attention has no window; it must be null, or at least "
            f"max_position_embeddings={longest}"
        )


def _positions(read: _Reader) -> dict[str, Any]:
    """Return the settings of rotary positions, from the keys of older or of newer versions."""
    given: dict[str, Any] = {}
    for name in ("rope_scaling", "rope_parameters"):
        section = read.content.get(name)
        if section is not None and not isinstance(section, Mapping):
            raise UserError(f"{read.where}: {name}={section!r:.60} must be a section")
        given |= section or {}
    base = given.get("rope_theta", read.value("rope_theta", read.value("rotary_emb_base", 10000.0)))
    part = given.get("partial_rotary_factor", read.value("partial_rotary_factor", read.value("rotary_pct", 1.0)))
    found: dict[str, Any] = {"positions": "rope", "rope_base": float(base), "rope_fraction": float(part)}
    kind = given.get("rope_type", given.get("type", "default"))
    if kind == "default":
        return found
    where = f"{read.where}: rope_scaling"
    if kind not in _ROPE:
        raise UserError(f"{where}: rope_type={kind!r:.60} cannot be read; allowed are {', '.join(_ROPE)}")
    factor = given.get("factor")
    if isinstance(factor, bool) or not isinstance(factor, int | float) or factor < 1.0:
        raise UserError(f"{where}: factor={factor!r:.60} must be a number of at least 1")
    if kind == "linear":
        return {**found, "positions_scale": float(factor), "rope_scaling": "linear"}
    if kind == "dynamic":
        if factor != 1.0:
            raise UserError(f"{where}: factor={factor}: of rope_type=dynamic only factor=1 can be read")
        return {**found, "positions_scale": DYNAMIC, "rope_scaling": "ntk"}
    usual = {"beta_fast": 32, "beta_slow": 1, "attention_factor": None, "mscale": None, "mscale_all_dim": None}
    for name, value in {**usual, "truncate": True}.items():
        if given.get(name) not in (None, value):
            raise UserError(f"{where}: {name}={given[name]!r:.30}: of rope_type=yarn only {name}={value} can be read")
    return {**found, "positions_scale": float(factor), "rope_scaling": "yarn"}


def place_of(directory: Path) -> str:
    """Return how messages name the ``config.json`` of a directory."""
    return str(directory / "config.json")
