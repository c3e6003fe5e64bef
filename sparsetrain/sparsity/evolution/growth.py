"""Where weights grow by gradients: what it asks of the layers, and what it keeps of the answers."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sparsetrain.errors import NotFiniteError
from sparsetrain.sparsity.evolution.base import Rule
from sparsetrain.sparsity.evolution.exchange import Counts, all_finite, choose_grown, units_of
from sparsetrain.sparsity.evolution.managed import Managed
from sparsetrain.sparsity.layers.dense_gradient import DenseGradientRequest
from sparsetrain.sparsity.layers.ranks import Ranks


@dataclass(frozen=True)
class Grown:
    """What is left of a dense gradient: the units to grow, and the gradient there if it gives the initial values."""

    units: Tensor  # places in the grid, increasing
    gradient: Tensor | None


class Growth:
    """Asks the layers that a step will update for their dense gradients, and chooses what grows.

    Args:
        rule: asks for nothing unless it grows by gradients. ranks: over which the gradients are added up.
        counts: how many units a layer keeps and grows in the update at a step.
    """

    def __init__(self, rule: Rule, ranks: Ranks, counts: Callable[[Managed, int], Counts]) -> None:
        self.rule, self._ranks, self._counts = rule, ranks, counts
        self._requests: dict[str, DenseGradientRequest[Any]] = {}
        self._said: set[str] = set()  # layers of which it was said that they could not be ranked

    def ask(self, layers: Iterable[Managed], step: int) -> None:
        """Ask for the gradients of the backward passes that lead to the update at ``step``, and for no others."""
        layers = list(layers)
        for entry in layers:
            if self._requests.pop(entry.name, None) is not None:
                entry.layer.request_dense_gradient(None)
        for entry in layers if self.rule.needs_gradient else ():
            if entry.due(self.rule, step) and entry.trains:
                self._requests[entry.name] = request = self._request(entry, step)
                entry.layer.request_dense_gradient(request)

    @property
    def asking(self) -> bool:
        """Whether any layer is asked for its gradient."""
        return bool(self._requests)

    def _request(self, entry: Managed, step: int) -> DenseGradientRequest[Any]:
        accumulate = self.rule.accumulation == "staggered"
        if self._ranks.several:  # to be added up in `take`, which all ranks reach, though not all may use the layer
            return DenseGradientRequest(lambda dense: dense, accumulate, hold=True)
        return DenseGradientRequest(lambda dense: self._choose(entry, step, dense), accumulate)

    def _choose(self, entry: Managed, step: int, dense: Tensor) -> Grown | None:
        """Return what is kept of a dense gradient; None if it is not finite, which a step that counts will refuse."""
        if not all_finite(dense):
            return None
        pattern = entry.layer.pattern
        units = choose_grown(dense, pattern, self._counts(entry, step), self.rule)
        gradient = units_of(dense, units, pattern.block) if self.rule.grown_scale > 0.0 else None
        # All layers keep theirs until the step ends.
        return Grown(units.to(torch.int32) if dense.numel() < 2**31 else units, gradient)

    def take(self, entry: Managed, step: int) -> Grown | None:
        """Return what is to grow in a layer: None if it was not asked, or took part in no backward pass.

        Raises:
            NotFiniteError: the gradient is not finite.
        """
        request = self._requests.pop(entry.name, None)
        if request is None:
            return None
        entry.layer.request_dense_gradient(None)
        grown, took_part = request.finish(), request.answered
        if self._ranks.several:
            dense, layer = grown, entry.layer
            took_part = self._ranks.any(took_part)
            if took_part:
                if dense is None:
                    dtype = torch.promote_types(layer.values.dtype, torch.float32)
                    dense = torch.zeros(layer.pattern.shape, dtype=dtype, device=layer.values.device)
                self._ranks.add_up(dense)
                grown = self._choose(entry, step, dense)
        if took_part and grown is None:
            raise NotFiniteError(f"{self.rule.name}: the gradient of layer '{entry.name}' is not finite at step {step}")
        if not took_part and entry.name not in self._said:
            self._said.add(entry.name)
            warnings.warn(
                f"{self.rule.name}: layer '{entry.name}' had no gradient at step {step} and keeps its mask: it took no "
                "part in the backward pass (said once for each layer)",
                stacklevel=5,
            )
        return grown
