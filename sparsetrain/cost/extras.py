"""Work of a step beside its products, element-wise passes and optimizer: what an implementation or a setting adds.

None of it counts in the total of a `sparsetrain.cost.ledger.Ledger`. The legend is that of
`sparsetrain.cost.operations`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from sparsetrain.cost.operations import (
    ATTENTION,
    BACKWARD,
    FORWARD,
    INDEX_BYTES,
    LINEAR,
    UPDATE,
    Operation,
)
from sparsetrain.cost.sizes import Layers, Number, Sizes, nonzeros

INDEX, COLUMNS, RECOMPUTATION = "index", "alibi columns", "recomputation"
DENSE_GRADIENT, MASK_UPDATE = "dense gradient", "mask update"

_ALIGNMENT = 8  # see `sparsetrain.models.positions.alibi_features`


def index_operations(operations: Sequence[Operation]) -> list[Operation]:
    """Return the index work of sparse products: an address for each nonzero and product.

    Its bytes are `Operation.index_bytes` of the products, and are not repeated here.
    """
    return [
        Operation(
            INDEX,
            operation.phase,
            operation.module,
            flops=operation.flops / (2.0 * operation.sizes["tokens"]),
            dense_flops=0.0,
            bytes=0.0,
            sizes={"tokens": operation.sizes["tokens"]},
            count=operation.count,
            layers=operation.layers,
        )
        for operation in operations
        if operation.kind == LINEAR and operation.is_sparse
    ]


def column_operations(operations: Sequence[Operation], sizes: Sizes, summands: int = 1) -> list[Operation]:
    """Return what the columns that carry ALiBi add to torch's fused attention: ``E / D`` of its products.

    Args:
        operations: those of a step. sizes: of the model.
        summands: columns that hold the bias: 1 in float32, 3 in 16 bits. Heads are padded to a multiple of 8.
    """
    width = np.asarray(sizes.width / sizes.heads)
    extra = summands + (-(width + summands)) % _ALIGNMENT
    share = float(extra / width) if width.ndim == 0 else extra / width
    return [
        replace(
            operation,
            kind=COLUMNS,
            flops=share * operation.flops,
            dense_flops=share * operation.dense_flops,
            bytes=share * operation.bytes,
        )
        for operation in operations
        if operation.kind == ATTENTION
    ]


def recomputed(operations: Sequence[Operation]) -> list[Operation]:
    """Return what activation checkpointing of every block adds: its products of the forward pass once more."""
    return [
        replace(operation, kind=RECOMPUTATION, phase=BACKWARD)
        for operation in operations
        if operation.kind in (LINEAR, ATTENTION) and operation.phase == FORWARD
    ]


def update_operations(
    sizes: Sizes,
    layers: Sequence[Layers],
    ranked: Number,
    needs_gradient: bool,
    value_bytes: float = 4.0,
) -> list[Operation]:
    """Return what an update of the masks adds to its step.

    A rule that grows by the gradient (RigL, arXiv 1911.11134) computes the dense gradient of each sparse matrix
    [R, C]: 2 R C FLOPs a token. Every rule compares the nonzeros to drop some, and the candidates to grow.

    Args:
        sizes: the model. layers: blocks by density.
        ranked: tokens whose dense gradient ranks the connections, those of the last micro-batch.
        needs_gradient: whether the rule grows by the gradient.
        value_bytes: bytes of an activation.
    """
    found = []
    for group in layers:
        for name, (rows, columns) in sizes.matrices().items():
            density = group.densities.get(name, 1.0)
            numel = rows * columns
            sparse = np.where(np.asarray(density) < 1.0, 1.0, 0.0)
            if not sparse.any():
                continue
            here = sparse if sparse.ndim else float(sparse)
            nnz = nonzeros(rows, columns, density)
            module = f"blocks.*.{name}"
            if needs_gradient:
                flops = here * 2.0 * ranked * numel
                moved = here * value_bytes * (ranked * (rows + columns) + 2.0 * numel)
                found.append(
                    Operation(
                        DENSE_GRADIENT,
                        UPDATE,
                        module,
                        flops=flops,
                        dense_flops=flops,
                        bytes=moved,
                        sizes={"width": np.sqrt(numel), "tokens": ranked, "density": 1.0},
                        count=group.count,
                        layers=group.indices,
                    )
                )
            compared = here * (nnz + (numel if needs_gradient else 0.0))
            found.append(
                Operation(
                    MASK_UPDATE,
                    UPDATE,
                    module,
                    flops=compared,
                    dense_flops=compared,
                    # Values and two moments move with their columns.
                    bytes=here * (value_bytes * numel + 2.0 * (3.0 * value_bytes + INDEX_BYTES) * nnz),
                    sizes={"elements": numel},
                    count=group.count,
                    layers=group.indices,
                )
            )
    return found
