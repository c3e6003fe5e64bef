"""The operations of one training step of a transformer: the work, the bytes and the sizes of each, in closed form.

Everything that the simulator says comes from this list: the ledger adds up its FLOPs, and a machine turns each entry
into seconds. Every number may be a float or an array, so that one pass answers for many configurations.

Legend: B sequences, T tokens of each (the context), N = B T, D model width, F width of the MLP, K width of all keys,
L layers, V vocabulary, nnz stored weights of a matrix.

A multiply-add is 2 FLOPs. A product with a matrix costs 2 N nnz forward and 4 N nnz backward: the gradient of the input
and that of the weights (MediSwift, arXiv 2403.00952, and SPDF, arXiv 2303.10464). Attention costs 4 N T D forward and
8 N T D backward, with every query against every key.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from sparsetrain.models.config import ModelConfig

Number: TypeAlias = float | NDArray[np.float64]
"""One value, or an array with one value for each configuration."""

LINEAR, HEAD, ATTENTION = "linear", "head", "attention"
NORM, ADD, ROTARY, SOFTMAX, EMBEDDING, OPTIMIZER = "norm", "add", "rotary", "softmax", "embedding", "optimizer"
GELU, SWIGLU = "gelu", "swiglu"
PRODUCTS = (LINEAR, HEAD, ATTENTION)
"""Kinds whose FLOPs are those of matrix products."""

FORWARD, BACKWARD, UPDATE = "forward", "backward", "update"

INDEX_BYTES = 4  # of a nonzero's column, as the layers store it
_ADAMW_FLOPS, _ADAMW_VALUES = (
    14,
    7,
)  # per parameter: reads weight, gradient and two moments, writes all but the gradient


@dataclass(frozen=True)
class Operation:
    """One operation of a step, executed ``count`` times; all other numbers are those of a single execution.

    Args:
        kind: one of the kinds above.
        phase: ``forward``, ``backward`` or ``update``.
        module: qualified name of the module that it belongs to; ``blocks.*`` stands for ``count`` blocks.
        flops: FLOPs on stored weights.
        dense_flops: FLOPs if no zero is skipped.
        bytes: bytes of all operands and results, each moved once; ``index_bytes`` are not among them.
        index_bytes: bytes of the positions of nonzeros.
        sizes: what the efficiency depends on, by name: ``width`` (geometric mean of a matrix's sides), ``tokens``,
            ``density``, ``context``, ``d_head``, ``vocabulary``, ``features``, ``elements``.
        count: number of executions.
        layers: the blocks it stands for, if they are known.
    """

    kind: str
    phase: str
    module: str
    flops: Number
    dense_flops: Number
    bytes: Number
    index_bytes: Number = 0.0
    sizes: Mapping[str, Number] = field(default_factory=dict)
    count: Number = 1.0
    layers: tuple[int, ...] | None = None

    @property
    def is_sparse(self) -> bool:
        """Whether the operation has a matrix whose zeros are not stored."""
        return bool(np.any(np.asarray(self.index_bytes) > 0.0))


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
    rotary: bool = False
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
            rotary=config.positions == "rope",
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
    """

    count: Number
    densities: Mapping[str, Number] = field(default_factory=dict)
    indices: tuple[int, ...] | None = None


def step_operations(
    sizes: Sizes,
    context: Number,
    batch: Number,
    layers: Sequence[Layers] | None = None,
    *,
    value_bytes: float = 4.0,
    state_bytes: float = 4.0,
    training: bool = True,
) -> list[Operation]:
    """Return the operations of one step, in the order of the forward pass, each followed by its backward pass.

    Args:
        sizes: the model.
        context: T. batch: B.
        layers: blocks by density; None is dense.
        value_bytes: bytes of an activation and of a weight in a product.
        state_bytes: bytes of each value that the optimizer reads or writes.
        training: False gives the forward pass alone.
    """
    groups = [Layers(sizes.layers)] if layers is None else list(layers)
    list_ = _List(sizes, context, batch, value_bytes, training)
    list_.embedding()
    weights: Number = _outer_weights(sizes)
    for group in groups:
        list_.block(group)
        weights = weights + group.count * _block_weights(sizes, group.densities)
    list_.outside("final_norm", NORM, elements=sizes.width, passes=(2.0, 4.0), flops=(7.0, 12.0))
    list_.head()
    operations = list_.operations
    if training:
        moved = _ADAMW_VALUES * state_bytes * weights
        operations.append(
            Operation(
                OPTIMIZER,
                UPDATE,
                "optimizer",
                flops=_ADAMW_FLOPS * weights,
                dense_flops=_ADAMW_FLOPS * (_outer_weights(sizes) + sizes.layers * _block_weights(sizes, {})),
                bytes=moved,
                sizes={"elements": weights},
            )
        )
    return operations


def _block_weights(sizes: Sizes, densities: Mapping[str, Number]) -> Number:
    """Return the stored weights of a block."""
    total: Number = 2.0 * sizes.width * (2.0 if sizes.layernorm and sizes.biased else 1.0)
    for name, (rows, columns) in sizes.matrices().items():
        total = total + nonzeros(rows, columns, densities.get(name, 1.0)) + (rows if sizes.biased else 0.0)
    return total


def _outer_weights(sizes: Sizes) -> Number:
    """Return the weights outside of the blocks."""
    tables = sizes.vocabulary * (1.0 if sizes.tied else 2.0) + sizes.positions
    return tables * sizes.width + sizes.width * (2.0 if sizes.layernorm and sizes.biased else 1.0)


def nonzeros(rows: Number, columns: Number, density: Number) -> Number:
    """Return the stored weights of a matrix: the exact count of a random pattern, rounded half to even."""
    return (
        np.round(density * (rows * columns)) if isinstance(density, np.ndarray) else np.rint(density * rows * columns)
    )


@dataclass
class _List:
    """The operations of a step as they are put together."""

    sizes: Sizes
    context: Number
    batch: Number
    value_bytes: float
    training: bool
    operations: list[Operation] = field(default_factory=list)

    @property
    def tokens(self) -> Number:
        return self.batch * self.context

    def block(self, group: Layers) -> None:
        sizes = self.sizes
        self.inside(group, "attn_norm", NORM, sizes.width, passes=(2.0, 4.0), flops=(7.0, 12.0))
        self.linear(group, "attn.qkv")
        if sizes.rotary:
            turned = sizes.width + sizes.kv_width
            self.inside(group, "attn.rotary", ROTARY, turned, passes=(4.0, 4.0), flops=(3.0, 3.0))
        self.attention(group)
        self.linear(group, "attn.out")
        self.inside(group, "attn_add", ADD, sizes.width, passes=(3.0, 3.0), flops=(2.0, 1.0))
        self.inside(group, "mlp_norm", NORM, sizes.width, passes=(2.0, 4.0), flops=(7.0, 12.0))
        if sizes.gated:
            self.linear(group, "mlp.gate")
        self.linear(group, "mlp.up")
        # Gated: silu and a product forward; both and their gradients backward.
        passes, work = ((5.0, 8.0), (6.0, 12.0)) if sizes.gated else ((2.0, 3.0), (8.0, 14.0))
        kind = SWIGLU if sizes.gated else GELU
        self.inside(group, "mlp.activation", kind, sizes.ffn, passes=passes, flops=work)
        self.linear(group, "mlp.down")
        self.inside(group, "mlp_add", ADD, sizes.width, passes=(3.0, 3.0), flops=(2.0, 1.0))

    def linear(self, group: Layers, name: str) -> None:
        rows, columns = self.sizes.matrices()[name]
        density = group.densities.get(name, 1.0)
        nnz = nonzeros(rows, columns, density)
        index = np.where(np.asarray(density) < 1.0, INDEX_BYTES * nnz + 8.0 * (rows + 1.0), 0.0)
        sizes = {"width": np.sqrt(rows * columns), "tokens": self.tokens, "density": density}
        moved = self.value_bytes * (self.tokens * (rows + columns) + nnz)
        for phase, factor in self._phases(1.0, 2.0):
            self.operations.append(
                Operation(
                    LINEAR,
                    phase,
                    f"blocks.*.{name}",
                    flops=factor * 2.0 * self.tokens * nnz,
                    dense_flops=factor * 2.0 * self.tokens * rows * columns,
                    bytes=factor * moved,
                    index_bytes=factor * (index if index.ndim else float(index)),
                    sizes=sizes,
                    count=group.count,
                    layers=group.indices,
                )
            )

    def attention(self, group: Layers) -> None:
        sizes = self.sizes
        flops = 4.0 * self.tokens * self.context * sizes.width
        moved = self.value_bytes * self.tokens * (2.0 * sizes.width + 2.0 * sizes.kv_width)
        at = {"context": self.context, "d_head": sizes.width / sizes.heads, "tokens": self.tokens}
        for phase, factor in self._phases(1.0, 2.0):
            self.operations.append(
                Operation(
                    ATTENTION,
                    phase,
                    "blocks.*.attn",
                    flops=factor * flops,
                    dense_flops=factor * flops,
                    bytes=factor * moved,
                    sizes=at,
                    count=group.count,
                    layers=group.indices,
                )
            )

    def inside(
        self,
        group: Layers,
        name: str,
        kind: str,
        elements: Number,
        passes: tuple[float, float],
        flops: tuple[float, float] = (0.0, 0.0),
    ) -> None:
        self._pass(f"blocks.*.{name}", kind, elements, passes, flops, group.count, group.indices)

    def outside(
        self,
        name: str,
        kind: str,
        elements: Number,
        passes: tuple[float, float],
        flops: tuple[float, float] = (0.0, 0.0),
    ) -> None:
        self._pass(name, kind, elements, passes, flops, 1.0, None)

    def embedding(self) -> None:
        sizes = self.sizes
        self.outside("embed", EMBEDDING, sizes.width, passes=(2.0, 3.0))
        if self.training:
            # A gradient of the whole table, which is added to that of a tied head.
            table = sizes.vocabulary * sizes.width
            moved = (5.0 if sizes.tied else 2.0) * self.value_bytes * table
            self.operations.append(Operation(ADD, BACKWARD, "embed", 0.0, 0.0, moved, sizes={"elements": table}))

    def head(self) -> None:
        sizes, tokens = self.sizes, self.tokens
        flops = 2.0 * tokens * sizes.vocabulary * sizes.width
        moved = self.value_bytes * (tokens * (sizes.width + sizes.vocabulary) + sizes.vocabulary * sizes.width)
        at = {
            "width": np.sqrt(sizes.vocabulary * sizes.width),
            "tokens": tokens,
            "density": 1.0,
            "vocabulary": sizes.vocabulary,
            "features": sizes.width,
        }
        for phase, factor in self._phases(1.0, 2.0):
            self.operations.append(
                Operation(
                    HEAD,
                    phase,
                    "head",
                    flops=factor * flops,
                    dense_flops=factor * flops,
                    bytes=factor * moved,
                    sizes=at,
                )
            )
        self._pass("loss", SOFTMAX, sizes.vocabulary, (4.0, 3.0), (5.0, 3.0), 1.0, None)

    def _pass(
        self,
        module: str,
        kind: str,
        features: Number,
        passes: tuple[float, float],
        flops: tuple[float, float],
        count: Number,
        layers: tuple[int, ...] | None,
    ) -> None:
        """Add passes over activations of ``features`` per token, as often as ``passes`` says for each direction."""
        elements = self.tokens * features
        for (phase, moves), each in zip(self._phases(*passes), flops, strict=False):
            self.operations.append(
                Operation(
                    kind,
                    phase,
                    module,
                    flops=each * elements,
                    dense_flops=each * elements,
                    bytes=moves * self.value_bytes * elements,
                    sizes={"elements": elements},
                    count=count,
                    layers=layers,
                )
            )

    def _phases(self, forward: float, backward: float) -> list[tuple[str, float]]:
        phases = [(FORWARD, forward)]
        return [*phases, (BACKWARD, backward)] if self.training else phases
