"""Tensors and masks of a transformer, to the names and shapes of a layout and back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from sparsetrain.errors import UserError
from sparsetrain.interop.fold import Plain, padded, pattern_of, scaled
from sparsetrain.interop.layouts import Layout, Part, parts
from sparsetrain.models import ModelConfig, Transformer
from sparsetrain.sparsity import SparsityPattern

# Buffers that old checkpoints hold beside the weights.
_BUFFERS = (".attn.bias", ".attn.masked_bias", ".rotary_emb.inv_freq", ".attention.bias", ".attention.masked_bias")


def to_layout(plain: Plain, layout: Layout) -> tuple[dict[str, Tensor], dict[str, SparsityPattern], Plain]:
    """Return the tensors of a model by the names of a layout, its masks by the names of their modules, and the model.

    The model has what the layout fixes, such as the width of the MLPs. Masks are ``[out, in]``, whatever the layout
    stores.
    """
    config = plain.config
    if layout.fixed_ffn and config.ffn_width < 4 * config.d_model:
        plain = padded(plain, 4 * config.d_model)
    if layout.learned is not None and config.positions == "none":
        plain = _with_zero_positions(plain)
    norm: dict[str, Tensor] = {}
    if layout.embed_norm is not None:
        plain, gain = _behind_a_norm(plain)
        norm = {"weight": gain, "bias": torch.zeros_like(gain)}
    tensors: dict[str, Tensor] = {}
    masks = {}
    for part in parts(layout, plain.config):
        weight = plain.tensors[f"{part.ours}.weight"]
        weight = weight if part.rows is None else weight[part.rows]
        stored = weight.T if layout.transposed and part.kind == "linear" else weight
        tensors[f"{part.theirs}.weight"] = stored.contiguous()
        if _has_bias(layout, part, plain.config):
            bias = plain.tensors.get(f"{part.ours}.bias")
            if bias is None:
                bias = torch.zeros(plain.tensors[f"{part.ours}.weight"].shape[0])
            tensors[f"{part.theirs}.bias"] = bias if part.rows is None else bias[part.rows]
        if part.ours in plain.masks:
            masks[part.theirs] = _rows_of(plain.masks[part.ours], part.rows)
    tensors |= {f"{layout.base}{layout.embed_norm}.{leaf}": tensor for leaf, tensor in norm.items()}
    return {name: tensor.clone() for name, tensor in tensors.items()}, masks, plain


def _has_bias(layout: Layout, part: Part, config: ModelConfig) -> bool:
    if part.kind == "norm":
        return layout.norm_biases
    return part.kind == "linear" and (layout.biases == "always" or (layout.biases == "chosen" and config.bias))


def _rows_of(pattern: SparsityPattern, rows: Tensor | None) -> SparsityPattern:
    return pattern if rows is None else pattern_of(pattern.mask()[rows], pattern.block)


def _with_zero_positions(plain: Plain) -> Plain:
    config = replace(plain.config, positions="learned")
    zeros = torch.zeros(config.max_context, config.d_model)
    note = f"It has no positions; those of this layout are zeros, of which there are {config.max_context}."
    return Plain(config, {**plain.tensors, "positions.weight": zeros}, plain.masks, [*plain.notes, note])


def _behind_a_norm(plain: Plain) -> tuple[Plain, Tensor]:
    """Return a model whose embedding passes through a LayerNorm, and the gain of that norm.

    LayerNorm divides a row by sqrt(variance + eps). A row that is small beside sqrt(eps) is hardly changed by it, but
    for its mean, which the norm of every branch and the final norm subtract anyway. So the embedding is made small by a
    power of two, and the gain undoes it. With the variance at most 2^-26 eps, the error is below float32's rounding.
    """
    config, tensors = plain.config, dict(plain.tensors)
    largest = float(tensors["embed.weight"].double().var(1, correction=0).max())
    small = 1.0
    while largest * small**2 > 2.0**-26 * config.norm_eps:
        small /= 2.0
    tensors["embed.weight"] = scaled(tensors["embed.weight"], small)
    if config.tie_embeddings:
        for name in ("final_norm.weight", "final_norm.bias"):
            if name in tensors:
                tensors[name] = scaled(tensors[name], 1.0 / small)
    gain = torch.full((config.d_model,), config.norm_eps**0.5 / small, dtype=torch.float64).float()
    note = (
        f"The embedding is multiplied by {small:.3g}, so that the norm behind it, which this layout has, only undoes "
        "that. In float16 such small numbers lose their digits: load the model in float32 or bfloat16."
    )
    return Plain(config, tensors, plain.masks, [*plain.notes, note]), gain


def from_layout(tensors: Mapping[str, Tensor], layout: Layout, config: ModelConfig, where: str) -> Plain:
    """Return a model from the tensors of a layout.

    Biases that are zero in all layers are left out; if one is not, all layers of ours have one.

    Args:
        tensors: float32, by name.
        config: the shape, of which the biases are not known yet.
        where: begins the messages.

    Raises:
        UserError: a tensor is missing, is left over, or has another shape.
    """
    rest = _with_base(tensors, layout)
    found: dict[str, Tensor] = {}
    biases: dict[str, Tensor] = {}
    shapes = dense_shapes(config)
    for part in parts(layout, config):
        weight = _taken(rest, f"{part.theirs}.weight", where)
        if layout.transposed and part.kind == "linear":
            weight = weight.T if weight.ndim == 2 else weight
        shape = shapes[f"{part.ours}.weight"]
        _place(found, f"{part.ours}.weight", weight, part.rows, shape, f"{where}: {part.theirs}")
        if (bias := rest.pop(f"{part.theirs}.bias", None)) is not None:
            _place(biases, f"{part.ours}.bias", bias, part.rows, shape[:1], f"{where}: {part.theirs}.bias")
    plain = Plain(config, found)
    if layout.embed_norm is not None:
        plain = _without_embed_norm(plain, rest, f"{layout.base}{layout.embed_norm}", where)
    rest.pop(f"{layout.head}.weight", None)  # a copy of the embedding, where the configuration ties them
    left = [name for name in rest if not name.endswith(_BUFFERS)]
    if left:
        raise UserError(f"{where}: the tensor {left[0]!r:.80} has no place in a model of ours ({layout.name})")
    return _with_biases(plain, biases)


def dense_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the weights of a dense model by name."""
    with torch.device("meta"):
        model = Transformer(config)
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def _with_base(tensors: Mapping[str, Tensor], layout: Layout) -> dict[str, Tensor]:
    """Return the tensors by their names in the class with a head; files of the class without one lack the prefix."""
    if any(name.startswith(layout.base) for name in tensors):
        return dict(tensors)
    head = f"{layout.head}.weight"
    return {name if name == head else layout.base + name: each for name, each in tensors.items()}


