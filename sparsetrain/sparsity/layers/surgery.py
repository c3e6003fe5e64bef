"""Make the linear layers of any model sparse, or dense again, in place."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any, TypeVar

from torch import nn

from sparsetrain import seeds, wrappers
from sparsetrain.errors import UserError, nearest
from sparsetrain.sparsity.config import SparsityConfig
from sparsetrain.sparsity.evolution.base import Rule
from sparsetrain.sparsity.layers.allocation import LayerAllocation, allocate_layers, match_groups
from sparsetrain.sparsity.layers.experts import (
    LAYERS,
    experts_of,
    has_split_experts,
    join_experts,
    split_experts,
    stacks_of,
)
from sparsetrain.sparsity.layers.foreign import (
    Rows,
    adapters_of,
    as_linear,
    check_unwrapped,
    give_back,
    is_conv1d,
    is_linear,
    matrix_of,
    refusal,
    shape_of,
    take_over,
    tied_heads,
    uses_of,
)
from sparsetrain.sparsity.layers.linear import SparseLinear
from sparsetrain.sparsity.layers.multihead import SparseMultiheadAttention, can_split, projections_of
from sparsetrain.sparsity.layers.names import default_reason
from sparsetrain.sparsity.layers.ranks import warn_of_own_draws
from sparsetrain.sparsity.layers.replaced import note_successors
from sparsetrain.sparsity.layers.summary import large_dense, warn_of_dense
from sparsetrain.sparsity.patterns.draw import full_pattern, given_pattern, make_pattern
from sparsetrain.sparsity.patterns.pattern import SparsityPattern

__all__ = ["densify", "is_conv1d", "sparse_layers", "sparsify"]

Model = TypeVar("Model", bound=nn.Module)


def sparse_layers(model: nn.Module) -> Iterator[tuple[str, SparseLinear]]:
    """Yield ``(qualified name, layer)`` for every sparse layer of ``model``; wrappers are no part of the name."""
    for name, module in wrappers.named_modules(model):
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

    By default every ``nn.Linear`` and Hugging Face ``Conv1D`` is replaced, except heads, routers and embeddings, which
    `SparsityConfig` defines. The input projections of ``nn.MultiheadAttention`` become the layers ``q_proj``,
    ``k_proj`` and ``v_proj`` (`SparseMultiheadAttention`). Experts in one tensor ``NAME`` ``[experts, out, in]`` become
    the layers ``NAME_layers.0`` and so on, and ``NAME`` is read from them. One warning names other matrices that stay
    dense and hold more than 1 % of the weights; `summary` lists everything.

    Each layer's mask is a function of the seed and the layer's qualified name, so no two layers share a mask.
    ``torch.compile`` and other wrappers are not part of a name. If masks evolve, these are the masks of step 0, which
    `MaskManager` changes.

    Args:
        model: changed in place.
        sparsity: fraction of zeros in [0, 1). Give it with the next four options, or give ``plan`` or ``masks`` alone.
        include, exclude: globs over qualified names.
        pattern: ``magnitude`` keeps the largest weights of the model; the others are listed in `SparsityConfig`.
        backend: as in `SparsityConfig`; ``plan`` has a backend of its own.
        seed: None draws from torch's global generator. ``plan.seed``, when set, wins.
        plan: the whole section, with groups of layers and all options.
        masks: qualified name -> mask ``[out_features, in_features]`` of each layer to replace, in any form that
            `given_pattern` takes; `load_masks` returns such masks.

    Returns:
        ``model``.

    Raises:
        UserError: bad sparsity, globs that match nothing, a layer left without weights, a mask of another shape or for
            no layer, a model that is itself a linear layer or is inside DDP or FSDP, or a layer that a sparse one
            cannot replace: its weight is shared, computed, quantized, on the meta device or without a size, or its
            class has its own forward. The model is then unchanged.
    """
    options = include is not None or exclude is not None or pattern != "random"
    if masks is not None:
        if sparsity is not None or plan is not None or options:
            raise UserError("sparsify: masks say which layers are sparse; give them without sparsity, plan or options")
    elif (sparsity is None) == (plan is None):
        raise UserError("sparsify: give exactly one of sparsity and plan, or masks alone")
    elif plan is not None and (options or backend != "auto"):
        raise UserError("sparsify: with plan=, give include, exclude, pattern and backend in the SparsityConfig")
    linears = linear_layers(model)
    if masks is not None:
        _check_masks(masks, linears)
        check_replaceable(model, linears, masks)
        replace_linears(model, linears, {name: given_pattern(mask) for name, mask in masks.items()}, backend)
        return model
    if plan is None:
        assert sparsity is not None
        globs: dict[str, Any] = {"include": include, "exclude": exclude}
        chosen = {key: value for key, value in globs.items() if value is not None}
        plan = SparsityConfig(sparsity=sparsity, pattern=pattern, backend=backend, **chosen)
    if plan.seed is None and seed is None:
        warn_of_own_draws("sparsify")
    base_seed = seeds.resolve_seed(plan.seed if plan.seed is not None else seed)
    allocated = allocate_model(model, linears, plan)
    replace_linears(model, linears, draw_patterns(linears, allocated, base_seed), plan.backend)
    if allocated:
        warn_of_dense(model, plan, "sparsify", stacklevel=3)
    return model


