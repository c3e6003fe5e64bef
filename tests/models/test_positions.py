"""ALiBi and rotary positions against naive references and the transformers library."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig
from transformers.models.bloom.modeling_bloom import build_alibi_tensor
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from sparsetrain.models import ModelConfig, alibi_slopes
from sparsetrain.models.attention import Attention, make_span
from sparsetrain.models.positions import alibi_bias, alibi_features, rope_frequencies, rope_tables, rotate


@pytest.mark.parametrize("n_heads", [1, 2, 3, 4, 6, 8, 12, 20, 32])
def test_slopes_match_transformers_bloom(n_heads: int) -> None:
    ones = torch.ones(1, 2)
    theirs = build_alibi_tensor(ones, n_heads, torch.float32).view(n_heads, 2)[:, 1]  # slope * position 1
    torch.testing.assert_close(alibi_slopes(n_heads).float(), theirs)


def test_slopes_for_powers_of_two() -> None:
    assert alibi_slopes(8).tolist() == [2.0**-h for h in range(1, 9)]
    assert alibi_slopes(4).tolist() == [1 / 4, 1 / 16, 1 / 64, 1 / 256]


def _naive_alibi(qkv: Tensor, n_heads: int, scale: float) -> Tensor:
    """Softmax over the full [H, T, T] scores, in float64."""
    q, k, v = qkv.double().chunk(3, dim=2)
    length = qkv.shape[1]
    i, j = torch.arange(length)[:, None], torch.arange(length)[None, :]
    bias = -alibi_slopes(n_heads)[:, None, None] * (i - j).abs().double()
    scores = torch.einsum("bihd,bjhd->bhij", q, k) * scale + bias.to(q.device)
    scores = scores.masked_fill((j > i).to(q.device), -math.inf)
    return torch.einsum("bhij,bjhd->bihd", scores.softmax(-1), v).flatten(2)


def _alibi_attention(n_heads: int, d_head: int, scale: float) -> Attention:
    config = ModelConfig(d_model=n_heads * d_head, n_layers=1, n_heads=n_heads, vocab_size=8)
    return Attention(config, scale)


def _run(qkv: Tensor, n_heads: int, scale: float) -> Tensor:
    d_head = qkv.shape[3]
    attention = _alibi_attention(n_heads, d_head, scale)
    config = ModelConfig(d_model=n_heads * d_head, n_layers=1, n_heads=n_heads, vocab_size=8)
    span = make_span(config, scale, qkv.flatten(2), 0)
    return attention._attend(qkv, span)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 3e-5), (torch.bfloat16, 2e-2)]
)
@pytest.mark.parametrize(("n_heads", "d_head", "length"), [(4, 16, 700), (6, 10, 65), (3, 7, 1)])
def test_alibi_matches_naive_reference(
    dtype: torch.dtype, tolerance: float, n_heads: int, d_head: int, length: int, device: torch.device
) -> None:
    qkv = torch.randn(2, length, 3 * n_heads, d_head).to(device, dtype)
    expected = _naive_alibi(qkv, n_heads, d_head**-0.5)
    actual = _run(qkv, n_heads, d_head**-0.5)
    torch.testing.assert_close(actual.double(), expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("scale", [1 / 8, 1 / 64, 72**-0.5])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_split_bias_in_16_bits_is_as_exact_as_float32(dtype: torch.dtype, scale: float) -> None:
    slopes, length = alibi_slopes(20), 8192  # not a power of two, so that the slopes use all bits
    features = alibi_features(slopes, length, scale, 64, dtype, torch.device("cpu")).double()
    query, key, value = features.chunk(3, dim=1)
    bias = (query * key).sum(-1) * scale
    exact = (torch.arange(length).double() - (length - 1) / 2)[:, None] * slopes
    assert (features.shape[2] + 64) % 8 == 0
    assert value.abs().max() == 0
    # float32 represents a bias of this size with 24 bits.
    assert (bias - exact).abs().max() <= exact.abs().max() * 2.0**-23


def test_alibi_gradients_match_naive_reference(device: torch.device) -> None:
    qkv = torch.randn(2, 40, 12, 8, dtype=torch.float64, device=device, requires_grad=True)
    weights = torch.randn(2, 40, 32, dtype=torch.float64, device=device)
    (expected,) = torch.autograd.grad((_naive_alibi(qkv, 4, 0.3) * weights).sum(), qkv)
    (actual,) = torch.autograd.grad((_run(qkv, 4, 0.3) * weights).sum(), qkv)
    torch.testing.assert_close(actual, expected)


@given(shift=st.integers(0, 5000), n_heads=st.integers(1, 9))
@settings(max_examples=20)
def test_alibi_depends_on_distance_only(shift: int, n_heads: int) -> None:
    slopes = alibi_slopes(n_heads)
    like = torch.zeros((), dtype=torch.float64)
    queries = torch.tensor([9, 9 + shift]).view(2, 1, 1, 1)  # of two rows
    here, there = alibi_bias(slopes, queries, torch.arange(10 + shift), like)
    assert torch.equal(here[:, :, :10], there[:, :, shift:])
    assert torch.equal(here[:, 0, :10], -slopes[:, None] * torch.arange(9, -1, -1))


class _LargestTensor(TorchDispatchMode):
    """Records the largest tensor that any operator returns, and the operators."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0
        self.operators: set[str] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        self.operators.add(func.__name__.split(".")[0])
        for item in result if isinstance(result, tuple | list) else (result,):
            if isinstance(item, Tensor):
                self.elements = max(self.elements, item.untyped_storage().nbytes() // item.element_size())
        return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_alibi_at_8k_never_holds_scores(dtype: torch.dtype, device: torch.device) -> None:
    length, n_heads, d_head = 8192, 2, 8
    qkv = torch.randn(1, length, 3 * n_heads, d_head, dtype=dtype, device=device, requires_grad=True)
    with _LargestTensor() as seen:
        y = _run(qkv, n_heads, 0.3)
        y.backward(torch.ones_like(y))
    ours = {"attention", "attention_backward"} <= seen.operators
    assert ours or any("flash" in name or "efficient" in name or "cudnn" in name for name in seen.operators)
    assert seen.elements <= 2 * 3 * n_heads * length * 16  # a few copies of q, k, v; scores would be 1000 times this
    assert seen.elements < length * length // 10


def test_rope_matches_transformers_llama(device: torch.device) -> None:
    length, n_heads, d_head, first = 33, 3, 16, 5
    config = LlamaConfig(hidden_size=n_heads * d_head, num_attention_heads=n_heads, max_position_embeddings=64)
    q = torch.randn(2, length, n_heads, d_head, device=device)
    k = torch.randn(2, length, n_heads, d_head, device=device)
    positions = torch.arange(first, first + length, device=device)[None].expand(2, -1)
    cos, sin = LlamaRotaryEmbedding(config).to(device)(q, positions)
    theirs = apply_rotary_pos_emb(q.transpose(1, 2), k.transpose(1, 2), cos, sin)
    frequencies, _ = rope_frequencies(d_head, 10000.0, "linear", 1.0, 64)
    tables = rope_tables(first, length, frequencies, device)
    for ours, other in zip((rotate(q, *tables), rotate(k, *tables)), theirs, strict=True):
        torch.testing.assert_close(ours, other.transpose(1, 2), atol=2e-5, rtol=1e-4)


@given(first=st.integers(0, 3000), shift=st.integers(0, 3000))
@settings(max_examples=20)
def test_rope_scores_depend_on_distance_only(first: int, shift: int) -> None:
    cpu = torch.device("cpu")
    frequencies, _ = rope_frequencies(8, 100.0, "linear", 1.0, 64)
    q, k = torch.randn(2, 1, 1, 1, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def score(start: int) -> float:
        at_q, at_k = rope_tables(start + 7, 1, frequencies, cpu), rope_tables(start, 1, frequencies, cpu)
        return float((rotate(q, *at_q) * rotate(k, *at_k)).sum())

    assert score(first) == pytest.approx(score(first + shift), abs=1e-5)
