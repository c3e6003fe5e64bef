"""The optimizer of a run, built from its configuration."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch

from sparsetrain.errors import UserError, check_choice, within
from sparsetrain.optim.schedule import ScheduleConfig
from sparsetrain.optim.segments import SegmentConfig

OPTIMIZERS = ("adamw", "sgd")
_BETAS = ("beta1", "beta2")


@dataclass
class SettingSchedules:
    """Schedules of settings of the optimizer besides the learning rate, each a list of segments over the whole run.

    They give the factor of the configured value in each step; it begins at 1, or at 0 for a ``warmup``. A setting
    without a schedule stays as it is.

    Args:
        weight_decay: of every parameter group.
        beta1, beta2: of AdamW; the product of value and factor stays below 1.
        momentum: of SGD; likewise.
    """

    weight_decay: list[SegmentConfig] | None = None
    beta1: list[SegmentConfig] | None = None
    beta2: list[SegmentConfig] | None = None
    momentum: list[SegmentConfig] | None = None

    def given(self) -> dict[str, ScheduleConfig]:
        """Return the schedules that are set, by setting.

        Raises:
            UserError: see `ScheduleConfig`.
        """
        found = {}
        for name, segments in vars(self).items():
            if segments is not None:
                try:
                    found[name] = ScheduleConfig(segments=segments)
                except UserError as error:
                    raise within(f"optimizer.schedules.{name}", "schedule.segments", error) from None
        return found


@dataclass
class OptimizerConfig:
    """AdamW or SGD, and gradient clipping.

    Args:
        name: ``adamw``, or ``sgd``, which needs ``parameterization.optimizer=sgd`` under all rules except SP.
        lr: base peak learning rate eta; the parameterization scales it for each tensor.
        weight_decay: base weight decay lambda; the parameterization scales it for each tensor.
        beta1: decay of Adam's first moment.
        beta2: decay of Adam's second moment.
        eps: what Adam adds to the root of the second moment.
        momentum: momentum of SGD.
        clip: maximum global gradient norm; 0 disables clipping.
        schedules: how other settings than the learning rate change during the run.
    """

    name: str = "adamw"
    lr: float = 2e-3
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    clip: float = 1.0
    momentum: float = 0.9
    schedules: SettingSchedules = field(default_factory=SettingSchedules)

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
        unused = ("momentum",) if self.name == "adamw" else _BETAS
        for name in self.schedules.given():
            if name in unused:
                raise UserError(f"optimizer.schedules.{name} has no meaning for optimizer.name={self.name}")


def build_optimizer(groups: Iterable[dict[str, Any]], config: OptimizerConfig) -> torch.optim.Optimizer:
    """Return torch's AdamW (fused on CPU and CUDA) or SGD over ``groups``, each with its own lr, weight decay and eps.

    Each group gets the key ``initial_lr``, its peak learning rate, which the schedule multiplies. It is the name that
    torch's schedulers use. For each other setting that has a schedule, a group gets a key that is named likewise.
    """
    groups = [{**group, "initial_lr": group["lr"]} for group in groups]
    for name in config.schedules.given():
        for group in groups:
            group[f"initial_{name}"] = group["weight_decay"] if name == "weight_decay" else getattr(config, name)
    if config.name == "sgd":
        return torch.optim.SGD(groups, momentum=config.momentum)
    devices = {parameter.device.type for group in groups for parameter in group["params"]}
    return torch.optim.AdamW(groups, betas=(config.beta1, config.beta2), fused=devices <= {"cpu", "cuda"})


def set_factor(groups: Iterable[dict[str, Any]], name: str, factor: float) -> None:
    """Set a setting of all parameter groups to ``factor`` times its initial value.

    Args:
        groups: of an optimizer of `build_optimizer`.
        name: ``lr``, or a setting that has a schedule.
    """
    for group in groups:
        value = group[f"initial_{name}"] * factor
        if name in _BETAS:
            first, second = group["betas"]
            group["betas"] = (value, second) if name == "beta1" else (first, value)
        else:
            group[name] = value
