"""An optimizer that was built too early says so, also where one matrix became several layers."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from transformers import MixtralConfig, MixtralForCausalLM

import sparsetrain as st
from sparsetrain.sparsity import StaleOptimizerWarning


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
