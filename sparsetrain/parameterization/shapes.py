"""How many inputs an output of a parameter sees, and how many outputs there are: what m_d is the ratio of."""

from __future__ import annotations

import math

from torch import nn

from sparsetrain.errors import UserError
from sparsetrain.parameterization.roles import EMBEDDING_TYPES, Place
from sparsetrain.parameterization.rules import MATRICES, Role
from sparsetrain.sparsity import SparseLinear
from sparsetrain.sparsity.surgery import is_conv1d

# Stacks of experts [E, in, out] of transformers that do not carry `is_transposed`.
_TRANSPOSED_STACKS = ("Llama4TextExperts",)


def fan_in(place: Place, dim: int | None = None) -> int:
    """Return the number of inputs of one output of a matrix, the length of an embedding's row, a norm or a bias.

    ====================================  =========================================
    weight                                fan_in
    ====================================  =========================================
    linear, recurrent, attention          its last dimension, [out, in]
    Hugging Face's Conv1D                 its first dimension, [in, out]
    convolution                           channels in a group times the kernel
    transposed convolution                channels in a group times kernel / stride
    bilinear                              the product of both inputs
    stacked experts                       the last dimension [E, out, in], or the middle one where the module says
                                          ``is_transposed``
    ====================================  =========================================

    Args:
        dim: the dimension that counts inputs, where the user has named it.
    """
    module, weight = place.module, place.parameter
    if isinstance(module, SparseLinear) and place.leaf == "values":
        return module.in_features
    if weight.ndim == 0:
        return 1
    if dim is not None:
        if not -weight.ndim <= dim < weight.ndim:
            raise UserError(f"fan_in: '{place.name}' has {weight.ndim} dimensions, so {dim} is none of them")
        return weight.shape[dim]
    if place.is_bias or weight.ndim == 1:
        return weight.shape[-1]
    if isinstance(module, nn.modules.conv._ConvTransposeNd):
        taps = math.prod(max(1, size // step) for size, step in zip(module.kernel_size, module.stride, strict=True))
        return module.in_channels // module.groups * taps
    if isinstance(module, nn.modules.conv._ConvNd | nn.Bilinear):
        return weight[0].numel()
    if is_conv1d(module):
        return weight.shape[0]
    return weight.shape[-2 if is_transposed_stack(place) else -1]


def fan_out(place: Place) -> int:
    """Return the number of outputs of a matrix, the length of anything else."""
    module, weight = place.module, place.parameter
    if isinstance(module, SparseLinear) and place.leaf == "values":
        return module.out_features
    if weight.ndim < 2 or place.is_bias or isinstance(module, EMBEDDING_TYPES) or is_conv1d(module):
        return weight.shape[-1] if weight.ndim else 1
    if isinstance(module, nn.modules.conv._ConvTransposeNd):
        return module.out_channels
    if weight.ndim == 3 and not isinstance(module, nn.modules.conv._ConvNd | nn.Bilinear):
        return weight.shape[-1 if is_transposed_stack(place) else -2]
    return weight.shape[0] // (3 if place.leaf == "in_proj_weight" else 1)


def is_transposed_stack(place: Place) -> bool:
    """Whether experts are stacked as [E, in, out]."""
    return place.parameter.ndim == 3 and (
        getattr(place.module, "is_transposed", False) is True or type(place.module).__name__ in _TRANSPOSED_STACKS
    )


def check_orientation(place: Place, base: Place, role: Role, said: bool) -> None:
    """Raise `UserError` where a stack of matrices may be [E, out, in] or [E, in, out] and m_d depends on which.

    With the same ratio to the base in both dimensions it does not, nor where the user has ``said`` it.
    """
    module = place.module
    known = isinstance(module, nn.modules.conv._ConvNd | nn.Bilinear | SparseLinear)
    if said or role not in MATRICES or place.parameter.ndim < 3 or known or hasattr(module, "is_transposed"):
        return
    if type(module).__name__ in _TRANSPOSED_STACKS or base.parameter.ndim != place.parameter.ndim:
        return
    (rows, columns), (base_rows, base_columns) = place.parameter.shape[-2:], base.parameter.shape[-2:]
    if rows * base_columns != columns * base_rows:
        raise UserError(
            f"parameterize: '{place.name}' {list(place.parameter.shape)} is a stack of matrices, and nothing says "
            f"which dimension counts inputs: pass fan_in={{'{place.name}': -1}} for [.., out, in], -2 for [.., in, out]"
        )
