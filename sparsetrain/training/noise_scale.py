"""The gradient noise scale of a run, from the per-example gradient norms of its norm layers."""

from __future__ import annotations

import glob
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from sparsetrain import wrappers
from sparsetrain.errors import UserError
from sparsetrain.gradients.modules import is_norm
from sparsetrain.gradients.per_example import per_example_norms
from sparsetrain.gradients.record import length_of
from sparsetrain.runs.optimizer_state import JSON
from sparsetrain.scaling.noise import NoiseScale
from sparsetrain.training.observers import (
    NOISE_SCALE,
    NOISE_SCALE_ALL,
    OBSERVERS,
    Observer,
    RunStart,
    register_observer,
)

__all__ = [
    "NOISE_SCALE",
    "OBSERVERS",
    "NoiseScaleObserver",
]  # a configuration imports the registry from here, with its entries


@register_observer(NOISE_SCALE)
class NoiseScaleObserver(Observer):
    """Measures the gradient noise scale of the LayerNorms and RMSNorms of a model, and leaves the training as it is.

    Their per-example norms cost next to nothing, and their noise scale follows that of all parameters up to a factor
    (arXiv 2411.00999). Norms are measured before clipping. The noise scale of several layers is not the mean of theirs
    but that of the sums of their squared norms.

    Attributes:
        scale: of all norm layers together, in sequences; averages over about 100 steps.
        layers: of each layer, by qualified name.
    """

    name = NOISE_SCALE
    everything = False

    def __init__(self) -> None:
        self.scale = NoiseScale()
        self.layers: dict[str, NoiseScale] = {}
        self._module: nn.Module | None = None
        self._norms: set[str] = set()

    def start(self, run: RunStart) -> None:
        """Find the layers.

        Raises:
            UserError: no norm layer has a parameter that trains.
        """
        self._module = run.module
        trains = {
            name: module
            for name, module in wrappers.named_modules(run.module)
            if any(parameter.requires_grad for parameter in module.parameters(recurse=False))
        }
        self._norms = {name for name, module in trains.items() if is_norm(module)}
        if not self._norms and not self.everything:
            raise UserError(
                f"observe={NOISE_SCALE}: no LayerNorm or RMSNorm of the model has a parameter that trains; "
                f"{NOISE_SCALE_ALL} measures all parameters"
            )
        names = trains if self.everything else [name for name in trains if name in self._norms]
        self.layers = {name: self.layers.get(name, NoiseScale()) for name in names}

    @contextmanager
    def passes(self) -> Iterator[None]:
        """Measure one step.

        Raises:
            UserError: the step has a single example, from which noise cannot be told; or, if all parameters are
                measured, a module has no rule.
        """
        assert self._module is not None
        include = None if self.everything else [glob.escape(name) for name in self._norms]
        norms = per_example_norms(self._module, include)
        with norms:
            yield
        squared = norms.squared
        examples = len(next(iter(squared.values()), ()))
        if examples < 2:
            raise UserError(
                f"the noise scale needs at least 2 examples in a step, which are different; this one has {examples}"
            )
        gradients = dict(wrappers.named_parameters(self._module))
        small: dict[str, float] = {}
        big: dict[str, float] = {}
        with torch.no_grad():
            for name, of_examples in squared.items():
                layer, gradient = name.rpartition(".")[0], gradients[name].grad
                assert gradient is not None
                small[layer] = small.get(layer, 0.0) + float(of_examples.double().mean())
                big[layer] = big.get(layer, 0.0) + float(length_of(gradient)) ** 2
        if all(map(math.isfinite, (*small.values(), *big.values()))):  # else the loop says that the run diverged
            self.add(small, big, examples)

    def add(self, small: Mapping[str, float], big: Mapping[str, float], examples: int) -> None:
        """Add a step: by layer, the mean of the examples' squared norms, and that of the batch of ``examples``."""
        for name in small:
            self.layers[name].update(small[name], big[name], big=examples)
        norms = [name for name in small if name in self._norms]  # in an order that no hash seed changes
        if norms:
            self.scale.update(sum(small[name] for name in norms), sum(big[name] for name in norms), big=examples)

    def measured(self) -> Mapping[str, Any]:
        """Return the noise scale, its 95 % interval and that of each layer; null where noise hides the gradient."""
        return {
            **_entries(self.name, self.scale),
            f"{self.name}_layers": {name: _finite(scale.value) for name, scale in self.layers.items()},
        }

    def note(self) -> str:
        low, high = self.scale.interval()
        return f"noise scale {self.scale.value:.3g} [{low:.3g}, {high:.3g}]"

    def result(self) -> Mapping[str, Any]:
        return {self.name: {**_ends(self.scale), "layers": {name: _ends(scale) for name, scale in self.layers.items()}}}

    def state(self) -> dict[str, JSON]:
        layers: dict[str, JSON] = {name: scale.state_dict() for name, scale in self.layers.items()}
        return {"norms": self.scale.state_dict(), "layers": layers}

    def restore(self, state: Mapping[str, JSON]) -> None:
        """Go on from a checkpoint.

        Raises:
            UserError: the state is damaged.
        """
        self.scale.load_state_dict(_section(state, "norms"))
        layers = _section(state, "layers")
        for name in layers:
            self.layers.setdefault(name, NoiseScale()).load_state_dict(_section(layers, name))


@register_observer(NOISE_SCALE_ALL)
class WholeNoiseScaleObserver(NoiseScaleObserver):
    """Measures the gradient noise scale of all parameters too, by the per-example norms of every layer.

    It costs a tenth of a step on a CPU or, in narrow models, half of one. `fit law=noise` says from such runs how far
    the noise scale of the norm layers stands for that of all parameters.

    Attributes:
        whole: of all parameters together.
    """

    everything = True

    def __init__(self) -> None:
        super().__init__()
        self.whole = NoiseScale()

    def add(self, small: Mapping[str, float], big: Mapping[str, float], examples: int) -> None:
        super().add(small, big, examples)
        self.whole.update(sum(small.values()), sum(big.values()), big=examples)

    def measured(self) -> Mapping[str, Any]:
        return {**super().measured(), **_entries(NOISE_SCALE_ALL, self.whole)}

    def note(self) -> str:
        return f"{super().note()}, of all {self.whole.value:.3g}"

    def result(self) -> Mapping[str, Any]:
        return {**super().result(), NOISE_SCALE_ALL: _ends(self.whole)}

    def state(self) -> dict[str, JSON]:
        return {**super().state(), "whole": self.whole.state_dict()}

    def restore(self, state: Mapping[str, JSON]) -> None:
        super().restore(state)
        if "whole" in state:
            self.whole.load_state_dict(_section(state, "whole"))


def _section(state: Mapping[str, JSON], name: str) -> dict[str, Any]:
    found = state.get(name)
    if not isinstance(found, dict):
        raise UserError(f"the checkpoint's state of the observer {NOISE_SCALE} is damaged at {name}")
    return found


def _ends(scale: NoiseScale) -> dict[str, float | None]:
    low, high = scale.interval()
    return {"value": _finite(scale.value), "low": _finite(low), "high": _finite(high)}


def _entries(name: str, scale: NoiseScale) -> dict[str, float | None]:
    ends = _ends(scale)
    return {name: ends["value"], f"{name}_low": ends["low"], f"{name}_high": ends["high"]}


def _finite(number: float) -> float | None:
    return number if math.isfinite(number) else None
