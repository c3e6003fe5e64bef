"""Optimizer groups: their content, torch's optimizers with them, and models that the rules do not fit."""

from __future__ import annotations

from collections.abc import Callable
from math import sqrt
from typing import Any

import pytest
import torch
from tiny_models import RULES, VOCAB, gpt2, mlp
from torch import nn

from sparsetrain.errors import UserError
from sparsetrain.models import ModelConfig, Transformer
from sparsetrain.parameterization import Parameterization, param_groups, parameterize
from sparsetrain.sparsity import SparseLinear, densify, sparse_layers, sparsify

P = Parameterization


def transformer(rules: Parameterization, **options: Any) -> Transformer:
    return Transformer(ModelConfig(32, 2, 2, VOCAB, bias=True, seed=0, **options), rules)


def test_groups_partition_the_parameters_and_hold_the_table() -> None:
    model = transformer(RULES, sparsity=0.75, tie_embeddings=False)
    groups = param_groups(model, RULES, lr=1.0, weight_decay=1.0, eps=1.0)
    members = [id(parameter) for group in groups for parameter in group["params"]]
    assert sorted(members) == sorted(id(parameter) for parameter in model.parameters())
    assert {group["name"]: (group["lr"], group["weight_decay"], group["eps"]) for group in groups} == {
        "embedding": (4.0, 1.0, 1.0),
        # m_d = 2, m_rho = 1/2, m_L = 2.
        "hidden": (pytest.approx(sqrt(0.5)), 1.0, pytest.approx(sqrt(0.5) / 2)),
        "output": (pytest.approx(sqrt(0.5)), 1.0, pytest.approx(sqrt(0.5) / 2)),
        "norm": (pytest.approx(sqrt(0.5)), 0.0, pytest.approx(sqrt(0.5) / 2)),
        "bias": (pytest.approx(sqrt(0.5)), 0.0, pytest.approx(sqrt(0.5) / 2)),
        "final_norm": (1.0, 0.0, 1.0),
        "final_bias": (1.0, 0.0, 1.0),
        "head": (1.0, 1.0, 1.0),
    }


def test_layers_of_different_density_get_groups_of_their_own() -> None:
    model = parameterize(sparsify(gpt2(), 0.75, include=["*c_fc"], seed=0), P.supar(16), gpt2(16), seed=0)
    rates = {group["lr"] for group in param_groups(model, P.supar(16), lr=1.0) if group["name"] == "hidden"}
    assert rates == {2.0, 0.5}  # 1 / (m_d m_rho): sparse c_fc, dense c_attn


@pytest.mark.parametrize(
    "optimizer",
    [torch.optim.AdamW, torch.optim.Adam, torch.optim.NAdam, torch.optim.RAdam, torch.optim.RMSprop],
)
def test_groups_fit_torch_optimizers(optimizer: type[torch.optim.Optimizer]) -> None:
    model = transformer(RULES, sparsity=0.5)
    made: Any = optimizer(param_groups(model, RULES, lr=1e-3, weight_decay=0.1))  # type: ignore[call-arg]
    tokens = torch.randint(0, VOCAB, (2, 9))
    before = model.loss(tokens[:, :-1], tokens[:, 1:])
    before.backward()
    made.step()
    assert model.loss(tokens[:, :-1], tokens[:, 1:]) < before


def test_frozen_parameters_are_left_out() -> None:
    model = transformer(RULES)
    model.embed.requires_grad_(False)
    groups = param_groups(model, RULES, lr=1.0)
    assert "embedding" not in {group["name"] for group in groups}
    assert all(parameter.requires_grad for group in groups for parameter in group["params"])


def _resparsified() -> nn.Module:
    model = transformer(RULES, sparsity=0.5)
    layer = next(layer for _, layer in sparse_layers(model))
    other = SparseLinear(layer.in_features, layer.out_features, density=0.25, seed=0)
    layer.set_topology(other.pattern, other.values)
    return model


def _with_a_new_parameter() -> nn.Module:
    model = transformer(RULES)
    model.extra = nn.Parameter(torch.zeros(3))
    return model


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (mlp, r"the model's tensors have no roles yet: call parameterize\(model, rules, base\) first"),
        (lambda: transformer(P.sp()), "the model was initialised for .*'sp'.*, not for .*'supar_completep'"),
        (_resparsified, "layer 'blocks.0.attn.qkv' has density 0.25 but was initialised for 0.5: call parameterize"),
        (_with_a_new_parameter, "parameter 'extra' has no role"),
        (lambda: sparsify(transformer(RULES), 0.5, seed=0), "parameter 'blocks.0.attn.qkv.values' has no role"),
        (lambda: densify(transformer(RULES, sparsity=0.5)), "parameter 'blocks.0.attn.qkv.weight' has no role"),
    ],
)
def test_a_model_that_the_rules_do_not_describe_is_refused(model: Callable[[], nn.Module], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        param_groups(model(), RULES, lr=1.0)
    assert "\n" not in str(caught.value)
