"""Initial values for all parameters of a model."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping

import torch
from torch import Tensor, nn

from sparsetrain import seeds
from sparsetrain.parameterization.groups import assign
from sparsetrain.parameterization.norms import is_norm_of_torch, starting_gain
from sparsetrain.parameterization.roles import EMBEDDING_TYPES, Place, places
from sparsetrain.parameterization.rules import Parameterization, Role, TensorTraits
from sparsetrain.sparsity import SparseLinear
from sparsetrain.sparsity.layers.surgery import is_conv1d

LEAST_TRUNCATION = 0.5
"""Numbers beyond a cut are drawn again, which takes long if nearly all are beyond it."""


def initialise(
    model: nn.Module,
    traits_of: Mapping[str, TensorTraits],
    rules: Parameterization,
    sigma: float,
    n_layers: int,
    seed: int,
    truncation: float | None = None,
    uniform: Collection[str] = (),
) -> None:
    """Initialise every parameter by its rule, each from its own seed, and record the assignment for `param_groups`.

    Matrices are drawn from a normal distribution with the standard deviation of the rules. Norms keep the gain that
    their author gave them, biases are zero, and parameters with the role ``keep`` are unchanged. The padding row of an
    embedding is zero. A sparse layer gets the numbers that the dense matrix of the same name would get at its
    positions, so that models that differ only in density are compared on common random numbers.

    Args:
        model: parameters on any device; on ``meta`` nothing is drawn. Wrappers change no number.
        traits_of: the traits of each parameter, by its name in the bare model.
        sigma: base standard deviation.
        n_layers: number of transformer blocks.
        seed: seed of all draws; see `sparsetrain.seeds`.
        truncation: draw numbers again that are more than this many standard deviations from 0; at least
            `LEAST_TRUNCATION`. The other numbers are those without a truncation.
        uniform: names of matrices that are drawn as ``nn.Linear`` draws its own, uniformly within
            +-1 / sqrt(fan_in). In a sparse one fan_in is the mean number of inputs that an output keeps.

    Raises:
        UserError: a parameter has no traits, or a trained norm whose initial gain is unknown.
    """
    padding = _padding_rows(model)
    first = {id(place.parameter): place for place in reversed([*places(model)])}
    homes = {place.name: place for place in reversed(first.values())}
    with torch.no_grad():
        # Everything that can fail comes first, so that the model is unchanged after an error.
        gains = {
            name: starting_gain(name, place.module, place.parameter)
            for name, place in homes.items()
            if name in traits_of
            and traits_of[name].role in (Role.NORM, Role.FINAL_NORM)
            and not place.parameter.is_meta
        }
        assign(model, traits_of, rules, n_layers)
        if _hold_no_values([homes[name] for name in gains]):
            gains = dict.fromkeys(gains, 1.0)
        draws, whole = _Draws(seed, truncation), _Draws(seed)
        for name, place in homes.items():
            traits, parameter = traits_of[name], place.parameter
            if parameter.is_meta or traits.role is Role.KEEP:
                continue
            if name in gains:
                gain = gains[name]
                if gain is not None:
                    parameter.fill_(gain)
                continue
            if traits.role in (Role.BIAS, Role.FINAL_BIAS):
                parameter.zero_()
                continue
            if name in uniform:
                whole.fill_uniformly(place, traits.density)
            else:
                draws.fill(place, rules.init_std(traits, sigma, n_layers))
            for row in padding.get(id(parameter), ()):
                parameter[row] = 0.0


class _Draws:
    """Standard normal numbers for dense tensors, each a function of the seed and the tensor's name."""

    def __init__(self, seed: int, truncation: float | None = None) -> None:
        self._seed, self._truncation = seed, truncation
        self._whole: tuple[str, Tensor] | None = None  # the last dense tensor that a slice was taken from

    def fill(self, place: Place, std: float) -> None:
        """Fill a parameter with normal numbers of deviation ``std``; a sparse one gets those at its positions."""
        module, parameter = place.module, place.parameter
        # A Conv1D holds the transposed matrix. Drawing [M, K] gives it the numbers that its sparse successor gets.
        transposed = is_conv1d(module) and parameter.ndim == 2
        shape: tuple[int, ...] = tuple(parameter.shape[::-1] if transposed else parameter.shape)
        pattern = module.pattern if isinstance(module, SparseLinear) and place.leaf == "values" else None
        if pattern is not None:
            shape = pattern.shape
        draws = self._matrix(place, shape).mul_(std)
        if pattern is not None:
            draws = pattern.gather(draws.to(parameter.device))
        parameter.copy_(draws.t() if transposed else draws)

    def fill_uniformly(self, place: Place, density: float) -> None:
        """Fill a matrix with numbers that are uniform within +-1 / sqrt(density K), K its inputs; never truncated."""
        module, parameter = place.module, place.parameter
        pattern = module.pattern if isinstance(module, SparseLinear) else None
        shape = tuple(parameter.shape) if pattern is None else pattern.shape
        # The normal distribution function makes uniform numbers of the normal ones, so these too follow the name.
        draws = torch.special.ndtr(self._matrix(place, shape)).mul_(2.0).sub_(1.0)
        draws = draws.div_(math.sqrt(max(1.0, density * shape[1])))
        parameter.copy_(draws if pattern is None else pattern.gather(draws.to(parameter.device)))

    def _matrix(self, place: Place, shape: tuple[int, ...]) -> Tensor:
        name = ".".join(part for part in place.dense if part)
        if place.slice is None:
            return self._draw(name, shape)
        if self._whole is None or self._whole[0] != name:
            self._whole = name, self._draw(name, place.slice.shape_of_whole(shape[0], shape[1]))
        return place.slice.take(self._whole[1]).clone(memory_format=torch.contiguous_format)

    def _draw(self, name: str, shape: tuple[int, ...]) -> Tensor:
        # On the CPU in float32, because torch's default device and dtype must not change the numbers.
        draws = torch.empty(shape, dtype=torch.float32, device="cpu")
        generator = seeds.generator(self._seed, "init", name)
        draws.normal_(0.0, 1.0, generator=generator)
        if self._truncation is not None:
            beyond = (draws.abs() > self._truncation).nonzero(as_tuple=True)
            while len(beyond[0]):
                again = draws.new_empty(len(beyond[0])).normal_(0.0, 1.0, generator=generator)
                draws[beyond] = again
                still = again.abs() > self._truncation
                beyond = tuple(index[still] for index in beyond)
        return draws


def _hold_no_values(gains: list[Place]) -> bool:
    """Whether all norms are torch's own with gain 0: then their memory comes from ``to_empty`` and was never filled."""
    return bool(gains) and all(is_norm_of_torch(place.module) and not place.parameter.any() for place in gains)


def _padding_rows(model: nn.Module) -> dict[int, list[int]]:
    """Return, by parameter id, the rows that are padding in one of the embeddings that share the parameter."""
    rows: dict[int, list[int]] = {}
    for module in model.modules():
        if isinstance(module, EMBEDDING_TYPES) and module.padding_idx is not None:
            rows.setdefault(id(module.weight), []).append(module.padding_idx)
    return rows
