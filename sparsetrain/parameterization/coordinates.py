"""Coordinate check: whether training changes every layer by the same amount at any width, density or depth.

A parameterization that transfers hyperparameters keeps three scales when one of these changes (muP: arXiv 2203.03466,
appendix D; SμPar: arXiv 2405.15743, section 4). They are measured for each layer over the first optimizer steps, as
root mean squares over all elements:

==========  ==========================================================================================
activation  the layer's output y
gradient    dL/dy. The muP family divides the logits by m_d, so the gradient falls as 1 / width, and as m_L^(-alpha)
            inside a residual branch; it does not depend on density
update      the change of the output that the last step caused for the same input, (W_new - W_old) x
==========  ==========================================================================================

The RMS is averaged over layers of the same kind (same name without the block number) and over seeds. Two numbers
describe its dependence on the axis: the slope of log RMS against the log of the axis, which is 0 if the scale is kept,
and the ratio of the largest to the smallest RMS.

Run the check at a learning rate at which the loss falls: no parameterization keeps any scale if training diverges.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from sparsetrain import wrappers
from sparsetrain.errors import UserError

QUANTITIES = ("activation", "gradient", "update")
LOSS = "loss"

KindOf = Callable[[str, nn.Module], str | None]


class Trial(NamedTuple):
    """A freshly initialised model, an optimizer for it, and a function that returns the loss at a step."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    loss: Callable[[int], Tensor]


@dataclass(frozen=True)
class Reading:
    """One measurement of one trial.

    Args:
        kind: kind of layers that it is averaged over; ``loss`` for the loss.
        quantity: one of `QUANTITIES`, or ``loss``.
        step: number of optimizer steps before it was read; an update is read right after its step.
        rms: root mean square, infinite if it was not finite; for the loss, its value in nats.
    """

    kind: str
    quantity: str
    step: int
    rms: float


@dataclass(frozen=True)
class Coordinate:
    """A `Reading` of the trial at ``value`` on the axis, with ``seed``, under ``scheme``."""

    scheme: str
    value: float
    seed: int
    kind: str
    quantity: str
    step: int
    rms: float


@dataclass(frozen=True)
class Spread:
    """The dependence of the RMS of one kind of layer on the axis, after averaging over seeds.

    Args:
        slope: least-squares slope of log RMS against log axis value; NaN if an RMS is zero or infinite.
        ratio: largest over smallest RMS; infinite if one is zero or infinite, except that it is 1 if all are zero.
        rms: ``(axis value, RMS)`` in the order of the axis.
    """

    scheme: str
    kind: str
    quantity: str
    step: int
    slope: float
    ratio: float
    rms: tuple[tuple[float, float], ...]


def layer_kind(name: str, module: nn.Module) -> str | None:
    """Return the kind of a module that has parameters of its own or is a numbered block; None for any other module.

    The kind is the name without its first number: ``blocks.3.attn.out`` and ``blocks.0.attn.out`` have the same kind,
    and the kind ``blocks`` is the residual stream after each block.
    """
    parts = name.split(".")
    numbers = [index for index, part in enumerate(parts) if part.isdigit()]
    numbered = bool(numbers) and numbers[0] == len(parts) - 1
    if not numbered and not any(True for _ in module.parameters(recurse=False)):
        return None
    rest = parts[: numbers[0]] + parts[numbers[0] + 1 :] if numbers else parts
    return ".".join(rest) or name or None


def read_coordinates(trial: Trial, steps: int, kind_of: KindOf = layer_kind) -> list[Reading]:
    """Train ``steps`` optimizer steps; return the activation, gradient and update RMS of each kind, and the losses.

    Activations, gradients and the loss are read before each step and after the last one, at steps 0 to ``steps``.
    Updates are read after each step, at 1 to ``steps``, for layers with parameters of their own and a single input.

    Args:
        trial: its model is read in its current mode (train or eval) and is changed by the training.
        steps: at least 1.
        kind_of: maps qualified name and module to a kind, or to None to leave the module out.

    Raises:
        UserError: no module has a kind, or ``steps`` is below 1.
    """
    if steps < 1:
        raise UserError(f"steps={steps} must be at least 1")
    recorder = _Recorder(trial.model, kind_of)
    readings: list[Reading] = []
    try:
        for step in range(steps + 1):
            recorder.clear()
            loss = trial.loss(step)
            trial.optimizer.zero_grad(set_to_none=True)
            loss.backward()
            readings.append(Reading(LOSS, LOSS, step, _finite(loss.item())))
            readings += recorder.readings("activation", step) + recorder.readings("gradient", step)
            if step < steps:
                trial.optimizer.step()
                recorder.measure_updates()
                readings += recorder.readings("update", step + 1)
    finally:
        recorder.remove()
    return readings


def coordinate_check(
    build: Callable[[float, int], Trial],
    values: Sequence[float],
    seeds: Iterable[int],
    steps: int = 10,
    scheme: str = "",
    kind_of: KindOf = layer_kind,
) -> list[Coordinate]:
    """Read the coordinates of a trial for each axis value and seed.

    Args:
        build: maps an axis value (a width, a density, a depth) and a seed to a fresh trial.
        values: at least two values, all above 0.
        scheme: a name to tell the rows of several parameterizations apart.

    Raises:
        UserError: there are fewer than two values, or one is not above 0.
    """
    check_values(values)
    return [
        Coordinate(scheme, value, seed, **vars(reading))
        for seed in seeds
        for value in values
        for reading in read_coordinates(build(value, seed), steps, kind_of)
    ]


