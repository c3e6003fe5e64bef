"""FLOPs and parameter counts against published numbers, torch's own counter, and real models."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from sparsetrain.cost.flops import (
    FlopTerms,
    flop_ratio,
    forward_flops_per_token,
    matrices,
    parameter_count,
    training_flops_per_token,
)
from sparsetrain.errors import UserError
from sparsetrain.models.config import ModelConfig
from sparsetrain.models.transformer import Transformer
from sparsetrain.sparsity import SparseLinear

MEDISWIFT_MED = ModelConfig(
    d_model=1024, n_layers=24, n_heads=16, vocab_size=50257, positions="learned", bias=True, max_context=2048
)
MEDISWIFT_XL = replace(MEDISWIFT_MED, d_model=2048)
CEREBRAS_111M = replace(MEDISWIFT_MED, d_model=768, n_layers=10, n_heads=12, d_ff=3072)
BTLM_3B = replace(MEDISWIFT_MED, d_model=2560, n_layers=32, n_heads=32, mlp="swiglu", d_ff=6826, positions="alibi")
SMALL = ModelConfig(d_model=32, n_layers=2, n_heads=4, vocab_size=50, max_context=16, seed=0)


@pytest.fixture(autouse=True)
def _torch_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    """Use torch's own attention, whose FLOPs its counter knows."""
    monkeypatch.setattr("sparsetrain.models.attention.suits", lambda *_: False)


@pytest.mark.parametrize(
    ("config", "sparsity", "published"),
    [
        (MEDISWIFT_MED, 0.5, 1.50),
        (MEDISWIFT_MED, 0.75, 2.00),
        (MEDISWIFT_XL, 0.5, 1.67),
        (MEDISWIFT_XL, 0.75, 2.49),
    ],
)
def test_ratio_is_the_published_one_of_mediswift(config: ModelConfig, sparsity: float, published: float) -> None:
    dense, sparse = (training_flops_per_token(config, density, 2048) for density in (1.0, 1.0 - sparsity))
    assert flop_ratio(dense, sparse) == pytest.approx(published, rel=0.01)


def test_terms_are_the_equation_of_the_paper() -> None:
    d, layers, vocabulary, context, density = 1024, 24, 50257, 2048, 0.25
    terms = training_flops_per_token(MEDISWIFT_MED, density, context)
    assert terms.sparse_linears == 6 * density * 12 * layers * d**2
    assert terms.head == 6 * vocabulary * d
    assert terms.attention == 6 * 2 * layers * context * d
    assert terms.total == terms.sparse_linears + terms.head + terms.attention
    assert terms.as_dict()["total"] == terms.total


@pytest.mark.parametrize(
    "config",
    [
        replace(SMALL, positions="learned"),
        replace(SMALL, mlp="swiglu", n_kv_heads=2, positions="rope", norm="rmsnorm"),
        replace(SMALL, positions="none", bias=True, d_ff=40, tie_embeddings=False),
    ],
    ids=["gelu", "swiglu-gqa", "bias-untied"],
)
def test_every_term_equals_torch_flop_counter(config: ModelConfig) -> None:
    """The math kernel of attention computes what the formula counts: two full products forward, four backward."""
    model = Transformer(config)
    tokens = torch.randint(0, config.vocab_size, (3, 16))
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(tokens).sum().backward()
    counted = {str(op): flops for op, flops in counter.get_flop_counts()["Global"].items()}
    expected = training_flops_per_token(config, 1.0, 16).for_tokens(3 * 16)
    attention = counted.pop("aten.bmm")
    assert sum(counted.values()) == expected.sparse_linears + expected.head
    assert attention == expected.attention


def test_forward_is_a_third_and_equals_torch_flop_counter() -> None:
    config = replace(SMALL, positions="learned")
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        Transformer(config)(torch.randint(0, config.vocab_size, (2, 16)))
    assert counter.get_total_flops() == pytest.approx(forward_flops_per_token(config, 1.0, 16).total * 32, rel=1e-12)


