"""fan_in and fan_out of parameters: the numbers of inputs and outputs that m_d and m_out are ratios of."""

from __future__ import annotations

import math

from torch import nn

from sparsetrain.errors import UserError
from sparsetrain.parameterization.roles import EMBEDDING_TYPES, Place
from sparsetrain.parameterization.rules import MATRICES, Role
from sparsetrain.sparsity import SparseLinear
from sparsetrain.sparsity.layers.surgery import is_conv1d

# Classes of stacked experts [E, in, out] in transformers that lack the attribute `is_transposed`.
_TRANSPOSED_STACKS = ("Llama4TextExperts",)


def fan_in(place: Place, dim: int | None = None) -> int:
    """Return the number of inputs per output of a matrix; for an embedding the row length, for a vector its length.

    ====================================  =========================================
    weight                                fan_in
    ====================================  =========================================
    linear, recurrent, attention          last dimension, [out, in]
    Hugging Face's Conv1D                 first dimension, [in, out]
    convolution                           channels per group times kernel size
    transposed convolution                channels per group times kernel size / stride
    bilinear                              product of both input sizes
    stacked experts                       last dimension, [E, out, in], or the middle one if the module has
                                          ``is_transposed``
    ====================================  =========================================

    Args:
        dim: the dimension that counts inputs, if the user has given it.
    """
    module, weight = place.module, place.parameter
    if isinstance(module, SparseLinear) and place.leaf == "values":
        return module.out_features if _is_flipped_slice(place, dim) else module.in_features
    if weight.ndim == 0:
        return 1
    if dim is not None:
        if not -weight.ndim <= dim < weight.ndim:
            raise UserError(f"fan_in: '{place.name}' has {weight.ndim} dimensions, so there is no dimension {dim}")
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
    """Return the number of outputs of a matrix, or the length of another parameter."""
    module, weight = place.module, place.parameter
    if isinstance(module, SparseLinear) and place.leaf == "values":
        return module.in_features if _is_flipped_slice(place, None) else module.out_features
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
        getattr(place.module, "is_transposed", False) is True or _holds_transposed(place.module)
    )


def _is_flipped_slice(place: Place, dim: int | None) -> bool:
    """Whether the sparse layer of an expert has swapped inputs and outputs, because its tensor is [E, in, out]."""
    if place.slice is None or not place.slice.stacked or place.slice.transposed:
        return False
    return dim in (-2, 1) or _holds_transposed(place.slice.holder)


def _holds_transposed(module: nn.Module) -> bool:
    return any(kind.__name__ in _TRANSPOSED_STACKS for kind in type(module).__mro__)


def check_orientation(place: Place, base: Place, role: Role, said: bool) -> None:
    """Raise `UserError` if a stack of matrices may be [E, out, in] or [E, in, out] and m_d depends on which.

    m_d does not depend on it if both dimensions have the same ratio to the base. ``said`` means that the user gave it.
    """
    stacks = [one for one in (place, base) if one.slice is None]
    holders = [one.module if one.slice is None else one.slice.holder for one in (place, base)]
    if said or role not in MATRICES or any(one.parameter.ndim < 3 for one in stacks):
        return
    if any(one.slice is not None and not one.slice.stacked for one in (place, base)):
        return
    for holder in holders:
        if isinstance(holder, nn.modules.conv._ConvNd | nn.Bilinear | SparseLinear):
            return
        if hasattr(holder, "is_transposed") or _holds_transposed(holder):
            return
    (rows, columns), (base_rows, base_columns) = _sides(place), _sides(base)
    if rows * base_columns != columns * base_rows:
        name = ".".join(place.dense)
        raise UserError(
            f"parameterize: '{name}' is a stack of matrices [{rows}, {columns}], and nothing says which dimension "
            f"counts inputs: pass fan_in={{'{name}': -1}} for [.., out, in], -2 for [.., in, out]"
        )


def _sides(place: Place) -> tuple[int, int]:
    """Return the last two dimensions of a stack of matrices, or of the sparse layer that holds one of its matrices."""
    if isinstance(place.module, SparseLinear):
        return place.module.out_features, place.module.in_features
    return place.parameter.shape[-2], place.parameter.shape[-1]
