"""What autograd saves for the backward pass of our models, in closed form; numbers may be arrays.

``torch.autograd.graph.saved_tensors_hooks`` sees the same tensors; parameters and the tokens themselves do not count.
Each of the two branches of a block saves its input and the input of its first matrix. Attention also saves queries,
keys and values, its result, and the logarithms of its denominators; the MLP saves two tensors of its width, or four if
it is gated. Attention scores are never stored. The loss saves the gradients of its input and of the head's weight,
which it computes on the way forward.

The legend is that of `sparsetrain.cost.operations`.
"""

from __future__ import annotations

from collections.abc import Collection

import numpy as np

from sparsetrain.cost.sizes import Number, Sizes
from sparsetrain.models.norm import LEAST

FLOAT = 4


def norm_values(sizes: Sizes, tokens: Number) -> Number:
    """Return the values that a norm saves: its input, and the moments of each row.

    Below a number of elements, torch computes RMSNorm by several operations, which save the normalised rows too.
    """
    moments = 2.0 if sizes.layernorm else 1.0
    elements = tokens * sizes.width
    twice = 0.0 if sizes.layernorm else np.where(np.asarray(elements) < LEAST["RMSNorm"], elements, 0.0)
    found = elements + moments * tokens + twice
    return found if np.ndim(found) else float(found)


def certain_values(sizes: Sizes, frozen: Collection[str] = ()) -> Number:
    """Return the values a token that a block saves on every device and with every kernel, without the moments of norms.

    Args:
        sizes: the model.
        frozen: names inside the block of matrices without a gradient, which need not save their inputs.
    """
    inputs = {"attn.qkv": sizes.width, "mlp.up": sizes.width, "mlp.down": sizes.ffn}  # attention saves that of `out`
    if sizes.gated and "mlp.gate" not in frozen:  # the gate saves the input of `up`
        frozen = set(frozen) - {"mlp.up"}
    matrices: Number = sum(width for name, width in inputs.items() if name not in frozen)
    norms, attention = 2.0 * sizes.width, 2.0 * sizes.width + 2.0 * sizes.kv_width
    return matrices + norms + attention + (3.0 if sizes.gated else 1.0) * sizes.ffn


def block_values(sizes: Sizes, tokens: Number, frozen: Collection[str] = (), kept: Number = 0.0) -> Number:
    """Return the values that a block saves, if its input has a gradient.

    Args:
        sizes: the model. tokens: N. frozen: as in `certain_values`.
        kept: values that sparse matrices keep beside their inputs, as the backend ``masked`` does.
    """
    more = 2.0 * norm_values(sizes, tokens) - 2.0 * tokens * sizes.width
    dropped = 2.0 * sizes.width if sizes.dropout else 0.0
    return tokens * (certain_values(sizes, frozen) + sizes.heads + dropped) + more + kept


def outer_values(sizes: Sizes, context: Number, tokens: Number, trained_head: bool = True) -> Number:
    """Return the values saved outside of the blocks.

    Args:
        sizes: the model. context: T. tokens: N.
        trained_head: whether the head's weight has a gradient.
    """
    head = tokens * sizes.width + (sizes.vocabulary * sizes.width if trained_head else 0.0)
    tables = 2.0 * context * sizes.rotated  # cosines and sines
    dropped = tokens * sizes.width if sizes.dropout else 0.0
    return norm_values(sizes, tokens) + head + tables + dropped