def shapes_of(layers: Mapping[str, nn.Module]) -> dict[str, tuple[int, int]]:
    """Return ``(out_features, in_features)`` of linear and sparse layers by name."""
    return {name: shape_of(layer) for name, layer in layers.items()}


def matrix_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Return the linear layers of a model, dense or sparse, by qualified name and in its order.

    The input projections of an ``nn.MultiheadAttention`` are among them, as `Rows`.

    Raises:
        UserError: the model is itself a linear layer or an attention module.
    """
    uses = uses_of(model)
    found: dict[str, nn.Module] = {}
    for name, module in wrappers.named_modules(model):
        if is_linear(module) or isinstance(module, SparseLinear):
            found[name] = module
        elif isinstance(module, nn.MultiheadAttention) and can_split(module, uses) and name:
            found |= projections_of(name, module)
        else:
            for leaf in stacks_of(name, module, uses):
                found |= experts_of(name, module, leaf)
    if "" in found and not isinstance(found[""], SparseLinear):
        raise UserError("the model is itself a linear layer: use SparseLinear.from_linear(layer, pattern)")
    return found


def linear_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Return the dense layers of `matrix_layers`."""
    return {name: layer for name, layer in matrix_layers(model).items() if not isinstance(layer, SparseLinear)}


def kept_by_default(model: nn.Module, layers: Mapping[str, nn.Module]) -> set[str]:
    """Return the names of the layers that stay dense under the default of ``exclude``."""
    others = [name for name, _ in wrappers.named_modules(model)]
    others += [name for name, _ in wrappers.named_parameters(model)]
    return {name for name in layers if default_reason(name, others) is not None} | tied_heads(model, layers)


def allocate_model(
    model: nn.Module, layers: Mapping[str, nn.Module], config: SparsityConfig, rule: Rule | None = None
) -> dict[str, LayerAllocation]:
    """Return the allocation of the ``layers`` of a model, dense or sparse, that are sparse at some time.

    Args:
        layers: by qualified name. rule: as `allocate_layers` takes it.

    Raises:
        UserError: as `allocate_layers`, where the line also names large matrices that are no linear layers; or a dense
            layer that a sparse one cannot replace, see `check_replaceable`.
    """
    if not config.is_sparse:
        return {}
    try:
        groups = match_groups(layers, config, kept_by_default(model, layers))
    except UserError as error:
        others = large_dense(model, config)
        raise UserError(f"{error}; no linear layers are {'; '.join(others)}" if others else str(error)) from None
    free = config.sparsity > 0.0 or config.nnz is not None
    sparse = [name for name, group in groups.items() if (free if group is None else group.sparsity > 0.0)]
    # The check precedes the shapes, because a refused layer may have no shape yet.
    check_replaceable(model, layers, [name for name in sparse if not isinstance(layers[name], SparseLinear)])
    return allocate_layers(shapes_of(layers), config, rule, groups=groups)


def check_replaceable(model: nn.Module, linears: Mapping[str, nn.Module], names: Collection[str]) -> None:
    """Refuse layers that a sparse layer cannot replace.

    Raises:
        UserError: the first of them, by name, and why; or a model inside DDP or FSDP.
    """
    if not names:
        return
    uses, adapters = uses_of(model), adapters_of(model)
    for name in names:
        layer = linears[name]
        reason = None if isinstance(layer, Rows) else refusal(name, layer, uses, adapters)
        if reason is not None:
            raise UserError(f"{name}: {reason}; exclude it from sparsify")
        _check_bare(model, layer.holder if isinstance(layer, Rows) else name)
    check_unwrapped(model, "sparsify")


def draw_patterns(
    linears: Mapping[str, nn.Module], allocated: Mapping[str, LayerAllocation], seed: int
) -> dict[str, SparsityPattern]:
    """Return the masks of step 0 of the allocated layers by name.

    Each is a function of the seed and the name, and of the weights if the kind of pattern ranks them.
    """
    patterns = {}
    shapes = shapes_of({name: linears[name] for name in allocated})
    for name, layer in allocated.items():
        weight = matrix_of(linears[name])
        draws = seeds.generator(seed, "mask", name)
        try:
            if layer.start == 1.0:  # nothing to draw, but the pattern stores blocks
                patterns[name] = full_pattern(shapes[name], layer.spec.block)
            else:
                patterns[name] = make_pattern(layer.spec, shapes[name], layer.start, draws, weight)
        except UserError as error:
            raise UserError(f"{name}: {error}") from None
    return patterns


