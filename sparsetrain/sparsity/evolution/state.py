"""The present state of managed masks: reports, numbers for metrics, a hash, and the state for a checkpoint."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from sparsetrain.errors import UserError
from sparsetrain.sparsity.evolution.base import Rule
from sparsetrain.sparsity.evolution.managed import Managed
from sparsetrain.sparsity.layers.linear import SparseLinear
from sparsetrain.sparsity.patterns.pattern import SparsityPattern


@dataclass(frozen=True)
class LayerReport:
    """One layer's mask at this moment.

    Args:
        density, target_density: the present density and that of the rule; they differ only after an error.
        itop_rate: R_s, the fraction of its weights that were active at some time.
        overlap: the fraction of its first mask that is active now. dead_rows: outputs without a weight.
    """

    name: str
    nnz: int
    density: float
    target_density: float
    itop_rate: float
    overlap: float
    dead_rows: int

    def numbers(self) -> dict[str, float]:
        """Return everything but the name, as metrics hold it."""
        return {key: value for key, value in vars(self).items() if key != "name"}


class ManagedMasks(ABC):
    """The half of `sparsetrain.sparsity.evolution.manager.MaskManager` that changes no mask.

    Attributes:
        rule: how masks change. steps: the number of counted steps. seed: of masks and growth.
    """

    rule: Rule
    steps: int
    seed: int
    _layers: list[Managed]
    _restored: bool

    @abstractmethod
    def _arm(self) -> None:
        """Prepare for the next step, after `steps` has changed."""

    @property
    def layers(self) -> dict[str, SparseLinear]:
        """The managed layers by qualified name."""
        return {entry.name: entry.layer for entry in self._layers}

    def patterns(self) -> dict[str, SparsityPattern]:
        """Return the masks of this moment by layer."""
        return {entry.name: entry.layer.pattern for entry in self._layers}

    def nnz_at(self, step: int) -> dict[str, int]:
        """Return the number of weights that each layer has after ``step`` steps, to the element."""
        return {entry.name: entry.nnz_at(self.rule, step) for entry in self._layers}

    def densities_at(self, step: int) -> dict[str, float]:
        """Return the density that each layer has after ``step`` steps."""
        return {e.name: e.nnz_at(self.rule, step) / (e.shape[0] * e.shape[1]) for e in self._layers}

    def due(self, step: int) -> list[str]:
        """Return the layers whose masks are updated after ``step`` steps."""
        return [entry.name for entry in self._layers if entry.due(self.rule, step)]

    def report(self) -> list[LayerReport]:
        """Return the state of each layer's mask."""
        return [
            LayerReport(
                entry.name,
                (pattern := entry.layer.pattern).nnz,
                pattern.density,
                entry.nnz_at(self.rule, self.steps) / (entry.shape[0] * entry.shape[1]),
                entry.history.rate,
                entry.history.overlap,
                pattern.empty_rows,
            )
            for entry in self._layers
        ]

    def watch(self) -> dict[str, float]:
        """Return numbers over all managed layers for metrics.

        ``density`` and ``target_density``; ``itop_rate`` R_s; ``mask_overlap`` with the first masks; and, where
        gradients exist, ``gradient_flow``: their squared norm over the stored weights, which is to first order the
        loss that an infinitesimal step removes (Evci et al. 2022, arXiv 2010.03533).
        """
        layers = self._layers
        size = [entry.shape[0] * entry.shape[1] for entry in layers]
        total = sum(size)
        if total == 0:
            return {}
        histories = [entry.history for entry in layers]
        numbers = {
            "density": sum(entry.layer.values.numel() for entry in layers) / total,
            "target_density": sum(self.nnz_at(self.steps).values()) / total,
            "itop_rate": sum(history.rate * n for history, n in zip(histories, size, strict=True)) / total,
            "mask_overlap": sum(h.overlap_weights for h in histories) / sum(h.first_weights for h in histories),
        }
        gradients = [entry.layer.values.grad for entry in layers]
        if all(gradient is not None for gradient in gradients):
            numbers["gradient_flow"] = sum(float(g.float().square().sum()) for g in gradients if g is not None)
        return numbers

    def hash(self) -> str:
        """Return a hexadecimal digest of all masks; two ranks, or two runs, have the same one iff their masks agree."""
        digest = hashlib.blake2b(digest_size=16)
        for entry in self._layers:
            pattern = entry.layer.pattern
            pattern.doubt()  # so that the next product checks what was compared here
            digest.update(f"{entry.name} {pattern.shape} {pattern.block}".encode())
            for indices in (pattern.row_ptr, pattern.col):
                digest.update(indices.cpu().numpy().data)
        return digest.hexdigest()

    # ------------------------------------------------------------------------------------------------- checkpoints

    def state_dict(self) -> dict[str, Any]:
        """Return the state that a checkpoint must hold beside those of the model and the optimizer.

        The state consists of numbers, strings and uint8 tensors in nested dictionaries, with the same keys at every
        step. ``torch.save``, ``torch.load(weights_only=True)`` and ``torch.distributed.checkpoint`` can handle it. The
        masks themselves are buffers of the model. Names are those of the bare model, without wrappers.
        """
        history = {entry.name: entry.history.snapshot(entry.layer.pattern) for entry in self._layers}
        state = {"rule": self.rule.name, "steps": self.steps, "seed": self.seed, "hash": self.hash()}
        return {**state, "history": history}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restore `state_dict`. Load the model's own state, with its masks, first.

        Raises:
            UserError: the state is malformed, or has another rule, other layers or other masks. Nothing is then
                changed.
        """
        history = state_dict.get("history")
        if not isinstance(history, Mapping) or not all(isinstance(bits, Mapping) for bits in history.values()):
            raise UserError("the state of the masks has no history, so state_dict() did not return it")
        names = [entry.name for entry in self._layers]
        if set(history) != set(names):
            other = sorted(set(history) ^ set(names))[0]
            where = "the model has no such managed layer" if other in history else "the state has no such layer"
            raise UserError(f"the state of the masks has other layers: '{other}': {where}")
        self._restore(state_dict, history)

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Return `state_dict` as a JSON object and uint8 tensors by name; masks that never changed have no tensors."""
        tensors = {
            f"{entry.name}.{key}": tensor for entry in self._layers for key, tensor in entry.history.tensors().items()
        }
        return {"rule": self.rule.name, "steps": self.steps, "seed": str(self.seed), "hash": self.hash()}, tensors

    def load_state(self, state: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Restore `state`, after the model's own state was loaded.

        Raises:
            UserError: the state has another rule or other masks.
        """
        history = {}
        for entry in self._layers:
            found = {key: tensors.get(f"{entry.name}.{key}") for key in ("first", "ever")}
            history[entry.name] = {key: tensor for key, tensor in found.items() if tensor is not None}
        self._restore(state, history)

    def _restore(self, state: Mapping[str, Any], history: Mapping[str, Mapping[str, Tensor]]) -> None:
        for key in ("rule", "steps", "seed", "hash"):
            if key not in state:
                raise UserError(f"the state of the masks has no '{key}'")
        if state["rule"] != self.rule.name:
            raise UserError(f"the masks were saved under {state['rule']} and cannot go on under {self.rule.name}")
        if state["hash"] != self.hash():
            raise UserError(
                "the model's masks differ from the masks of the manager's state: load both together, the model first"
            )
        try:
            steps, seed = int(state["steps"]), int(state["seed"])
        except (TypeError, ValueError):
            raise UserError(
                f"the state of the masks has steps={state['steps']!r} and seed={state['seed']!r}: integers are needed"
            ) from None
        for entry in self._layers:
            entry.history.check(history[entry.name])
        for entry in self._layers:
            entry.history.restore(dict(history[entry.name]), entry.layer.pattern)
        self.steps, self.seed, self._restored = steps, seed, True
        self._arm()
