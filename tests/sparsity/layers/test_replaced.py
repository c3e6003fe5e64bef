"""An optimizer that was built too early says so, also where one matrix became several layers."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable

import pytest
import torch
from regression import adamw, batch, loss_of, mlp
from torch import Tensor, nn
from transformers import MixtralConfig, MixtralForCausalLM

import sparsetrain as st
from sparsetrain.errors import UserError
from sparsetrain.sparsity import StaleOptimizerWarning, densify, sparsify

pytestmark = pytest.mark.filterwarnings("ignore:.* have no weight")


def attention() -> tuple[nn.Module, list[str], Callable[[nn.Module], Tensor]]:
    block = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
    model = nn.TransformerEncoder(block, 1, enable_nested_tensor=False)
    return model, ["*self_attn.[qkv]_proj"], lambda model: model(torch.randn(2, 4, 32)).sum()


def experts() -> tuple[nn.Module, list[str], Callable[[nn.Module], Tensor]]:
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_local_experts": 4}
    config = MixtralConfig(**sizes, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2)
    ids = torch.randint(0, 64, (2, 8))
    return MixtralForCausalLM(config), ["*experts*"], lambda model: model(ids, labels=ids).loss


@pytest.mark.parametrize("make", [attention, experts])
def test_parts_of_a_larger_matrix_stand_in_its_place(make: Callable[[], tuple[nn.Module, list[str], Callable]]) -> None:  # type: ignore[type-arg]
    """Attention's input projections and stacked experts have other names than the tensor that they were."""
    model, include, loss = make()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    st.sparsify(model, 0.5, include=include, seed=0)
    loss(model).backward()
    with pytest.warns(StaleOptimizerWarning, match="was built before layers were replaced"):
        optimizer.step()


@pytest.mark.parametrize("to_none", [True, False])
def test_a_gradient_from_before_does_not_pass_for_training(to_none: bool) -> None:
    """Trained, made sparse, and trained on with the same optimizer."""
    model, x = nn.Sequential(nn.Linear(32, 64), nn.Linear(64, 32)), torch.randn(2, 32)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(x).sum().backward()
    optimizer.step()
    st.sparsify(model, 0.5, seed=0)
    optimizer.zero_grad(set_to_none=to_none)
    model(x).sum().backward()
    with pytest.warns(StaleOptimizerWarning, match=r"holds the old 0\.weight"):
        optimizer.step()


@pytest.mark.parametrize("replace", [lambda model: sparsify(model, 0.5, seed=0), lambda model: densify(model)])
def test_an_optimizer_of_replaced_parameters_is_noticed_once(replace: Callable[[nn.Module], nn.Module]) -> None:
    model = sparsify(mlp(), 0.8, seed=0, include=["2"])
    optimizer = adamw(model)
    replace(model)
    loss_of(model, batch(0)).backward()
    with pytest.warns(StaleOptimizerWarning, match=r"AdamW was built before layers were replaced.*(0\.weight|2\.val)"):
        optimizer.step()
    optimizer.step()
    new = adamw(model)
    new.step()


def test_an_optimizer_of_another_model_is_no_reason_to_warn() -> None:
    teacher = mlp()
    model = copy.deepcopy(teacher)
    sparsify(model, 0.8, seed=0)
    kept = nn.Sequential(*teacher)  # the same layers, trained on their own below
    sparsify(teacher, 0.8, seed=0)
    ours, theirs = adamw(model), adamw(kept)
    for network, optimizer in ((model, ours), (kept, theirs), (teacher, adamw(teacher))):
        loss_of(network, batch(0)).backward()
        optimizer.step()


def test_a_static_manager_refuses_an_optimizer_that_was_built_before_it() -> None:
    model = mlp()
    early = adamw(model)
    masks = st.MaskManager(model, st.Static(sparsity=0.8), seed=0)
    with pytest.raises(UserError, match=r"the optimizer does not hold 0\.values: build MaskManager\(model, rule\) fir"):
        masks.step(early)
    loss_of(model, batch(0)).backward()
    with pytest.raises(UserError, match="built before layers were replaced"):  # warnings are errors here
        early.step()
    model.requires_grad_(False)
    masks.step(early)  # nothing of it would train anyway


def test_nothing_keeps_an_optimizer_or_a_replaced_layer_alive() -> None:
    model = mlp()
    old = weakref.ref(model[0].weight)
    masks = st.MaskManager(model, st.SET(sparsity=0.8), seed=0)
    optimizer = adamw(model)
    optimizer.step()
    masks.step(optimizer)
    gone = weakref.ref(optimizer)
    del optimizer
    gc.collect()
    assert old() is None
    assert gone() is None
    again = adamw(model)
    again.step()
    masks.step(again)
    assert masks.steps == 2
