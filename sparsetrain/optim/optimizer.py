"""The optimizer of a run, built from its configuration."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

from sparsetrain.errors import UserError, check_choice

OPTIMIZERS = ("adamw", "sgd")


@dataclass
class OptimizerConfig:
    """AdamW or SGD, and gradient clipping.

    Args:
        name: ``adamw``, or ``sgd``, which needs ``parameterization.optimizer=sgd`` under all rules except SP.
        lr: base peak learning rate eta; the parameterization scales it for each tensor.
        weight_decay: base weight decay lambda; the parameterization scales it for each tensor.
        beta1, beta2, eps: coefficients of Adam.
        momentum: momentum of SGD.
        clip: maximum global gradient norm; 0 disables clipping.
    """

    name: str = "adamw"
    lr: float = 2e-3
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    clip: float = 1.0
    momentum: float = 0.9

    def __post_init__(self) -> None:
        check_choice("optimizer.name", self.name, OPTIMIZERS)
        for name in ("weight_decay", "clip"):
            if not 0 <= getattr(self, name) < math.inf:
                raise UserError(f"optimizer.{name}={getattr(self, name)} must be at least 0 and finite")
        for name in ("lr", "eps"):
            if not 0 < getattr(self, name) < math.inf:
                raise UserError(f"optimizer.{name}={getattr(self, name)} must be above 0 and finite")
        for name in ("beta1", "beta2", "momentum"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(f"optimizer.{name}={getattr(self, name)} must lie in [0, 1)")


def build_optimizer(groups: Iterable[dict[str, Any]], config: OptimizerConfig) -> torch.optim.Optimizer:
    """Return torch's AdamW (fused on CPU and CUDA) or SGD over ``groups``, each with its own lr, weight decay and eps.

    Each group gets the key ``initial_lr``, its peak learning rate, which the schedule multiplies. It is the name that
    torch's schedulers use.
    """
    groups = [{**group, "initial_lr": group["lr"]} for group in groups]
    if config.name == "sgd":
        return torch.optim.SGD(groups, momentum=config.momentum)
    devices = {parameter.device.type for group in groups for parameter in group["params"]}
    return torch.optim.AdamW(groups, betas=(config.beta1, config.beta2), fused=devices <= {"cpu", "cuda"})
