"""Sparse layers that stand for parts of one dense tensor: the projections of attention, the experts of a stack."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn

IN_PROJECTIONS = ("q_proj", "k_proj", "v_proj")
# `sparsify` puts the experts of the tensor NAME into the list NAME_layers of the same module.
_EXPERT = re.compile(r"(?:(?P<holder>.+)\.)?(?P<leaf>[^.]+)_layers\.(?P<index>\d+)")


@dataclass(frozen=True)
class Part:
    """The place of a layer's matrix in the dense tensor that it is a part of.

    Args:
        holder_name, holder: the module that holds the dense tensor when nothing is sparse.
        leaf: the tensor's name there.
        index, count: of the part, and how many there are.
        stacked: whether the tensor has a dimension for the parts, as experts; else they stand below each other.
        transposed: whether the tensor is [count, in, out].
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
        """Return the shape of the dense tensor, given that of the part's matrix ``[out, in]``."""
        if not self.stacked:
            return (self.count * rows, columns)
        return (self.count, columns, rows) if self.transposed else (self.count, rows, columns)

    def take(self, whole: Tensor) -> Tensor:
        """Return the part's matrix ``[out, in]`` of the dense tensor."""
        if self.stacked:
            return whole[self.index].t() if self.transposed else whole[self.index]
        return whole.chunk(self.count)[self.index]


def part_of(module_name: str, modules: Mapping[str, nn.Module]) -> Part | None:
    """Return of which dense tensor the layer called ``module_name`` is a part, None if it is one on its own."""
    parent_name, _, child = module_name.rpartition(".")
    parent = modules.get(parent_name)
    if isinstance(parent, nn.MultiheadAttention) and child in IN_PROJECTIONS:
        if parent._qkv_same_embed_dim:
            return Part(parent_name, parent, "in_proj_weight", IN_PROJECTIONS.index(child), len(IN_PROJECTIONS), False)
        return Part(parent_name, parent, f"{child}_weight", 0, 1, False)
    found = _EXPERT.fullmatch(module_name)
    if found is None or not isinstance(parent, nn.ModuleList):
        return None
    holder_name, leaf = found["holder"] or "", found["leaf"]
    holder = modules[holder_name]
    if leaf in holder._parameters and holder._parameters[leaf] is None:
        flipped = getattr(holder, "is_transposed", False) is True
        return Part(holder_name, holder, leaf, int(found["index"]), len(parent), True, flipped)
    return None
