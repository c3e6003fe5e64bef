"""Experts that a module holds as one tensor ``[experts, out, in]``: the matrix of each expert becomes a layer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from sparsetrain.sparsity.layers.foreign import Rows
from sparsetrain.sparsity.layers.linear import SparseLinear

LAYERS = "_layers"  # suffix of the tensor's name that makes the name of the list of layers
_SIZES = {
    *(Tensor.size, Tensor.dim, Tensor.numel, Tensor.__len__),
    *(getattr(Tensor, name).__get__ for name in ("shape", "dtype", "device", "ndim", "requires_grad", "layout")),
}


class _Lazy(Tensor):
    """A dense tensor that layers compute when a function needs its entries."""

    _dense: Callable[[], Tensor]

    @staticmethod
    def _make(cls: type[Any], like: Tensor, shape: tuple[int, ...]) -> Any:
        return Tensor._make_wrapper_subclass(cls, shape, dtype=like.dtype, device=like.device)

    def dense(self) -> Tensor:
        """Return the tensor, differentiable in the values of its layers."""
        return self._dense()

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _SIZES:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        called = _as_layer_call(func, args, kwargs)
        if called is not None:
            return called()
        args, kwargs = tree_map(lambda x: x.dense() if isinstance(x, _Lazy) else x, (args, kwargs))
        return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch itself leaves the defaults out in the stub
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Compute with the dense tensor if a call has bypassed ``__torch_function__``."""
        args, kwargs = tree_map(lambda x: x.dense() if isinstance(x, _Lazy) else x, (args, kwargs or {}))
        return func(*args, **kwargs)


class StackedExperts(_Lazy):
    """The tensor ``[experts, out, in]`` (transposed: ``[experts, in, out]``) over one layer for each expert.

    ``F.linear(x, stack[expert])``, and ``x @ stack[expert]`` where it is transposed, call the expert's layer. Every
    other function gets the dense tensor.
    """

    layers: nn.ModuleList
    transposed: bool


class ExpertMatrix(_Lazy):
    """The matrix of one expert."""

    layer: nn.Module
    transposed: bool


def _stack(layers: nn.ModuleList, transposed: bool) -> Tensor:
    def dense() -> Tensor:
        stacked = torch.stack([cast(Tensor, layer.weight) for layer in layers])
        return stacked.transpose(1, 2) if transposed else stacked

    if torch.compiler.is_compiling():
        return dense()
    first = _values(layers[0])
    rows, columns = cast(int, layers[0].out_features), cast(int, layers[0].in_features)
    shape = (len(layers), columns, rows) if transposed else (len(layers), rows, columns)
    stack = StackedExperts._make(StackedExperts, first, shape)
    stack.layers, stack.transposed, stack._dense = layers, transposed, dense
    return cast(Tensor, stack)


def _matrix(stack: StackedExperts, index: int) -> ExpertMatrix:
    layer = stack.layers[index]

    def dense() -> Tensor:
        weight = cast(Tensor, layer.weight)
        return weight.t() if stack.transposed else weight

    matrix = ExpertMatrix._make(ExpertMatrix, _values(layer), tuple(stack.shape[1:]))
    matrix.layer, matrix.transposed, matrix._dense = layer, stack.transposed, dense
    return cast(ExpertMatrix, matrix)


def _values(layer: nn.Module) -> Tensor:
    return layer.values if isinstance(layer, SparseLinear) else cast(Tensor, layer.weight)


