"""Make the linear layers of any model sparse, or dense again, in place."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils import skip_init

from sparsetrain import seeds
from sparsetrain.errors import UserError, nearest
from sparsetrain.sparsity.allocation import allocate_densities, choose
from sparsetrain.sparsity.config import SparsityConfig
from sparsetrain.sparsity.init import full_pattern, given_pattern, make_pattern
from sparsetrain.sparsity.linear import SparseLinear
from sparsetrain.sparsity.pattern import SparsityPattern
from sparsetrain.sparsity.spec import PatternSpec

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
    masks: Mapping[str, Any] | None = None,
) -> Model:
    """Replace linear layers by `SparseLinear`, keeping the weights at the positions that stay.

    By default every ``nn.Linear`` and Hugging Face ``Conv1D`` is replaced but those named ``*head*`` or ``*embed*``.
    Each layer's mask is a function of the seed and its qualified name, so that no two layers share one. A plan whose
    masks evolve gives the masks of step 0; `MaskManager` changes them.

    Args:
        model: changed in place.
        sparsity: fraction of zeros in [0, 1). Give this with the options beside it, or ``plan`` or ``masks`` alone.
        include, exclude: globs over qualified names.
        pattern: ``magnitude`` keeps the largest weights of the model; the others are listed in `SparsityConfig`.
        backend: as in `SparsityConfig`; with a plan, its own counts.
        seed: None draws from torch's global generator. ``plan.seed``, when set, wins.
        plan: several groups with a sparsity of their own, and every other option.
        masks: qualified name -> mask ``[out_features, in_features]`` of each layer to replace: anything that
            `given_pattern` takes, for example what `load_masks` returns.

    Returns:
        ``model``.

    Raises:
        UserError: bad sparsity, globs that match nothing, a layer left without weights, a mask of another shape or for
            no layer, a weight that is shared with another module or computed from other parameters, or a model that is
            itself a linear layer. The model is then unchanged.
    """
    options = include is not None or exclude is not None or pattern != "random"
    if masks is not None:
        if sparsity is not None or plan is not None or options:
            raise UserError("sparsify: masks say which layers are sparse, and how; give them without sparsity or plan")
    elif (sparsity is None) == (plan is None):
        raise UserError("sparsify needs either sparsity or plan, not both and not neither (or masks alone)")
    elif plan is not None and (options or backend != "auto"):
        raise UserError("sparsify: include, exclude, pattern and backend belong into the plan when one is given")
    linears = linear_layers(model)
    if masks is not None:
        _check_masks(masks, linears)
        wanted = {name: given_pattern(mask) for name, mask in masks.items()}
        replace_linears(model, linears, wanted, backend)
        return model
    if plan is None:
        assert sparsity is not None
        globs: dict[str, Any] = {"include": include, "exclude": exclude}
        chosen = {key: value for key, value in globs.items() if value is not None}
        plan = SparsityConfig(sparsity=sparsity, pattern=pattern, backend=backend, **chosen)
    base_seed = seeds.resolve_seed(plan.seed if plan.seed is not None else seed)
    layers = plan_layers(shapes_of(linears), plan)
    replace_linears(model, linears, draw_patterns(linears, layers, base_seed), plan.backend)
    return model


@dataclass(frozen=True)
class LayerPlan:
    """What a plan means for one layer: the density it is allocated, that of step 0, and the kind of pattern."""

    density: float
    start: float
    spec: PatternSpec


def plan_layers(shapes: Mapping[str, tuple[int, int]], plan: SparsityConfig) -> dict[str, LayerPlan]:
    """Return the layers of a plan that are sparse at some time; those that stay dense throughout are left out.

    Raises:
        UserError: as `sparsetrain.sparsity.allocation.allocate_densities`.
    """
    groups = choose(shapes, plan)
    evolution, layers = plan.evolution, {}
    for name, density in allocate_densities(shapes, plan).items():
        if density < 1.0:
            # Gradual pruning begins less sparse than what it is allocated, usually dense.
            start = max(density, 1.0 - evolution.initial_sparsity) if evolution.rule == "gmp" else density
            group = groups[name]
            layers[name] = LayerPlan(density, start, plan.spec(group.pattern if group is not None else None))
    return layers


def shapes_of(layers: Mapping[str, nn.Module]) -> dict[str, tuple[int, int]]:
    """Return ``(out_features, in_features)`` of linear and sparse layers by name."""
    shapes = {}
    for name, layer in layers.items():
        if is_conv1d(layer):
            weight = layer.weight
            assert isinstance(weight, Tensor)
            shapes[name] = (weight.shape[1], weight.shape[0])
        else:
            assert isinstance(layer, nn.Linear | SparseLinear)
            shapes[name] = (layer.out_features, layer.in_features)
    return shapes


def linear_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Return the dense linear layers of a model by qualified name.

    Raises:
        UserError: the model is itself one.
    """
    linears = {name: module for name, module in model.named_modules() if _is_linear(module)}
    if "" in linears:
        raise UserError("the model is itself a linear layer: use SparseLinear.from_linear(layer, pattern)")
    return linears


