"""Weights that are kept outside of the machine and stream through it layer by layer, as on Cerebras systems.

Each matrix arrives for the forward pass and again for the backward pass, whose gradients leave in the other direction
at the same time. Of a sparse matrix only nonzeros travel, each with its position, unless all
weights are fewer bytes. The next weights arrive while the
machine computes, so what counts of a product is the longer of the two; what the computation does not hide is memory
(values) and index (positions). Several machines receive the same weights from one place, and the network adds up their
gradients on the way back, so replicas wait for nothing further; weights are updated where they are kept, as gradients
arrive.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from sparsetrain.cost.hardware import Machine
from sparsetrain.cost.operations import BACKWARD, HEAD, LINEAR, Operation
from sparsetrain.cost.sizes import Number
from sparsetrain.errors import UserError


def streamed_terms(
    operation: Operation, terms: Mapping[str, Number], machine: Machine, value_bytes: float
) -> dict[str, Number]:
    """Return the seconds of an operation by term where its weights arrive over the machine's first link.

    Args:
        operation: one of a step. terms: its seconds with weights on the machine.
        machine: its first link leads to the weights.
        value_bytes: bytes of a weight on the link.

    Raises:
        UserError: the machine has no link.
    """
    if operation.kind not in (LINEAR, HEAD):
        return dict(terms)
    if not machine.links:
        raise UserError(f"{machine.name}: execution is streamed, so links must have the one that the weights come by")
    passes = 2.0 if operation.phase == BACKWARD else 1.0  # operations count backward products twice
    work = 2.0 * passes * operation.sizes["tokens"]
    rate = machine.links[0].rate
    values, positions = value_bytes * operation.flops / work / rate, operation.index_bytes / passes / rate
    all_values = value_bytes * operation.dense_flops / work / rate
    fewer = np.asarray(values + positions <= all_values)
    values, positions = np.where(fewer, values, all_values), np.where(fewer, positions, 0.0)
    busy = terms.get("compute", 0.0) + terms.get("memory", 0.0) + terms.get("index", 0.0)
    waiting = np.maximum(values + positions - busy, 0.0)
    share = values / np.maximum(values + positions, 1e-300)
    return {
        **terms,
        "memory": terms.get("memory", 0.0) + waiting * share,
        "index": terms.get("index", 0.0) + waiting * (1.0 - share),
    }