def check_values(values: Sequence[float], field: str = "values") -> None:
    """Raise `UserError` unless ``values`` are at least two different numbers above 0."""
    if len(set(values)) < 2 or len(set(values)) < len(values):
        raise UserError(f"{field}={list(values)} must name at least two values, and no value twice")
    if not all(value > 0 for value in values):
        raise UserError(f"{field}={list(values)} must all be above 0, because the slope uses their logarithm")


def spreads(rows: Iterable[Coordinate], step: int | None = None) -> list[Spread]:
    """Return slope and ratio for each scheme, kind and quantity at one step, in the order of the rows.

    Args:
        rows: rows of one axis from `coordinate_check`; several schemes may be mixed.
        step: the step to use; None means the last step of each quantity.
    """
    groups: dict[tuple[str, str, str, int], dict[float, list[float]]] = {}
    last: dict[tuple[str, str, str], int] = {}
    for row in rows:
        key = (row.scheme, row.kind, row.quantity)
        last[key] = max(last.get(key, 0), row.step)
        groups.setdefault((*key, row.step), {}).setdefault(row.value, []).append(row.rms)
    found = []
    for (scheme, kind, quantity, at), by_value in groups.items():
        if at == (last[scheme, kind, quantity] if step is None else step):
            means = tuple((value, float(np.mean(by_value[value]))) for value in sorted(by_value))
            slope, ratio = _slope_and_ratio(means)
            found.append(Spread(scheme, kind, quantity, at, slope, ratio, means))
    return found


def losses_fall(rows: Iterable[Coordinate]) -> dict[tuple[str, float], bool]:
    """Return, for each (scheme, axis value), whether the mean loss at the last step is below that at the first."""
    losses: dict[tuple[str, float], dict[int, list[float]]] = {}
    for row in rows:
        if row.quantity == LOSS:
            losses.setdefault((row.scheme, row.value), {}).setdefault(row.step, []).append(row.rms)
    return {key: bool(np.mean(of[max(of)]) < np.mean(of[min(of)])) for key, of in losses.items()}


def _slope_and_ratio(means: Sequence[tuple[float, float]]) -> tuple[float, float]:
    values, rms = (np.array(column) for column in zip(*means, strict=True))
    if not rms.any():
        return 0.0, 1.0  # the layer received no gradient at any value
    if not (np.isfinite(rms).all() and rms.all()):
        return math.nan, math.inf
    slope = 0.0 if len(rms) < 2 else float(np.polyfit(np.log(values), np.log(rms), 1)[0])
    return slope, float(rms.max() / rms.min())


def _finite(value: float) -> float:
    return value if math.isfinite(value) else math.inf


def _rms(tensor: Tensor) -> float:
    return _finite(tensor.detach().double().square().mean().sqrt().item())


class _Recorder:
    """Hooks on the modules of a model that have a kind; they keep the last inputs and outputs between two steps."""

    def __init__(self, model: nn.Module, kind_of: KindOf) -> None:
        self._kinds: dict[nn.Module, str] = {}
        for name, module in wrappers.named_modules(model):
            kind = kind_of(name, module)
            if kind is not None:
                self._kinds[module] = kind
        if not self._kinds:
            raise UserError("the coordinate check needs a module with parameters of its own, and the model has none")
        self._inputs: dict[nn.Module, tuple[Any, ...]] = {}
        self._kept: dict[nn.Module, tuple[Tensor, Tensor]] = {}
        self._rms: dict[str, dict[str, list[float]]] = {quantity: {} for quantity in QUANTITIES}
        self._recording = True
        # Before all other pre-hooks, so that `measure_updates` does not apply a multiplier of `parameterize` twice.
        self._handles = [module.register_forward_pre_hook(self._enter, prepend=True) for module in self._kinds]
        self._handles += [module.register_forward_hook(self._hook) for module in self._kinds]

    def clear(self) -> None:
        self._kept.clear()
        for of in self._rms.values():
            of.clear()

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()

    def readings(self, quantity: str, step: int) -> list[Reading]:
        return [Reading(kind, quantity, step, float(np.mean(of))) for kind, of in self._rms[quantity].items()]

    @torch.no_grad()
    def measure_updates(self) -> None:
        """Run each layer again on its last input; the difference is the effect of the optimizer step."""
        self._recording = False
        for module, (x, before) in self._kept.items():
            self._note("update", module, _first(module(x)) - before)
        self._recording = True

    def _note(self, quantity: str, module: nn.Module, tensor: Tensor) -> None:
        self._rms[quantity].setdefault(self._kinds[module], []).append(_rms(tensor))

    def _enter(self, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        self._inputs[module] = inputs

    def _hook(self, module: nn.Module, _inputs: tuple[Any, ...], output: Any) -> None:
        y, inputs = _first(output), self._inputs.pop(module)
        # A scalar is not an activation: a head that receives targets returns the loss.
        if not self._recording or not isinstance(y, Tensor) or not y.is_floating_point() or y.ndim == 0:
            return
        self._note("activation", module, y)
        if y.requires_grad:
            y.register_hook(lambda gradient: self._note("gradient", module, gradient))
        own = any(True for _ in module.parameters(recurse=False))
        if own and len(inputs) == 1 and isinstance(inputs[0], Tensor):
            self._kept[module] = (inputs[0].detach(), y.detach())


def _first(output: Any) -> Any:
    """Return the main output of a module: its output, or the first one of a tuple."""
    return output[0] if isinstance(output, tuple) else output
