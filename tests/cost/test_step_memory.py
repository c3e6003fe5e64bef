"""The memory of a step against what autograd saves and what torch's allocator holds."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from sparsetrain import ModelConfig, SoftPrompt, Transformer, UserError, step_memory
from sparsetrain.bench.memory import pattern_bytes, peak_bytes
from sparsetrain.cost.memory import state_bytes
from sparsetrain.models.prompted import Prompted
from sparsetrain.sparsity import sparse_layers

# Shapes that differ in components, width, depth, tokens and vocabulary.
SHAPES: list[tuple[dict[str, Any], int, int]] = [
    ({"d_model": 128, "n_layers": 2, "n_heads": 4, "vocab_size": 512}, 2, 64),
    ({"d_model": 128, "n_layers": 3, "n_heads": 4, "vocab_size": 512, "mlp": "swiglu"}, 4, 128),
    ({"d_model": 128, "n_layers": 2, "n_heads": 4, "vocab_size": 512, "positions": "rope"}, 8, 128),
    ({"d_model": 64, "n_layers": 3, "n_heads": 4, "vocab_size": 8192, "positions": "learned"}, 4, 64),
    ({"d_model": 64, "n_layers": 2, "n_heads": 4, "vocab_size": 5000, "tie_embeddings": False, "bias": True}, 4, 128),
    (
        {"d_model": 192, "n_layers": 2, "n_heads": 3, "vocab_size": 1000, "mlp": "swiglu", "norm": "rmsnorm"}
        | {"positions": "rope"},
        *(2, 256),
    ),
    ({"d_model": 256, "n_layers": 2, "n_heads": 8, "n_kv_heads": 2, "vocab_size": 1000, "dropout": 0.1}, 4, 128),
]


def built(shape: dict[str, Any], sparsity: float, backend: str = "csr") -> tuple[ModelConfig, Transformer]:
    config = ModelConfig(**shape, sparsity=sparsity, seed=0, max_context=256)
    model = Transformer(config)
    for _, layer in sparse_layers(model):
        layer.backend = backend
    return config, model


def saved_bytes(model: torch.nn.Module, *arguments: Tensor) -> int:
    """Return the bytes of the storages that autograd saves, without weights, indices and the tokens."""
    own = [*model.parameters(), *model.buffers(), *arguments]
    known = {tensor.untyped_storage().data_ptr() for tensor in own}
    seen: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(*arguments)
    assert loss.requires_grad  # the graph lives until here, so no storage was used twice
    return sum(seen.values())


def measured_peak(model: Transformer, tokens: Tensor) -> int:
    """Return the bytes that stay between steps and the rise during a step; the layouts of the kernels count."""
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)

    def step() -> None:
        model.loss(tokens, tokens).backward()
        optimizer.step()

    step()
    rises = []
    for _ in range(2):  # the profiler may miss an event
        optimizer.zero_grad()
        rises.append(peak_bytes(step))
    optimizer.zero_grad()
    state = state_bytes(model, optimizer)
    patterns = sum(pattern_bytes(layer.pattern) for _, layer in sparse_layers(model))
    return max(rises) + state.parameters + state.optimizer + patterns


@pytest.mark.parametrize("sparsity", [0.0, 0.8])
@pytest.mark.parametrize(("shape", "batch", "context"), SHAPES)
def test_activations_and_peak_match_a_real_step(
    shape: dict[str, Any], batch: int, context: int, sparsity: float
) -> None:
    config, model = built(shape, sparsity)
    tokens = torch.randint(0, config.vocab_size, (batch, context))
    found = step_memory(config, context, batch)
    assert found == step_memory(model, context, batch)
    assert found.activations == pytest.approx(saved_bytes(model, tokens, tokens), rel=1e-3)
    assert found.peak == pytest.approx(measured_peak(model, tokens), rel=0.08)
    state = state_bytes(model)
    assert found.parameters == found.gradients == found.moments // 2 == state.parameters
    patterns = sum(pattern_bytes(layer.pattern) for _, layer in sparse_layers(model))
    assert found.indices == pytest.approx(patterns, rel=0.05)
    assert found.resident < found.peak < sum(found.as_dict().values()) - found.peak + 1


def test_masked_keeps_dense_matrices() -> None:
    config, model = built(SHAPES[0][0], 0.5, "masked")
    tokens = torch.randint(0, 512, (2, 64))
    found = step_memory(model, 64, 2)
    assert found == step_memory(config, 64, 2, backend="masked")
    assert found.activations == pytest.approx(saved_bytes(model, tokens, tokens), rel=1e-3)
    assert found.peak == pytest.approx(measured_peak(model, tokens), rel=0.08)


def test_frozen_parts_save_less() -> None:
    _, model = built(SHAPES[1][0], 0.0)
    tokens = torch.randint(0, 512, (4, 128))
    model.requires_grad_(False)
    model.blocks[2].requires_grad_(True)
    found = step_memory(model, 128, 4)
    assert found.gradients == 4 * sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert found.activations == pytest.approx(saved_bytes(model, tokens, tokens), rel=1e-3)
    prompted = Prompted(model.requires_grad_(False), SoftPrompt(8, 128))
    found = step_memory(prompted, 120, 4)
    slots = torch.full((4, 128), -1)
    slots[:, :8] = torch.arange(8)
    # The positions of the prompt are saved too.
    assert found.activations == pytest.approx(saved_bytes(prompted, tokens, tokens, slots), rel=5e-3)
    assert found.gradients == 4 * 8 * 128


def test_refusals() -> None:
    config, _ = built(SHAPES[0][0], 0.0)
    with pytest.raises(UserError, match="context=0 is not a whole number"):
        step_memory(config, 0, 1)
    with pytest.raises(UserError, match=r"backend='crs'.*did you mean 'csr'"):
        step_memory(config, 1, 1, backend="crs")
    with pytest.raises(UserError, match="model is a Linear, neither"):
        step_memory(torch.nn.Linear(2, 2), 1, 1)