def draw_patterns(
    linears: Mapping[str, nn.Module], layers: Mapping[str, LayerPlan], seed: int
) -> dict[str, SparsityPattern]:
    """Return the masks of step 0 of some layers, each a function of the seed and the name (and of its weights, where
    those are ranked)."""
    patterns = {}
    shapes = shapes_of({name: linears[name] for name in layers})
    for name, layer in layers.items():
        weight: Tensor | None = None
        if layer.spec.name == "magnitude":
            weight = linears[name]._parameters.get("weight")
            if weight is not None and is_conv1d(linears[name]):
                weight = weight.t()
        draws = seeds.generator(seed, "mask", name)
        try:
            if layer.start == 1.0:  # nothing to choose yet, but blocks are stored as such
                patterns[name] = full_pattern(shapes[name], layer.spec.block)
            else:
                patterns[name] = make_pattern(layer.spec, shapes[name], layer.start, draws, weight)
        except UserError as error:
            raise UserError(f"{name}: {error}") from None
    return patterns


def replace_linears(
    model: nn.Module, linears: Mapping[str, nn.Module], patterns: Mapping[str, SparsityPattern], backend: str
) -> dict[str, SparseLinear]:
    """Put sparse layers in the place of those that ``patterns`` names, all or none; return them by name.

    Raises:
        UserError: a weight that is shared or computed.
    """
    # With duplicates: a module that the model holds under two names shares its weight with itself.
    everything = [module for _, module in model.named_modules(remove_duplicate=False)]
    uses = Counter(id(parameter) for module in everything for parameter in module.parameters(recurse=False))
    layers: dict[str, SparseLinear] = {}
    for name, pattern in patterns.items():
        weight = linears[name]._parameters.get("weight")
        if weight is None:
            raise UserError(
                f"{name}: its weight is computed (weight norm, a parametrization); exclude it from sparsify"
            )
        if uses[id(weight)] > 1:
            raise UserError(f"{name}: its weight is shared with another module; exclude it from sparsify")
        sparse = SparseLinear.from_linear(_as_linear(linears[name]), pattern, backend)
        layers[name] = _with_hooks_of(linears[name], sparse)
    for name, layer in layers.items():
        layer.label = name
        _replace(model, name, layer)
    return layers


def _check_masks(masks: Mapping[str, Any], linears: Mapping[str, nn.Module]) -> None:
    shapes = shapes_of(linears)
    for name, mask in masks.items():
        if name not in linears:
            raise UserError(f"masks['{name}'] is for no linear layer of the model{nearest(name, linears)}")
        if tuple(mask.shape) != shapes[name]:
            raise UserError(f"masks['{name}'] has shape {tuple(mask.shape)}; the layer needs {shapes[name]}")


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
