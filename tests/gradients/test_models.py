"""Per-example gradient norms of layers and of whole models against autograd, one example at a time."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from example_norms import assert_norms, batch, language_model, one_at_a_time, transformer
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import gpt2
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM

import sparsetrain
from sparsetrain import SoftPrompt, SparseLinear, SparsityConfig, SparsityPattern
from sparsetrain.models.prompted import Prompted
from sparsetrain.sparsity.backends import cpu as cpu_backend

MODELS: dict[str, dict[str, Any]] = {
    "tied and dense": {},
    "tied, sparse, biases": {"sparsity": 0.75, "bias": True},
    "blocks": {"plan": SparsityConfig(sparsity=0.25, pattern="block", block=(4, 4))},
    "learned positions, RMSNorm, SwiGLU": {"positions": "learned", "norm": "rmsnorm", "mlp": "swiglu", "sparsity": 0.5},
    "untied head, few key heads, RoPE": {"tie_embeddings": False, "n_kv_heads": 1, "positions": "rope"},
}


@pytest.mark.parametrize("name", MODELS)
def test_a_transformer_with_masked_targets_matches_autograd(name: str) -> None:
    model = transformer(**MODELS[name])
    tokens, targets = batch()
    found = assert_norms(model, *language_model(targets, tokens, model), len(tokens))
    assert all(squared[0] == 0.0 and squared[1] > 0.0 for squared in found.values())


def test_the_head_over_several_chunks_of_tokens_matches_autograd(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sparsetrain.models.cross_entropy.chunk_tokens", lambda *_: 7)
    for tied in (True, False):
        model = transformer(tie_embeddings=tied)
        tokens, targets = batch()
        assert_norms(model, *language_model(targets, tokens, model), len(tokens))


@settings(max_examples=25)
@given(
    examples=st.integers(1, 5),
    length=st.integers(1, 70),
    sizes=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    data=st.data(),
)
def test_a_sparse_layer_gives_the_norms_of_the_masked_dense_gradient(
    examples: int, length: int, sizes: tuple[int, int], data: st.DataObject
) -> None:
    block = data.draw(st.sampled_from([(1, 1), (4, 8), (5, 4)]))
    backend = data.draw(st.sampled_from(["csr" if block == (1, 1) else "bsr", "masked"]))
    dtype = torch.float64 if backend == "masked" else torch.float32
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    occupied = torch.rand(sizes, generator=generator) < data.draw(st.sampled_from([0.1, 0.6]))
    occupied[:, 0] = True  # no row is empty
    mask = occupied.repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)
    layer = SparseLinear(
        mask.shape[1],
        mask.shape[0],
        pattern=SparsityPattern.from_mask(mask, block),
        bias=data.draw(st.booleans()),
        backend=backend,
        seed=0,
        dtype=dtype,
    )
    x = torch.randn(examples, length, mask.shape[1], generator=generator).to(dtype)
    weights = torch.randn(examples, length, mask.shape[0], generator=generator).to(dtype)
    found = assert_norms(
        layer,
        lambda: (layer(x) * weights).mean(),
        lambda one: (layer(x[one]) * weights[one]).sum() / weights.numel(),
        examples,
    )
    dense = torch.einsum("btm,btk->bmk", weights.double(), x.double()) * mask / weights.numel() * examples
    torch.testing.assert_close(found["values"].double(), dense.square().sum((1, 2)), rtol=1e-5, atol=0.0)


@pytest.mark.parametrize("backend", ["csr", "bsr"])
def test_threads_share_examples_and_pieces_of_them(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_backend, "A_THREAD", 1)
    layer = SparseLinear(48, 40, pattern=_pattern(40, 48, 1 if backend == "csr" else 8), backend=backend, seed=0)
    before = torch.get_num_threads()
    try:
        for threads, examples, length in ((2, 4, 130), (3, 2, 64), (4, 1, 200), (2, 3, 5)):
            torch.set_num_threads(threads)
            x, weights = torch.randn(examples, length, 48), torch.randn(examples, length, 40)
            assert_norms(
                layer,
                lambda x=x, w=weights: (layer(x) * w).mean(),  # type: ignore[misc]
                lambda one, x=x, w=weights: (layer(x[one]) * w[one]).sum() / w.numel(),  # type: ignore[misc]
                examples,
            )
    finally:
        torch.set_num_threads(before)


def _pattern(rows: int, columns: int, side: int) -> SparsityPattern:
    occupied = torch.rand(rows // side, columns // side, generator=torch.Generator().manual_seed(0)) < 0.4
    return SparsityPattern.from_mask(occupied.repeat_interleave(side, 0).repeat_interleave(side, 1), (side, side))


class Scale(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.randn(6))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gain


@sparsetrain.register_example_gradients(Scale)
def of_scale(module: nn.Module, inputs: tuple[Any, ...], g: Tensor) -> dict[str, Tensor]:
    return {"gain": (g * inputs[0]).flatten(1, -2).sum(1)}


class Everything(nn.Module):
    """Layers of torch in all shapes, one of them used twice, and a rule of our own."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(11, 6, padding_idx=2)
        self.norm = nn.LayerNorm(6)
        self.wide_norm = nn.LayerNorm((2, 6), bias=False)
        self.rms = nn.RMSNorm(6, eps=1e-3)
        self.twice = nn.Linear(6, 6)
        self.scale = Scale()
        self.last = nn.Linear(6, 3)
        self.bag = nn.Linear(3, 2)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.scale(self.norm(self.table(ids)))
        x = self.twice(torch.tanh(self.twice(x)))
        x = self.wide_norm(torch.stack([x, x.square()], 2)).flatten(1, 2)
        return self.bag(torch.relu(self.last(self.rms(x))).mean(1))


