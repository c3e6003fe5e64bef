"""`MaskManager`: owns the sparse layers of a model, changes their masks when a step is due, and says how they are."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from sparsetrain import seeds
from sparsetrain.errors import NotFiniteError, UserError
from sparsetrain.sparsity.config import SparsityConfig
from sparsetrain.sparsity.evolution import Rule, Static
from sparsetrain.sparsity.exchange import (
    Counts,
    all_finite,
    choose_kept,
    draw_grown,
    exchange_counts,
)
from sparsetrain.sparsity.growth import Grown, Growth
from sparsetrain.sparsity.linear import SparseLinear
from sparsetrain.sparsity.managed import Managed, manage_layers
from sparsetrain.sparsity.pattern import SparsityPattern
from sparsetrain.sparsity.ranks import Ranks, is_sharded
from sparsetrain.sparsity.topology import TopologyUpdate, apply_update, check_optimizer


@dataclass(frozen=True)
class LayerReport:
    """One layer's mask at this moment.

    Args:
        density, target_density: what it has and what the rule asks for; equal unless something is wrong.
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


@dataclass(frozen=True)
class MaskUpdate:
    """What one step changed: weights dropped and grown over all layers, and whether any layer changed its size."""

    step: int
    layers: tuple[str, ...]
    dropped: int
    grown: int
    resized: bool


def _is_cut(layer: SparseLinear) -> bool:
    """Whether FSDP holds the values of a layer in shards, in whatever way it has put them away."""
    values = layer._parameters.get("values")
    return values is None or is_sharded(values) or values.numel() != layer.pattern.nnz


