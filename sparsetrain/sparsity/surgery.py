"""Make the linear layers of any model sparse, or dense again, in place."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any, TypeVar

import torch
from torch import nn
from torch.nn.utils import skip_init

from sparsetrain import seeds
from sparsetrain.errors import UserError
from sparsetrain.sparsity.allocation import SparsityConfig, allocate
from sparsetrain.sparsity.init import make_pattern
from sparsetrain.sparsity.linear import SparseLinear

Model = TypeVar("Model", bound=nn.Module)
Layer = TypeVar("Layer", bound=nn.Module)


def sparse_layers(model: nn.Module) -> Iterator[tuple[str, SparseLinear]]:
    """Yield ``(qualified name, layer)`` for every sparse layer of ``model``."""
    for name, module in model.named_modules():
        if isinstance(module, SparseLinear):
            yield name, module


def sparsify(
    model: Model,
    sparsity: float | None = None,
    *,
    include: list[str] | None = None,
    exclude: list[str] | None = None,
    pattern: str = "random",
    backend: str = "auto",
    seed: int | None = None,
    plan: SparsityConfig | None = None,
) -> Model:
    """Replace linear layers by `SparseLinear`, keeping the weights at the positions that stay.

    By default every ``nn.Linear`` and Hugging Face ``Conv1D`` is replaced but those named ``*head*`` or ``*embed*``.
    Each layer's mask is a function of the seed and its qualified name, so that no two layers share one.

    Args:
        model: changed in place.
        sparsity: fraction of zeros in [0, 1). Give this with the options beside it, or ``plan`` alone.
        include, exclude: globs over qualified names.
        pattern, backend: as in `SparsityConfig`; with a plan, its own count.
        seed: None draws from torch's global generator. ``plan.seed``, when set, wins.
        plan: several groups with a sparsity of their own.

    Returns:
        ``model``.

    Raises:
        UserError: bad sparsity, globs that match nothing, a layer left without weights, a weight that is shared with
            another module or computed from other parameters, or a model that is itself a linear layer. The model is
            then unchanged.
    """
    if (sparsity is None) == (plan is None):
        raise UserError("sparsify needs either sparsity or plan, not both and not neither")
    if plan is None:
        assert sparsity is not None
        globs: dict[str, Any] = {"include": include, "exclude": exclude}
        chosen = {key: value for key, value in globs.items() if value is not None}
        plan = SparsityConfig(sparsity=sparsity, pattern=pattern, backend=backend, **chosen)
    elif include is not None or exclude is not None or pattern != "random" or backend != "auto":
        raise UserError("sparsify: include, exclude, pattern and backend belong into the plan when one is given")
    base_seed = seeds.resolve_seed(plan.seed if plan.seed is not None else seed)

    linears = {name: module for name, module in model.named_modules() if _is_linear(module)}
    if "" in linears:
        raise UserError("the model is itself a linear layer: use SparseLinear.from_linear(layer, pattern)")
    # With duplicates: a module that the model holds under two names shares its weight with itself.
    everything = [module for _, module in model.named_modules(remove_duplicate=False)]
    uses = Counter(id(parameter) for module in everything for parameter in module.parameters(recurse=False))
    layers: dict[str, SparseLinear] = {}
    for name, layer_sparsity in allocate(linears, plan).items():
        weight = linears[name]._parameters.get("weight")
        if weight is None:
            raise UserError(
                f"{name}: its weight is computed (weight norm, a parametrization); exclude it from sparsify"
            )
        if uses[id(weight)] > 1:
            raise UserError(f"{name}: its weight is shared with another module; exclude it from sparsify")
        linear = _as_linear(linears[name])
        try:
            mask = make_pattern(
                plan.pattern,
                (linear.out_features, linear.in_features),
                1.0 - layer_sparsity,
                seeds.generator(base_seed, "mask", name),
            )
        except UserError as error:
            raise UserError(f"{name}: {error}") from None
        layers[name] = _with_hooks_of(linears[name], SparseLinear.from_linear(linear, mask, plan.backend))
    for name, layer in layers.items():
        _replace(model, name, layer)
    return model


def densify(model: Model) -> Model:
    """Replace every `SparseLinear` by an ``nn.Linear`` in place, zeros where the mask was; returns ``model``.

    All of the dense weights train afterwards. The parameters are new objects: build the optimizer after this.
    """
    if isinstance(model, SparseLinear):
        raise UserError("the model is itself a sparse layer: use layer.to_linear()")
    dense: dict[SparseLinear, nn.Linear] = {}
    # With duplicates: a layer that the model uses in two places stays one layer.
    for name, layer in list(model.named_modules(remove_duplicate=False)):
        if isinstance(layer, SparseLinear):
            if layer not in dense:
                dense[layer] = _with_hooks_of(layer, layer.to_linear())
            _replace(model, name, dense[layer])
    return model


def is_conv1d(module: nn.Module) -> bool:
    """Whether ``module`` is Hugging Face's GPT-2 layer, a linear layer with a transposed weight ``[K, M]``."""
    # By its attributes: transformers is an optional dependency.
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf") and hasattr(module, "nx")


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or is_conv1d(module)


def _as_linear(module: nn.Module) -> nn.Linear:
    if isinstance(module, nn.Linear):
        return module
    weight, bias = module.weight, module.bias
    assert isinstance(weight, nn.Parameter)
    assert isinstance(bias, nn.Parameter)
    linear = skip_init(nn.Linear, weight.shape[0], weight.shape[1], device=weight.device, dtype=weight.dtype)
    with torch.no_grad():
        linear.weight.copy_(weight.t())
        linear.bias.copy_(bias)
    linear.weight.requires_grad_(weight.requires_grad)
    linear.bias.requires_grad_(bias.requires_grad)
    return linear.train(module.training)


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


def _with_hooks_of(old: nn.Module, new: Layer) -> Layer:
    """Return ``new`` with the hooks of ``old``, among them a parameterization's multipliers."""
    for name in _HOOKS:
        # The very dictionaries: the handles that `register_forward_hook` gave out still remove what is in them.
        setattr(new, name, getattr(old, name))
    return new


def _replace(model: nn.Module, name: str, layer: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, layer)
