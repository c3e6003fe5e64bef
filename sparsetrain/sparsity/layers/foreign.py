"""Linear layers of other libraries: what a sparse layer takes over and gives back, and which it cannot replace."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter
from torch.nn.utils import skip_init

from sparsetrain import wrappers
from sparsetrain.errors import UserError
from sparsetrain.sparsity.layers.linear import SparseLinear

# Subclasses of nn.Linear with a forward of their own that computes what nn.Linear computes. By name: transformers is
# an optional dependency.
_PLAIN_FORWARD = ("FalconLinear",)
_STANDARD = frozenset(vars(nn.Module())) - {"training"}
_SIZES = ("in_features", "out_features")
_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_is_full_backward_hook",
)


class Rows(nn.Linear):
    """Rows of a larger matrix as a linear layer without a bias, which shares its memory; it lives during surgery only.

    Args:
        holder: qualified name of the module that holds the matrix. child: the name of the layer to make there.
        weight: the rows, ``[out_features, in_features]``.
    """

    def __init__(self, holder: str, child: str, weight: Tensor, training: bool) -> None:
        nn.Module.__init__(self)
        self.out_features, self.in_features = weight.shape
        self.holder, self.child = holder, child
        self.weight = nn.Parameter(weight.detach(), weight.requires_grad)
        self.register_parameter("bias", None)
        self.training = training

    def copy(self) -> nn.Linear:
        """Return the rows as a dense layer with memory of its own."""
        weight = self.weight
        linear = nn.Linear(self.in_features, self.out_features, bias=False, device="meta")
        linear.weight = nn.Parameter(weight.detach().clone(), weight.requires_grad)
        return linear.train(self.training)


@dataclass(frozen=True)
class Origin:
    """The class of the dense layer that a sparse layer replaced, and the names of the attributes taken over."""

    cls: type[nn.Module]
    attributes: tuple[str, ...]


def is_conv1d(module: nn.Module) -> bool:
    """Whether ``module`` is Hugging Face's GPT-2 layer, a linear layer with a transposed weight ``[K, M]``."""
    # Recognised by its attributes, because transformers is an optional dependency.
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf") and hasattr(module, "nx")


def is_linear(module: nn.Module) -> bool:
    """Whether ``module`` is a dense linear layer, even one that cannot become sparse (see `refusal`)."""
    return isinstance(module, nn.Linear) or is_conv1d(module)


def shape_of(module: nn.Module) -> tuple[int, int]:
    """Return ``(out_features, in_features)`` of a linear or a sparse layer."""
    if is_conv1d(module):
        weight = module.weight
        assert isinstance(weight, Tensor)
        return (weight.shape[1], weight.shape[0])
    assert isinstance(module, nn.Linear | SparseLinear)
    return (module.out_features, module.in_features)


def matrix_of(module: nn.Module) -> Tensor | None:
    """Return the weight ``[out_features, in_features]`` of a linear layer, None if it is not a parameter."""
    weight = module._parameters.get("weight")
    return weight.t() if weight is not None and is_conv1d(module) else weight


# -- which layers cannot become sparse ---------------------------------------------------------------------------------


def uses_of(model: nn.Module) -> Counter[int]:
    """Return how many places of the model hold each parameter, by its id; a module held twice counts twice."""
    everything = [module for _, module in wrappers.named_modules(model, remove_duplicate=False)]
    return Counter(id(parameter) for module in everything for parameter in module.parameters(recurse=False))


def adapters_of(model: nn.Module) -> tuple[str, ...]:
    """Return the names of the adapter layers that peft put around layers of the model."""
    return tuple(name for name, module in wrappers.named_modules(model) if "base_layer" in module._modules)


def tied_heads(model: nn.Module, linears: Mapping[str, nn.Module]) -> set[str]:
    """Return the names of the linear layers that share their weight with an embedding."""
    tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding) and "weight" in m._parameters}
    return {name for name, layer in linears.items() if id(layer._parameters.get("weight")) in tables}


def refusal(name: str, module: nn.Module, uses: Mapping[int, int], adapters: tuple[str, ...] = ()) -> str | None:
    """Return why a sparse layer cannot replace a linear layer, None if it can.

    Args:
        uses: as `uses_of` gives it. adapters: as `adapters_of` gives it.
    """
    weight, bias = module._parameters.get("weight"), module._parameters.get("bias")
    if weight is None:
        return "its weight is computed (weight norm, a parametrization) or masked by torch's pruning"
    if isinstance(weight, UninitializedParameter):
        return "its size is not known yet (LazyLinear); run one forward pass first"
    if uses.get(id(weight), 0) > 1:
        return "its weight is shared with another module"
    if any(name.startswith(f"{adapter}.") for adapter in adapters):
        return "it belongs to an adapter of peft; make the model sparse first, or merge and unload the adapter"
    if type(weight) is not nn.Parameter or not weight.is_floating_point():
        return (
            f"its weight is quantized or sharded ({type(weight).__name__}, {str(weight.dtype).removeprefix('torch.')})"
        )
    if weight.is_meta:
        return "its weight is on the meta device; give it memory and values first"
    if weight.numel() == 0:
        return f"it has no weights ({weight.shape[0]}x{weight.shape[1]})"
    return _own_behaviour(module, weight, bias)


