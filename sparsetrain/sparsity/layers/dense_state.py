"""The state of a sparse model as that of the dense model, for files that other libraries read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from sparsetrain.errors import UserError
from sparsetrain.sparsity.layers.dense_matrix import block_of
from sparsetrain.sparsity.layers.experts import joined_stacks
from sparsetrain.sparsity.layers.linear import SparseLinear
from sparsetrain.sparsity.layers.multihead import SparseMultiheadAttention
from sparsetrain.sparsity.patterns.pattern import SparsityPattern

_PARTS = ("values", "row_ptr", "col")


@torch.no_grad()
def dense_state(model: nn.Module, state: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Return a state dictionary of a model as if `densify` had made it dense; the model stays as it is.

    Weights are exactly zero outside the masks. A sparse layer that loads such a state takes the weights at the
    positions of its own mask, and refuses weights outside it.

    Args:
        state: a state of the model or a part of one; None for its present state.

    Raises:
        UserError: the state has some of a layer's values, row_ptr and col and not all.
    """
    found = dict(model.state_dict() if state is None else state)
    # The keys of a state hold the names of wrappers, as `nn.Module` counts them.
    modules = [(f"{name}." if name else "", module) for name, module in model.named_modules(remove_duplicate=False)]
    for prefix, layer in modules:
        if isinstance(layer, SparseLinear):
            _join_layer(prefix, layer, found)
    for prefix, module in modules:
        stacks = module.joined_projections() if isinstance(module, SparseMultiheadAttention) else joined_stacks(module)
        for leaf, (keys, join) in stacks.items():
            weights = [found.pop(prefix + key) for key in keys if prefix + key in found]
            if len(weights) == len(keys):
                found[prefix + leaf] = join(weights)
    return found


def _join_layer(prefix: str, layer: SparseLinear, found: dict[str, Any]) -> None:
    parts: dict[str, Tensor] = {part: found.pop(prefix + part) for part in _PARTS if prefix + part in found}
    if not parts:
        return
    if len(parts) < len(_PARTS):
        raise UserError(f"{layer.label}: the state has {', '.join(parts)}; row_ptr, col and values belong together")
    values, row_ptr, col = (parts[part] for part in _PARTS)
    shape = layer.out_features, layer.in_features
    pattern = SparsityPattern(shape, row_ptr, col, block_of(row_ptr, col, values.numel(), *shape))
    weight = pattern.scatter(values)
    found[f"{prefix}weight"] = weight.t().contiguous() if layer.from_conv1d else weight
