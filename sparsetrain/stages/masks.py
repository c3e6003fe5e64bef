"""The masks of a run: the sparsity section and mask manager that follow from its configuration and its phases."""

from __future__ import annotations

from dataclasses import replace

from sparsetrain.errors import UserError
from sparsetrain.models import Transformer
from sparsetrain.optim import Budget
from sparsetrain.sparsity import EvolutionConfig, MaskManager, Phase, SparsityConfig, Static, make_rule, sparse_layers
from sparsetrain.sparsity.config import STATIC
from sparsetrain.sparsity.evolution.base import RULES
from sparsetrain.sparsity.patterns.spec import evolving_patterns
from sparsetrain.stages.config import RunConfig


def seeded(config: RunConfig) -> SparsityConfig:
    """Return the sparsity section with its seed filled in: its own if given, else the run's."""
    seed = config.seed if config.sparsity.seed is None else config.sparsity.seed
    return replace(config.sparsity, seed=seed)


def sparsity_section(config: RunConfig, budget: Budget) -> SparsityConfig:
    """Return the sparsity section of a run, with its seed, and with the densities of its phases as evolution rule.

    Layers get their share of the weights at the highest sparsity of all phases, and keep these ratios in the others.

    Raises:
        UserError: phases have densities, but the run starts from another run, or ``sparsity.nnz`` is set; densities
            change, but the rule of evolution changes masks itself, or the pattern would not survive a change.
    """
    section = seeded(config)
    if all(phase.density is None for phase in budget.phases):
        return section
    if config.init_from is not None:
        raise UserError(
            f"budget.phases: density: a run with init_from={config.init_from} keeps the densities of its checkpoint"
        )
    if section.nnz is not None:
        raise UserError(f"budget.phases: density: sparsity.nnz={section.nnz} already sets the number of weights")
    sparsities = [
        section.sparsity if phase.density is None else round(1.0 - phase.density, 12) for phase in budget.phases
    ]
    most = max(sparsities)
    rule = section.evolution.rule
    if min(sparsities) == most and not RULES[rule].resizes:
        return replace(section, sparsity=most)
    if rule not in (STATIC, "vspdf"):
        raise UserError(
            f"budget.phases: density: sparsity.evolution.rule={rule} changes the masks itself; phases with densities "
            "need rule=static"
        )
    if min(sparsities) == most:
        return replace(section, sparsity=most, evolution=EvolutionConfig())
    for pattern in (section.pattern, *(group.pattern for group in section.groups)):
        if pattern is not None and pattern not in evolving_patterns():
            raise UserError(
                f"budget.phases: density: sparsity.pattern={pattern} would not survive the first change of density; "
                f"use one of {', '.join(evolving_patterns())}"
            )
    phases = [
        Phase(phase.first_step / budget.total_steps, sparsity)
        for phase, sparsity, before in zip(budget.phases, sparsities, [most, *sparsities], strict=False)
        if sparsity != before
    ]
    settings = {key: value for key, value in vars(section.evolution).items() if key not in ("rule", "phases")}
    return replace(section, sparsity=most, evolution=EvolutionConfig("vspdf", phases=phases, **settings))


def starts_sparse(config: RunConfig) -> float:
    """Return the sparsity at the start of a run, as tables and directory names show it."""
    density = next(iter(config.budget.densities), None)
    return config.sparsity.sparsity if density is None else round(1.0 - density, 12)


def mask_manager(config: RunConfig, model: Transformer, budget: Budget, drawn: bool = False) -> MaskManager | None:
    """Return the manager that changes and watches the masks of a pre-training, or None for a dense model.

    A run that starts from another run keeps the densities of its checkpoint: a rule that changes densities, such as
    gradual pruning, has ended, and any other rule, such as SET, continues.

    Args:
        drawn: whether the masks of a run that starts from another one were drawn for it, since that one has none.

    Raises:
        UserError: the rule would act only after the end of the run, or never.
    """
    section = sparsity_section(config, budget)
    rule = make_rule(section, budget.total_steps)
    if not any(True for _ in sparse_layers(model)):
        return None
    if config.init_from is None or drawn:
        return MaskManager(model, rule, plan=section)
    return MaskManager(model, Static() if rule.resizes else rule, include=["*"], seed=section.seed)
