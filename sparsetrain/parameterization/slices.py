"""Sparse layers that replace slices of one dense tensor: the projections of attention, the experts of a stack."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn

IN_PROJECTIONS = ("q_proj", "k_proj", "v_proj")
# `sparsify` puts the experts of the tensor NAME into the list NAME_layers of the same module.
_EXPERT = re.compile(r"(?:(?P<holder>.+)\.)?(?P<leaf>[^.]+)_layers\.(?P<index>\d+)")


@dataclass(frozen=True)
class TensorSlice:
    """The slice of a dense tensor that a layer's matrix replaces.

    Args:
        holder_name, holder: the module that holds the dense tensor if nothing is sparse.
        leaf: name of the tensor in that module.
        index, count: index of the slice, and number of slices.
        stacked: whether slices are indexed by a dimension of their own, as experts are; otherwise rows are split.
        transposed: whether the tensor has shape [count, in, out].
    """

    holder_name: str
    holder: nn.Module
    leaf: str
    index: int
    count: int
    stacked: bool
    transposed: bool = False

    @property
    def name(self) -> str:
        return f"{self.holder_name}.{self.leaf}" if self.holder_name else self.leaf

    def shape_of_whole(self, rows: int, columns: int) -> tuple[int, ...]:
        """Return the shape of the dense tensor for a slice with the matrix shape ``[out, in]``."""
        if not self.stacked:
            return (self.count * rows, columns)
        return (self.count, columns, rows) if self.transposed else (self.count, rows, columns)

    def take(self, whole: Tensor) -> Tensor:
        """Return the slice of the dense tensor as a matrix ``[out, in]``."""
        if self.stacked:
            return whole[self.index].t() if self.transposed else whole[self.index]
        return whole.chunk(self.count)[self.index]


def slice_of(module_name: str, modules: Mapping[str, nn.Module]) -> TensorSlice | None:
    """Return the slice that the layer called ``module_name`` replaces, or None if it replaces a whole tensor."""
    parent_name, _, child = module_name.rpartition(".")
    parent = modules.get(parent_name)
    if isinstance(parent, nn.MultiheadAttention) and child in IN_PROJECTIONS:
        if parent._qkv_same_embed_dim:
            return TensorSlice(
                parent_name, parent, "in_proj_weight", IN_PROJECTIONS.index(child), len(IN_PROJECTIONS), False
            )
        return TensorSlice(parent_name, parent, f"{child}_weight", 0, 1, False)
    found = _EXPERT.fullmatch(module_name)
    if found is None or not isinstance(parent, nn.ModuleList):
        return None
    holder_name, leaf = found["holder"] or "", found["leaf"]
    holder = modules[holder_name]
    if leaf in holder._parameters and holder._parameters[leaf] is None:
        flipped = getattr(holder, "is_transposed", False) is True
        return TensorSlice(holder_name, holder, leaf, int(found["index"]), len(parent), True, flipped)
    return None
