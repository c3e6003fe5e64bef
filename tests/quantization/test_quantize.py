"""`quantize`: equality with a dense twin of the decoded weights, bytes, ties, and what is refused."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as some
from tiny_models import gpt2
from torch import Tensor, nn

import sparsetrain as st
from sparsetrain.errors import UserError
from sparsetrain.quantization import QuantizedLinear, QuantizedSparseLinear, quantize
from sparsetrain.quantization.quantize import quantized_layers
from sparsetrain.sparsity import sparse_layers


def tiny(**options: Any) -> st.Transformer:
    shape: dict[str, Any] = {"d_model": 32, "n_layers": 2, "n_heads": 2, "vocab_size": 101, "bias": True, "seed": 0}
    return st.Transformer(st.ModelConfig(**shape | options)).eval()


def tokens() -> Tensor:
    return torch.randint(0, 101, (2, 9), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def twin(model: nn.Module, original: nn.Module) -> nn.Module:
    """Return the original model as a dense one, with the decoded weights of the quantized one."""
    dense = st.densify(original)
    for name, layer in quantized_layers(model).items():
        place = dense.get_submodule(name)
        place.weight.copy_(layer.weight.t() if type(place).__name__ == "Conv1D" else layer.weight)
    return dense


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"sparsity": 0.75, "positions": "learned", "max_context": 16, "mlp": "swiglu", "norm": "rmsnorm"},
        {"sparsity": 0.5, "tie_embeddings": False, "d_model": 30, "d_ff": 37},
    ],
)
def test_a_quantized_model_is_its_dense_twin(options: dict[str, Any]) -> None:
    original = tiny(**options)
    model = quantize(copy.deepcopy(original), group=16)
    assert not list(sparse_layers(model))
    with torch.no_grad():
        logits, expected = model(tokens()), twin(model, copy.deepcopy(original))(tokens())
        changed = (logits - original(tokens())).norm() / original(tokens()).norm()
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-6)
    assert 0 < changed < 0.25
    assert torch.equal(model.generate(tokens(), 3, temperature=0.0)[:, :9], tokens())
    finer = quantize(copy.deepcopy(original), bits=8, group=16)
    with torch.no_grad():
        assert (finer(tokens()) - original(tokens())).norm() < 0.02 * original(tokens()).norm()


@settings(max_examples=20, deadline=None)
@given(
    down=some.integers(1, 6),
    across=some.integers(1, 6),
    block=some.sampled_from([(1, 1), (4, 2), (1, 8)]),
    density=some.floats(0.05, 1.0),
    group=some.integers(2, 70),
    seed=some.integers(0, 1000),
)
def test_a_sparse_layer_has_its_values_at_its_positions(
    down: int, across: int, block: tuple[int, int], density: float, group: int, seed: int
) -> None:
    grid = torch.rand(down, across, generator=torch.Generator().manual_seed(seed)) < density
    grid[:, 0] = True
    mask = grid.repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)
    pattern = st.SparsityPattern.from_mask(mask, block)
    layer = st.SparseLinear(mask.shape[1], mask.shape[0], pattern=pattern, seed=seed)
    quantized = QuantizedSparseLinear.of(layer, 4, group)
    quantized.check()
    assert torch.equal(quantized.weight, pattern.scatter(quantized.matrix.decode()[0]))
    x = torch.randn(3, mask.shape[1], generator=torch.Generator().manual_seed(seed))
    expected = x @ quantized.weight.T + layer.bias
    torch.testing.assert_close(quantized(x), expected, rtol=1e-5, atol=1e-6)


def test_large_layers_are_decoded_in_panels(monkeypatch: pytest.MonkeyPatch) -> None:
    dense, sparse = nn.Linear(24, 40), st.SparseLinear(24, 40, density=0.3, seed=0)
    model = quantize(nn.Sequential(dense, nn.ReLU(), nn.Linear(40, 24), sparse))
    x = torch.randn(5, 24, generator=torch.Generator().manual_seed(0))
    whole, weight = model(x), model[3].weight
    monkeypatch.setattr("sparsetrain.quantization.layers._PANEL", 100)
    torch.testing.assert_close(model(x), whole)
    assert torch.equal(model[3].weight, weight)


def test_bytes_of_the_demo_are_within_the_bars() -> None:
    """0.35 of bfloat16 with the embedding, and 1.1 bytes a nonzero with its index at 75 % sparsity."""
    shape: dict[str, Any] = {
        "d_model": 128,
        "n_layers": 4,
        "n_heads": 4,
        "vocab_size": 2048,
        "init_std": 0.08,
        "seed": 0,
    }
    dense = st.Transformer(st.ModelConfig(**shape))
    wide = 2 * sum(parameter.numel() for parameter in dense.parameters())
    quantize(dense)
    assert dense.head.matrix is dense.embed.matrix
    held = {tensor.data_ptr(): tensor.nbytes for tensor in dense.state_dict().values()}
    assert sum(held.values()) / wide <= 0.30 < 0.35
    sparse = quantize(st.Transformer(st.ModelConfig(**shape, sparsity=0.75)))
    layers = [layer for layer in quantized_layers(sparse).values() if isinstance(layer, QuantizedSparseLinear)]
    assert len(layers) == 16
    stored = sum(tensor.nbytes for layer in layers for tensor in layer.state_dict().values())
    assert stored / sum(layer.nnz for layer in layers) <= 1.01 < 1.1


def test_hugging_face_models_keep_their_hooks_and_ties() -> None:
    """GPT-2: Conv1D holds the transposed matrix, and the head shares the embedding."""
    original = gpt2()
    seen: list[int] = []
    original.lm_head.register_forward_hook(lambda *_: seen.append(1))
    model = quantize(copy.deepcopy(original))
    assert isinstance(model.transformer.h[0].attn.c_attn, QuantizedLinear)
    assert model.lm_head.matrix is model.transformer.wte.matrix
    ids = torch.randint(0, 20, (1, 7), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(
            model(ids).logits, twin(model, copy.deepcopy(original))(ids).logits, rtol=1e-4, atol=1e-5
        )
    assert len(seen) == 2


def test_a_change_of_dtype_keeps_the_codes() -> None:
    model = quantize(tiny(sparsity=0.5))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items() if ".matrix." in name}
    half = copy.deepcopy(model).to(torch.float64).to(torch.float16).to(torch.bfloat16)
    assert all(torch.equal(half.state_dict()[name], tensor) for name, tensor in before.items())
    with torch.no_grad():
        assert half(tokens()).dtype == torch.bfloat16


def test_a_quantized_model_does_not_train() -> None:
    model = quantize(tiny())
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    with pytest.raises(UserError, match="weights of 4 bits do not train: train the model, then quantize it"):
        model.train()
    with pytest.raises(UserError, match="no linear, sparse or embedding layer to quantize"):
        quantize(model)


def test_a_weight_that_another_module_reads_stays() -> None:
    class Reader(nn.Module):
        def __init__(self, weight: nn.Parameter) -> None:
            super().__init__()
            self.weight = weight

    shared = nn.Linear(8, 8)
    model = quantize(nn.Sequential(shared, Reader(shared.weight), nn.Linear(8, 8)))
    assert model[0] is shared
    assert isinstance(model[2], QuantizedLinear)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 5}, "bits=5 is not one of 4, 8"),
        ({"bits": 4.0}, "bits=4.0 is not one of 4, 8"),
        ({"bits": True}, "bits=True is not one of 4, 8"),
        ({"group": 1}, "group=1 is not an integer of at least 2"),
        ({"group": 64.0}, "group=64.0 is not an integer of at least 2"),
    ],
)
def test_settings_are_refused_in_one_line(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        quantize(tiny(), **options)


def test_a_refused_model_is_unchanged() -> None:
    model = tiny(sparsity=0.5)
    with torch.no_grad():
        model.blocks[1].mlp.down.values[3] = torch.nan
    before = dict(model.named_modules())
    with pytest.raises(UserError, match=r"blocks\.1\.mlp\.down: a weight is NaN"):
        quantize(model)
    assert dict(model.named_modules()) == before
    with pytest.raises(UserError, match=r"model is a str, not a torch\.nn\.Module"):
        quantize("model")  # type: ignore[type-var]
    with pytest.raises(UserError, match="the model is itself a layer"):
        quantize(nn.Linear(4, 4))