def replace_linears(
    model: nn.Module, linears: Mapping[str, nn.Module], patterns: Mapping[str, SparsityPattern], backend: str
) -> dict[str, SparseLinear]:
    """Replace the layers that ``patterns`` names by sparse ones, all or none; return the sparse layers by name.

    Call `check_replaceable` first.
    """
    layers: dict[str, SparseLinear] = {}
    for name, pattern in patterns.items():
        old = linears[name]
        sparse = SparseLinear.from_linear(as_linear(old), pattern, backend)
        layers[name] = sparse if isinstance(old, Rows) else take_over(old, sparse)
    holders = {old.holder for name in layers if isinstance(old := linears[name], Rows)}
    for holder in sorted(holders):
        parts = {name: old for name, old in linears.items() if isinstance(old, Rows) and old.holder == holder}
        _split(model, holder, parts, layers)
    for name, layer in layers.items():
        layer.label = name
        if not isinstance(linears[name], Rows):
            wrappers.replace_module(model, name, layer)
    return layers


def _split(model: nn.Module, holder: str, parts: Mapping[str, Rows], layers: Mapping[str, SparseLinear]) -> None:
    """Turn the parts of a module's larger matrices into layers: those in ``layers``, or else dense copies."""
    module = wrappers.find_module(model, holder)
    if isinstance(module, nn.MultiheadAttention):
        made = {part.child: layers[name] if name in layers else part.copy() for name, part in parts.items()}
        wrappers.replace_module(model, holder, SparseMultiheadAttention(module, made))
        return
    stacks: dict[str, list[str]] = {}
    for name, part in parts.items():
        stacks.setdefault(part.child.rpartition(".")[0].removesuffix(LAYERS), []).append(name)
    for leaf, names in stacks.items():
        if any(name in layers for name in names):
            stack = module._parameters[leaf]
            assert stack is not None
            values = [layers[name].values for name in names if name in layers]
            note_successors(f"{holder}.{leaf}" if holder else leaf, stack, values)
            split_experts(module, leaf, [layers[name] if name in layers else parts[name].copy() for name in names])


def _check_masks(masks: Mapping[str, Any], linears: Mapping[str, nn.Module]) -> None:
    shapes = shapes_of(linears)
    for name, mask in masks.items():
        if name not in linears:
            raise UserError(f"masks['{name}']: the model has no linear layer of this name{nearest(name, linears)}")
        if tuple(mask.shape) != shapes[name]:
            raise UserError(f"masks['{name}'] has shape {tuple(mask.shape)}; the layer needs {shapes[name]}")


def densify(model: Model) -> Model:
    """Replace every `SparseLinear` by a dense layer in place, zeros where the mask was; returns ``model``.

    Each layer gets the class that `sparsify` found there: a Conv1D, a subclass of ``nn.Linear``, or an
    ``nn.MultiheadAttention`` or a tensor of experts around it. All dense weights train afterwards. The weights are new
    objects, so build the optimizer afterwards.

    Raises:
        UserError: the model is itself a sparse layer, or it is inside DDP or FSDP. The model is then unchanged.
    """
    # Duplicates are included, so that a layer that the model uses in two places stays one layer.
    everything = list(wrappers.named_modules(model, remove_duplicate=False))
    sparse = [(name, layer) for name, layer in everything if isinstance(layer, SparseLinear)]
    attention = [(name, module) for name, module in everything if isinstance(module, SparseMultiheadAttention)]
    if any(name == "" for name, _ in sparse):
        raise UserError("the model is itself a sparse layer: use layer.to_linear()")
    if sparse or attention:
        check_unwrapped(model, "densify")
    for name, _ in [*sparse, *attention]:
        _check_bare(model, name)
    dense: dict[nn.Module, nn.Module] = {}
    for name, layer in sparse:
        if layer not in dense:
            dense[layer] = give_back(layer)
        wrappers.replace_module(model, name, dense[layer])
    for name, module in attention:
        if module not in dense:
            dense[module] = module.dense()
        wrappers.replace_module(model, name, dense[module])
    for _, holder in everything:
        if has_split_experts(holder):
            join_experts(holder)
    return model


def _check_bare(model: nn.Module, name: str) -> None:
    """Refuse a layer that has a wrapper of its own, before anything is changed."""
    parent, _, child = name.rpartition(".")
    inner = wrappers.find_module(model, parent).get_submodule(child) if name else model
    if wrappers.wrapped_child(inner) is not None:
        kind = type(inner).__name__
        raise UserError(f"{name}: it is wrapped ({kind}); change the bare layer first, then compile or wrap it")
