"""Which layers a `MaskManager` manages, and how many weights each has at which step."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from torch import nn

from sparsetrain.errors import UserError
from sparsetrain.sparsity.config import EVOLVING, SparsityConfig
from sparsetrain.sparsity.evolution.history import Exploration
from sparsetrain.sparsity.evolution.rules import Rule, Static
from sparsetrain.sparsity.evolution.topology import grid_of
from sparsetrain.sparsity.layers.allocation import matches
from sparsetrain.sparsity.layers.linear import SparseLinear
from sparsetrain.sparsity.layers.summary import warn_of_dense
from sparsetrain.sparsity.layers.surgery import (
    LayerPlan,
    check_replaceable,
    draw_patterns,
    kept_by_default,
    linear_layers,
    matrix_layers,
    plan_layers,
    planned_names,
    replace_linears,
    shapes_of,
    sparse_layers,
)
from sparsetrain.sparsity.patterns.select import Slices, bands
from sparsetrain.sparsity.patterns.spec import PatternSpec, pattern_nnz


@dataclass
class Managed:
    """A layer under management. ``offset`` delays its updates, where layers take turns."""

    name: str
    layer: SparseLinear
    plan: LayerPlan
    shape: tuple[int, int]
    offset: int
    parts: list[Slices]
    history: Exploration

    @property
    def trains(self) -> bool:
        """Whether the weights are trained, and not frozen."""
        values = self.layer._parameters.get("values")
        return values is not None and values.requires_grad

    def nnz_at(self, rule: Rule, step: int) -> int:
        """Return the number of weights after ``step`` steps."""
        return layer_nnz(self.plan, self.shape, rule, step)

    def due(self, rule: Rule, step: int) -> bool:
        return step > self.offset and rule.due(step - self.offset)


def layer_nnz(plan: LayerPlan, shape: tuple[int, int], rule: Rule, step: int) -> int:
    """Return the number of weights, to the element, that a layer ``[R, C]`` has after ``step`` steps under a rule."""
    density = _density_at(rule, plan.density, step)
    if isinstance(rule, Static):
        return pattern_nnz(plan.spec, shape, density)
    bh, bw = plan.spec.block
    return max(1, round(density * (shape[0] // bh) * (shape[1] // bw))) * bh * bw


def planned_densities(
    shapes: Mapping[str, tuple[int, int]], plan: SparsityConfig, rule: Rule
) -> Callable[[int], dict[str, float]]:
    """Return a function from a step to the density of each sparse layer after it, without building a model.

    Args:
        shapes: (out_features, in_features) by name of every linear layer.

    Raises:
        UserError: as `sparsetrain.sparsity.layers.allocation.allocate_densities`.
    """
    layers = plan_layers(shapes, plan)
    numel = {name: shapes[name][0] * shapes[name][1] for name in layers}
    return lambda step: {
        name: layer_nnz(layer, shapes[name], rule, step) / numel[name] for name, layer in layers.items()
    }


def manage_layers(
    model: nn.Module, rule: Rule, plan: SparsityConfig | None, globs: Mapping[str, list[str]], seed: int
) -> list[Managed]:
    """Return the layers to manage, after making those sparse that the plan names and that are not.

    Args:
        plan: None takes the sparse layers that the model has, by ``globs`` (``include``, ``exclude``), as they are.

    Raises:
        UserError: see `sparsetrain.sparsity.evolution.manager.MaskManager`; the model is then unchanged.
    """
    sparse = dict(sparse_layers(model))
    if plan is None:
        plans, new, backend = _as_they_are(sparse, globs, rule), {}, "auto"
    else:
        plans, backend = _planned(model, rule, plan), plan.backend
        for name, layer in plans.items():
            if name in sparse:
                _check_density(name, sparse[name], layer, rule)
        linears = linear_layers(model)
        new = draw_patterns(linears, {name: layer for name, layer in plans.items() if name not in sparse}, seed)
    if not plans and (plan is None or not isinstance(rule, Static)):
        found = "no layer is sparse" if plan is None else f"the plan (sparsity={plan.sparsity}) makes no layer sparse"
        raise UserError(f"MaskManager with {rule.name}: {found}; give the rule a sparsity above 0")
    patterns = {name: new[name] if name in new else sparse[name].pattern for name in plans}
    _check_evolution(plans, {name: pattern.block for name, pattern in patterns.items()}, rule)
    parts = {}
    for name, layer in plans.items():
        pattern = patterns[name]
        parts[name] = bands(grid_of(pattern), layer.spec.bands if pattern.block == layer.spec.block else (1, 1))
    if plan is not None and new:
        sparse |= replace_linears(model, linears, new, backend)
        warn_of_dense(model, plan, "MaskManager", stacklevel=4)
    staggered, every = rule.accumulation == "staggered", getattr(rule, "every", 1)
    managed = []
    for index, (name, layer) in enumerate(plans.items()):
        pattern = patterns[name]
        sparse[name].forget_origin(evolves=not isinstance(rule, Static))
        grid, unit = grid_of(pattern), pattern.block[0] * pattern.block[1]
        history = Exploration(grid, pattern.nnz // unit, unit)
        offset = index * every // len(plans) if staggered else 0
        managed.append(Managed(name, sparse[name], layer, pattern.shape, offset, parts[name], history))
    return managed


def _planned(model: nn.Module, rule: Rule, plan: SparsityConfig) -> dict[str, LayerPlan]:
    """Return the plans of the linear layers of a model, dense or sparse, with the densities of the rule at step 0."""
    everything = matrix_layers(model)
    kept = kept_by_default(model, everything)
    dense = {name: layer for name, layer in everything.items() if not isinstance(layer, SparseLinear)}
    check_replaceable(model, dense, [name for name in planned_names(model, everything, plan, kept) if name in dense])
    layers = plan_layers(shapes_of(everything), plan, kept)
    return {name: replace(layer, start=_density_at(rule, layer.density, 0)) for name, layer in layers.items()}


def _as_they_are(
    sparse: Mapping[str, SparseLinear], globs: Mapping[str, list[str]], rule: Rule
) -> dict[str, LayerPlan]:
    """Return plans for the sparse layers that a model already has, with their own densities."""
    plans = {}
    for name, layer in sparse.items():
        if matches(name, globs.get("include", ["*"])) and not matches(name, globs.get("exclude", [])):
            pattern = layer.pattern
            spec = PatternSpec() if pattern.block == (1, 1) else PatternSpec("block", pattern.block)
            plans[name] = LayerPlan(pattern.density, pattern.density, spec)
            if _density_at(rule, pattern.density, 0) != pattern.density:
                raise UserError(f"MaskManager: {rule.name} changes densities; give it a sparsity, or a plan")
    return plans


def _check_density(name: str, layer: SparseLinear, plan: LayerPlan, rule: Rule) -> None:
    rows, columns = layer.out_features, layer.in_features
    expected = pattern_nnz(plan.spec, (rows, columns), plan.start) if plan.start < 1.0 else rows * columns
    if layer.pattern.nnz != expected:
        raise UserError(
            f"layer '{name}' is already sparse, with density {layer.pattern.density:.6g} ({layer.pattern.nnz} "
            f"weights), where {rule.name} begins with {expected / (rows * columns):.6g} ({expected}): give the rule "
            "that sparsity, or none (sparsity=None)"
        )


def check_planned_evolution(shapes: Mapping[str, tuple[int, int]], plan: SparsityConfig, rule: Rule) -> None:
    """Raise `UserError` if a rule could not evolve the masks of a plan, as `MaskManager` would, without a model.

    Args:
        shapes: (out_features, in_features) by name of every linear layer.
    """
    plans = plan_layers(shapes, plan)
    whole = {
        name: all(size % block == 0 for size, block in zip(shapes[name], layer.spec.block, strict=True))
        for name, layer in plans.items()
    }
    _check_evolution(plans, {name: layer.spec.block if whole[name] else (1, 1) for name, layer in plans.items()}, rule)


def _check_evolution(plans: Mapping[str, LayerPlan], blocks: Mapping[str, tuple[int, int]], rule: Rule) -> None:
    if isinstance(rule, Static):
        return
    for name, plan in plans.items():
        if plan.spec.name not in EVOLVING:
            raise UserError(
                f"layer '{name}': pattern={plan.spec.name!r} would not outlast the first update of {rule.name}; masks "
                f"that evolve start as one of {', '.join(EVOLVING)}"
            )
        if blocks[name] != plan.spec.block:
            raise UserError(
                f"layer '{name}': block {plan.spec.block[0]}x{plan.spec.block[1]} does not divide it, and {rule.name} "
                "moves whole blocks"
            )
    every = getattr(rule, "every", 1)
    if rule.accumulation == "staggered" and every < len(plans):
        raise UserError(
            f"{rule.name}: every={every} with accumulation=staggered must be at least the number of layers, "
            f"{len(plans)}: one layer is updated a step"
        )


def _density_at(rule: Rule, allocated: float, step: int) -> float:
    """Return the density after ``step`` steps of a layer; exactly what it is allocated where the rule says so."""
    reference = 1.0 - allocated
    sparsity = rule.layer_sparsity(reference, step)
    return allocated if sparsity == reference else 1.0 - sparsity
