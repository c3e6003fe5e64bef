"""Whether residual branches are more than linear in their own weights: the third desideratum of CompleteP.

CompleteP (arXiv 2505.01618) asks that no branch reduces to its linearisation. The model is a stack of L branches of two
matrices each (W ~ N(0, 1), multiplier sqrt(2 / N), a ReLU before each). Both matrices of one branch f take one Adam
step, with the learning rate, eps and residual multiplier of the rules at depth L. The measured ratio compares the
change that a linearisation misses with the change that it sees:

    |f(W + dW) - f(W) - J dW| / |J dW|

The numerator is of second order in dW and the denominator of first order, so the ratio scales as the learning rate,
L^(alpha - 1). At alpha = 1/2 deep models become lazy (slope -1/2); at alpha = 1 every layer keeps learning features at
any depth (slope 0). The paper measures the first matrix of the branch and one neuron. Here both matrices change and all
neurons count, because such a small step rarely crosses the kink of a ReLU.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from sparsetrain.errors import UserError
from sparsetrain.parameterization.rules import Parameterization, Role, TensorTraits
from sparsetrain.seeds import generator


@dataclass(frozen=True)
class Linearisation:
    """The ratio at one depth and seed: second-order over first-order change of a branch in one Adam step."""

    scheme: str
    alpha: float
    depth: int
    seed: int
    ratio: float


def linearisation_ratio(
    rules: Parameterization, depth: int, seed: int, width: int = 128, lr: float = 1e-3, eps: float = 1e-8
) -> float:
    """Return |f(W + dW) - f(W) - J dW| / |J dW| for the second of ``depth`` branches; float64 on the CPU.

    Args:
        rules: the source of learning rate, eps and residual multiplier, at base width ``width``.
        depth: L, at least 2.
        width: N, width of the residual stream and of the branches.
        lr: base learning rate; it is divided by sqrt(N) because the weights are of order 1.
        eps: base eps.

    Raises:
        UserError: ``depth`` is below 2.
    """
    if depth < 2:
        raise UserError(f"depth={depth} must be at least 2: the check measures the second branch")
    draws = generator(seed, "linearisation", depth)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draws, dtype=torch.float64, device="cpu")

    scale, residual = math.sqrt(2.0 / width), rules.residual_multiplier(depth)

    def branch(h: Tensor, first: Tensor, second: Tensor) -> Tensor:
        return scale * (second @ torch.relu(scale * (first @ torch.relu(h))))

    h = normal(width)
    readout = normal(width) / width
    weights = [(normal(width, width), normal(width, width)) for _ in range(depth)]
    h = h + residual * branch(h, *weights[0])
    first, second = (matrix.requires_grad_() for matrix in weights[1])
    before = h
    out = h = h + residual * branch(h, first, second)
    for pair in weights[2:]:
        out = out + residual * branch(out, *pair)
    loss = (readout @ out - 1.0).square() / 2
    traits = TensorTraits(Role.HIDDEN)
    rate = rules.learning_rate(traits, lr, depth) / math.sqrt(width)
    small = rules.epsilon(traits, eps, depth)
    # In Adam's first step the bias-corrected moments are the gradient and its square, for any betas.
    steps = tuple(-rate * g / (g.abs() + small) for g in torch.autograd.grad(loss, (first, second)))
    old = (first.detach(), second.detach())
    before = before.detach()
    # J dW by the product rule: the step of the second matrix, plus that of the first one through the active ReLUs.
    inner = scale * (old[0] @ torch.relu(before))
    moved = (inner > 0) * (scale * (steps[0] @ torch.relu(before)))
    linear = scale * (steps[1] @ torch.relu(inner) + old[1] @ moved)
    new = branch(before, old[0] + steps[0], old[1] + steps[1])
    return float((new - branch(before, *old) - linear).norm() / linear.norm())


def linearisation_table(
    rules: Sequence[Parameterization], depths: Sequence[int], seeds: Sequence[int], width: int = 128
) -> list[Linearisation]:
    """Return the ratio for each rule, depth and seed."""
    return [
        Linearisation(rule.scheme, rule.alpha, depth, seed, linearisation_ratio(rule, depth, seed, width))
        for rule in rules
        for depth in depths
        for seed in seeds
    ]


def linearisation_slope(rows: Sequence[Linearisation]) -> float:
    """Return the slope of the log of the median ratio over seeds against log depth; NaN if a median is not finite."""
    depths = sorted({row.depth for row in rows})
    medians = np.array([np.median([row.ratio for row in rows if row.depth == depth]) for depth in depths])
    if not (np.isfinite(medians).all() and (medians > 0).all()):
        return math.nan
    return float(np.polyfit(np.log(depths), np.log(medians), 1)[0])
