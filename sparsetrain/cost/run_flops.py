"""The training FLOPs of a pre-training whose densities and context change, by formula.

The FLOPs of a step follow from its context and from the densities that the rule gives it: `sparsetrain.cost.flops` has
the formula. At an update step, a dense gradient (`RigL`) adds 2 R C FLOPs per token for each sparse layer [R, C].
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Protocol, TypeVar

from sparsetrain.cost.flops import FlopTerms, hidden_shapes, matrices, training_flops_per_token
from sparsetrain.errors import UserError
from sparsetrain.models.config import ModelConfig
from sparsetrain.sparsity import EvolutionConfig, Rule, SparsityConfig, make_rule
from sparsetrain.sparsity.evolution.managed import allocated_densities

UPDATES = "mask_updates"


class StepsOfPhase(Protocol):
    """The properties of a phase that `RunFlops` reads: its first step, and the context and sequences of a step."""

    @property
    def first_step(self) -> int: ...

    @property
    def context(self) -> int: ...

    @property
    def batch_size(self) -> int: ...


class Steps(Protocol):
    """The properties of a budget that `RunFlops` reads; `sparsetrain.optim.Budget` explains them."""

    @property
    def phases(self) -> Sequence[StepsOfPhase]: ...

    @property
    def total_steps(self) -> int: ...

    def at(self, step: int, /) -> StepsOfPhase: ...

    def before(self, step: int, /) -> StepsOfPhase: ...

    def tokens_at(self, step: int, /) -> int: ...


StepsT = TypeVar("StepsT", bound=Steps)


class RunFlops:
    """Training FLOPs of a run, step by step.

    Args:
        config: the model.
        densities_at: maps a number of completed steps to the density of each sparse layer.
        rule: the evolution rule of the masks.
        budget: the steps of the run, each with its context and batch size.
        micro_batch: maps the sequences of a step to those of a micro-batch; an update ranks connections by the dense
            gradient of the last one.
    """

    def __init__(
        self,
        config: ModelConfig,
        densities_at: Callable[[int], Mapping[str, float]],
        rule: Rule,
        budget: Steps,
        micro_batch: Callable[[int], int],
    ) -> None:
        self.config, self.densities_at, self.rule = config, densities_at, rule
        self.budget, self.micro_batch = budget, micro_batch
        self._terms: dict[tuple[float, ...], FlopTerms] = {}

    def per_token(self, steps_done: int) -> FlopTerms:
        """Return the FLOPs per token of the step that follows ``steps_done`` steps."""
        densities, context = self.densities_at(steps_done), self.budget.at(steps_done).context
        key = (context, *densities.values())
        if key not in self._terms:
            self._terms[key] = training_flops_per_token(self.config, densities or 1.0, context)
        return self._terms[key]

    def between(self, first: int, end: int) -> dict[str, float]:
        """Return the FLOPs of steps ``first`` to ``end - 1``, by term and as ``total``."""
        updates = [step for step in self.rule.updates(end) if step > first]
        borders = [phase.first_step for phase in self.budget.phases]
        # An update at ``end`` changes only later steps.
        changes = sorted({step for step in (*updates, *borders) if first < step < end})
        sums = FlopTerms(0.0, 0.0, 0.0)
        for begin, stop in zip([first, *changes], [*changes, end], strict=True):
            tokens = self.budget.tokens_at(stop) - self.budget.tokens_at(begin)
            part = self.per_token(begin).for_tokens(tokens)
            sums = FlopTerms(
                sums.sparse_linears + part.sparse_linears, sums.head + part.head, sums.attention + part.attention
            )
        entries = sums.as_dict()
        if self.rule.needs_gradient and updates:
            layers = self.densities_at(0)
            dense = sum(matrix.numel for matrix in matrices(self.config) if matrix.name in layers)
            phases = [self.budget.before(step) for step in updates]
            ranked = sum(self.micro_batch(phase.batch_size) * phase.context for phase in phases)
            entries[UPDATES] = 2.0 * dense * ranked
            entries["total"] += entries[UPDATES]
        return entries

    def through(self, steps: int) -> dict[str, float]:
        """Return the FLOPs of the first ``steps`` steps, by term and as ``total``."""
        return self.between(0, steps)


def planned_flops(
    config: ModelConfig, section_of: Callable[[StepsT], SparsityConfig], micro_batch: Callable[[int], int]
) -> Callable[[StepsT], float]:
    """Return a function from a budget to its training FLOPs by formula; it does not build the model.

    Args:
        config: the model.
        section_of: returns the sparsity section for a budget, since the phases of a budget may change densities.
        micro_batch: as `RunFlops` has it.
    """
    shapes = hidden_shapes(config)

    def flops(budget: StepsT) -> float:
        section = section_of(budget)
        rule = rule_of_length(section, budget.total_steps)
        densities = allocated_densities(shapes, section, rule)
        return RunFlops(config, densities, rule, budget, micro_batch).through(budget.total_steps)["total"]

    return flops


def rule_of_length(sparsity: SparsityConfig, steps: int) -> Rule:
    """Return the configured rule for ``steps`` steps, or a static one if the run is too short for its updates."""
    try:
        return make_rule(sparsity, steps)
    except UserError:
        return make_rule(replace(sparsity, evolution=EvolutionConfig()), steps)
