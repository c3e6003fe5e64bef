"""`MaskManager`: owns the sparse layers of a model, and changes their masks when a step is due."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.optim import Optimizer

from sparsetrain import seeds
from sparsetrain.errors import NotFiniteError, UserError
from sparsetrain.sparsity.config import SparsityConfig
from sparsetrain.sparsity.evolution.base import Rule
from sparsetrain.sparsity.evolution.exchange import (
    Counts,
    all_finite,
    draw_grown,
    exchange_counts,
    select_kept,
)
from sparsetrain.sparsity.evolution.growth import Grown, Growth
from sparsetrain.sparsity.evolution.managed import Managed, manage_layers, naming
from sparsetrain.sparsity.evolution.optimizers import (
    StepWatch,
    check_any_held,
    check_optimizer,
    holder,
    innermost,
    note_steps,
)
from sparsetrain.sparsity.evolution.rules import Static
from sparsetrain.sparsity.evolution.state import LayerReport as LayerReport
from sparsetrain.sparsity.evolution.state import ManagedMasks
from sparsetrain.sparsity.evolution.topology import TopologyUpdate, apply_update
from sparsetrain.sparsity.layers.linear import SparseLinear
from sparsetrain.sparsity.layers.ranks import Ranks, is_sharded

PATIENCE = 1000  # calls without a step of the optimizer before a warning


@dataclass(frozen=True)
class MaskUpdate:
    """What one step changed: weights dropped and grown over all layers, and whether any layer changed its size."""

    step: int
    layers: tuple[str, ...]
    dropped: int
    grown: int
    resized: bool


def _is_cut(layer: SparseLinear) -> bool:
    """Whether FSDP holds the values of a layer in shards, in any of its forms."""
    values = layer._parameters.get("values")
    return values is None or is_sharded(values) or values.numel() != layer.pattern.nnz


class MaskManager(ManagedMasks):
    """Makes the layers of a model sparse, and changes their masks by a rule while it is trained.

    ::

        manager = MaskManager(model, RigL(sparsity=0.9, every=100, drop_fraction=0.3))   # before the optimizer
        optimizer = torch.optim.AdamW(model.parameters())
        loss.backward(); optimizer.step(); manager.step(optimizer); optimizer.zero_grad()

    All updates are functions of (seed, layer name, step) and of the weights and gradients. An update replaces a layer's
    pattern and moves values, gradient and every per-weight tensor of the optimizer together. The Parameter object
    stays, survivors keep their bits, and grown weights start at zero (`sparsetrain.sparsity.evolution.topology`).

    Under data-parallel training each rank has its own manager. Random growth is seeded, so ranks agree without
    communication. Dense gradients are summed over ranks, one layer at a time, in a separate process group. A hash of
    all masks is compared at the first step and after every update. All ranks build the manager and call `step`; both
    are collective calls. If one rank skips a step, all ranks skip it. Give the bare model, before it is wrapped. DDP
    keeps buffers of the parameters' sizes and must be built anew when GMP or variable sparsity changes a size:
    ``on_resize`` is then called, and must be given.

    FSDP, in either version, takes `Static` masks only. Masks cannot change under it, because each rank has a shard of
    ``values``: the weights cannot be ranked together, nor moved from one rank to another. Other rules raise at the
    first `attach` or `step`.

    An update needs about the memory of one dense layer in float32 beside that of training: the dense gradient of RigL,
    the permutation of empty positions that SET draws from, or the new indices or values of GMP beside the old ones.
    From a layer's first update on, two bits per dense weight are kept for `watch`.

    Args:
        model: changed in place; dense layers that become sparse keep their weights at the mask's positions.
        rule: `Static`, `SET`, `RigL`, `GMP`, `VariableSparsity`, or another `Rule`.
        plan: which layers, how sparse, in what pattern; its ``evolution`` is not read. None takes the next options.
        include, exclude: globs over qualified names, as in `sparsify`.
        pattern: ``random``, ``magnitude``, or any other under `Static`. backend: of the new layers.
        seed: of masks and growth; None draws from torch's global generator, with several ranks that of rank 0.
            ``plan.seed``, when set, wins.
        total_steps: length of the training, if known; a rule with updates after it is refused.
        on_resize: called after an update that changed the number of weights of a layer.

    Raises:
        UserError: an already sparse layer whose density is not that of the rule at step 0; no sparse layer; a plan
            together with include, exclude or pattern; a rule with updates after ``total_steps``; a model that FSDP has
            wrapped; ranks with different seeds; or as `sparsify`. The model is then unchanged.
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
            raise UserError("MaskManager: with plan=, give include, exclude and pattern in the SparsityConfig")
        globs: dict[str, Any] = {
            key: value for key, value in (("include", include), ("exclude", exclude)) if value is not None
        }
        if plan is None and rule.sparsity is not None:
            plan = SparsityConfig(rule.sparsity, pattern, backend=backend, **globs)
        if plan is not None and rule.sparsity is not None and plan.nnz is None and plan.sparsity != rule.sparsity:
            raise UserError(
                f"MaskManager: plan.sparsity={plan.sparsity} and {rule.name}(sparsity={rule.sparsity}) differ"
            )
        if plan is not None and plan.seed is not None:
            seed = plan.seed
        self._ranks = Ranks()
        self.seed = self._ranks.share_seed(seeds.resolve_seed(seed), given=seed is not None)
        self._layers = manage_layers(model, rule, plan, globs, self.seed)
        self._growth = self._new_growth()
        self._optimizers: list[weakref.ref[Optimizer]] = []  # the checked ones, without wrappers
        self._asked, self._idle, self._begun = note_steps(), 0, False
        self._watch: StepWatch | None = None
        self._restored = False
        # Until the first step a load may give the model other masks, whose history another manager has.
        self._drawn = None if isinstance(rule, Static) else self.hash()
        self._arm()

    # ------------------------------------------------------------------------------------------------------- steps

    def _new_growth(self) -> Growth:
        return Growth(self.rule, self._ranks, lambda entry, step: self._counts(entry, step, self._drop(entry, step)))

    def __getstate__(self) -> dict[str, Any]:
        # Requests to the layers and watches of the optimizers do not extend to copies of them.
        return {**self.__dict__, "_growth": None, "_watch": None, "_optimizers": []}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._growth = self._new_growth()
        for entry in self._layers:
            entry.layer.forget_origin(evolves=not isinstance(self.rule, Static))
        self._arm()

    def attach(self, optimizer: Optimizer, *others: Optimizer) -> None:
        """Check that the optimizer's state can follow the masks; the first call of `step` does so too.

        Args:
            optimizer, others: one or several that together hold all managed layers that train. The optimizer inside a
                wrapper is used, if the wrapper shares its state (Accelerate, Lightning).

        Raises:
            UserError: an optimizer of unknown kind, or layers' values that no optimizer holds; layers that FSDP has
                sharded; several ranks without ``on_resize`` under a rule that changes sizes.
        """
        self._check((optimizer, *others))
        self._begin_watch((optimizer, *others), before=True)

    def step(self, optimizer: Optimizer, *others: Optimizer) -> MaskUpdate | None:
        """Count an optimizer step that was just done, and update the masks if an update is due.

        Call it after each step, between ``optimizer.step()`` and ``optimizer.zero_grad()``. A call counts one step if
        the optimizer has taken any since the last call. After a micro-batch whose gradients were only accumulated, and
        after a step that a gradient scaler skipped, nothing is counted and no mask changes. Several optimizers must all
        have stepped, and so must several ranks. A frozen layer (``requires_grad_(False)``) keeps its mask, and follows
        the rule again when it trains again.

        Args:
            optimizer, others: as in `attach`.

        Returns:
            What changed, or None.

        Raises:
            UserError: as `attach`; or scores of the rule that have another shape.
            NotFiniteError: weights or gradients to rank are not finite.
            RuntimeError: the ranks of a distributed training have different masks.
        """
        optimizers = (optimizer, *others)
        if [reference() for reference in self._optimizers] != [innermost(one) for one in optimizers]:
            self._check(optimizers)
            self._begin_watch(optimizers, before=False)
        if not self._begun:
            self._compare_first_masks()
        if not self._took_step():
            return None
        self.steps += 1
        due = [entry for entry in self._layers if entry.due(self.rule, self.steps)]
        if not due:
            self._arm()
            return None
        self._check(optimizers)
        sizes = [entry.layer.values.numel() for entry in due]
        changed = [
            (entry.name, *counts)
            for entry in due
            if entry.trains and (counts := self._update(entry, optimizers)) is not None
        ]
        self._arm()
        # Also if nothing changed on this rank: an update is due on all ranks at once.
        self._ranks.check_equal(self.hash)
        if not changed:
            return None
        if self._watch is not None:
            self._watch.renew()
        resized = sizes != [entry.layer.values.numel() for entry in due]
        if resized and self.on_resize is not None:
            self.on_resize()
        names, dropped, grown = zip(*changed, strict=True)
        return MaskUpdate(self.steps, names, sum(dropped), sum(grown), resized)

    def _check(self, optimizers: tuple[Optimizer, ...]) -> None:
        whole = [entry for entry in self._layers if not _is_cut(entry.layer)]
        trained = {f"{entry.name}.values": entry.layer.values for entry in whole if entry.trains}
        if isinstance(self.rule, Static):
            check_any_held(optimizers, trained)
            return
        if len(whole) < len(self._layers):
            raise UserError(
                f"{self.rule.name}: FSDP has sharded the layers, and masks cannot change under FSDP; use DDP, or "
                "Static masks"
            )
        if self.rule.resizes and self._ranks.several and self.on_resize is None:
            raise UserError(
                f"{self.rule.name} changes the sizes of weights, for which DDP keeps buffers: give "
                "MaskManager(on_resize=...) a function that wraps the model anew, or, if no wrapper has buffers, one "
                "that does nothing (lambda: None)"
            )
        check_optimizer(optimizers, trained)

    def _begin_watch(self, optimizers: tuple[Optimizer, ...], before: bool) -> None:
        inner = [innermost(optimizer) for optimizer in optimizers]
        values = [entry.layer.values for entry in self._layers if not _is_cut(entry.layer)]
        self._watch = StepWatch(inner, values, self._asked, before, self._restored)
        self._optimizers = [weakref.ref(optimizer) for optimizer in inner]

    def _took_step(self) -> bool:
        """Whether the optimizers have stepped since the last call, on all ranks."""
        assert self._watch is not None
        took, self._asked = self._watch.took(), note_steps()
        if not isinstance(self.rule, Static):
            # One number between CPUs makes all ranks count the same steps, also if some have skipped a step.
            took = self._ranks.all(took)
        self._idle = 0 if took else self._idle + 1
        if self._idle == PATIENCE:
            warnings.warn(
                f"MaskManager.step was called {PATIENCE} times since the optimizer's last step (step {self.steps}), so "
                "no step is counted and no mask changes; call it after optimizer.step(), with the optimizer that steps",
                stacklevel=3,
            )
        if not took and self._growth.asking and not self._gradients_finite():
            self._arm()  # a gradient scaler threw this step's gradients away
        return took

    def _gradients_finite(self) -> bool:
        found = (reference() for reference in self._optimizers)
        groups = [group for optimizer in found if optimizer is not None for group in optimizer.param_groups]
        gradients = [parameter.grad for group in groups for parameter in group["params"]]
        return all(all_finite(gradient) for gradient in gradients if gradient is not None)

    def _compare_first_masks(self) -> None:
        """Compare the first masks of all ranks, and on the first rank the masks of this manager and the model."""
        self._begun = True
        shapes = seeds.derive_seed(0, *(f"{entry.name} {entry.shape}" for entry in self._layers))
        # Ranks with different layers, or with shards, train parts of one model and have different masks.
        if self._ranks.equal(shapes) and not any(_is_cut(entry.layer) for entry in self._layers):
            self._ranks.check_equal(lambda: f"{seeds.derive_seed(self.seed, self.hash(), self.steps):016x}")
        unknown = self.steps == 0 and not self._restored and self._ranks.first
        if unknown and self._drawn is not None and self._drawn != self.hash():
            warnings.warn(
                f"{self.rule.name} begins at step 0 with other masks than MaskManager has drawn: if a checkpoint was "
                "loaded, load the manager's state too (load_state_dict); in a new training, build the manager after "
                "loading",
                stacklevel=3,
            )

    def _arm(self) -> None:
        self._growth.ask(self._layers, self.steps + 1)

    def _drop(self, entry: Managed, step: int) -> float:
        return self.rule.drop(step - entry.offset)

    def _counts(self, entry: Managed, step: int, drop: float) -> Counts:
        pattern = entry.layer.pattern
        target = entry.nnz_at(self.rule, step) // (pattern.block[0] * pattern.block[1])
        return exchange_counts(pattern, target, entry.bands, drop)

    def _update(self, entry: Managed, optimizers: tuple[Optimizer, ...]) -> tuple[int, int] | None:
        """Update one layer; return the numbers of weights dropped and grown, None if nothing changed."""
        found = self._growth.take(entry, self.steps)
        layer, step = entry.layer, self.steps
        # A layer without a gradient, which took no part in the step, exchanges nothing, but its size follows the rule.
        drop = 0.0 if self.rule.needs_gradient and found is None else self._drop(entry, step)
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
        apply_update(layer, update, holder(optimizers, layer.values), start, self.rule.grown_moments)
        entry.history.record(layer.pattern)
        grown = update.grown_count
        return before - (layer.values.numel() - grown), grown

    def _next(self, entry: Managed, counts: Counts, found: Grown | None) -> TopologyUpdate | None:
        """Return the update of a layer, None if nothing changes.

        It does not hold the old pattern, whose indices are freed when the layer gets the new ones.
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
        with naming(entry.name, step):
            kept = select_kept(layer.values, pattern, counts, self.rule)
        return TopologyUpdate.exchange(pattern, kept, grown)
