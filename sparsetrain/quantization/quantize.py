"""`quantize`: replace the layers of a model by ones that hold codes of 4 or 8 bits."""

from __future__ import annotations

from collections import Counter
from typing import TypeVar

from torch import Tensor, nn

from sparsetrain import wrappers
from sparsetrain.errors import UserError
from sparsetrain.models.head import Head
from sparsetrain.quantization.codes import BITS
from sparsetrain.quantization.layers import (
    PackedMatrix,
    Quantized,
    QuantizedEmbedding,
    QuantizedLinear,
    QuantizedSparseLinear,
)
from sparsetrain.sparsity.layers.foreign import (
    adapters_of,
    check_unwrapped,
    is_linear,
    matrix_of,
    move_hooks,
    refusal,
    uses_of,
)
from sparsetrain.sparsity.layers.linear import SparseLinear

Model = TypeVar("Model", bound=nn.Module)

# torch's attention reads the weight of its output projection without calling the layer, also in fused kernels.
_READ_BY_OTHERS = ("NonDynamicallyQuantizableLinear",)


def quantize(model: Model, bits: int = 4, group: int = 64) -> Model:
    """Store the weights of linear, sparse and embedding layers in 4 or 8 bits, in place; returns ``model``.

    Each group of ``group`` weights of a row, or of the values of a sparse layer, shares a scale and an offset of 16
    bits: 4.5 bits a weight at the defaults, 0.28 of bfloat16. Both are searched for the least squared error, and no
    data are needed. A head that is tied to an embedding shares its codes. The positions of a sparse layer are packed
    too, at 75 % sparsity in 0.43 bytes each.

    The model is then for inference: it is in evaluation mode, no parameter requires a gradient, and ``train()`` is
    refused. Weights are decoded in each forward pass, so memory is saved and not time. Norms and biases stay as they
    are, and so do layers with a forward method of their own, which `sparsetrain.sparsify` would not replace either.

    Args:
        model: any model that is not itself a single layer.
        bits: 4 or 8.
        group: the number of weights that share a scale, at least 2; the last group of a row may be short.

    Raises:
        UserError: ``model`` is no module; ``bits`` or ``group`` is refused; a weight is not finite; the model has no
            layer to quantize, is one, or is inside DDP, FSDP or a compiled module. The model is then unchanged.
    """
    if not isinstance(model, nn.Module):
        raise UserError(f"model is a {type(model).__name__}, not a torch.nn.Module")
    if isinstance(bits, bool) or not isinstance(bits, int) or bits not in BITS:
        raise UserError(f"bits={bits!r} is not one of {', '.join(map(str, BITS))}")
    if isinstance(group, bool) or not isinstance(group, int) or not 2 <= group < 2**31:
        raise UserError(f"group={group!r} is not an integer of at least 2")
    check_unwrapped(model, "quantize")
    found = _layers(model)
    if not found:
        raise UserError("the model has no linear, sparse or embedding layer to quantize")
    if any(name == "" for name, _ in found):
        raise UserError("the model is itself a layer: quantize the model that holds it")
    for name, _ in found:
        parent, _, child = name.rpartition(".")
        if wrappers.wrapped_child(wrappers.find_module(model, parent).get_submodule(child)) is not None:
            raise UserError(f"{name} is wrapped; quantize the bare model first, then compile or wrap it")
    made: dict[nn.Module, Quantized] = {}
    matrices: dict[int, PackedMatrix] = {}
    for name, layer in found:
        if layer not in made:
            try:
                made[layer] = _quantized(layer, bits, group, matrices)
            except UserError as error:
                raise UserError(f"{name}: {error}") from None
            move_hooks(layer, made[layer])
    for name, layer in found:
        wrappers.replace_module(model, name, made[layer])
    model.requires_grad_(False)
    model.eval()
    return model


def quantized_layers(model: nn.Module) -> dict[str, Quantized]:
    """Return the layers that `quantize` made, by qualified name; a layer of two places has the first name."""
    return {name: module for name, module in wrappers.named_modules(model) if isinstance(module, Quantized)}


def _layers(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Return every place of a layer that can be quantized, by name."""
    uses, adapters = uses_of(model), adapters_of(model)
    everything = list(wrappers.named_modules(model, remove_duplicate=False))
    places = [(name, module) for name, module in everything if _suits(name, module, adapters)]
    held = Counter(id(_matrix(layer)) for _, layer in places if not isinstance(layer, SparseLinear))
    # A weight that some other module reads too must stay.
    return [
        (name, layer)
        for name, layer in places
        if isinstance(layer, SparseLinear) or held[id(_matrix(layer))] == uses[id(_matrix(layer))]
    ]


def _suits(name: str, module: nn.Module, adapters: tuple[str, ...]) -> bool:
    if isinstance(module, SparseLinear):
        return type(module).forward is SparseLinear.forward and not module.values.is_meta
    weight = module._parameters.get("weight")
    if weight is None or weight.is_meta or not weight.is_floating_point():
        return False
    if isinstance(module, nn.Embedding):
        plain = type(module).forward is nn.Embedding.forward and "forward" not in vars(module)
        return plain and module.max_norm is None and not module.sparse
    if isinstance(module, Head):
        return type(module).forward is Head.forward and "forward" not in vars(module) and module.bias is None
    plain = is_linear(module) and type(module).__name__ not in _READ_BY_OTHERS
    return plain and refusal(name, module, {}, adapters) is None


def _matrix(layer: nn.Module) -> Tensor | None:
    return layer._parameters.get("weight")


def _quantized(layer: nn.Module, bits: int, group: int, matrices: dict[int, PackedMatrix]) -> Quantized:
    """Return the layer of codes; ``matrices`` holds those of weights that were met before, by id."""
    if isinstance(layer, SparseLinear):
        return QuantizedSparseLinear.of(layer, bits, group)
    weight = _matrix(layer) if isinstance(layer, nn.Embedding) else matrix_of(layer)
    assert weight is not None
    key = id(_matrix(layer))
    if key not in matrices:
        matrices[key] = PackedMatrix.of(weight, bits, group)
    if isinstance(layer, nn.Embedding):
        return QuantizedEmbedding(matrices[key])
    return QuantizedLinear(matrices[key], layer._parameters.get("bias"))
