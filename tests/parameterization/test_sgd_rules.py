"""The rules of SGD: their table row by row, the derivation, and refused settings."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from sparsetrain.cli.resolve import load
from sparsetrain.errors import UserError
from sparsetrain.models import ModelConfig, Transformer
from sparsetrain.optim import OptimizerConfig, build_optimizer
from sparsetrain.parameterization import Parameterization, Role, TensorTraits, param_groups

P = Parameterization
SGD: dict[str, Any] = {"optimizer": "sgd"}
# m_d = 4, m_rho = 1/4, m_L = 4, alpha = 1: m_L^(2 alpha - 1) = 4.
M_D, DENSITY, LAYERS = 4.0, 0.125, 8
PRODUCT = P.supar_completep(64, 0.5, 2, embedding_lr_multiplier=8.0, **SGD)
TABLE = {
    Role.HIDDEN: 16.0,  # 1 / m_rho * m_L
    Role.OUTPUT: 16.0,
    Role.NORM: 16.0,  # m_d * m_L
    Role.BIAS: 16.0,
    Role.EMBEDDING: 32.0,  # m_d * 8
    Role.POSITION: 32.0,
    Role.FINAL_NORM: 4.0,
    Role.FINAL_BIAS: 4.0,
    Role.HEAD: 4.0,
    Role.PROMPT: 4.0,
    Role.KEEP: 1.0,
}


def traits(role: Role) -> TensorTraits:
    return TensorTraits(role, M_D, DENSITY if role in (Role.HIDDEN, Role.OUTPUT) else 1.0)


@pytest.mark.parametrize("role", Role)
def test_learning_rates_of_sgd_row_for_row(role: Role) -> None:
    assert PRODUCT.learning_rate(traits(role), 1.0, LAYERS) == TABLE[role]


@pytest.mark.parametrize(
    ("rules", "hidden", "norm", "head"),
    [
        (P.sp(**SGD), 1.0, 1.0, 1.0),
        (P.mup(64, **SGD), 1.0, 4.0, 4.0),
        (P.supar(64, 0.5, **SGD), 4.0, 4.0, 4.0),
        (P.completep(64, 2, **SGD), 4.0, 16.0, 4.0),
        (P.completep(64, 2, 0.5, **SGD), 1.0, 4.0, 4.0),
    ],
    ids=lambda value: value.scheme if isinstance(value, Parameterization) else None,
)
def test_each_scheme_takes_its_own_factors_of_the_sgd_rules(
    rules: Parameterization, hidden: float, norm: float, head: float
) -> None:
    found = [rules.learning_rate(traits(role), 1.0, LAYERS) for role in (Role.HIDDEN, Role.NORM, Role.HEAD)]
    assert found == [hidden, norm, head]


@pytest.mark.parametrize("role", [Role.HIDDEN, Role.OUTPUT, Role.EMBEDDING, Role.HEAD])
def test_decay_per_step_of_sgd_depends_on_neither_width_nor_density(role: Role) -> None:
    rules = P.supar(64, 0.5, **SGD)
    assert rules.learning_rate(traits(role), 1.0, LAYERS) * rules.weight_decay(traits(role), 0.5) == 0.5
    coupled = P.supar(64, 0.5, wd_rule="coupled", **SGD)
    assert coupled.weight_decay(traits(role), 0.5) == 0.5


def test_groups_for_sgd_have_no_eps() -> None:
    rules = P.supar(16, **SGD)
    model = Transformer(ModelConfig(32, 1, 2, 11, seed=0, sparsity=0.5), rules)
    groups = param_groups(model, rules, lr=1.0, optimizer=torch.optim.SGD)
    assert {group["name"]: group["lr"] for group in groups} == {
        "embedding": 2.0,
        "hidden": 2.0,
        "output": 2.0,
        "norm": 2.0,
        "final_norm": 2.0,
    }
    assert not any("eps" in group for group in groups)
    made = build_optimizer(groups, OptimizerConfig(name="sgd", lr=1.0, momentum=0.5))
    assert isinstance(made, torch.optim.SGD)
    assert {group["momentum"] for group in made.param_groups} == {0.5}


def test_sp_fits_both_families() -> None:
    model = Transformer(ModelConfig(32, 1, 2, 11, seed=0))
    for optimizer in (torch.optim.SGD, torch.optim.AdamW):
        assert param_groups(model, P.sp(), lr=1.0, optimizer=optimizer)
    assert load("pretrain", ["optimizer=sgd", "parameterization=sp"]).optimizer.momentum == 0.9


def groups_for(rules: Parameterization, optimizer: type[torch.optim.Optimizer]) -> Callable[[], Any]:
    model = Transformer(ModelConfig(32, 1, 2, 11, seed=0), rules)
    return lambda: param_groups(model, rules, lr=1.0, optimizer=optimizer)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (
            groups_for(P.supar(16), torch.optim.SGD),
            ["name=sgd", "optimizer=adam", "set parameterization.optimizer=sgd"],
        ),
        (groups_for(P.mup(16, **SGD), torch.optim.AdamW), ["name=AdamW", "set parameterization.optimizer=adam"]),
        (lambda: load("pretrain", ["optimizer=sgd"]), ["name=sgd", "of supar", "set parameterization.optimizer=sgd"]),
        (lambda: load("pretrain", ["parameterization.optimizer=sgd"]), ["name=adamw", "=adam"]),
        (lambda: load("pretrain", ["parameterization.base_width=256"]), ["base_width=256", "model.d_model=128"]),
        (lambda: P.sp(optimizer="sgdm"), ["optimizer='sgdm'", "adam, sgd"]),
        (lambda: P.sp(output_rule="shrink"), ["output_rule='shrink'", "did you mean 'shrunk'?"]),
        (lambda: TensorTraits("hiden"), ["role='hiden'", "did you mean 'hidden'?"]),  # type: ignore[arg-type]
        (lambda: TensorTraits(Role.HIDDEN, 1.0, 0.0), ["density=0.0", "(0, 1]"]),
        (lambda: TensorTraits(Role.HIDDEN, 0.0), ["m_d=0.0", "above 0"]),
    ],
)
def test_what_the_rules_are_not_made_for_is_one_line(call: Callable[[], Any], words: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        call()
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value)
