"""How many inputs an output of a parameter sees, and how many outputs there are: what m_d is the ratio of."""

from __future__ import annotations

import math

from torch import nn

from sparsetrain.errors import UserError
from sparsetrain.parameterization.roles import EMBEDDING_TYPES, Place
from sparsetrain.parameterization.rules import MATRICES, Role
from sparsetrain.sparsity import SparseLinear
from sparsetrain.sparsity.layers.surgery import is_conv1d

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
        return module.out_features if _is_flipped_part(place, dim) else module.in_features
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
        return module.in_features if _is_flipped_part(place, None) else module.out_features
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


def _is_flipped_part(place: Place, dim: int | None) -> bool:
    """Whether the sparse layer of an expert has its inputs and outputs the other way round: it is of [E, in, out]."""
    if place.part is None or not place.part.stacked or place.part.transposed:
        return False
    return dim in (-2, 1) or _holds_transposed(place.part.holder)


def _holds_transposed(module: nn.Module) -> bool:
    return any(kind.__name__ in _TRANSPOSED_STACKS for kind in type(module).__mro__)


def check_orientation(place: Place, base: Place, role: Role, said: bool) -> None:
    """Raise `UserError` where a stack of matrices may be [E, out, in] or [E, in, out] and m_d depends on which.

    With the same ratio to the base in both dimensions it does not, nor where the user has ``said`` it.
    """
    stacks = [one for one in (place, base) if one.part is None]
    holders = [one.module if one.part is None else one.part.holder for one in (place, base)]
    if said or role not in MATRICES or any(one.parameter.ndim < 3 for one in stacks):
        return
    if any(one.part is not None and not one.part.stacked for one in (place, base)):
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
    """Return the last two dimensions of a stack of matrices, of which a sparse layer may hold one."""
    if isinstance(place.module, SparseLinear):
        return place.module.out_features, place.module.in_features
    return place.parameter.shape[-2], place.parameter.shape[-1]
