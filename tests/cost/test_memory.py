"""Predicted bytes against the bytes of live models and optimizers."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from sparsetrain.cost.memory import StateBytes, state_bytes, training_bytes
from sparsetrain.errors import UserError
from sparsetrain.models.config import ModelConfig
from sparsetrain.models.transformer import Transformer


@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.7])
@pytest.mark.parametrize("tied", [True, False])
def test_prediction_equals_a_live_adamw_run(sparsity: float, tied: bool, device: torch.device) -> None:
    config = ModelConfig(
        d_model=32, n_layers=2, n_heads=2, vocab_size=64, bias=True, sparsity=sparsity, seed=0, tie_embeddings=tied
    )
    model = Transformer(config).to(device)
    optimizer = torch.optim.AdamW(model.parameters())
    tokens = torch.randint(0, 64, (2, 8), device=device)
    model.loss(tokens, tokens).backward()
    optimizer.step()
    measured = state_bytes(model, optimizer)
    predicted = training_bytes(config, 1.0 - sparsity)
    assert measured.parameters == predicted.parameters
    assert measured.gradients == predicted.gradients
    assert measured.index == predicted.index
    assert (measured.index == 0) == (sparsity == 0.0)
    step_counters = 4 * len(list(model.parameters()))
    assert measured.optimizer == predicted.optimizer + step_counters


def test_before_the_first_step_there_are_only_parameters_and_index() -> None:
    model = Transformer(ModelConfig(d_model=16, n_layers=1, n_heads=1, vocab_size=16, sparsity=0.5, seed=0))
    measured = state_bytes(model, torch.optim.AdamW(model.parameters()))
    assert measured.gradients == measured.optimizer == 0
    assert measured.total == measured.parameters + measured.index + measured.buffers


def test_shared_storage_counts_once_and_other_buffers_apart() -> None:
    first, second = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
    second.weight = first.weight
    model = nn.Sequential(first, second, nn.BatchNorm1d(4))
    measured = state_bytes(model)
    assert measured.parameters == 4 * (16 + 4 + 4)
    assert measured.buffers == 4 * (4 + 4) + 8  # running mean and variance, and a count


def test_meta_tensors_are_told_apart() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    assert state_bytes(model).parameters == 2 * 16 * 4


def test_sizes_follow_dtype_and_optimizer() -> None:
    config = ModelConfig(d_model=16, n_layers=1, n_heads=1, vocab_size=16)
    full = training_bytes(config)
    mixed = training_bytes(config, value_bytes=2, moments=1)
    assert mixed == StateBytes(full.parameters // 2, full.gradients // 2, full.optimizer // 2, 0)
    assert full.as_dict()["total"] == full.total == 16 * (full.parameters // 4)
    with pytest.raises(UserError, match="moments=-1 is negative"):
        training_bytes(config, moments=-1)


def test_index_is_row_pointers_and_columns() -> None:
    config = ModelConfig(d_model=8, n_layers=1, n_heads=1, vocab_size=8)
    # out: 8 x 8 at a quarter is 16 values, 9 row pointers of 8 bytes and 16 columns of 4.
    assert training_bytes(config, {"blocks.0.attn.out": 0.25}).index == 9 * 8 + 16 * 4