class MaskManager:
    """Makes the layers of a model sparse, and changes their masks by a rule while it is trained.

    ::

        manager = MaskManager(model, RigL(sparsity=0.9, every=100, drop_fraction=0.3))   # before the optimizer
        optimizer = torch.optim.AdamW(model.parameters())
        loss.backward(); optimizer.step(); manager.step(optimizer); optimizer.zero_grad()

    Everything it does is a function of (seed, layer name, step) and of the weights and gradients. An update replaces a
    layer's pattern and moves values, gradient and every per-weight tensor of the optimizer together; the Parameter
    object stays, survivors keep their bits and grown weights start at zero (`sparsetrain.sparsity.topology`).

    Under data-parallel training each rank has a manager of its own. Random growth is seeded, so ranks agree without
    talking; dense gradients are summed over ranks, one layer at a time, in a process group of their own; a hash of all
    masks is compared after every update. Give the bare model, before it is wrapped. DDP keeps buffers of the
    parameters' sizes and must be built anew when a size changes, as GMP and variable sparsity make it: ``on_resize`` is
    called then.

    FSDP, in either version, takes sparse layers whose masks stay: `Static`. Masks cannot change under it, since each
    rank has a shard of ``values`` in which neither all magnitudes can be ranked nor weights moved from one rank to
    another: other rules raise at the first `attach` or `step`.

    An update holds, beside what training holds already, about one dense layer in float32 at a time: RigL its dense
    gradient, SET the permutation of the empty positions that it draws from, GMP the new indices or values while the
    old ones are still there. What stays is two bits a dense weight, for `watch`, from a layer's first update on.

    Args:
        model: changed in place; dense layers that the plan makes sparse keep their weights at the mask's positions.
        rule: `Static`, `SET`, `RigL`, `GMP` or `VariableSparsity`.
        plan: which layers, how sparse, in what pattern; its ``evolution`` is not read. Without one, the options below.
        include, exclude: globs over qualified names, as in `sparsify`.
        pattern: ``random``, ``magnitude``, or any other under `Static`. backend: of the new layers.
        seed: of masks and growth; None draws from torch's global generator. ``plan.seed``, when set, wins.
        total_steps: length of the training, if known: a rule that would act after it is refused.
        on_resize: called after an update that changed the number of weights of a layer.

    Raises:
        UserError: an already sparse layer whose density is not that of the rule at step 0; no layer at all; a plan
            beside include, exclude or pattern; a rule that acts after ``total_steps``; a model that FSDP has wrapped
            already; and as `sparsify`. The model is then unchanged.
    """

    def __init__(
        self,
        model: nn.Module,
        rule: Rule,
        *,
        plan: SparsityConfig | None = None,
        include: list[str] | None = None,
        exclude: list[str] | None = None,
        pattern: str = "random",
        backend: str = "auto",
        seed: int | None = None,
        total_steps: int | None = None,
        on_resize: Callable[[], None] | None = None,
    ) -> None:
        if total_steps is not None:
            rule.check(total_steps)
        if any(is_sharded(parameter) for parameter in model.parameters()):
            raise UserError("MaskManager: FSDP has sharded the model; build the manager first, from the bare model")
        self.rule, self.on_resize = rule, on_resize
        self.steps = 0
        if plan is not None and (include is not None or exclude is not None or pattern != "random"):
            raise UserError("MaskManager: include, exclude and pattern belong into the plan when one is given")
        globs: dict[str, Any] = {
            key: value for key, value in (("include", include), ("exclude", exclude)) if value is not None
        }
        if plan is None and rule.sparsity is not None:
            plan = SparsityConfig(rule.sparsity, pattern, backend=backend, **globs)
        if plan is not None and rule.sparsity is not None and plan.nnz is None and plan.sparsity != rule.sparsity:
            raise UserError(
                f"MaskManager: plan.sparsity={plan.sparsity} and {rule.name}(sparsity={rule.sparsity}) differ"
            )
        self.seed = seeds.resolve_seed(plan.seed if plan is not None and plan.seed is not None else seed)
        self._layers = manage_layers(model, rule, plan, globs, self.seed)
        self._ranks = Ranks()
        self._known: int | None = None  # id of the optimizer that was checked
        self._growth = Growth(rule, self._ranks, lambda entry, step: self._counts(entry, step, self._drop(entry, step)))
        self._growth.ask(self._layers, self.steps + 1)

    @property
    def layers(self) -> dict[str, SparseLinear]:
        """The managed layers by qualified name."""
        return {entry.name: entry.layer for entry in self._layers}

    # ------------------------------------------------------------------------------------------------------- steps

    def attach(self, optimizer: Optimizer) -> None:
        """Check that the optimizer's state can follow the masks; `step` does it too, at its first call.

        Raises:
            UserError: an optimizer of unknown kind, or one that does not hold the layers' values; layers that FSDP has
                sharded.
        """
        if not isinstance(self.rule, Static):
            if any(_is_cut(entry.layer) for entry in self._layers):
                raise UserError(
                    f"{self.rule.name}: FSDP has sharded the layers, and masks cannot change under it; use DDP, or "
                    "Static masks"
                )
            check_optimizer(optimizer, {f"{entry.name}.values": entry.layer.values for entry in self._layers})
        self._known = id(optimizer)

    def step(self, optimizer: Optimizer) -> MaskUpdate | None:
        """Count an optimizer step that was just done, and update the masks if that is due.

        Call it between ``optimizer.step()`` and ``optimizer.zero_grad()``.

        Returns:
            What changed, or None.

        Raises:
            UserError: as `attach`. NotFiniteError: weights or gradients to be ranked that are not finite.
            RuntimeError: the ranks of a distributed training have arrived at different masks.
        """
        if self._known != id(optimizer):
            self.attach(optimizer)
        self.steps += 1
        sizes = [entry.layer.values.numel() for entry in self._layers]
        changed = [
            (entry.name, *counts)
            for entry in self._layers
            if entry.due(self.rule, self.steps) and (counts := self._update(entry, optimizer)) is not None
        ]
        self._growth.ask(self._layers, self.steps + 1)
        if not changed:
            return None
        self._ranks.check_equal(self.hash)
        resized = sizes != [entry.layer.values.numel() for entry in self._layers]
        if resized and self.on_resize is not None:
            self.on_resize()
        names, dropped, grown = zip(*changed, strict=True)
        return MaskUpdate(self.steps, names, sum(dropped), sum(grown), resized)

    def _drop(self, entry: Managed, step: int) -> float:
        return self.rule.drop(step - entry.offset)

    def _counts(self, entry: Managed, step: int, drop: float) -> Counts:
        pattern = entry.layer.pattern
        target = entry.nnz_at(self.rule, step) // (pattern.block[0] * pattern.block[1])
        return exchange_counts(pattern, target, entry.parts, drop)

    def _update(self, entry: Managed, optimizer: Optimizer) -> tuple[int, int] | None:
        """Update one layer; return the numbers of weights dropped and grown, None if there was nothing to do."""
        asked, found = self._growth.take(entry, self.steps)
        layer, step = entry.layer, self.steps
        # Without a gradient (the layer took no part in the step) nothing is exchanged, but its size still follows.
        drop = 0.0 if asked and found is None else self._drop(entry, step)
        counts = self._counts(entry, step, drop)
        update = self._next(entry, counts, found)
        if update is None:
            return None
        start = None
        if found is not None and found.gradient is not None and bool(found.gradient.any()):
            survivors = update.carry(layer.values)[~update.grown]
            scale = self.rule.grown_scale * survivors.square().mean().sqrt()
            start = -scale * found.gradient / found.gradient.square().mean().sqrt()
        before = layer.values.numel()
        entry.history.begin(layer.pattern)
        apply_update(layer, update, optimizer, start)
        entry.history.record(layer.pattern)
        grown = update.grown_count
        return before - (layer.values.numel() - grown), grown

    def _next(self, entry: Managed, counts: Counts, found: Grown | None) -> TopologyUpdate | None:
        """Return the update of a layer, None if there is nothing to do.

        The old pattern is not held beyond: its indices are freed when the layer is given the new ones.
        """
        layer, pattern, step = entry.layer, entry.layer.pattern, self.steps
        if sum(grown for _, _, grown in counts) == 0 and sum(kept for _, kept, _ in counts) == pattern.col.numel():
            return None
        if not all_finite(layer.values):
            raise NotFiniteError(
                f"{self.rule.name}: the weights of layer '{entry.name}' are not finite at step {self.steps}"
            )
        if found is None:
            grown = draw_grown(pattern, counts, seeds.generator(self.seed, "grow", entry.name, step))
        else:
            grown = found.units
        kept = choose_kept(layer.values, pattern, counts, self.rule.protect_rows)
        return TopologyUpdate.exchange(pattern, kept, grown)

    # --------------------------------------------------------------------------------------------------- watching

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
        """Return a hexadecimal digest of all masks: equal on two ranks, or before and after a resume, iff they are."""
        digest = hashlib.blake2b(digest_size=16)
        for entry in self._layers:
            pattern = entry.layer.pattern
            digest.update(f"{entry.name} {pattern.shape} {pattern.block}".encode())
            for indices in (pattern.row_ptr, pattern.col):
                digest.update(indices.cpu().numpy().data)
        return digest.hexdigest()

    # ------------------------------------------------------------------------------------------------- checkpoints

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Return what a checkpoint must hold beside the model: a JSON object, and uint8 tensors by name.

        The masks themselves are buffers of the model.
        """
        tensors = {
            f"{entry.name}.{key}": tensor for entry in self._layers for key, tensor in entry.history.tensors().items()
        }
        return {"rule": self.rule.name, "steps": self.steps, "seed": str(self.seed), "hash": self.hash()}, tensors

    def load_state(self, state: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Go on from `state`, after the model's own state was loaded.

        Raises:
            UserError: the state of another rule, or masks that are not those it was saved with.
        """
        if state["rule"] != self.rule.name:
            raise UserError(f"the masks were saved under {state['rule']} and cannot go on under {self.rule.name}")
        if state["hash"] != self.hash():
            raise UserError(
                "the model's masks are not those that the manager's state was saved with: load both together"
            )
        self.steps, self.seed = int(state["steps"]), int(state["seed"])
        for entry in self._layers:
            prefix = f"{entry.name}."
            own = {key.removeprefix(prefix): tensor for key, tensor in tensors.items() if key.startswith(prefix)}
            own = {key: tensor for key, tensor in own.items() if key in ("first", "ever")}
            entry.history.restore(own, entry.layer.pattern)
        self._growth.ask(self._layers, self.steps + 1)
