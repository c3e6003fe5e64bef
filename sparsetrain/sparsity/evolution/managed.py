"""Which layers a `MaskManager` manages, and how many weights each has at which step."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from torch import nn

from sparsetrain.errors import UserError
from sparsetrain.sparsity.config import SparsityConfig
from sparsetrain.sparsity.evolution.base import Rule
from sparsetrain.sparsity.evolution.history import Exploration
from sparsetrain.sparsity.evolution.rules import Static
from sparsetrain.sparsity.evolution.topology import grid_of
from sparsetrain.sparsity.layers.allocation import LayerAllocation, allocate_layers, matches
from sparsetrain.sparsity.layers.linear import SparseLinear
from sparsetrain.sparsity.layers.summary import warn_of_dense
from sparsetrain.sparsity.layers.surgery import (
    allocate_model,
    draw_patterns,
    matrix_layers,
    replace_linears,
    sparse_layers,
)
from sparsetrain.sparsity.patterns.select import Slices, bands
from sparsetrain.sparsity.patterns.spec import PatternSpec, evolving_patterns, pattern_nnz


@dataclass
class Managed:
    """A managed layer. ``offset`` delays its updates if layers take turns."""

    name: str
    layer: SparseLinear
    allocation: LayerAllocation
    shape: tuple[int, int]
    offset: int
    bands: list[Slices]
    history: Exploration

    @property
    def trains(self) -> bool:
        """Whether the weights are trained, and not frozen."""
        values = self.layer._parameters.get("values")
        return values is not None and values.requires_grad

    def nnz_at(self, rule: Rule, step: int) -> int:
        """Return the number of weights after ``step`` steps."""
        return layer_nnz(self.allocation, self.shape, rule, step)

    def due(self, rule: Rule, step: int) -> bool:
        return step > self.offset and rule.due(step - self.offset)


def layer_nnz(allocation: LayerAllocation, shape: tuple[int, int], rule: Rule, step: int) -> int:
    """Return the number of weights, to the element, that a layer ``[R, C]`` has after ``step`` steps under a rule."""
    density = rule.layer_density(allocation.density, step)
    if isinstance(rule, Static):
        return pattern_nnz(allocation.spec, shape, density)
    bh, bw = allocation.spec.block
    return max(1, round(density * (shape[0] // bh) * (shape[1] // bw))) * bh * bw


def allocated_densities(
    shapes: Mapping[str, tuple[int, int]], config: SparsityConfig, rule: Rule
) -> Callable[[int], dict[str, float]]:
    """Return a function from a step to the density of each sparse layer after it, without building a model.

    Args:
        shapes: (out_features, in_features) by name of every linear layer.

    Raises:
        UserError: as `sparsetrain.sparsity.layers.allocation.allocate_densities`.
    """
    allocated = allocate_layers(shapes, config, rule)
    numel = {name: shapes[name][0] * shapes[name][1] for name in allocated}
    return lambda step: {
        name: layer_nnz(allocation, shapes[name], rule, step) / numel[name] for name, allocation in allocated.items()
    }


@contextmanager
def naming(layer: str, step: int) -> Iterator[None]:
    """Name the layer and the step in a `UserError` that is raised inside, for example by the scores of a rule."""
    try:
        yield
    except UserError as error:
        raise type(error)(f"layer '{layer}' at step {step}: {error}") from None


def manage_layers(
    model: nn.Module, rule: Rule, config: SparsityConfig | None, globs: Mapping[str, list[str]], seed: int
) -> list[Managed]:
    """Return the layers to manage, after making dense layers sparse if ``config`` allocates a density to them.

    Args:
        config: None takes the sparse layers that the model has, by ``globs`` (``include``, ``exclude``), as they are.

    Raises:
        UserError: see `sparsetrain.sparsity.evolution.manager.MaskManager`; the model is then unchanged.
    """
    sparse = dict(sparse_layers(model))
    if config is None:
        allocated, new, backend = _as_they_are(sparse, globs, rule), {}, "auto"
    else:
        matrices = matrix_layers(model)
        allocated, backend = allocate_model(model, matrices, config, rule), config.backend
        for name, allocation in allocated.items():
            if name in sparse:
                _check_density(name, sparse[name], allocation, rule)
        linears = {name: layer for name, layer in matrices.items() if not isinstance(layer, SparseLinear)}
        new = draw_patterns(linears, {name: found for name, found in allocated.items() if name in linears}, seed)
    if not allocated and (config is None or not isinstance(rule, Static)):
        found = "no layer is sparse" if config is None else f"sparsity={config.sparsity} makes no layer sparse"
        raise UserError(f"MaskManager with {rule.name}: {found}; give the rule a sparsity above 0")
    patterns = {name: new[name] if name in new else sparse[name].pattern for name in allocated}
    _check_evolution(allocated, {name: pattern.block for name, pattern in patterns.items()}, rule)
    ranked_in = {}
    for name, allocation in allocated.items():
        pattern, spec = patterns[name], allocation.spec
        ranked_in[name] = bands(grid_of(pattern), spec.bands if pattern.block == spec.block else (1, 1))
    if config is not None and new:
        sparse |= replace_linears(model, linears, new, backend)
        warn_of_dense(model, config, "MaskManager", stacklevel=4)
    staggered, every = rule.accumulation == "staggered", getattr(rule, "every", 1)
    managed = []
    for index, (name, allocation) in enumerate(allocated.items()):
        pattern = patterns[name]
        sparse[name].forget_origin(evolves=not isinstance(rule, Static))
        grid, unit = grid_of(pattern), pattern.block[0] * pattern.block[1]
        history = Exploration(grid, pattern.nnz // unit, unit)
        offset = index * every // len(allocated) if staggered else 0
        managed.append(Managed(name, sparse[name], allocation, pattern.shape, offset, ranked_in[name], history))
    return managed


def _as_they_are(
    sparse: Mapping[str, SparseLinear], globs: Mapping[str, list[str]], rule: Rule
) -> dict[str, LayerAllocation]:
    """Return the allocation of the sparse layers that a model already has, with their own densities."""
    allocated = {}
    for name, layer in sparse.items():
        if matches(name, globs.get("include", ["*"])) and not matches(name, globs.get("exclude", [])):
            pattern = layer.pattern
            spec = PatternSpec() if pattern.block == (1, 1) else PatternSpec("block", pattern.block)
            allocated[name] = LayerAllocation(pattern.density, pattern.density, spec)
            if rule.layer_density(pattern.density, 0) != pattern.density:
                raise UserError(
                    f"MaskManager: {rule.name} changes densities; give it a sparsity, or plan=SparsityConfig(...)"
                )
    return allocated


def _check_density(name: str, layer: SparseLinear, allocation: LayerAllocation, rule: Rule) -> None:
    rows, columns = layer.out_features, layer.in_features
    start = allocation.start
    expected = pattern_nnz(allocation.spec, (rows, columns), start) if start < 1.0 else rows * columns
    if layer.pattern.nnz != expected:
        raise UserError(
            f"layer '{name}' is already sparse, with density {layer.pattern.density:.6g} ({layer.pattern.nnz} "
            f"weights), where {rule.name} begins with {expected / (rows * columns):.6g} ({expected}): give the rule "
            "that sparsity, or none (sparsity=None)"
        )


def check_allocated_evolution(shapes: Mapping[str, tuple[int, int]], config: SparsityConfig, rule: Rule) -> None:
    """Raise `UserError` if a rule could not evolve the masks of a configuration, as `MaskManager` would.

    No model is built.

    Args:
        shapes: (out_features, in_features) by name of every linear layer.
    """
    allocated = allocate_layers(shapes, config, rule)
    whole = {
        name: all(size % block == 0 for size, block in zip(shapes[name], allocation.spec.block, strict=True))
        for name, allocation in allocated.items()
    }
    blocks = {name: allocation.spec.block if whole[name] else (1, 1) for name, allocation in allocated.items()}
    _check_evolution(allocated, blocks, rule)


def _check_evolution(
    allocated: Mapping[str, LayerAllocation], blocks: Mapping[str, tuple[int, int]], rule: Rule
) -> None:
    if isinstance(rule, Static):
        return
    rule.check_choices()
    for name, allocation in allocated.items():
        spec = allocation.spec
        if spec.name not in evolving_patterns():
            raise UserError(
                f"layer '{name}': pattern={spec.name!r} would not outlast the first update of {rule.name}; masks "
                f"that evolve begin as one of {', '.join(evolving_patterns())}"
            )
        if blocks[name] != spec.block:
            raise UserError(
                f"layer '{name}': block {spec.block[0]}x{spec.block[1]} does not divide it, and {rule.name} "
                "moves whole blocks"
            )
    every = getattr(rule, "every", 1)
    if rule.accumulation == "staggered" and every < len(allocated):
        raise UserError(
            f"{rule.name}: every={every} with accumulation=staggered must be at least the number of layers, "
            f"{len(allocated)}: one layer is updated a step"
        )
