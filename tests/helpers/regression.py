"""A small regression model for sparsity, with its batches, loss and optimizer."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from sparsetrain import seeds
from sparsetrain.sparsity import densify

WIDTH = 16


def mlp(seed: int = 0, dtype: torch.dtype = torch.float64) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(WIDTH, 24), nn.GELU(), nn.Linear(24, WIDTH)).to(dtype)


def batch(step: int, rows: int = 12) -> Tensor:
    return torch.randn(rows, WIDTH, generator=seeds.generator(step, "batch"), dtype=torch.float64)


def loss_of(model: nn.Module, x: Tensor) -> Tensor:
    return (model(x) - x.roll(1, 1)).square().mean()


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)


def dense_gradients(model: nn.Module, batches: list[Tensor]) -> dict[str, Tensor]:
    """Return the gradients of all dense weights, from the densified twin."""
    twin = densify(copy.deepcopy(model))
    for x in batches:
        loss_of(twin, x).backward()
    return {name: module.weight.grad for name, module in twin.named_modules() if isinstance(module, nn.Linear)}
