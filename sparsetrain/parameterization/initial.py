"""Give every parameter of a model its initial values."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from sparsetrain import seeds
from sparsetrain.parameterization.groups import assign
from sparsetrain.parameterization.norms import is_norm_of_torch, starting_gain
from sparsetrain.parameterization.roles import EMBEDDING_TYPES, Place, places
from sparsetrain.parameterization.rules import Parameterization, Role, TensorSpec
from sparsetrain.sparsity import SparseLinear
from sparsetrain.sparsity.layers.surgery import is_conv1d


def initialise(
    model: nn.Module,
    specs: Mapping[str, TensorSpec],
    rules: Parameterization,
    sigma: float,
    n_layers: int,
    seed: int,
) -> None:
    """Fill every parameter from its rule and a seed of its own, and record the assignment for `param_groups`.

    Matrices are normal with the standard deviation of the rules, norms have the gain that their author gave them,
    biases are zero, and what has the role ``keep`` stays as it is. The row of an embedding that stands for padding is
    zero. A sparse layer takes the numbers that the dense matrix of the same name would get, at its positions, so that
    models which differ in density alone are compared on common random numbers.

    Args:
        model: parameters on any device; on ``meta`` nothing is drawn. A wrapper changes no number.
        specs: one per parameter name, as ``named_parameters`` of the bare model gives them.
        sigma: the base standard deviation.
        n_layers: number of transformer blocks.
        seed: of all draws; see `sparsetrain.seeds`.

    Raises:
        UserError: a parameter without a spec, or a trained norm whose first gain cannot be told.
    """
    padding = _padding_rows(model)
    first = {id(place.parameter): place for place in reversed([*places(model)])}
    homes = {place.name: place for place in reversed(first.values())}
    with torch.no_grad():
        # First what may be refused, so that the model is then unchanged.
        gains = {
            name: starting_gain(name, place.module, place.parameter)
            for name, place in homes.items()
            if name in specs and specs[name].role in (Role.NORM, Role.FINAL_NORM) and not place.parameter.is_meta
        }
        assign(model, specs, rules, n_layers)
        if _hold_no_values([homes[name] for name in gains]):
            gains = dict.fromkeys(gains, 1.0)
        draws = _Draws(seed)
        for name, place in homes.items():
            spec, parameter = specs[name], place.parameter
            if parameter.is_meta or spec.role is Role.KEEP:
                continue
            if name in gains:
                gain = gains[name]
                if gain is not None:
                    parameter.fill_(gain)
                continue
            if spec.role in (Role.BIAS, Role.FINAL_BIAS):
                parameter.zero_()
                continue
            draws.fill(place, rules.init_std(spec, sigma, n_layers))
            for row in padding.get(id(parameter), ()):
                parameter[row] = 0.0


class _Draws:
    """Standard normal numbers by the name of a dense tensor, each a function of the seed and the name."""

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._whole: tuple[str, Tensor] | None = None  # of which the last part was taken

    def fill(self, place: Place, std: float) -> None:
        """Fill a parameter with numbers of a standard deviation, a sparse one with those at its positions."""
        module, parameter = place.module, place.parameter
        # A Conv1D holds the transposed matrix; drawn as [M, K] too, so that its sparse successor gets its numbers.
        transposed = is_conv1d(module) and parameter.ndim == 2
        shape: tuple[int, ...] = tuple(parameter.shape[::-1] if transposed else parameter.shape)
        pattern = module.pattern if isinstance(module, SparseLinear) and place.leaf == "values" else None
        if pattern is not None:
            shape = pattern.shape
        draws = self._matrix(place, shape).mul_(std)
        if pattern is not None:
            draws = pattern.gather(draws.to(parameter.device))
        parameter.copy_(draws.t() if transposed else draws)

    def _matrix(self, place: Place, shape: tuple[int, ...]) -> Tensor:
        name = ".".join(part for part in place.dense if part)
        if place.part is None:
            return self._draw(name, shape)
        if self._whole is None or self._whole[0] != name:
            self._whole = name, self._draw(name, place.part.shape_of_whole(shape[0], shape[1]))
        return place.part.take(self._whole[1]).clone(memory_format=torch.contiguous_format)

    def _draw(self, name: str, shape: tuple[int, ...]) -> Tensor:
        # On the CPU and in float32, so that neither torch's default device nor its default dtype changes a number.
        draws = torch.empty(shape, dtype=torch.float32, device="cpu")
        return draws.normal_(0.0, 1.0, generator=seeds.generator(self._seed, "init", name))


def _hold_no_values(gains: list[Place]) -> bool:
    """Whether every norm is torch's own and has the gain 0: memory from ``to_empty``, which no author has filled."""
    return bool(gains) and all(is_norm_of_torch(place.module) and not place.parameter.any() for place in gains)


def _padding_rows(model: nn.Module) -> dict[int, list[int]]:
    """Return the rows of each parameter, by its id, that stand for padding in one of the embeddings that share it."""
    rows: dict[int, list[int]] = {}
    for module in model.modules():
        if isinstance(module, EMBEDDING_TYPES) and module.padding_idx is not None:
            rows.setdefault(id(module.weight), []).append(module.padding_idx)
    return rows
