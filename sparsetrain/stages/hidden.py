"""The hidden matrices of a run as laws count them: weights, adjusted peak rate and weight decay, timescale.

A timescale belongs to the matrices whose learning rate and weight decay it is computed from. Those of embeddings, norms
and the head differ, so laws are about hidden matrices, with the rates that the parameterization gives them.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from sparsetrain.cost.flops import hidden_shapes, matrices
from sparsetrain.cost.run_flops import rule_of_length
from sparsetrain.models import ModelConfig, matrix_traits
from sparsetrain.optim import OptimizerConfig, RunSchedule, timescale
from sparsetrain.parameterization import Parameterization
from sparsetrain.runs.weights import read_weights
from sparsetrain.sparsity.evolution.managed import allocated_densities
from sparsetrain.stages.config import PretrainConfig, RunConfig, model_config
from sparsetrain.stages.masks import sparsity_section
from sparsetrain.stages.pretrain import budget_of

_LONG = 1 << 20  # steps, where they are not known


@dataclass(frozen=True)
class Hidden:
    """The hidden matrices of a run at its start.

    Args:
        weights: elements, as if all matrices were dense.
        nonzeros: weights that are stored.
        lr, weight_decay: peak learning rate and weight decay after the parameterization has scaled them, of the
            matrices that hold the most nonzeros.
        decay_factor: this weight decay divided by the base weight decay.
        others: factors between the smallest and the largest product of the two over all matrices; 1 if they agree.
        peak: what the schedules make of that product at most, see `RunSchedule.peak`.
        resizes: whether the evolution of masks changes the number of nonzeros, so that a run has no single one.
    """

    weights: int
    nonzeros: int
    lr: float
    weight_decay: float
    decay_factor: float
    others: float
    peak: float = 1.0
    resizes: bool = False

    def tau(self, steps: int) -> float:
        """Return the timescale over a number of steps; infinity without weight decay."""
        decay = self.weight_decay * self.peak
        if self.lr * decay * steps < sys.float_info.min:  # also where 1 over the product is too large for a number
            return math.inf
        return timescale(self.lr, decay, steps)

    def count(self, per: str) -> int:
        """Return the parameters that a law counts: ``weight`` or ``nonzero``."""
        return self.weights if per == "weight" else self.nonzeros


def hidden_of(
    model: ModelConfig, rules: Parameterization, optimizer: OptimizerConfig, densities: Mapping[str, float]
) -> Hidden:
    """Return the hidden matrices of a model, without building it.

    Args:
        densities: of the sparse layers, by name; other matrices are dense.
    """
    shapes = matrices(model, densities or 1.0)
    nonzeros: dict[tuple[float, float], int] = {}
    for name, traits in matrix_traits(model, rules, {shape.name: shape.density for shape in shapes}).items():
        rates = (rules.learning_rate(traits, optimizer.lr, model.n_layers), rules.weight_decay(traits, 1.0))
        nonzeros[rates] = nonzeros.get(rates, 0) + next(shape.nnz for shape in shapes if shape.name == name)
    lr, factor = max(nonzeros, key=lambda rates: nonzeros[rates])
    products = [rate * decay for rate, decay in nonzeros]
    return Hidden(
        weights=sum(shape.numel for shape in shapes),
        nonzeros=sum(shape.nnz for shape in shapes),
        lr=lr,
        weight_decay=factor * optimizer.weight_decay,
        decay_factor=factor,
        others=max(products) / min(products) if min(products) > 0.0 else math.inf,
    )


def densities_of(start: str, model: ModelConfig) -> dict[str, float]:
    """Return the density of each sparse layer in the weights of the run ``start``.

    Raises:
        UserError: see `read_weights`.
    """
    shapes, stored = hidden_shapes(model), read_weights(Path(start)).stored
    return {name: count / (shapes[name][0] * shapes[name][1]) for name, count in stored.items()}


def hidden_of_run(config: RunConfig) -> Hidden:
    """Return the hidden matrices of a pre-training at its start, from its settings and the run that it starts from.

    Raises:
        UserError: the configuration cannot be used, or its ``init_from`` cannot be read.
    """
    model = model_config(config.model, config.model.get("vocab_size") or 1)
    sized = config
    if config.budget.epochs is not None:  # their steps depend on the text, and densities only on shares of them
        sized = replace(config, budget=replace(config.budget, epochs=None, steps=_LONG))
    budget = budget_of(sized, model, None)
    section = sparsity_section(sized, budget)
    densities: Mapping[str, float] = {}
    resizes = False
    if config.init_from is not None:
        densities = densities_of(config.init_from, model)
    elif section.is_sparse:
        rule = rule_of_length(section, budget.total_steps)
        densities, resizes = allocated_densities(hidden_shapes(model), section, rule)(0), rule.resizes
    hidden = hidden_of(model, config.parameterization, config.optimizer, densities)
    peak = RunSchedule(config.schedule, budget, config.optimizer).peak()
    return replace(hidden, peak=peak, resizes=resizes)


def follows(rules: Parameterization, hidden: Hidden) -> list[str]:
    """Return a sentence if the product of rate and weight decay changes with the density, which tau does not know."""
    if not (hidden.resizes and rules.follow == "density" and rules.wd_rule == "coupled"):
        return []
    return [
        "tau is that of the density at the start: parameterization.follow=density changes the rate with the density, "
        "and wd_rule=coupled does not change the weight decay with it."
    ]


def steps_of(config: PretrainConfig) -> int | None:
    """Return the steps that a pre-training was meant to have, or None where they depend on its text.

    Raises:
        UserError: the configuration cannot be used.
    """
    if config.budget.epochs is not None:
        return None
    return budget_of(config, model_config(config.model, config.model.get("vocab_size") or 1), None).total_steps