def _as_layer_call(
    func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Callable[[], Any] | None:
    """Return a call of an expert's layer that computes ``func``, None if ``func`` is no such product."""
    if func is Tensor.__getitem__ and isinstance(args[0], StackedExperts):
        return (lambda: _matrix(args[0], int(args[1]))) if _is_integer(args[1]) else None
    if func is F.linear and len(args) > 1 and isinstance(args[1], ExpertMatrix) and not args[1].transposed:
        bias = args[2] if len(args) > 2 else kwargs.get("bias")
        output = args[1].layer
        return (lambda: output(args[0])) if bias is None else (lambda: output(args[0]) + bias)
    products = (torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.mm, Tensor.mm)
    if func in products and len(args) == 2 and isinstance(args[1], ExpertMatrix) and args[1].transposed:
        return None if isinstance(args[0], _Lazy) else lambda: args[1].layer(args[0])
    return None


def _is_integer(index: Any) -> bool:
    if isinstance(index, Tensor):
        return index.ndim == 0 and index.dtype in (torch.int64, torch.int32)
    return isinstance(index, int) and not isinstance(index, bool)


# -- into a module and out of it ---------------------------------------------------------------------------------------


def stacks_of(name: str, module: nn.Module, uses: Mapping[int, int]) -> list[str]:
    """Return the names of the parameters of a module that stack the matrices of experts and can be split.

    They have three dimensions, and the module's name or class speaks of experts.
    """
    kind = type(module)
    if kind.__module__.startswith("torch.") or "expert" not in f"{name}.{kind.__name__}".lower():
        return []
    return [
        leaf
        for leaf, weight in module._parameters.items()
        if weight is not None
        and weight.ndim == 3
        and min(weight.shape) > 1
        and "bias" not in leaf
        and type(weight) is nn.Parameter
        and weight.is_floating_point()
        and not weight.is_meta
        and not weight._backward_hooks
        and uses.get(id(weight), 0) == 1
        and not hasattr(module, leaf + LAYERS)
    ]


def experts_of(name: str, module: nn.Module, leaf: str) -> dict[str, Rows]:
    """Return the matrices of a stack as linear layers by qualified name, sharing its memory."""
    stack = module._parameters[leaf]
    assert stack is not None
    prefix = f"{name}." if name else ""
    found = {}
    for index in range(len(stack)):
        weight = stack[index].t() if _transposed(module) else stack[index]
        child = f"{leaf}{LAYERS}.{index}"
        found[prefix + child] = Rows(name, child, weight, module.training)
    return found


def split_experts(module: nn.Module, leaf: str, layers: list[nn.Module]) -> None:
    """Replace a stack of matrices by one layer for each expert; the module stays the same object."""
    kind = type(module)
    base, leaves = getattr(kind, "_stacked", (kind, ()))
    # None, as for a missing bias, keeps the tensor's place in the order of parameters.
    module._parameters[leaf] = None
    setattr(module, leaf + LAYERS, nn.ModuleList(layers))
    module.__class__ = _with_stacks(base, (*leaves, leaf))


def has_split_experts(module: nn.Module) -> bool:
    """Whether `split_experts` has changed a module."""
    return hasattr(type(module), "_stacked")


def join_experts(module: nn.Module) -> None:
    """Restore the tensors with the present weights; the layers must be dense."""
    base, leaves = type(module)._stacked  # type: ignore[attr-defined]
    module.__class__ = base
    for leaf in leaves:
        layers = module._modules.pop(leaf + LAYERS)
        assert isinstance(layers, nn.ModuleList)
        weights = [cast(nn.Parameter, layer.weight) for layer in layers]
        stack = torch.stack([weight.detach() for weight in weights])
        stack = stack.transpose(1, 2).contiguous() if _transposed(module) else stack
        module._parameters[leaf] = nn.Parameter(stack, any(weight.requires_grad for weight in weights))


def joined_stacks(module: nn.Module) -> dict[str, tuple[list[str], Callable[[list[Tensor]], Tensor]]]:
    """Return by name of each stack that `split_experts` has cut: the keys of its weights, and what joins them."""

    def join(weights: list[Tensor]) -> Tensor:
        stack = torch.stack(weights)
        return stack.transpose(1, 2).contiguous() if _transposed(module) else stack

    leaves = type(module)._stacked[1] if has_split_experts(module) else ()  # type: ignore[attr-defined]
    layers = {leaf: cast(nn.ModuleList, module._modules[leaf + LAYERS]) for leaf in leaves}
    return {leaf: ([f"{leaf}{LAYERS}.{i}.weight" for i in range(len(layers[leaf]))], join) for leaf in leaves}


def _transposed(module: nn.Module) -> bool:
    """Whether the stacks of a module are ``[experts, in, out]``, which modules of transformers tell by an attribute."""
    return bool(getattr(module, "is_transposed", False))


_CLASSES: dict[tuple[type[nn.Module], tuple[str, ...]], type[nn.Module]] = {}


def _with_stacks(base: type[nn.Module], leaves: tuple[str, ...]) -> type[nn.Module]:
    """Return the subclass of ``base`` whose ``leaves`` are computed from layers when they are read."""
    if (base, leaves) in _CLASSES:
        return _CLASSES[base, leaves]

    def reader(leaf: str) -> property:
        return property(lambda self: _stack(self._modules[leaf + LAYERS], _transposed(self)))

    def reduce(self: nn.Module, protocol: int) -> tuple[Any, ...]:
        return _rebuild, (base, leaves), self.__dict__

    def load(self: nn.Module, state: dict[str, Any], prefix: str, *rest: Any) -> None:
        # The layers of the experts load after this, from what is left here.
        for leaf in leaves:
            for index, weight in enumerate(state.pop(prefix + leaf, ())):
                state[f"{prefix}{leaf}{LAYERS}.{index}.weight"] = weight.t() if _transposed(self) else weight
        base._load_from_state_dict(self, state, prefix, *rest)

    body: dict[str, Any] = {leaf: reader(leaf) for leaf in leaves}
    body |= {"_stacked": (base, leaves), "__reduce_ex__": reduce, "_load_from_state_dict": load}
    body |= {"__doc__": base.__doc__, "__module__": base.__module__}
    made = type(f"Sparse{base.__name__}", (base,), body)
    return _CLASSES.setdefault((base, leaves), made)


def _rebuild(base: type[nn.Module], leaves: tuple[str, ...]) -> nn.Module:
    kind = _with_stacks(base, leaves)
    return kind.__new__(kind)
