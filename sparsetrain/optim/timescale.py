"""AdamW as an average: how much of the final weights each update makes up, and over how many steps it averages.

With decoupled weight decay, a step is ``theta_t = (1 - alpha_t) theta_(t-1) + alpha_t x_t``, where ``alpha_t`` is the
applied learning rate times the weight decay, and ``x_t = -update_t / weight_decay``. So the final weights are a convex
combination of the initial weights and of all x_t ("Straight to Zero", arXiv 2502.15938, and "Power Lines",
arXiv 2505.13738):

    theta_T = c_0 theta_0 + sum_i c_i x_i
    c_0 = prod_j (1 - alpha_j)        c_i = alpha_i prod_(j > i) (1 - alpha_j)

The initial weights are a bias, which a large ``alpha`` T forgets; the noise of single updates averages out as the sum
of c_i^2, which flat coefficients keep small. The timescale ``tau = 1 / (lr wd T)`` is the share of the training over
which a constant rate averages.

Each parameter group has its own rate and weight decay, and so its own average: `group_averages`.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sparsetrain.errors import UserError, as_number


def ema_coefficients(lrs: Sequence[float] | Tensor, weight_decay: float | Sequence[float] | Tensor) -> Tensor:
    """Return the shares of the initial weights and of each update in the final weights of AdamW.

    Args:
        lrs: ``[T]``, the applied learning rate of each step, with the factor of the schedule and of the
            parameterization.
        weight_decay: of all steps, or ``[T]`` of each.

    Returns:
        float64 ``[T + 1]``: c_0, the share of the initial weights, and then c_1 to c_T. They sum to 1.

    Raises:
        UserError: no step, another number of weight decays than of rates, or a product of the two outside [0, 1].
    """
    rates, decay = _float64("lrs", lrs), _float64("weight_decay", weight_decay)
    if rates.ndim != 1 or len(rates) == 0:
        raise UserError(f"lrs has shape {list(rates.shape)}; it must be [T], the rate of each step, with T at least 1")
    if decay.ndim > 1 or (decay.ndim == 1 and decay.shape != rates.shape):
        raise UserError(f"weight_decay has shape {list(decay.shape)}; it must be a number or [{len(rates)}], as lrs")
    alphas = rates * decay
    wrong = ~((alphas >= 0.0) & (alphas <= 1.0))
    if bool(wrong.any()):
        step = int(wrong.nonzero()[0])
        raise UserError(
            f"lr times weight_decay is {float(alphas[step]):.6g} in step {step}; it must lie in [0, 1], since a step "
            "takes that share away from the weights"
        )
    # 1 - alpha would be rounded the same way in each of many steps, and so would their product.
    with np.errstate(divide="ignore"):  # an alpha of 1
        logs = np.log1p(-alphas.numpy().astype(np.longdouble))[::-1].cumsum()[::-1]
    kept = torch.cat([torch.from_numpy(np.exp(logs).astype(np.float64)), torch.ones(1, dtype=torch.float64)])
    return torch.cat([kept[:1], alphas * kept[1:]])


def timescale(lr: float, weight_decay: float, steps: int) -> float:
    """Return ``tau = 1 / (lr weight_decay steps)``: the share of a training over which AdamW averages its updates.

    Above 1 the average is longer than the training: the weights remember their start, and the weight decay has almost
    no effect. ``weight_decay = 0`` gives infinity.

    Args:
        lr: the peak learning rate of the matrices in question, after the parameterization has scaled it.
        weight_decay: of the same matrices, after the same.
        steps: T, optimizer steps of the training.

    Raises:
        UserError: ``lr`` is not above 0, ``weight_decay`` below 0, or ``steps`` below 1; or 1 over their product is too
            large or too small for a float.
    """
    _check(lr, steps)
    weight_decay = as_number("weight_decay", weight_decay)
    if not 0.0 <= weight_decay < math.inf:
        raise UserError(f"weight_decay={weight_decay} must be at least 0 and finite")
    if weight_decay == 0.0:
        return math.inf
    return _inverse(float(lr * weight_decay * steps), f"lr={lr} times weight_decay={weight_decay} times steps={steps}")


def weight_decay_for(tau: float, lr: float, steps: int) -> float:
    """Return the weight decay ``1 / (tau lr steps)`` that gives the timescale ``tau``; see `timescale`.

    Raises:
        UserError: ``tau`` or ``lr`` is not above 0, or ``steps`` below 1; or 1 over their product is too large or too
            small for a float.
    """
    _check(lr, steps)
    tau = as_number("tau", tau)
    if not 0.0 < tau < math.inf:
        raise UserError(f"tau={tau} must be above 0 and finite")
    return _inverse(float(tau * lr * steps), f"tau={tau} times lr={lr} times steps={steps}")


def _inverse(product: float, said: str) -> float:
    if not sys.float_info.min <= product < math.inf:
        raise UserError(f"{said} is {product}, and 1 over it is no usable number")
    return 1.0 / product


def _check(lr: float, steps: int) -> None:
    if not 0.0 < as_number("lr", lr) < math.inf:
        raise UserError(f"lr={lr} must be above 0 and finite")
    if not 1 <= as_number("steps", steps) < math.inf:
        raise UserError(f"steps={steps} must be at least 1")


def _float64(name: str, values: Any) -> Tensor:
    try:
        return torch.as_tensor(values, dtype=torch.float64).detach().cpu()
    except (TypeError, ValueError, RuntimeError):
        shown = " ".join(repr(values).split())
        raise UserError(f"{name}={shown:.60} must be a number, or a list of numbers") from None


@dataclass(frozen=True)
class Average:
    """What the coefficients of an average come to.

    Attributes:
        tau: the timescale at the peak rate, as a share of the training.
        bias: c_0, the share of the initial weights.
        variance: T times the sum of c_i^2 over all updates; 1 for equal coefficients.
        last_percent: the share of the last 1 % of the updates, at least one.
    """

    tau: float
    bias: float
    variance: float
    last_percent: float


def average(lrs: Sequence[float] | Tensor, weight_decay: float | Sequence[float] | Tensor) -> Average:
    """Return what the coefficients of `ema_coefficients` come to; arguments and errors are the same.

    ``tau`` is that of the largest product of rate and weight decay.
    """
    coefficients = ema_coefficients(lrs, weight_decay)
    updates, steps = coefficients[1:], len(coefficients) - 1
    alphas = _float64("lrs", lrs) * _float64("weight_decay", weight_decay)
    peak = float(alphas.max())
    return Average(
        tau=1.0 / (peak * steps) if peak > 0.0 else math.inf,
        bias=float(coefficients[0]),
        variance=steps * float(updates.square().sum()),
        last_percent=float(updates[-max(1, round(steps / 100)) :].sum()),
    )


def group_averages(groups: Iterable[Mapping[str, Any]], factors: Sequence[float] | Tensor) -> list[Average]:
    """Return the average of each parameter group of an optimizer under a schedule.

    Args:
        groups: with ``lr`` and ``weight_decay``; ``initial_lr`` is the peak rate if a schedule has changed ``lr``.
        factors: ``[T]``, the factor of the peak rate in each step.

    Raises:
        UserError: see `ema_coefficients`.
    """
    scale = _float64("factors", factors)
    return [average(group.get("initial_lr", group["lr"]) * scale, group["weight_decay"]) for group in groups]
