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

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from sparsetrain.cost.sizes import Layers, Number, Sizes, nonzeros, trained_weights
from sparsetrain.models.cross_entropy import chunk_tokens

LINEAR, HEAD, ATTENTION = "linear", "head", "attention"
NORM, ELEMENTWISE, SOFTMAX, EMBEDDING, OPTIMIZER = "norm", "elementwise", "softmax", "embedding", "optimizer"
PRODUCTS = (LINEAR, HEAD, ATTENTION)
"""Kinds whose FLOPs are those of matrix products."""

ADD, BIAS, ROTARY, GELU, SWIGLU = "add", "bias", "rotary", "gelu", "swiglu"
"""Names of element-wise operations whose times differ."""

FORWARD, BACKWARD, UPDATE = "forward", "backward", "update"

INDEX_BYTES, ROW_BYTES = 4, 8  # of a nonzero's column and of a row pointer, as the layers store them
# Per parameter; the pass reads weight, gradient and two moments, and writes all but the gradient.
_ADAMW_FLOPS, _ADAMW_VALUES = 14, 7


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
        curve: the name that its efficiency has in a machine's file; empty is the kind.
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
    curve: str = ""

    @property
    def is_sparse(self) -> bool:
        """Whether the operation has a matrix whose zeros are not stored."""
        return bool(np.any(np.asarray(self.index_bytes) > 0.0))


def step_operations(
    sizes: Sizes,
    context: Number,
    batch: Number,
    layers: Sequence[Layers] | None = None,
    *,
    value_bytes: float = 4.0,
    state_bytes: float = 4.0,
    training: bool = True,
    cached: Number = 0.0,
    frozen: Collection[str] = (),
    prompt_tokens: Number = 0.0,
    last_logits: bool = False,
    whole_logits: bool = False,
) -> list[Operation]:
    """Return the operations of one step, in the order of the forward pass, each followed by its backward pass.

    Args:
        sizes: the model.
        context: T. batch: B.
        layers: blocks by density, in their order; None is dense.
        value_bytes: bytes of an activation and of a weight in a product.
        state_bytes: bytes of each value that the optimizer reads or writes.
        training: False gives the forward pass alone.
        cached: tokens of each sequence before these, whose keys and values are in a cache.
        frozen: names of parameters outside of the blocks without a gradient: ``embed``, ``positions``, ``final_norm``,
            ``head``. A tied head is frozen with the embedding.
        prompt_tokens: learned vectors of a soft prompt, among the T tokens.
        last_logits: whether the head is computed for the last token of a sequence only.
        whole_logits: whether the logits of all tokens are computed at once, as most implementations for GPUs do, and
            not chunk by chunk.
    """
    groups = [Layers(sizes.layers)] if layers is None else list(layers)
    list_ = _List(sizes, context, batch, value_bytes, training, cached)
    list_.flows = bool(np.any(np.asarray(prompt_tokens) > 0.0))
    list_.embedding(frozen)
    for group in groups:
        list_.block(group)
    list_.norm("final_norm", "final_norm" not in frozen, 1.0, None)
    list_.head(("embed" if sizes.tied else "head") not in frozen, last_logits, whole_logits)
    operations = list_.operations
    if training:
        weights = trained_weights(sizes, groups, frozen) + prompt_tokens * sizes.width
        full = [Layers(group.count, {}, None, group.frozen) for group in groups]
        dense = trained_weights(sizes, full, frozen) + prompt_tokens * sizes.width
        operations.append(
            Operation(
                OPTIMIZER,
                UPDATE,
                "optimizer",
                flops=_ADAMW_FLOPS * weights,
                dense_flops=_ADAMW_FLOPS * dense,
                bytes=_ADAMW_VALUES * state_bytes * weights,
                sizes={"elements": weights},
            )
        )
    return operations