@given(
    heads=st.sampled_from([(1, 1), (2, 1), (4, 2), (6, 3)]),
    width=st.sampled_from([24, 48]),
    layers=st.integers(1, 3),
    vocabulary=st.integers(2, 300),
    mlp=st.sampled_from(["gelu", "swiglu"]),
    d_ff=st.one_of(st.none(), st.integers(8, 70)),
    norm=st.sampled_from(["layernorm", "rmsnorm"]),
    positions=st.sampled_from(["alibi", "rope", "learned", "none"]),
    bias=st.booleans(),
    tied=st.booleans(),
)
def test_count_equals_a_real_model(
    heads: tuple[int, int],
    width: int,
    layers: int,
    vocabulary: int,
    mlp: str,
    d_ff: int | None,
    norm: str,
    positions: str,
    bias: bool,
    tied: bool,
) -> None:
    config = ModelConfig(
        d_model=width,
        n_layers=layers,
        n_heads=heads[0],
        n_kv_heads=heads[1],
        vocab_size=vocabulary,
        max_context=20,
        mlp=mlp,
        d_ff=d_ff,
        norm=norm,
        positions=positions,
        bias=bias,
        tie_embeddings=tied,
        seed=0,
    )
    with torch.device("meta"):
        model = Transformer(config)
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    count = parameter_count(config)
    assert count.total == sum(shape.numel() for shape in shapes.values())
    assert count.norms == sum(shape.numel() for name, shape in shapes.items() if "norm" in name)
    for matrix in matrices(config):
        assert tuple(shapes[f"{matrix.name}.weight"]) == (matrix.out_features, matrix.in_features)


@pytest.mark.parametrize("sparsity", [0.3, 0.75])
def test_density_of_a_real_sparse_model_gives_its_exact_count(sparsity: float) -> None:
    config = replace(SMALL, sparsity=sparsity, bias=True)
    model = Transformer(config)
    stored = sum(parameter.numel() for parameter in model.parameters())
    measured = {n: m.pattern.density for n, m in model.named_modules() if isinstance(m, SparseLinear)}
    assert len(measured) == len(matrices(config))
    assert parameter_count(config, 1.0 - sparsity).total == stored
    assert parameter_count(config, measured).total == stored


def test_counts_are_the_published_ones() -> None:
    assert parameter_count(CEREBRAS_111M).total == 111_050_496
    assert parameter_count(MEDISWIFT_MED).matrices == 301_989_888
    assert parameter_count(MEDISWIFT_XL).matrices == 1_207_959_552
    assert parameter_count(BTLM_3B).total == pytest.approx(2.65e9, rel=0.005)


@pytest.mark.parametrize("config", [CEREBRAS_111M, MEDISWIFT_XL, BTLM_3B], ids=["111m", "xl", "btlm"])
def test_count_of_published_shapes_equals_the_model_on_meta(config: ModelConfig) -> None:
    with torch.device("meta"):
        model = Transformer(config)
    assert parameter_count(config).total == sum(parameter.numel() for parameter in model.parameters())


def test_first_matching_glob_gives_the_density() -> None:
    density = {"blocks.0.attn.qkv": 0.5, "blocks.*.attn.*": 0.25}
    found = {matrix.name: matrix.density for matrix in matrices(SMALL, density)}
    assert found["blocks.0.attn.qkv"] == 0.5
    assert found["blocks.1.attn.qkv"] == found["blocks.0.attn.out"] == 0.25
    assert found["blocks.0.mlp.up"] == 1.0


@given(
    low=st.floats(0.05, 1.0),
    high=st.floats(0.05, 1.0),
    context=st.integers(1, 10_000),
)
def test_flops_grow_with_density_and_context(low: float, high: float, context: int) -> None:
    low, high = sorted((low, high))
    few, many = (training_flops_per_token(SMALL, density, context) for density in (low, high))
    assert few.total <= many.total
    assert flop_ratio(many, few) >= 1.0
    assert training_flops_per_token(SMALL, low, context + 1).attention > few.attention


def test_terms_scale_with_tokens() -> None:
    assert FlopTerms(1.0, 2.0, 3.0).for_tokens(10) == FlopTerms(10.0, 20.0, 30.0)


@pytest.mark.parametrize(
    ("density", "message"),
    [
        (0.0, r"density=0\.0 must lie in \(0, 1\]"),
        (1.5, r"density=1\.5"),
        (float("nan"), "density=nan"),
        ({"blocks.0.attn.qvk": 0.5}, r"blocks\.0\.attn\.qvk.*did you mean 'blocks\.0\.attn\.qkv'"),
        ({"*": 0.5, "blocks.0.mlp.up": 0.1}, r"blocks\.0\.mlp\.up.*applies to no hidden matrix"),
        ({"*": -1.0}, r"density\['\*'\]=-1\.0"),
    ],
)
def test_bad_density_is_named(density: float | dict[str, float], message: str) -> None:
    with pytest.raises(UserError, match=message):
        matrices(SMALL, density)


def test_bad_context_is_named() -> None:
    with pytest.raises(UserError, match="context=0"):
        training_flops_per_token(SMALL, 1.0, 0)
