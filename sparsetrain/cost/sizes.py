"""The sizes of a transformer and its blocks, from which work and memory of a step follow; numbers may be arrays.

The legend is that of `sparsetrain.cost.operations`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from sparsetrain.models.config import ModelConfig

Number: TypeAlias = float | NDArray[np.float64]
"""One value, or an array with one value for each configuration."""


@dataclass(frozen=True)
class Sizes:
    """The sizes and components of a transformer that its cost depends on; numbers may be arrays."""

    width: Number
    layers: Number
    heads: Number
    kv_width: Number
    ffn: Number
    vocabulary: Number
    gated: bool = False
    biased: bool = False
    tied: bool = True
    layernorm: bool = True
    rotated: float = 0.0  # features of a head that RoPE rotates
    positions: Number = 0.0
    dropout: bool = False

    @classmethod
    def of(cls, config: ModelConfig) -> Sizes:
        """Return the sizes of a model."""
        return cls(
            width=float(config.d_model),
            layers=float(config.n_layers),
            heads=float(config.n_heads),
            kv_width=float(config.kv_heads * config.d_head),
            ffn=float(config.ffn_width),
            vocabulary=float(config.vocab_size),
            gated=config.mlp == "swiglu",
            biased=config.bias,
            tied=config.tie_embeddings,
            layernorm=config.norm == "layernorm",
            rotated=float(config.d_rotary if config.positions == "rope" else 0),
            positions=float(config.max_context if config.positions == "learned" else 0),
            dropout=config.dropout > 0.0,
        )

    def matrices(self) -> dict[str, tuple[Number, Number]]:
        """Return ``(out_features, in_features)`` of a block's matrices by their names inside the block."""
        shapes = {"attn.qkv": (self.width + 2.0 * self.kv_width, self.width), "attn.out": (self.width, self.width)}
        if self.gated:
            shapes["mlp.gate"] = (self.ffn, self.width)
        shapes["mlp.up"] = (self.ffn, self.width)
        shapes["mlp.down"] = (self.width, self.ffn)
        return shapes


@dataclass(frozen=True)
class Layers:
    """Blocks whose matrices have the same densities.

    Args:
        count: number of these blocks.
        densities: stored fraction of each matrix by its name inside the block; a matrix without one is dense.
        indices: which blocks, if they are known.
        frozen: names inside the block of matrices and norms whose weights have no gradient. If any parameter of a
            model is frozen, each block needs an entry of its own, because the lowest blocks may need no gradient.
    """

    count: Number
    densities: Mapping[str, Number] = field(default_factory=dict)
    indices: tuple[int, ...] | None = None
    frozen: Collection[str] = ()


def trained_weights(sizes: Sizes, layers: Sequence[Layers], frozen: Collection[str] = ()) -> Number:
    """Return the stored weights that are trained; see `step_operations` for the arguments."""
    total = _outer_weights(sizes, frozen)
    for group in layers:
        total = total + group.count * block_weights(sizes, group.densities, group.frozen)
    return total


def block_weights(sizes: Sizes, densities: Mapping[str, Number], frozen: Collection[str] = ()) -> Number:
    """Return the stored weights of a block that are trained."""
    each = sizes.width * (2.0 if sizes.layernorm and sizes.biased else 1.0)
    total: Number = each * sum(name not in frozen for name in ("attn_norm", "mlp_norm"))
    for name, (rows, columns) in sizes.matrices().items():
        if name not in frozen:
            total = total + nonzeros(rows, columns, densities.get(name, 1.0)) + (rows if sizes.biased else 0.0)
    return total


def _outer_weights(sizes: Sizes, frozen: Collection[str] = ()) -> Number:
    """Return the weights outside of the blocks that are trained."""
    rows: Number = 0.0
    for name, count in (("embed", sizes.vocabulary), ("positions", sizes.positions), ("head", sizes.vocabulary)):
        if name not in frozen and not (name == "head" and sizes.tied):
            rows = rows + count
    norm = sizes.width * (2.0 if sizes.layernorm and sizes.biased else 1.0)
    return rows * sizes.width + (0.0 if "final_norm" in frozen else norm)


def nonzeros(rows: Number, columns: Number, density: Number) -> Number:
    """Return the stored weights of a matrix: the exact count of a random pattern, rounded half to even."""
    return (
        np.round(density * (rows * columns)) if isinstance(density, np.ndarray) else np.rint(density * rows * columns)
    )
