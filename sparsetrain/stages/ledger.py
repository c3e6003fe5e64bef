"""What a pre-training costs by the formula while the density of its layers changes, and how long a budget lasts.

Every step costs what the masks of that step cost: `sparsetrain.cost.flops` with the densities that the rule gives it.
A dense gradient (`RigL`) adds 2 R C FLOPs per token and layer at update steps, on top of the sparse gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

from sparsetrain.cost.flops import FlopTerms, matrices, training_flops_per_token
from sparsetrain.errors import UserError
from sparsetrain.models.config import ModelConfig
from sparsetrain.sparsity import Rule, SparsityConfig, make_rule
from sparsetrain.sparsity.managed import planned_densities

UPDATES = "mask_updates"


class FlopLedger:
    """Training FLOPs of a run, step by step.

    Args:
        config: the model. context: tokens that one token attends over.
        densities_at: the density of each sparse layer after a number of steps.
        rule: how masks change.
        tokens_per_step: tokens of an optimizer step.
        ranked_tokens: tokens whose dense gradient an update ranks: those of the last micro-batch.
    """

    def __init__(
        self,
        config: ModelConfig,
        densities_at: Callable[[int], Mapping[str, float]],
        rule: Rule,
        context: int,
        tokens_per_step: int,
        ranked_tokens: int,
    ) -> None:
        self.config, self.densities_at, self.rule, self.context = config, densities_at, rule, context
        self.tokens_per_step, self.ranked_tokens = tokens_per_step, ranked_tokens
        self._terms: dict[tuple[float, ...], FlopTerms] = {}

    def per_token(self, steps_done: int) -> FlopTerms:
        """Return the FLOPs per token of the step that follows ``steps_done``."""
        densities = self.densities_at(steps_done)
        key = tuple(densities.values())
        if key not in self._terms:
            self._terms[key] = training_flops_per_token(self.config, densities or 1.0, self.context)
        return self._terms[key]

    def through(self, steps: int) -> dict[str, float]:
        """Return the FLOPs of the first ``steps`` steps by term, and their ``total``."""
        updates = [step for step in range(1, steps) if self.rule.due(step)]
        sums = FlopTerms(0.0, 0.0, 0.0)
        for first, end in zip([0, *updates], [*updates, steps], strict=True):
            part = self.per_token(first).for_tokens((end - first) * self.tokens_per_step)
            sums = FlopTerms(
                sums.sparse_linears + part.sparse_linears, sums.head + part.head, sums.attention + part.attention
            )
        entries = sums.as_dict()
        ranked = sum(self.rule.due(step) for step in range(1, steps + 1)) if self.rule.needs_gradient else 0
        if ranked:
            layers = self.densities_at(0)
            dense = sum(matrix.numel for matrix in matrices(self.config) if matrix.name in layers)
            entries[UPDATES] = 2.0 * dense * self.ranked_tokens * ranked
            entries["total"] += entries[UPDATES]
        return entries


def steps_for_flops(
    budget: float, config: ModelConfig, plan: SparsityConfig, context: int, tokens_per_step: int, ranked_tokens: int
) -> int:
    """Return the largest number of steps whose training FLOPs by the formula stay within ``budget``.

    Masks that change at fractions of training make the cost depend on the length of the run in more than proportion;
    it still grows with every step, so the length is found by bisection.

    Raises:
        UserError: the budget does not pay for one step.
    """
    shapes = {matrix.name: (matrix.out_features, matrix.in_features) for matrix in matrices(config)}

    def cost(steps: int) -> float:
        rule = _rule_of_length(plan, steps)
        ledger = FlopLedger(
            config, planned_densities(shapes, plan, rule), rule, context, tokens_per_step, ranked_tokens
        )
        return ledger.through(steps)["total"]

    low, high = 0, 1
    while cost(high) <= budget:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if cost(middle) <= budget else (low, middle)
    if low == 0:
        raise UserError(f"stage.flops={budget:g} does not pay for one step of this model ({cost(1):.3g} FLOPs)")
    return low


def _rule_of_length(plan: SparsityConfig, steps: int) -> Rule:
    """Return the plan's rule for a run of ``steps``; of a run too short for its updates, one without any."""
    try:
        return make_rule(plan, steps)
    except UserError:
        return make_rule(replace(plan, evolution=type(plan.evolution)()), steps)
