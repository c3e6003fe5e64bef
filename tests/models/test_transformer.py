"""The whole model: names, causality, gradients, initial values, sparsity, multipliers."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from sparsetrain.errors import UserError
from sparsetrain.models import ModelConfig, Transformer, tensor_traits
from sparsetrain.models.attention import make_span
from sparsetrain.parameterization import Parameterization, Role, TensorTraits, assignment, param_groups
from sparsetrain.sparsity import SparseLinear, SparsityConfig, SparsityGroup

KINDS: dict[str, dict[str, Any]] = {
    "alibi-gelu": {},
    "alibi-gqa-sparse": {"n_kv_heads": 2, "sparsity": 0.5, "mlp": "swiglu"},
    "rope-swiglu-rmsnorm": {"positions": "rope", "mlp": "swiglu", "norm": "rmsnorm", "tie_embeddings": False},
    "learned-bias": {"positions": "learned", "bias": True},
    "none": {"positions": "none"},
}
VOCAB = 50


def build(rules: Parameterization | None = None, plan: SparsityConfig | None = None, **options: Any) -> Transformer:
    shape = {"d_model": 32, "n_layers": 2, "n_heads": 4, "vocab_size": VOCAB, "max_context": 24, "seed": 0}
    return Transformer(ModelConfig(**{**shape, **options}), rules, plan)


def test_parameter_names_to_the_letter() -> None:
    model = build(mlp="swiglu", bias=True, positions="learned", tie_embeddings=False, n_layers=1)
    stems = ["blocks.0.attn_norm", "blocks.0.attn.qkv", "blocks.0.attn.out", "blocks.0.mlp_norm"]
    stems += [f"blocks.0.mlp.{name}" for name in ("up", "gate", "down")] + ["final_norm"]
    expected = {"embed.weight", "positions.weight", "head.weight"}
    expected |= {f"{stem}.{leaf}" for stem in stems for leaf in ("weight", "bias")}
    assert {name for name, _ in model.named_parameters()} == expected


def test_tied_weight_is_listed_once_as_the_embedding() -> None:
    model = build()
    assert isinstance(model.head, nn.Linear)
    assert model.head.weight is model.embed.weight
    assert (copied := copy.deepcopy(model)).head.weight is copied.embed.weight
    assert "head.weight" not in dict(model.named_parameters())


@pytest.mark.parametrize("kind", KINDS)
@given(position=st.integers(1, 19), seed=st.integers(0, 1000))
@settings(max_examples=10)
def test_a_later_token_never_changes_earlier_logits(kind: str, position: int, seed: int) -> None:
    torch.manual_seed(seed)
    model = build(init_std=0.3, **KINDS[kind])
    tokens = torch.randint(0, VOCAB, (2, 20))
    changed = tokens.clone()
    changed[:, position] = (tokens[:, position] + 1 + torch.randint(0, VOCAB - 1, ())) % VOCAB
    with torch.no_grad():
        before, after = model(tokens), model(changed)
    assert torch.equal(before[:, :position], after[:, :position])
    assert not torch.equal(before[:, position], after[:, position])


@pytest.mark.parametrize("kind", ["alibi-gelu", "rope-swiglu-rmsnorm", "learned-bias"])
def test_an_earlier_token_changes_later_logits(kind: str) -> None:
    model = build(init_std=0.3, **KINDS[kind])
    tokens = torch.randint(1, VOCAB, (1, 20))
    changed = tokens.clone()
    changed[:, 0] = 0
    with torch.no_grad():
        difference = (model(tokens) - model(changed)).abs().amax(dim=-1)[0]
    assert bool((difference > 1e-6).all())


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_match_finite_differences(kind: str) -> None:
    rules = Parameterization.supar_completep(16, 0.5, 1, alpha=0.5, alpha_in=2.0, alpha_out=3.0)
    model = build(rules, d_model=16, vocab_size=11, init_std=0.2, **KINDS[kind]).double()
    tokens, targets = torch.randint(0, 11, (2, 2, 6))
    targets[0, 2] = -100
    model.loss(tokens, targets).backward()
    step = 1e-6
    for name, parameter in model.named_parameters():
        direction = torch.randn_like(parameter)
        losses = []
        for sign in (1.0, -1.0):
            with torch.no_grad():
                parameter.add_(direction, alpha=sign * step)
                losses.append(model.loss(tokens, targets).item())
                parameter.sub_(direction, alpha=sign * step)
        assert parameter.grad is not None
        expected = (losses[0] - losses[1]) / (2 * step)
        assert float((parameter.grad * direction).sum()) == pytest.approx(expected, rel=1e-5, abs=1e-8), name


@pytest.mark.parametrize("kind", KINDS)
def test_loss_and_token_losses_equal_torch_cross_entropy_of_the_logits(kind: str, device: torch.device) -> None:
    model = build(Parameterization.mup(16, alpha_in=2.0, alpha_out=5.0), init_std=0.3, **KINDS[kind]).to(device)
    tokens, targets = torch.randint(0, VOCAB, (2, 3, 20), device=device)
    targets[1, :7] = -100
    logits = model(tokens)
    torch.testing.assert_close(model.loss(tokens, targets), F.cross_entropy(logits.flatten(0, 1), targets.flatten()))
    assert torch.equal(model(tokens, targets), model.loss(tokens, targets))
    expected = F.cross_entropy(logits.transpose(1, 2), targets, reduction="none")
    torch.testing.assert_close(model.token_losses(tokens, targets), expected.detach())
    embeddings = model.embed_tokens(tokens)
    other = torch.zeros_like(tokens)
    assert torch.equal(model.loss(other, targets, embeddings=embeddings), model.loss(tokens, targets))
    assert torch.equal(model(other, embeddings=embeddings), logits)


def test_forward_multipliers_of_the_table() -> None:
    rules = Parameterization.completep(16, 1, alpha=0.5, alpha_in=3.0, alpha_out=7.0)
    model = build(rules)
    tokens = torch.randint(0, VOCAB, (1, 9))
    x = 3.0 * model.embed(tokens)
    span = make_span(model.config, 1 / model.config.d_head, x, 0)
    for block in model.blocks:
        x = x + 2**-0.5 * block.attn(block.attn_norm(x), span)
        x = x + 2**-0.5 * block.mlp(block.mlp_norm(x))
    expected = model.final_norm(x) @ model.embed.weight.t() * (7.0 / 2.0)
    torch.testing.assert_close(model(tokens), expected)


ROLES = {
    "embed.weight": (Role.EMBEDDING, 4.0),
    "positions.weight": (Role.POSITION, 4.0),
    "blocks.1.attn_norm.weight": (Role.NORM, 4.0),
    "blocks.1.attn_norm.bias": (Role.BIAS, 4.0),
    "blocks.1.attn.qkv.values": (Role.HIDDEN, 4.0),
    "blocks.1.attn.qkv.bias": (Role.BIAS, 4.0),
    "blocks.1.attn.out.values": (Role.OUTPUT, 4.0),
    "blocks.1.mlp.up.values": (Role.HIDDEN, 4.0),
    "blocks.1.mlp.gate.values": (Role.HIDDEN, 4.0),
    "blocks.1.mlp.down.values": (Role.OUTPUT, 85 / 21),  # floor(8 * 32 / 3) over floor(8 * 8 / 3)
    "blocks.1.mlp.up.bias": (Role.BIAS, 85 / 21),  # its own length, not what its matrix reads
    "blocks.1.mlp.gate.bias": (Role.BIAS, 85 / 21),
    "blocks.1.mlp.down.bias": (Role.BIAS, 4.0),
    "final_norm.weight": (Role.FINAL_NORM, 4.0),
    "final_norm.bias": (Role.FINAL_BIAS, 4.0),
    "head.weight": (Role.HEAD, 4.0),
}


def test_tensor_specs_row_for_row() -> None:
    rules = Parameterization.supar(8)
    model = build(rules, mlp="swiglu", bias=True, positions="learned", tie_embeddings=False, sparsity=0.5)
    traits_of = tensor_traits(model, rules)
    assert set(traits_of) == {name for name, _ in model.named_parameters()}
    for name, (role, m_d) in ROLES.items():
        assert (traits_of[name].role, traits_of[name].m_d) == (role, pytest.approx(m_d)), name
        owner = model.get_submodule(name.rpartition(".")[0])
        density = owner.pattern.density if isinstance(owner, SparseLinear) and name.endswith("values") else 1.0
        assert traits_of[name].density == density
    assert param_groups(model, rules, lr=1e-3)


@pytest.mark.parametrize("sparsity", [0.0, 0.75])
@pytest.mark.parametrize("scheme", ["sp", "supar"])
def test_initial_std_measured_against_the_table(scheme: str, sparsity: float) -> None:
    rules = Parameterization.supar(32) if scheme == "supar" else Parameterization.sp()
    m_d, m_rho = (4.0, 1.0 - sparsity) if scheme == "supar" else (1.0, 1.0)
    model = build(rules, d_model=128, vocab_size=400, init_std=0.05, sparsity=sparsity, tie_embeddings=False)
    hidden = 0.05 / math.sqrt(m_d * m_rho)
    table = {
        "embed": 0.05,
        "head": 0.05,
        "blocks.0.attn.qkv": hidden,
        "blocks.1.mlp.up": hidden,
        "blocks.0.attn.out": hidden / 2,  # 1 / sqrt(2 n_layers), n_layers = 2
        "blocks.1.mlp.down": hidden / 2,
    }
    for name, std in table.items():
        module = model.get_submodule(name)
        drawn = module.values if isinstance(module, SparseLinear) else module.weight
        assert float(drawn.detach().std()) == pytest.approx(std, rel=5 / math.sqrt(2 * drawn.numel())), name
    assert bool((model.blocks[0].attn_norm.weight == 1.0).all())


def test_one_seed_gives_one_model() -> None:
    first, again, other = build(sparsity=0.5), build(sparsity=0.5), build(sparsity=0.5, seed=1)
    for (name, a), (_, b) in zip(first.state_dict().items(), again.state_dict().items(), strict=True):
        assert torch.equal(a, b), name
    assert not torch.equal(first.embed.weight, other.embed.weight)
    assert not torch.equal(first.blocks[0].attn.qkv.col, other.blocks[0].attn.qkv.col)


def test_no_seed_draws_from_the_global_generator() -> None:
    models = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        models.append(build(seed=None).embed.weight)
    assert torch.equal(models[0], models[1])
    assert not torch.equal(models[1], models[2])


def test_sparse_layers_are_exact_and_distinct() -> None:
    model = build(sparsity=0.7, n_layers=3)
    layers = {name: m for name, m in model.named_modules() if isinstance(m, SparseLinear)}
    assert {name.split(".", 2)[2] for name in layers} == {"attn.qkv", "attn.out", "mlp.up", "mlp.down"}
    for layer in layers.values():
        assert layer.values.numel() == round(0.3 * layer.in_features * layer.out_features)
    masks = [layer.pattern.mask() for name, layer in layers.items() if name.endswith("attn.qkv")]
    assert not any(torch.equal(a, b) for i, a in enumerate(masks) for b in masks[:i])


def test_sparse_model_shares_its_draws_with_the_dense_one() -> None:
    rules = Parameterization.supar(32)
    dense, sparse = build(rules), build(rules, sparsity=0.75)
    for name, layer in sparse.named_modules():
        if isinstance(layer, SparseLinear):
            weight = dense.get_submodule(name).weight
            torch.testing.assert_close(layer.values, layer.pattern.gather(weight) / math.sqrt(0.25))
    assert torch.equal(dense.embed.weight, sparse.embed.weight)


def test_sparsity_zero_builds_plain_linear_layers() -> None:
    assert not any(isinstance(module, SparseLinear) for module in build().modules())


def test_plan_by_groups() -> None:
    plan = SparsityConfig(sparsity=0.0, groups=[SparsityGroup("*mlp*", 0.5)])
    model = build(plan=plan)
    assert isinstance(model.blocks[0].attn.qkv, nn.Linear)
    assert isinstance(model.blocks[0].mlp.up, SparseLinear)


def test_a_sparse_head_is_refused() -> None:
    with pytest.raises(UserError, match=r"head: its class Head has its own forward.*; exclude it"):
        build(plan=SparsityConfig(sparsity=0.5, exclude=[]), tie_embeddings=False)


def test_meta_device_has_the_parameters_of_the_real_model() -> None:
    with torch.device("meta"):
        model = build(seed=None)
    assert all(parameter.is_meta for parameter in model.parameters())
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in build().parameters())
    assert assignment(model).traits_of["embed.weight"] == TensorTraits(Role.EMBEDDING)


def test_dropout_only_in_training() -> None:
    model = build(dropout=0.5)
    tokens = torch.randint(0, VOCAB, (1, 8))
    assert not torch.equal(model(tokens), model(tokens))
    model.eval()
    assert torch.equal(model(tokens), model(tokens))
    assert torch.equal(model(tokens), build()(tokens))


@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_autocast_stays_close_to_float32(kind: str, device: torch.device) -> None:
    model = build(init_std=0.1, **KINDS[kind]).to(device)
    tokens, targets = torch.randint(0, VOCAB, (2, 2, 20), device=device)
    exact = model.loss(tokens, targets)
    with torch.autocast(device.type, torch.bfloat16):
        loss = model.loss(tokens, targets)
    loss.backward()
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, exact, atol=2e-2, rtol=0.0)


def test_too_many_tokens_for_learned_positions() -> None:
    with pytest.raises(UserError, match="25 tokens are more than the 24 learned positions"):
        build(positions="learned")(torch.zeros(1, 25, dtype=torch.long))


def test_bad_inputs_are_named() -> None:
    model = build()
    tokens = torch.zeros(1, 4, dtype=torch.long)
    with pytest.raises(UserError, match="tokens have shape \\(4,\\)"):
        model(tokens[0])
    with pytest.raises(UserError, match="differ in shape"):
        model(tokens, tokens[:, 1:])
    with pytest.raises(UserError, match="exactly one of tokens and embeddings"):
        model.hidden()
