"""The usual two groups: decay of sparse parameters equals the rule "two dimensions or more" on the dense model."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from tiny_models import gpt2, mlp
from torch import nn

from sparsetrain import decay_groups
from sparsetrain.errors import UserError
from sparsetrain.models import ModelConfig, Transformer
from sparsetrain.sparsity import RigL, sparsify
from sparsetrain.sparsity.evolution.manager import MaskManager


def encoder() -> nn.Module:
    return nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32), 2, enable_nested_tensor=False)


def ours() -> nn.Module:
    return Transformer(ModelConfig(16, 2, 2, 11, bias=True, seed=0))


def decayed(model: nn.Module) -> set[str]:
    """Return the names of decayed parameters, with the dense name for sparse values."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = decay_groups(model, 0.1)
    assert [(group["name"], group["weight_decay"]) for group in groups] == [("decay", 0.1), ("no_decay", 0.0)]
    members = [id(parameter) for group in groups for parameter in group["params"]]
    assert sorted(members) == sorted(id(parameter) for parameter in model.parameters())
    return {names[id(parameter)].replace("values", "weight") for parameter in groups[0]["params"]}


@pytest.mark.parametrize("make", [gpt2, mlp, encoder, ours])
def test_a_sparse_model_decays_what_the_usual_rule_takes_in_its_dense_twin(make: Callable[[], nn.Module]) -> None:
    twin = {name for name, parameter in make().named_parameters() if parameter.ndim >= 2}
    assert decayed(make()) == twin
    found = decayed(sparsify(make(), 0.5, exclude=["*self_attn*", "*head*"], seed=0))
    assert found == twin
    assert any("emb" in name or "wte" in name for name in twin) == (make in (gpt2, ours))


def test_frozen_parameters_are_left_out_and_a_group_may_be_empty() -> None:
    model = sparsify(mlp(), 0.5, seed=0)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.endswith("bias"))
    (group,) = decay_groups(model, 0.1)
    assert (group["name"], len(group["params"])) == ("no_decay", 3)


def test_an_optimizer_of_the_groups_trains_under_moving_masks() -> None:
    """The values stay in their group when masks change, and decay without a gradient."""
    model = mlp()
    manager = MaskManager(model, RigL(sparsity=0.5, every=1), seed=0)
    optimizer = torch.optim.SGD(decay_groups(model, 0.5), lr=0.1)
    model(torch.randn(4, 7)).square().mean().backward()
    optimizer.step()
    manager.step(optimizer)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.detach(), before[name] * (1.0 if name.endswith("bias") else 0.95))


@pytest.mark.parametrize("value", [-0.1, float("nan"), float("inf"), "0.1", True, None])
def test_a_decay_that_is_none_is_refused(value: object) -> None:
    with pytest.raises(UserError, match="weight_decay="):
        decay_groups(mlp(), value)  # type: ignore[arg-type]
