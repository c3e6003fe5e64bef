"""What the configuration of a run says about its masks, once it is known how many steps each phase has."""

from __future__ import annotations

from dataclasses import replace

from sparsetrain.errors import UserError
from sparsetrain.models import Transformer
from sparsetrain.optim import Budget
from sparsetrain.sparsity import MaskManager, SparsityConfig, Static, make_rule, sparse_layers
from sparsetrain.sparsity.config import EVOLVING, EvolutionConfig, Phase
from sparsetrain.stages.config import RunConfig


def seeded(config: RunConfig) -> SparsityConfig:
    """Return the sparsity section with the seed that its masks are drawn from."""
    seed = config.seed if config.sparsity.seed is None else config.sparsity.seed
    return replace(config.sparsity, seed=seed)


def mask_plan(config: RunConfig, budget: Budget) -> SparsityConfig:
    """Return the sparsity section of a run, seeded, with the densities of its phases as its rule of evolution.

    Layers are allocated their own sparsity at the largest of all phases, and keep their ratio in the others.

    Raises:
        UserError: densities in phases of a run that starts from another, or beside a number of weights; densities that
            change beside a rule that changes masks by itself, or in a pattern that does not outlast it.
    """
    section = seeded(config)
    if all(phase.density is None for phase in budget.phases):
        return section
    if config.init_from is not None:
        raise UserError(
            f"budget.phases: density: a run that starts from another, init_from={config.init_from}, keeps the "
            "densities that it finds there"
        )
    if section.nnz is not None:
        raise UserError(f"budget.phases: density: sparsity.nnz={section.nnz} says already how many weights there are")
    sparsities = [
        section.sparsity if phase.density is None else round(1.0 - phase.density, 12) for phase in budget.phases
    ]
    most = max(sparsities)
    rule = section.evolution.rule
    if min(sparsities) == most and rule in ("static", "set", "rigl"):
        return replace(section, sparsity=most)
    if rule not in ("static", "vspdf"):
        raise UserError(
            f"budget.phases: density: sparsity.evolution.rule={rule} changes the masks itself; phases with densities "
            "need rule=static"
        )
    if min(sparsities) == most:
        return replace(section, sparsity=most, evolution=EvolutionConfig())
    for pattern in (section.pattern, *(group.pattern for group in section.groups)):
        if pattern is not None and pattern not in EVOLVING:
            raise UserError(
                f"budget.phases: density: sparsity.pattern={pattern} would not outlast the first change of density; "
                f"use one of {', '.join(EVOLVING)}"
            )
    phases = [
        Phase(phase.first_step / budget.total_steps, sparsity)
        for phase, sparsity, before in zip(budget.phases, sparsities, [most, *sparsities], strict=False)
        if sparsity != before
    ]
    return replace(section, sparsity=most, evolution=replace(section.evolution, rule="vspdf", phases=phases))


def starts_sparse(config: RunConfig) -> float:
    """Return the sparsity that a run begins with, as configurations, tables and names of directories say it."""
    density = next(iter(config.budget.densities), None)
    return config.sparsity.sparsity if density is None else round(1.0 - density, 12)


def mask_manager(config: RunConfig, model: Transformer, budget: Budget) -> MaskManager | None:
    """Return what changes the masks of a pre-training and watches them; None for a dense model.

    A run that starts from another keeps the densities that it finds there: gradual pruning and variable sparsity are
    over, SET and RigL go on.

    Raises:
        UserError: a rule that would act after the end, or never.
    """
    plan = mask_plan(config, budget)
    rule = make_rule(plan, budget.total_steps)
    if not any(True for _ in sparse_layers(model)):
        return None
    if config.init_from is None:
        return MaskManager(model, rule, plan=plan)
    keeps = plan.evolution.rule in ("set", "rigl")
    return MaskManager(model, rule if keeps else Static(), include=["*"], seed=plan.seed)
