"""Limits of the parameterizations, as training runs of the real model that agree to the last bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from sparsetrain.models import ModelConfig, Transformer
from sparsetrain.parameterization import Parameterization, param_groups

P = Parameterization
WIDTH, LAYERS, VOCAB = 32, 2, 29


def train(rules: Parameterization, sparsity: float = 0.0, **options: Any) -> tuple[list[float], dict[str, Tensor]]:
    """Run ten steps of the rules' optimizer; return the losses and the final parameters."""
    config = ModelConfig(WIDTH, LAYERS, 4, VOCAB, max_context=16, bias=True, seed=0, sparsity=sparsity, **options)
    model = Transformer(config, rules)
    optimizer: torch.optim.Optimizer
    if rules.optimizer == "sgd":
        groups = param_groups(model, rules, lr=0.5, weight_decay=1e-3, optimizer=torch.optim.SGD)
        optimizer = torch.optim.SGD(groups, momentum=0.9)
    else:
        groups = param_groups(model, rules, lr=1e-2, weight_decay=0.1, eps=1e-6, optimizer=torch.optim.AdamW)
        optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95))
    source = torch.Generator().manual_seed(0)
    losses = []
    for _ in range(10):
        tokens = torch.randint(0, VOCAB, (4, 17), generator=source)
        loss = model.loss(tokens[:, :-1], tokens[:, 1:])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, model.state_dict()


def same(a: tuple[list[float], dict[str, Tensor]], b: tuple[list[float], dict[str, Tensor]]) -> bool:
    return a[0] == b[0] and all(torch.equal(a[1][key], b[1][key]) for key in {**a[1], **b[1]})


# Both sides set all options outside the limit to the same value, which is not the neutral one.
SHARED: dict[str, Any] = {
    "alpha_in": 2.0,
    "alpha_out": 3.0,
    "embedding_lr_multiplier": 1.5,
    "attention_scale": "linear",
    "eps_rule": "table",
}


# SGD has its own rules and therefore its own limits.
SGD: dict[str, Any] = {**SHARED, "optimizer": "sgd"}


@pytest.mark.parametrize("options", [{}, {"mlp": "swiglu", "norm": "rmsnorm", "tie_embeddings": False}])
def test_mup_at_base_width_equals_sp(options: dict[str, Any]) -> None:
    for shared in (SHARED, SGD):
        assert same(train(P.mup(WIDTH, **shared), **options), train(P.sp(**shared), **options))


def test_supar_at_density_one_equals_mup() -> None:
    for shared in (SHARED, SGD):
        assert same(train(P.supar(8, **shared)), train(P.mup(8, **shared)))


def test_supar_at_base_density_equals_mup() -> None:
    assert same(train(P.supar(8, 0.25, **SHARED), 0.75), train(P.mup(8, **SHARED), 0.75))


def test_completep_at_base_depth_equals_mup() -> None:
    # L_ref is base_layers for one and n_layers for the other, which are equal here.
    for shared in (SHARED, SGD):
        assert same(train(P.completep(8, LAYERS, 0.5, **shared)), train(P.mup(8, **shared)))


def test_the_product_at_all_ones_equals_sp() -> None:
    for shared in (SHARED, SGD):
        assert same(train(P.supar_completep(WIDTH, 1.0, LAYERS, **shared)), train(P.sp(**shared)))
        assert same(train(P.supar_completep(WIDTH, 0.25, LAYERS, **shared), 0.75), train(P.sp(**shared), 0.75))


@pytest.mark.parametrize(
    ("a", "b", "sparsity"),
    [
        (P.mup(8, **SHARED), P.sp(**SHARED), 0.0),
        (P.supar(8, **SHARED), P.mup(8, **SHARED), 0.75),
        (P.completep(8, 1, **SHARED), P.mup(8, **SHARED), 0.0),
        (P.mup(WIDTH), P.sp(), 0.0),
        (P.mup(8, **SGD), P.sp(**SGD), 0.0),
    ],
    ids=["width", "density", "depth", "attention_scale", "width under SGD"],
)
def test_away_from_the_limit_the_runs_differ(a: Parameterization, b: Parameterization, sparsity: float) -> None:
    assert not same(train(a, sparsity), train(b, sparsity))
