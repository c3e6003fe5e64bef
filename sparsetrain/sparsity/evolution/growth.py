"""Growth by gradients: requests of dense gradients to the layers, and the positions chosen from them."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sparsetrain.errors import NotFiniteError
from sparsetrain.sparsity.evolution.base import Rule
from sparsetrain.sparsity.evolution.exchange import Counts, all_finite, select_grown, units_of
from sparsetrain.sparsity.evolution.managed import Managed, naming
from sparsetrain.sparsity.layers.dense_gradient import DenseGradientRequest
from sparsetrain.sparsity.layers.ranks import Ranks


@dataclass(frozen=True)
class Grown:
    """The result of ranking a dense gradient: the units to grow, and their gradient if it gives initial values."""

    units: Tensor  # places in the grid, increasing
    gradient: Tensor | None


class Growth:
    """Requests dense gradients from the layers that the next step updates, and selects the units that grow.

    Args:
        rule: a rule that does not grow by gradients requests nothing. ranks: the gradients are summed over them.
        counts: how many units a layer keeps and grows in the update at a step.
    """

    def __init__(self, rule: Rule, ranks: Ranks, counts: Callable[[Managed, int], Counts]) -> None:
        self.rule, self._ranks, self._counts = rule, ranks, counts
        self._requests: dict[str, DenseGradientRequest[Any]] = {}
        self._said: set[str] = set()  # layers with a warning that they had no gradient

    def ask(self, layers: Iterable[Managed], step: int) -> None:
        """Request the gradients of the backward passes that lead to the update at ``step``, and no others."""
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
        """Whether any layer has a request."""
        return bool(self._requests)

    def _request(self, entry: Managed, step: int) -> DenseGradientRequest[Any]:
        accumulate = self.rule.accumulation == "staggered"
        if self._ranks.several:  # `take` sums them: all ranks reach it, even ranks that do not use the layer
            return DenseGradientRequest(lambda dense: dense, accumulate, hold=True)
        return DenseGradientRequest(lambda dense: self._choose(entry, step, dense), accumulate)

    def _choose(self, entry: Managed, step: int, dense: Tensor) -> Grown | None:
        """Return the units to grow; None if the gradient is not finite, which `take` refuses if the step counts."""
        if not all_finite(dense):
            return None
        pattern = entry.layer.pattern
        with naming(entry.name, step):
            units = select_grown(dense, pattern, self._counts(entry, step), self.rule)
        gradient = units_of(dense, units, pattern.block) if self.rule.grown_scale > 0.0 else None
        # All layers keep theirs until the step ends.
        return Grown(units.to(torch.int32) if dense.numel() < 2**31 else units, gradient)

    def take(self, entry: Managed, step: int) -> Grown | None:
        """Return the units to grow in a layer; None without a request, or if the layer took part in no backward pass.

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
