"""Which model sizes and lengths of training reach a loss at the least compute and time together."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from sparsetrain.errors import UserError
from sparsetrain.scaling.law import LossLaw

_ROUNDS = 200  # of the fixed point for the tokens of the best batch
_NEAR = 1e-10


@dataclass(frozen=True)
class Training:
    """A training that reaches the loss.

    Args:
        parameters, tokens, batch: N, D and B, the last two in tokens.
        steps: D / B.
        flops: 6 N D.
        time: 6 N steps: the FLOPs that follow one after another if the tokens of a batch are computed side by side.
    """

    parameters: float
    tokens: float
    batch: float

    @property
    def steps(self) -> float:
        return self.tokens / self.batch

    @property
    def flops(self) -> float:
        return 6.0 * self.parameters * self.tokens

    @property
    def time(self) -> float:
        return 6.0 * self.parameters * self.steps


def pareto_trainings(
    law: LossLaw,
    loss: float,
    parameters: Sequence[float],
    batch_opt: Callable[[float], float],
    batch_critical: Callable[[float], float],
    factors: Sequence[float] = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0),
) -> list[Training]:
    """Return the trainings that reach ``loss`` and that no other one beats in both compute and time.

    The law of loss holds for trainings at the best batch, whose D tokens are ``D_min (1 + B_opt / B_crit)``. Another
    batch B needs ``D_min (1 + B / B_crit)`` ("Power Lines", arXiv 2505.13738, section on time and compute).

    Args:
        law: L(N, D).
        loss: the target, in the law's unit.
        parameters: sizes N to consider.
        batch_opt: B_opt in tokens by training tokens D, such as a fitted law.
        batch_critical: B_crit in tokens by D_min.
        factors: batch sizes to consider, relative to B_opt, at least 1.

    Returns:
        Trainings from the cheapest to the fastest. Sizes whose loss stays above the target are left out.

    Raises:
        UserError: no size reaches the loss, or a factor is below 1.
    """
    if any(not 1.0 <= factor < math.inf for factor in factors):
        raise UserError(f"factors={list(factors)} must be at least 1: below the best batch the hyperbola does not hold")
    found = []
    for size in parameters:
        tokens = tokens_for(law, loss, size)
        if tokens is None:
            continue
        best = batch_opt(tokens)
        least = tokens
        for _ in range(_ROUNDS):
            before, least = least, tokens / (1.0 + best / batch_critical(least))
            if abs(least / before - 1.0) < _NEAR:
                break
        critical = batch_critical(least)
        found += [Training(size, least * (1.0 + f * best / critical), f * best) for f in factors]
    if not found:
        raise UserError(
            f"loss={loss}: no size of {', '.join(f'{size:g}' for size in parameters)} parameters reaches it"
        )
    found.sort(key=lambda each: (each.flops, each.time))
    kept: list[Training] = []
    for each in found:
        if not kept or each.time < kept[-1].time:
            kept.append(each)
    return kept


def tokens_for(law: LossLaw, loss: float, parameters: float) -> float | None:
    """Return the tokens D at which ``law(parameters, D)`` is ``loss``, or None if it stays above it."""
    values = law.parameters
    above = loss - values["floor"] - values["a"] / parameters ** values["alpha"]
    return float((values["b"] / above) ** (1.0 / values["beta"])) if above > 0.0 else None