def _own_behaviour(module: nn.Module, weight: Tensor, bias: Tensor | None) -> str | None:
    """Return what a sparse layer would lose of a layer, None if nothing."""
    kind = type(module)
    if "forward" in vars(module) or "_compiled_call_impl" in vars(module):
        return "its forward was replaced on the object (by accelerate, or compiled); make it sparse first"
    plain = kind.forward is nn.Linear.forward or kind.__name__ in _PLAIN_FORWARD or is_conv1d(module)
    if not plain or kind.__call__ is not nn.Module.__call__:
        return f"its class {kind.__name__} has its own forward, which a sparse layer would not compute"
    extra = sorted({*module._parameters, *module._buffers, *module._modules} - {"weight", "bias"})
    if extra:
        return f"its class {kind.__name__} holds more than weight and bias ({', '.join(extra)})"
    if bias is None and getattr(module, "bias", None) is not None:
        return "its bias is computed (pruning, a parametrization)"
    if weight._backward_hooks or getattr(weight, "_post_accumulate_grad_hooks", None):
        return "its weight has gradient hooks, which would see another tensor"
    taken = [key for key in others_attributes(module) if hasattr(SparseLinear, key) and not hasattr(nn.Module, key)]
    if taken:
        return f"a sparse layer uses the name of its attribute '{taken[0]}' itself"
    return None


# -- there and back ----------------------------------------------------------------------------------------------------


def take_over(old: nn.Module, new: SparseLinear) -> SparseLinear:
    """Give a sparse layer the hooks, bias, mode and attributes of the dense layer that it replaces; return it."""
    attributes = others_attributes(old)
    for key in attributes:
        setattr(new, key, vars(old)[key])
    new.from_conv1d = is_conv1d(old)
    new._dense_origin = Origin(type(old), attributes)  # type: ignore[assignment]  # no module and no tensor
    _move(old, new, "values")
    return new


def give_back(layer: SparseLinear) -> nn.Module:
    """Return a dense layer of the class that the sparse layer replaced, or ``nn.Linear`` if it replaced none.

    It is exactly zero where the mask was. Hooks, bias, mode, and attributes that others put on either layer are those
    of the sparse layer.
    """
    origin = getattr(layer, "_dense_origin", Origin(nn.Linear, ()))
    linear = layer.to_linear()
    dense: nn.Module = linear
    if origin.cls is not nn.Linear:
        # Its constructor has unknown arguments, so only the state of `nn.Module` and the taken attributes are set.
        dense = origin.cls.__new__(origin.cls)
        nn.Module.__init__(dense)
        dense.weight = linear.weight
        dense.register_parameter("bias", linear.bias)
        if isinstance(dense, nn.Linear):
            dense.in_features, dense.out_features = layer.in_features, layer.out_features
    for key in {*origin.attributes, *_set_by_others(layer)}:
        if key in vars(layer):
            setattr(dense, key, vars(layer)[key])
    if is_conv1d(dense):
        dense.weight = nn.Parameter(linear.weight.detach().t().contiguous(), linear.weight.requires_grad)
    _move(layer, dense, "weight")
    return dense


def as_linear(module: nn.Module) -> nn.Linear:
    """Return ``module``, or an ``nn.Linear`` that shares the values of a Conv1D."""
    if isinstance(module, nn.Linear):
        return module
    weight = module.weight
    assert isinstance(weight, nn.Parameter)
    out_features, in_features = shape_of(module)
    linear = skip_init(nn.Linear, in_features, out_features, device=weight.device, dtype=weight.dtype)
    linear.weight = nn.Parameter(weight.detach().t(), weight.requires_grad)
    linear.register_parameter("bias", module._parameters.get("bias"))
    return linear.train(module.training)


def others_attributes(module: nn.Module) -> tuple[str, ...]:
    """Return the names of attributes of a module beside parameters, buffers, children, hooks, mode and sizes."""
    return tuple(key for key in vars(module) if key not in _STANDARD and key not in (*_SIZES, "training"))


def _set_by_others(layer: SparseLinear) -> list[str]:
    """Return the names of public attributes that were set on a sparse layer after it was built."""
    own = {"in_features", "out_features", "strict_topology", "training", *_STANDARD}
    return [key for key in vars(layer) if not key.startswith("_") and key not in own and not hasattr(SparseLinear, key)]


def move_hooks(old: nn.Module, new: nn.Module) -> None:
    """Give ``new`` the forward and backward hooks of ``old``, among them a parameterization's multipliers."""
    for key in _HOOKS:
        # The same dictionary objects: handles of `register_forward_hook` still remove hooks from them.
        setattr(new, key, getattr(old, key))


def _move(old: nn.Module, new: nn.Module, weight: str) -> None:
    move_hooks(old, new)
    if "bias" in old._parameters:
        new._parameters["bias"] = old._parameters["bias"]  # the same object, which other code may hold
    before = old._parameters["values" if weight == "weight" else "weight"]
    after = new._parameters[weight]
    assert before is not None
    assert after is not None
    for key, value in vars(before).items():
        setattr(after, key, value)  # such as `_no_weight_decay`
    new.train(old.training)


def check_unwrapped(model: nn.Module, verb: str) -> None:
    """Refuse to change the parameters of a model whose wrapper would keep using the old ones.

    Raises:
        UserError: the model, or a part of it, is inside DistributedDataParallel or FSDP.
    """
    for module in model.modules():
        sharded = any(
            hasattr(p, "placements") or getattr(p, "_fsdp_flattened", False) for p in module.parameters(False)
        )
        if isinstance(module, nn.parallel.DistributedDataParallel) or sharded or _is_fsdp(module):
            kind = "FSDP" if sharded or _is_fsdp(module) else type(module).__name__
            raise UserError(
                f"{verb}: the model is wrapped in {kind}, which holds its old parameters; {verb} the bare model first, "
                "then wrap it"
            )


def _is_fsdp(module: nn.Module) -> bool:
    return any(kind.__name__ in ("FullyShardedDataParallel", "FSDPModule") for kind in type(module).__mro__)