def test_layers_of_torch_repeats_padding_and_a_layer_used_twice_match_autograd() -> None:
    model = Everything()
    ids = torch.tensor([[1, 1, 1, 2], [2, 3, 4, 4], [5, 6, 7, 8]])
    wanted = torch.randn(3, 2)
    assert_norms(
        model,
        lambda: (model(ids) - wanted).square().mean(),
        lambda one: (model(ids[one : one + 1]) - wanted[one]).square().mean() / 3,
        3,
    )


def test_gpt2_of_transformers_matches_autograd() -> None:
    model = gpt2()
    tokens = torch.randint(0, 37, (3, 16))
    _, share = language_model(tokens.roll(-1, 1), tokens, model)
    found = assert_norms(
        model,
        lambda: F.cross_entropy(model(input_ids=tokens).logits.flatten(0, 1), tokens.roll(-1, 1).flatten()),
        share,
        3,
    )
    assert "transformer.wpe.weight" in found
    assert "lm_head.weight" not in found  # it is the table


def test_a_sparse_llama_of_transformers_matches_autograd() -> None:
    config = LlamaConfig(
        vocab_size=37, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2
    )
    model = sparsetrain.sparsify(LlamaForCausalLM(config).eval(), sparsity=0.5, seed=0)
    tokens = torch.randint(0, 37, (2, 9))
    _, share = language_model(tokens.roll(-1, 1), tokens, model)
    loss = lambda: F.cross_entropy(model(tokens).logits.flatten(0, 1), tokens.roll(-1, 1).flatten())  # noqa: E731
    assert_norms(model, loss, share, 2)


def test_a_soft_prompt_in_a_frozen_model_matches_autograd() -> None:
    model = Prompted(transformer(), SoftPrompt(4, 32, std=1.0))
    model.model.requires_grad_(False)
    tokens, targets = batch(masked=0.1)
    slots = torch.full_like(tokens, -1)
    slots[:, 3:7] = torch.arange(4)
    slots[1, 9:11] = 2  # a vector three times in one example
    count = int((targets >= 0).sum())
    found = assert_norms(
        model,
        lambda: model(tokens, targets, slots),
        lambda one: (
            F.cross_entropy(model(tokens[one : one + 1], slots=slots[one : one + 1])[0], targets[one], reduction="sum")
            / count
        ),
        3,
    )
    assert found.keys() == {"prompt.vectors"}


def test_a_sparse_bert_whose_key_biases_have_a_gradient_of_zero_is_measured() -> None:
    config = BertConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)
    model = sparsetrain.sparsify(BertForSequenceClassification(config).eval(), sparsity=0.5, backend="csr", seed=0)
    ids, labels = torch.randint(3, 60, (4, 6)), torch.tensor([0, 1, 1, 0])
    expected = one_at_a_time(model, lambda b: F.cross_entropy(model(ids[b : b + 1]).logits, labels[b : b + 1]) / 4, 4)
    with sparsetrain.per_example_norms(model) as norms:
        F.cross_entropy(model(input_ids=ids).logits, labels).backward()
    assert norms.squared.keys() == expected.keys()
    for name, squared in expected.items():
        if "key.bias" not in name:  # zero up to rounding
            torch.testing.assert_close(norms.squared[name].double(), squared, rtol=1e-4, atol=1e-12, msg=name)


@pytest.mark.parametrize("bias", [True, False])
def test_a_model_in_bfloat16_is_not_refused(bias: bool) -> None:
    """torch adds the gradients of a LayerNorm in 16 bits, which is wrong by some percent."""
    for seed in range(4):
        torch.manual_seed(seed)
        shape = {"d_model": 32, "n_layers": 2, "n_heads": 2, "vocab_size": 60, "sparsity": 0.5}
        model = sparsetrain.Transformer(sparsetrain.ModelConfig(**shape, bias=bias)).bfloat16()
        tokens = torch.randint(0, 60, (4, 129))
        with sparsetrain.per_example_norms(model) as norms:
            model(tokens[:, :-1], tokens[:, 1:]).backward()
        assert norms.squared.keys() == {
            name for name, parameter in model.named_parameters() if parameter.grad is not None
        }
