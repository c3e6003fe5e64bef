"""The blocks of a model as `sparsetrain.cost.operations` takes them: from a configuration, or from a live model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from sparsetrain import wrappers
from sparsetrain.cost.flops import Density, matrices
from sparsetrain.cost.sizes import Layers
from sparsetrain.models.config import ModelConfig
from sparsetrain.models.head import Head
from sparsetrain.models.prompted import Prompted
from sparsetrain.models.transformer import Block, Transformer
from sparsetrain.quantization.layers import QuantizedLinear, QuantizedSparseLinear
from sparsetrain.sparsity.layers.linear import SparseLinear

OUTSIDE = ("embed", "positions", "final_norm", "head")


@dataclass(frozen=True)
class Shape:
    """A model as its cost depends on it.

    Args:
        config: shapes and components.
        layers: blocks by density, in their order.
        frozen: names of parameters outside of the blocks that have no gradient.
        prompt_tokens: learned vectors of a soft prompt.
        trains: whether any parameter has a gradient.
        device, dtype: of the weights; None for a configuration.
    """

    config: ModelConfig
    layers: list[Layers]
    frozen: frozenset[str] = field(default_factory=frozenset)
    prompt_tokens: int = 0
    trains: bool = True
    device: torch.device | None = None
    dtype: torch.dtype | None = None


def shape_of_config(config: ModelConfig, density: Density | None = None) -> Shape:
    """Return the shape of a configuration; ``density`` replaces its own sparsity, as `flops.matrices` takes it."""
    stored = {m.name: m.nnz / m.numel for m in matrices(config, 1.0 - config.sparsity if density is None else density)}
    by_block: dict[int, dict[str, float]] = {layer: {} for layer in range(config.n_layers)}
    for name, share in stored.items():
        _, layer, inside = name.split(".", 2)
        by_block[int(layer)][inside] = share
    return Shape(config, _grouped(by_block, {}))


def shape_of_model(model: nn.Module) -> Shape | None:
    """Return the shape of a live `Transformer` or `Prompted`, or None if it is another module or has other layers.

    It is also None if a layer trains its bias but not its matrix, or the other way around.
    """
    model = wrappers.unwrap(model)
    prompt = 0
    if type(model) is Prompted:
        prompt, trains_prompt = len(model.prompt.vectors), model.prompt.vectors.requires_grad
        model = wrappers.unwrap(model.model)
    if type(model) is not Transformer or not all(type(wrappers.unwrap(block)) is Block for block in model.blocks):
        return None
    config, modules = model.config, dict(wrappers.named_modules(model))
    by_block: dict[int, dict[str, float]] = {layer: {} for layer in range(config.n_layers)}
    frozen: dict[int, set[str]] = {layer: set() for layer in range(config.n_layers)}
    for matrix in matrices(config):
        layer = modules.get(matrix.name)
        stored = None if layer is None else stored_weights(layer)
        if layer is None or stored is None or _trains(layer) is None:
            return None
        _, index, inside = matrix.name.split(".", 2)
        by_block[int(index)][inside] = stored / matrix.numel
        if not _trains(layer):
            frozen[int(index)].add(inside)
    if type(modules["head"]) not in (Head, nn.Linear, QuantizedLinear):
        return None
    if any(name in modules and _trains(modules[name]) is None for name in OUTSIDE):
        return None
    for index in by_block:
        for norm in ("attn_norm", "mlp_norm"):
            if not _trains(modules[f"blocks.{index}.{norm}"]):
                frozen[index].add(norm)
    outside = frozenset(name for name in OUTSIDE if name in modules and not _trains(modules[name]))
    fixed = bool(outside) or any(frozen.values())
    parameters = list(model.parameters())
    first = next(iter(parameters), None)
    return Shape(
        config,
        _grouped(by_block, frozen if fixed else {}),
        outside,
        prompt,
        any(p.requires_grad for p in parameters) or (prompt > 0 and trains_prompt),
        None if first is None else first.device,
        None if first is None else first.dtype,
    )


def stored_weights(layer: nn.Module) -> int | None:
    """Return the stored values of a linear layer's matrix, or None if it is no such layer."""
    kind = _kind(layer)
    if kind is SparseLinear:
        return int(layer.pattern.nnz)  # type: ignore[union-attr]
    if kind is QuantizedSparseLinear:
        return int(layer.nnz)  # type: ignore[arg-type]
    if kind is QuantizedLinear:
        return int(layer.matrix.rows * layer.matrix.columns)  # type: ignore[union-attr, operator]
    return None if kind is None else int(layer.weight.numel())  # type: ignore[union-attr, operator]


def _kind(layer: nn.Module | None) -> type[Any] | None:
    known = (nn.Linear, SparseLinear, QuantizedLinear, QuantizedSparseLinear)
    return type(layer) if type(layer) in known else None


def _trains(module: nn.Module) -> bool | None:
    """Return whether the parameters of a module have gradients, or None if only some have."""
    found = {parameter.requires_grad for parameter in module.parameters(recurse=False)}
    return None if len(found) == 2 else True in found


def _grouped(by_block: Mapping[int, Mapping[str, float]], frozen: Mapping[int, set[str]]) -> list[Layers]:
    """Return equal blocks together; with frozen parameters each block alone, since its place matters."""
    if frozen:
        return [Layers(1.0, found, (index,), frozenset(frozen[index])) for index, found in by_block.items()]
    groups: dict[tuple[tuple[str, float], ...], list[int]] = {}
    for index, found in by_block.items():
        groups.setdefault(tuple(found.items()), []).append(index)
    return [Layers(float(len(indices)), dict(key), tuple(indices)) for key, indices in groups.items()]
