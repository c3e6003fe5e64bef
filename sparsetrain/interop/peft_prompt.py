"""Soft prompts as peft stores them: ``adapter_config.json`` and ``adapter_model.safetensors`` in a directory."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, NotRequired, TypedDict

import safetensors.torch
from safetensors import SafetensorError
from torch import nn

from sparsetrain.errors import UserError
from sparsetrain.files import read_json, whole_file, write_json
from sparsetrain.models import SoftPrompt, Transformer

_CONFIG, _WEIGHTS, _KEY = "adapter_config.json", "adapter_model.safetensors", "prompt_embeddings"
# Kinds of peft whose file holds the vectors that the model reads. (Those of prefix tuning are keys and values.)
_KINDS = ("PROMPT_TUNING", "P_TUNING")


class _Config(TypedDict):
    peft_type: str
    num_virtual_tokens: NotRequired[int | None]
    num_transformer_submodules: NotRequired[int | None]


def load_peft_prompt(directory: str | os.PathLike[str], scale: float = 1.0) -> SoftPrompt:
    """Return the soft prompt of a directory that peft wrote: it stands in ``front`` of the text.

    Args:
        directory: an adapter of the kind prompt tuning or p-tuning, for a model without an encoder.
        scale: as in `SoftPrompt`.

    Raises:
        UserError: there is no such directory, its adapter is of another kind, or its files are damaged.
    """
    home = Path(directory)
    config = read_json(home / _CONFIG, _Config)
    kind = config["peft_type"]
    if kind not in _KINDS:
        raise UserError(f"{home / _CONFIG}: peft_type={kind!r:.40} is no soft prompt; allowed are {', '.join(_KINDS)}")
    if config.get("num_transformer_submodules") not in (None, 1):
        raise UserError(f"{home / _CONFIG}: a prompt of a model with encoder and decoder; only decoders are supported")
    path = home / _WEIGHTS
    if not path.is_file() and path.with_suffix(".bin").is_file():
        raise UserError(f"{path.with_suffix('.bin')} is a pickle, which is not read; save it with safe_serialization")
    try:
        tensors = safetensors.torch.load_file(path)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(f"{path} cannot be read as .safetensors: {str(error).splitlines()[0][:200]}") from None
    rows = tensors.get(_KEY)
    if rows is None or rows.ndim != 2 or not rows.is_floating_point() or not rows.isfinite().all():
        raise UserError(f"{path}: {_KEY} must be a matrix of finite numbers [virtual tokens, width]")
    if config.get("num_virtual_tokens") not in (None, len(rows)):
        raise UserError(
            f"{path}: {_KEY} has {len(rows)} rows, and {_CONFIG} num_virtual_tokens={config['num_virtual_tokens']}"
        )
    return SoftPrompt.from_embeddings(rows.float(), scale=scale, front=True)


def save_peft_prompt(
    prompt: SoftPrompt, directory: str | os.PathLike[str], model: nn.Module, base: str | None = None
) -> None:
    """Write a soft prompt as an adapter of peft, for ``PeftModel.from_pretrained(base_model, directory)``.

    Args:
        prompt: a prompt in ``front`` of the text, where peft puts its virtual tokens.
        directory: made if it does not exist.
        model: the model that reads the prompt: a `Transformer`, whose alpha_in the vectors then contain, as the
            embedding that ``sparsetrain export`` writes contains it; or a model of transformers.
        base: name or directory of the base model for peft's ``base_model_name_or_path``; None takes the name that a
            model of transformers knows of itself.

    Raises:
        UserError: the prompt stands between source and answer, or has another width than the model.
    """
    if not prompt.front:
        raise UserError(
            "peft puts its virtual tokens in front of the text, and this prompt stands between source and answer; "
            "train it with position=front"
        )
    if isinstance(model, Transformer):
        width, layers, heads = model.config.d_model, model.config.n_layers, model.config.n_heads
        scale, name = model.embedding_scale, None
    else:
        text: Any = model.config.get_text_config()  # type: ignore[union-attr,operator]
        width, layers, heads = text.hidden_size, text.num_hidden_layers, text.num_attention_heads
        scale, name = 1.0, getattr(model.config, "_name_or_path", None)
    vectors = (prompt.vectors.detach() * (prompt.scale * scale)).float().cpu().contiguous()
    if vectors.shape[1] != width:
        raise UserError(f"the prompt has vectors of width {vectors.shape[1]}; the model has {width}")
    home = Path(directory)
    config = {
        "peft_type": "PROMPT_TUNING",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base if base is not None else name,
        "inference_mode": True,
        "num_virtual_tokens": len(vectors),
        "token_dim": width,
        "num_layers": layers,
        "num_attention_heads": heads,
        "num_transformer_submodules": 1,
        "prompt_tuning_init": "RANDOM",
    }
    with whole_file(home / _WEIGHTS) as temporary:
        safetensors.torch.save_file({_KEY: vectors}, temporary, metadata={"format": "pt"})
    write_json(home / _CONFIG, config)
