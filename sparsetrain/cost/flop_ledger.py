"""`flops`: the ledger of a step of a model, in closed form for the library's models and by a trace for others."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from sparsetrain.cost.blocks import Shape, shape_of_config, shape_of_model
from sparsetrain.cost.extras import column_operations, index_operations, recomputed, update_operations
from sparsetrain.cost.flops import Density
from sparsetrain.cost.ledger import PHASES, Convention, Ledger, Pass, entries_of, ledger_of
from sparsetrain.cost.memory import state_bytes, training_bytes
from sparsetrain.cost.operations import OPTIMIZER, step_operations
from sparsetrain.cost.sizes import Sizes
from sparsetrain.cost.trace import trace
from sparsetrain.errors import UserError, check_choice
from sparsetrain.models.config import DYNAMIC, ModelConfig
from sparsetrain.sparsity.evolution.base import RULES

_WIDE = (torch.float32, torch.float64)


def flops(
    model: ModelConfig | nn.Module,
    context: int,
    batch: int,
    *,
    attention: str = "full",
    sparsity: str = "skipped",
    density: Density | None = None,
    phase: str = "training",
    cached: int = 0,
    prompt_tokens: int = 0,
    mask_update: str | None = None,
    recomputation: bool = False,
    last_logits: bool = False,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    inputs: Sequence[Any] | None = None,
) -> Ledger:
    """Return the FLOPs and bytes of one step: by default, of a training step of ``batch`` sequences.

    A `ModelConfig` and a live `Transformer` or `Prompted` are counted in closed form, the latter two with the nonzeros
    and the frozen parts that they have. Any other module runs once without values: a parameter without a gradient costs
    only what it costs. A trace counts matrix products alone, and products of two batches of matrices as attention.

    Args:
        model: a configuration, whose ``sparsity`` counts; a model of the library, also a quantized one for inference;
            or any module, such as a causal language model of Hugging Face.
        context: tokens T of a sequence that pass through the model; one in ``decoding``, unless several are decoded at
            a time.
        batch: sequences B.
        attention: ``full`` counts every query with every key, ``causal`` with the keys up to its own position.
        sparsity: ``skipped`` counts nonzeros, ``counted`` counts zeros too.
        density: stored fraction of the hidden matrices of a configuration, as `sparsetrain.cost.flops.matrices` takes
            it; None is that of its ``sparsity``.
        phase: ``training`` is forward and backward pass, ``prefill`` the forward pass, ``decoding`` the forward pass
            behind ``cached`` tokens of each sequence.
        cached: tokens of a sequence whose keys and values are in a cache.
        prompt_tokens: learned vectors of a soft prompt, which lengthen the context; a `Prompted` has its own.
        mask_update: an evolution rule, such as ``rigl``, if the step ends with an update of its masks.
        recomputation: whether every block computes its forward pass again in the backward pass.
        last_logits: whether the head is computed for the last token of each sequence only, as in generation.
        dtype, device: of the activations of a configuration; None is float32 and the CPU. On other devices and in other
            types, torch's attention carries ALiBi in columns, which ``by_kind`` lists.
        inputs: arguments of the call of a module that is traced, if it takes others than token ids.

    Raises:
        UserError: a number is out of range, a name is unknown, an argument does not suit the model or the phase, or a
            module cannot be traced.
    """
    convention = Convention(attention, sparsity)
    check_choice("phase", phase, PHASES)
    for name, value, least in (
        ("context", context, 1),
        ("batch", batch, 1),
        ("cached", cached, 0),
        ("prompt_tokens", prompt_tokens, 0),
    ):
        check_whole(name, value, least)
    if cached and phase != "decoding":
        raise UserError(f"cached={cached} needs phase=decoding, not {phase}")
    if phase == "decoding" and not cached:
        raise UserError("cached=0: phase=decoding needs the tokens in the cache, at least 1")
    if phase != "training":
        for name, given in (("mask_update", mask_update), ("recomputation", recomputation or None)):
            if given is not None:
                raise UserError(f"{name}={given} needs phase=training, not {phase}")
    if mask_update is not None and mask_update not in RULES:
        check_choice("mask_update", mask_update, list(RULES))
    if density is not None and not isinstance(model, ModelConfig):
        raise UserError(f"density={density} is for a ModelConfig; a {type(model).__name__} has its own")
    if isinstance(model, ModelConfig):
        shape: Shape | None = shape_of_config(model, density)
    elif isinstance(model, nn.Module):
        shape = shape_of_model(model) if inputs is None else None
    else:
        raise UserError(f"model is a {type(model).__name__}, neither a ModelConfig nor a torch.nn.Module")
    if shape is None:
        assert isinstance(model, nn.Module)
        extras = {"prompt_tokens": prompt_tokens, "mask_update": mask_update, "last_logits": last_logits}
        for name, given in (*extras.items(), ("recomputation", recomputation)):
            if given:
                raise UserError(f"{name}={given} needs a model of the library; {type(model).__name__} is traced")
        asked = Pass(context, batch, cached, phase)
        seen = trace(model, asked, inputs)
        entries = seen.entries
        return ledger_of(entries, asked, convention, _weights(model), seen.cache_bytes)
    prompt = shape.prompt_tokens or prompt_tokens
    asked = Pass(context + (0 if phase == "decoding" else prompt), batch, cached, phase)
    _check_shape(shape, asked, model)
    dtype, device = dtype or shape.dtype or torch.float32, torch.device(device or shape.device or "cpu")
    operations = _operations(shape, asked, prompt, mask_update, recomputation, last_logits, dtype, device)
    config = shape.config
    if isinstance(model, nn.Module):
        weights = _weights(model)
    else:
        stored = 1.0 - config.sparsity if density is None else density
        held = training_bytes(config, stored, value_bytes=dtype.itemsize)
        weights = held.parameters + held.index
    kept = 0 if phase == "training" else cache_bytes(config, asked.cached + asked.context, batch, dtype)
    return ledger_of(entries_of(operations), asked, convention, weights, kept)


def _operations(
    shape: Shape,
    asked: Pass,
    prompt: int,
    mask_update: str | None,
    recomputation: bool,
    last_logits: bool,
    dtype: torch.dtype,
    device: torch.device,
) -> list[Any]:
    training = asked.phase == "training" and (shape.trains or prompt > 0)
    sizes = Sizes.of(shape.config)
    found = step_operations(
        sizes,
        float(asked.context),
        float(asked.batch),
        shape.layers,
        value_bytes=float(dtype.itemsize),
        training=training,
        cached=float(asked.cached),
        frozen=shape.frozen,
        prompt_tokens=float(prompt) if training else 0.0,
        last_logits=last_logits,
    )
    more = index_operations(found)
    if shape.config.positions == "alibi" and not (device.type == "cpu" and dtype == torch.float32):
        more += column_operations(found, sizes, 1 if dtype in _WIDE else 3)
    if recomputation and training:
        more += recomputed(found)
    if mask_update is not None:
        ranked = float(asked.context * asked.batch)
        more += update_operations(sizes, shape.layers, ranked, RULES[mask_update].needs_gradient, float(dtype.itemsize))
    return [operation for operation in (*found, *more) if operation.kind != OPTIMIZER or operation.flops]


def _check_shape(shape: Shape, asked: Pass, model: ModelConfig | nn.Module) -> None:
    config, length = shape.config, asked.cached + asked.context
    if config.positions == "learned" and length > config.max_context:
        raise UserError(f"{length} tokens are more than the {config.max_context} learned positions of the model")
    if asked.phase == "decoding" and config.positions_scale == DYNAMIC and length > config.max_context:
        raise UserError(
            f"positions_scale=dynamic reads all {length} tokens again beyond max_context={config.max_context}: "
            "ask for phase=prefill"
        )
    if asked.phase == "training" and isinstance(model, nn.Module) and not shape.trains and _quantized(model):
        raise UserError("phase=training: weights of 4 or 8 bits do not train; ask for phase=prefill or decoding")


def _quantized(model: nn.Module) -> bool:
    from sparsetrain.quantization.layers import Quantized

    return any(isinstance(module, Quantized) for module in model.modules())


def _weights(model: nn.Module) -> int:
    """Return the bytes of weights, positions of nonzeros and buffers, without gradients."""
    held = state_bytes(model)
    return held.total - held.gradients


def cache_bytes(config: ModelConfig, tokens: int, batch: int, dtype: torch.dtype = torch.float32) -> int:
    """Return the bytes of a `sparsetrain.models.kv_cache.KVCache` of ``tokens`` tokens for ``batch`` sequences."""
    each = 2 * config.n_layers * config.kv_heads * config.d_head
    each += config.d_model if config.positions_scale == DYNAMIC else 0
    return batch * tokens * each * dtype.itemsize


def check_whole(name: str, value: object, least: int) -> None:
    """Raise `UserError` unless ``value`` is a whole number of at least ``least``."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise UserError(f"{name}={value!r} is not a whole number of at least {least}")