def _taken(rest: dict[str, Tensor], name: str, where: str) -> Tensor:
    if name not in rest:
        raise UserError(f"{where}: the tensor {name} is missing")
    return rest.pop(name)


def _place(
    found: dict[str, Tensor], name: str, tensor: Tensor, rows: Tensor | None, shape: tuple[int, ...], where: str
) -> None:
    """Put a tensor of theirs into the rows of ours that it holds."""
    expected = shape if rows is None else (len(rows), *shape[1:])
    if tuple(tensor.shape) != expected:
        raise UserError(f"{where} has shape {list(tensor.shape)}; config.json needs {list(expected)}")
    if rows is None:
        found[name] = tensor.contiguous()
        return
    found.setdefault(name, torch.zeros(shape))[rows] = tensor


def _without_embed_norm(plain: Plain, rest: dict[str, Tensor], name: str, where: str) -> Plain:
    """Return a model whose embedding holds what a norm behind it made of each row; the head keeps the raw rows."""
    weight, bias = _taken(rest, f"{name}.weight", where), _taken(rest, f"{name}.bias", where)
    raw, config, tensors = plain.tensors["embed.weight"], plain.config, dict(plain.tensors)
    size = raw.shape[1:]
    if weight.shape != size or bias.shape != size:
        raise UserError(f"{where}: {name} has shape {list(weight.shape)}; config.json needs {list(size)}")
    tensors["embed.weight"] = F.layer_norm(raw.double(), size, weight.double(), bias.double(), config.norm_eps).float()
    note = "The norm behind the embedding is part of its rows"
    if config.tie_embeddings:
        tensors["head.weight"] = raw
        note += "; the head, which was tied, keeps the rows before the norm"
    return Plain(replace(config, tie_embeddings=False), tensors, plain.masks, [*plain.notes, f"{note}."])


def _with_biases(plain: Plain, biases: Mapping[str, Tensor]) -> Plain:
    config = plain.config
    if not any(bool(bias.any()) for bias in biases.values()):
        note = ["All biases are zero, and left out."] if biases else []
        return Plain(config, plain.tensors, plain.masks, [*plain.notes, *note])
    config = replace(config, bias=True)
    tensors, added = dict(plain.tensors), 0
    for name, shape in dense_shapes(config).items():
        if name.endswith(".bias"):
            added += name not in biases
            tensors[name] = biases.get(name, torch.zeros(shape))
    note = [f"{added} layers without a bias get one of zeros, since others have one."] if added else []
    return Plain(config, tensors, plain.masks, [*plain.notes, *note])


def masks_from_layout(
    masks: Mapping[str, SparsityPattern], layout: Layout, config: ModelConfig, where: str
) -> dict[str, SparsityPattern]:
    """Return masks by the names of our layers from those by the names of a layout's modules.

    A layer of ours that is made of several of theirs, of which some have no mask, is full there.

    Raises:
        UserError: a mask is of no hidden matrix, or has another shape.
    """
    known = {part.theirs: part for part in parts(layout, config) if part.kind == "linear"}
    shapes = dense_shapes(config)
    full: dict[str, Tensor] = {}
    blocks: dict[str, set[tuple[int, int]]] = {}
    for name, pattern in masks.items():
        part = known.get(name) or known.get(layout.base + name)
        if part is None:
            raise UserError(f"{where}: the mask {name!r:.80} is of no matrix of a block; only those are sparse in ours")
        shape = shapes[f"{part.ours}.weight"]
        mask = full.setdefault(part.ours, torch.ones(shape, dtype=torch.bool))
        expected = shape if part.rows is None else (len(part.rows), *shape[1:])
        if pattern.shape != expected:
            raise UserError(f"{where}: the mask {name!r:.80} has shape {pattern.shape}; the layer needs {expected}")
        mask[slice(None) if part.rows is None else part.rows] = pattern.mask()
        blocks.setdefault(part.ours, set()).add(pattern.block)
    return {name: pattern_of(mask, _common(blocks[name])) for name, mask in full.items()}


def _common(blocks: set[tuple[int, int]]) -> tuple[int, int]:
    return next(iter(blocks)) if len(blocks) == 1 else (1, 1)
