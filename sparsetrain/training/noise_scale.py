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
from sparsetrain.runs.optimizer_state import JSON
from sparsetrain.scaling.noise import NoiseScale
from sparsetrain.training.observers import NOISE_SCALE, OBSERVERS, Observer, RunStart, register_observer

__all__ = [
    "NOISE_SCALE",
    "OBSERVERS",
    "NoiseScaleObserver",
]  # a configuration imports the registry from here, with its entries


@register_observer(NOISE_SCALE)
class NoiseScaleObserver(Observer):
    """Measures the gradient noise scale of the LayerNorms and RMSNorms of a model, and leaves the training as it is.

    Their per-example norms cost next to nothing, and their noise scale follows that of all parameters up to a factor
    (arXiv 2411.00999). Norms are measured before clipping. The noise scale of all norm layers is not the mean of theirs
    but that of the sums of their squared norms.

    Attributes:
        scale: of all norm layers together, in sequences; averages over about 100 steps.
        layers: of each norm layer, by qualified name.
    """

    name = NOISE_SCALE

    def __init__(self) -> None:
        self.scale = NoiseScale()
        self.layers: dict[str, NoiseScale] = {}
        self._module: nn.Module | None = None

    def start(self, run: RunStart) -> None:
        """Find the norm layers.

        Raises:
            UserError: no norm layer has a parameter that trains.
        """
        self._module = run.module
        names = [
            name
            for name, module in wrappers.named_modules(run.module)
            if is_norm(module) and any(parameter.requires_grad for parameter in module.parameters(recurse=False))
        ]
        if not names:
            raise UserError("observe=noise_scale: no LayerNorm or RMSNorm of the model has a parameter that trains")
        self.layers = {name: self.layers.get(name, NoiseScale()) for name in names}

    @contextmanager
    def passes(self) -> Iterator[None]:
        """Measure one step.

        Raises:
            UserError: the step has a single example, from which noise cannot be told.
        """
        assert self._module is not None
        norms = per_example_norms(self._module, include=[glob.escape(name) for name in self.layers])
        with norms:
            yield
        small: dict[str, float] = dict.fromkeys(self.layers, 0.0)
        big = dict(small)
        examples = 0
        gradients = {name: one.grad for name, one in wrappers.named_parameters(self._module) if one.grad is not None}
        with torch.no_grad():
            for name, squared in norms.squared.items():
                layer, examples = name.rpartition(".")[0], len(squared)
                small[layer] += float(squared.double().mean())
                big[layer] += float(gradients[name].double().square().sum())
        if examples < 2:
            raise UserError(
                f"observe=noise_scale: a step has {examples} example; budget.batch_size must be at least 2, since the "
                "noise is the difference between examples"
            )
        if not all(map(math.isfinite, (*small.values(), *big.values()))):
            return  # the loop says that the run diverged
        for name, scale in self.layers.items():
            scale.update(small[name], big[name], big=examples)
        self.scale.update(sum(small.values()), sum(big.values()), big=examples)

    def measured(self) -> Mapping[str, Any]:
        """Return the noise scale, its 95 % interval and that of each layer; null where noise hides the gradient."""
        low, high = self.scale.interval()
        return {
            "noise_scale": _finite(self.scale.value),
            "noise_scale_low": _finite(low),
            "noise_scale_high": _finite(high),
            "noise_scale_layers": {name: _finite(scale.value) for name, scale in self.layers.items()},
        }

    def note(self) -> str:
        low, high = self.scale.interval()
        return f"noise scale {self.scale.value:.3g} [{low:.3g}, {high:.3g}]"

    def result(self) -> Mapping[str, Any]:
        layers = {}
        for name, scale in self.layers.items():
            low, high = scale.interval()
            layers[name] = {"value": _finite(scale.value), "low": _finite(low), "high": _finite(high)}
        low, high = self.scale.interval()
        whole = {"value": _finite(self.scale.value), "low": _finite(low), "high": _finite(high)}
        return {"noise_scale": {**whole, "layers": layers}}

    def state(self) -> dict[str, JSON]:
        layers: dict[str, JSON] = {name: scale.state_dict() for name, scale in self.layers.items()}
        return {"all": self.scale.state_dict(), "layers": layers}

    def restore(self, state: Mapping[str, JSON]) -> None:
        """Go on from a checkpoint.

        Raises:
            UserError: the state is damaged.
        """
        whole, layers = state.get("all"), state.get("layers")
        if not isinstance(whole, dict) or not isinstance(layers, dict):
            raise UserError("the checkpoint's state of the observer noise_scale is damaged")
        self.scale.load_state_dict(whole)
        for name, one in layers.items():
            if not isinstance(one, dict):
                raise UserError(f"the checkpoint's state of the observer noise_scale is damaged at {name}")
            self.layers.setdefault(name, NoiseScale()).load_state_dict(one)


def _finite(number: float) -> float | None:
    return number if math.isfinite(number) else None