@dataclass
class _List:
    """The operations of a step as they are put together; ``flows`` tells whether the activations have a gradient."""

    sizes: Sizes
    context: Number
    batch: Number
    value_bytes: float
    training: bool
    cached: Number
    flows: bool = False
    operations: list[Operation] = field(default_factory=list)

    @property
    def tokens(self) -> Number:
        return self.batch * self.context

    def embedding(self, frozen: Collection[str]) -> None:
        """Add the look-up. Its gradient is a whole table, filled with zeros first, and a tied head adds its own."""
        sizes, tables = self.sizes, 2.0 if np.any(np.asarray(self.sizes.positions) > 0.0) else 1.0
        rows = (0.0 if "embed" in frozen else sizes.vocabulary * (4.0 if sizes.tied else 1.0)) + (
            0.0 if "positions" in frozen else sizes.positions
        )
        trained = "embed" not in frozen or (tables > 1.0 and "positions" not in frozen)
        self.passes("embed", EMBEDDING, sizes.width, (2.0 * tables, 3.0 * tables), trained=trained, rows=rows)

    def block(self, group: Layers) -> None:
        sizes, at = self.sizes, (group.count, group.indices)
        self.norm("blocks.*.attn_norm", "attn_norm" not in group.frozen, *at)
        self.linear(group, "attn.qkv")
        if sizes.rotated:
            turned = sizes.width + sizes.kv_width
            # Half turned, products with both tables, their sum, and a copy beside the values.
            self.passes("blocks.*.attn.rotary", ELEMENTWISE, turned, (13.0, 13.0), (3.0, 3.0), *at, curve=ROTARY)
        self.attention(group)
        self.linear(group, "attn.out")
        self.passes("blocks.*.attn_add", ELEMENTWISE, sizes.width, (3.0, 3.0), (2.0, 1.0), *at, curve=ADD)
        self.norm("blocks.*.mlp_norm", "mlp_norm" not in group.frozen, *at)
        entered = self.flows
        if sizes.gated:
            self.linear(group, "mlp.gate")
        gate, self.flows = self.flows, entered
        self.linear(group, "mlp.up")
        self.flows = self.flows or gate
        # Gated: silu and a product forward; both and their gradients backward.
        passes, work = ((5.0, 9.0), (6.0, 12.0)) if sizes.gated else ((2.0, 3.0), (8.0, 14.0))
        curve = SWIGLU if sizes.gated else GELU
        self.passes("blocks.*.mlp.activation", ELEMENTWISE, sizes.ffn, passes, work, *at, curve=curve)
        self.linear(group, "mlp.down")
        self.passes("blocks.*.mlp_add", ELEMENTWISE, sizes.width, (3.0, 3.0), (2.0, 1.0), *at, curve=ADD)

    def norm(self, module: str, trained: bool, count: Number, layers: tuple[int, ...] | None) -> None:
        self.passes(module, NORM, self.sizes.width, (2.0, 4.0), (7.0, 12.0), count, layers, trained)

    def linear(self, group: Layers, name: str) -> None:
        rows, columns = self.sizes.matrices()[name]
        density = group.densities.get(name, 1.0)
        nnz = nonzeros(rows, columns, density)
        index = np.where(np.asarray(density) < 1.0, INDEX_BYTES * nnz + ROW_BYTES * (rows + 1.0), 0.0)
        sizes = {"width": np.sqrt(rows * columns), "tokens": self.tokens, "density": density}
        moved = self.value_bytes * (self.tokens * (rows + columns) + nnz)
        for phase, factor in self._phases(1.0, self._gradients(name not in group.frozen)):
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
        if self.sizes.biased:
            # A dense product adds its bias itself. The gradient of a bias is a sum over the tokens.
            forward, backward = 2.0 * np.where(index > 0.0, 1.0, 0.0), 1.0 if name not in group.frozen else 0.0
            for phase, factor in self._phases(1.0, backward):
                moves: Number = forward if phase == FORWARD else factor
                elements = self.tokens * rows
                self.operations.append(
                    Operation(
                        ELEMENTWISE,
                        phase,
                        f"blocks.*.{name}",
                        flops=np.minimum(moves, 1.0) * elements,
                        dense_flops=np.minimum(moves, 1.0) * elements,
                        bytes=self.value_bytes * moves * elements,
                        sizes={"elements": elements},
                        count=group.count,
                        layers=group.indices,
                        curve=BIAS,
                    )
                )

    def attention(self, group: Layers) -> None:
        sizes = self.sizes
        keys = self.cached + self.context
        flops = 4.0 * self.tokens * keys * sizes.width
        moved = self.value_bytes * (2.0 * self.tokens * sizes.width + 2.0 * self.batch * keys * sizes.kv_width)
        at = {"context": keys, "d_head": sizes.width / sizes.heads, "tokens": self.tokens}
        for phase, factor in self._phases(1.0, 2.0 * self.flows):
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

    def head(self, trained: bool, last: bool, whole: bool) -> None:
        """Add the head and the loss, whole or chunk by chunk as `sparsetrain.models.cross_entropy` computes them."""
        sizes, tokens = self.sizes, self.batch if last else self.tokens
        flops = 2.0 * tokens * sizes.vocabulary * sizes.width
        table, rows = sizes.vocabulary * sizes.width, tokens * (sizes.width + sizes.vocabulary)
        chunks = np.ceil(tokens / _chunk(sizes.vocabulary)) if self.training and not whole else 1.0
        at = {
            "width": np.sqrt(table),
            "tokens": tokens,
            "density": 1.0,
            "vocabulary": sizes.vocabulary,
            "features": sizes.width,
        }
        needed = float(self.flows), float(trained)
        gradients = needed[0] * (rows + chunks * table) + needed[1] * (rows + (2.0 * chunks + 3.0) * table)
        for (phase, factor), moved in zip(
            self._phases(1.0, self._gradients(trained)), (rows + chunks * table, gradients), strict=False
        ):
            self.operations.append(
                Operation(
                    HEAD,
                    phase,
                    "head",
                    flops=factor * flops,
                    dense_flops=factor * flops,
                    bytes=self.value_bytes * moved,
                    sizes=at,
                )
            )
        if self.training:
            self.passes("loss", SOFTMAX, sizes.vocabulary, (6.0, 2.0), (5.0, 3.0))

    def passes(
        self,
        module: str,
        kind: str,
        features: Number,
        passes: tuple[float, float],
        flops: tuple[float, float] = (0.0, 0.0),
        count: Number = 1.0,
        layers: tuple[int, ...] | None = None,
        trained: bool = False,
        rows: Number = 0.0,
        curve: str = "",
    ) -> None:
        """Add passes over activations of ``features`` per token, as often as ``passes`` says for each direction.

        The backward pass also goes over ``rows`` of the model's width.
        """
        elements = self.tokens * features
        self.flows = self.flows or trained
        more = (0.0, rows * self.sizes.width)
        for (phase, moves), each, extra in zip(self._phases(*passes), flops, more, strict=False):
            if phase == BACKWARD and not self.flows:
                continue
            self.operations.append(
                Operation(
                    kind,
                    phase,
                    module,
                    flops=each * elements,
                    dense_flops=each * elements,
                    bytes=self.value_bytes * (moves * elements + extra),
                    sizes={"elements": elements + extra / moves},
                    count=count,
                    layers=layers,
                    curve=curve,
                )
            )

    def _gradients(self, trained: bool) -> float:
        """Return the products of a backward pass: one for the input, one for the weights; both may be needless."""
        needed = float(self.flows) + float(trained)
        self.flows = self.flows or trained
        return needed

    def _phases(self, forward: float, backward: float) -> list[tuple[str, float]]:
        phases = [(FORWARD, forward)]
        return [*phases, (BACKWARD, backward)] if self.training and backward else phases


def _chunk(vocabulary: Number) -> Number:
    different, where = np.unique(vocabulary, return_inverse=True)  # few, also among many configurations
    sizes = np.array([float(chunk_tokens(int(rows))) for rows in different])[where]
    return sizes.reshape(np.shape(vocabulary)) if np.ndim(vocabulary) else sizes.item()
