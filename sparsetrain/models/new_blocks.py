"""Further blocks for a trained model, which at first change nothing (LLaMA Pro, arXiv 2401.02415)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TypeVar

from torch import Tensor

T = TypeVar("T")

_BLOCK = re.compile(r"blocks\.(\d+)\.(.+)")
# What the two branches of a block add to the residual stream. The indices of a sparse matrix stay.
_OUTPUT = re.compile(r"(attn\.out|mlp\.down)\.(weight|values|bias)")


def sources(n_layers: int, new_blocks: int) -> list[tuple[int, bool]]:
    """Return, for each block of the deeper model, the block it comes from and whether it is a copy.

    The copies are spread evenly: the i-th of n stands behind block ceil(i n_layers / n), counted from 1.
    """
    copied = {-(-n_layers * index // new_blocks) - 1 for index in range(1, new_blocks + 1)} if new_blocks else set()
    return [(old, is_copy) for old in range(n_layers) for is_copy in ((False, True) if old in copied else (False,))]


def added(n_layers: int, new_blocks: int) -> list[int]:
    """Return the places of the copies in the deeper model."""
    return [place for place, (_, is_copy) in enumerate(sources(n_layers, new_blocks)) if is_copy]


def deepened(named: Mapping[str, T], n_layers: int, new_blocks: int) -> dict[str, T]:
    """Return what a deeper model has by the names of its tensors or layers; copies share the values.

    Args:
        named: values by the names of a model of ``n_layers`` blocks.
        n_layers: blocks of that model.
        new_blocks: blocks that are added, at most ``n_layers``.
    """
    inside: dict[int, dict[str, T]] = {}
    for name, value in named.items():
        if (match := _BLOCK.fullmatch(name)) is not None:
            inside.setdefault(int(match[1]), {})[match[2]] = value
    found = {name: value for name, value in named.items() if _BLOCK.fullmatch(name) is None}
    for place, (old, _) in enumerate(sources(n_layers, new_blocks)):
        found |= {f"blocks.{place}.{leaf}": value for leaf, value in inside.get(old, {}).items()}
    return found


def with_identities(tensors: Mapping[str, Tensor], n_layers: int, new_blocks: int) -> dict[str, Tensor]:
    """Return the state dict of the deeper model, whose new blocks add zeros to the residual stream.

    A new block has the matrices, the masks and the norms of the block before it, and output projections of zero, of
    their density. Their gradients are not zero, so the block learns.
    """
    found, copies = deepened(tensors, n_layers, new_blocks), set(added(n_layers, new_blocks))
    for name, value in found.items():
        match = _BLOCK.fullmatch(name)
        if match is not None and int(match[1]) in copies:
            found[name] = value.new_zeros(value.shape) if _OUTPUT.fullmatch(match[2]) else value.clone()
    return found
