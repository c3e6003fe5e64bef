"""The coordinate check: its numbers against hand-made oracles, its verdict on all parameterizations and axes."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

from sparsetrain.errors import UserError
from sparsetrain.models import ModelConfig, Transformer
from sparsetrain.parameterization import (
    Coordinate,
    Parameterization,
    Trial,
    coordinate_check,
    param_groups,
    parameterize,
    spreads,
)
from sparsetrain.parameterization.coordinates import layer_kind, losses_fall, read_coordinates
from sparsetrain.sparsity import sparsify

P = Parameterization
VOCAB = 61


# -- what is read ----------------------------------------------------------------------------------------------------


def rms(tensor: Tensor) -> float:
    return float(tensor.detach().double().square().mean().sqrt())


def test_readings_of_a_linear_layer_equal_those_worked_out_by_hand() -> None:
    layer = nn.Linear(3, 2, bias=False)
    model, x = nn.Sequential(layer), torch.randn(5, 3)
    weight = layer.weight.detach().clone()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    found = read_coordinates(Trial(model, optimizer, lambda _step: model(x).square().sum()), steps=1)
    y = x @ weight.t()
    gradient = 2 * y  # dL/dy
    change = -0.1 * (gradient.t() @ x)  # of the weight
    expected = {
        ("loss", 0): float(y.square().sum()),
        ("activation", 0): rms(y),
        ("gradient", 0): rms(gradient),
        ("update", 1): rms(x @ change.t()),
        ("activation", 1): rms(y + x @ change.t()),
    }
    by_name = {(reading.quantity, reading.step): reading.rms for reading in found}
    for key, value in expected.items():
        assert by_name[key] == pytest.approx(value, rel=1e-5), key
    assert set(by_name) == {*expected, ("gradient", 1), ("loss", 1)}


def test_kinds_drop_the_number_of_the_block() -> None:
    model = Transformer(ModelConfig(16, 2, 2, VOCAB, seed=0, bias=True, sparsity=0.5))
    kinds = {name: layer_kind(name, module) for name, module in model.named_modules()}
    assert kinds["blocks.1.attn.qkv"] == kinds["blocks.0.attn.qkv"] == "blocks.attn.qkv"
    assert (kinds["blocks.1"], kinds["embed"], kinds["head"]) == ("blocks", "embed", "head")
    assert kinds[""] is kinds["blocks"] is kinds["blocks.0.attn"] is None
    assert layer_kind("0", nn.Linear(2, 2)) == "0"  # of a plain Sequential


def test_a_loss_that_the_head_returns_is_no_activation_of_it() -> None:
    model = Transformer(ModelConfig(16, 1, 2, VOCAB, seed=0))
    tokens = torch.randint(0, VOCAB, (2, 5))
    trial = Trial(model, torch.optim.SGD(model.parameters(), lr=0.1), lambda _step: model(tokens, tokens))
    kinds = {reading.kind for reading in read_coordinates(trial, steps=1)}
    assert {"loss", "embed", "blocks.mlp.down", "final_norm"} <= kinds
    assert "head" not in kinds


def test_multipliers_in_hooks_act_once_in_an_update() -> None:
    # Head of a hooked model: logits = W (x alpha_out / m_d). The oracle puts the factor into a layer without hooks.
    def model(width: int) -> nn.Sequential:
        return nn.Sequential(nn.Linear(3, width, bias=False), nn.Linear(width, 4, bias=False))

    rules = P.mup(8, alpha_out=6.0)
    hooked = parameterize(model(16), rules, model(8), roles={"0": "embedding", "1": "head"}, seed=0)
    plain = model(16)
    plain.load_state_dict(hooked.state_dict())
    x = torch.randn(7, 3)

    def scaled(_step: int) -> Tensor:
        return plain[1](plain[0](x) * 3.0).square().sum()

    trials = [(hooked, lambda _step: hooked(x).square().sum()), (plain, scaled)]
    ours, oracle = (
        read_coordinates(Trial(m, torch.optim.SGD(m.parameters(), lr=1e-3), loss), steps=2) for m, loss in trials
    )
    for a, b in zip(ours, oracle, strict=True):
        assert (a.kind, a.quantity, a.step) == (b.kind, b.quantity, b.step)
        assert a.rms == pytest.approx(b.rms, rel=1e-5)


def test_hooks_are_removed_and_frozen_layers_have_no_update() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 1))
    model[0].requires_grad_(False)
    optimizer = torch.optim.SGD(model[1].parameters(), lr=0.1)
    x = torch.ones(2, 3)
    found = read_coordinates(Trial(model, optimizer, lambda _step: model(x).sum()), steps=1)
    assert {r.kind: r.rms for r in found if r.quantity == "update"}["0"] == 0.0
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model)


def test_slope_and_ratio_of_a_power_law_are_exact() -> None:
    rows = [
        Coordinate("a", value, seed, kind, "activation", step, scale * value**power)
        for kind, power in (("flat", 0.0), ("falls", -1.5))
        for value in (8.0, 16.0, 64.0)
        for seed, scale in ((0, 1.0), (1, 3.0))
        for step in (0, 5)
    ]
    found = {spread.kind: spread for spread in spreads(rows)}
    assert (found["flat"].slope, found["flat"].ratio) == (pytest.approx(0.0, abs=1e-12), 1.0)
    assert (found["falls"].slope, found["falls"].ratio) == (pytest.approx(-1.5), pytest.approx(8**1.5))
    assert found["flat"].rms == ((8.0, 2.0), (16.0, 2.0), (64.0, 2.0))
    assert {spread.step for spread in spreads(rows)} == {5}
    assert {spread.step for spread in spreads(rows, step=0)} == {0}


@pytest.mark.parametrize("broken", [math.inf, 0.0])
def test_a_broken_point_is_never_a_finite_ratio(broken: float) -> None:
    rows = [Coordinate("a", v, 0, "k", "update", 1, r) for v, r in ((1.0, 1.0), (2.0, broken))]
    (found,) = spreads(rows)
    assert found.ratio == math.inf
    assert math.isnan(found.slope)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: coordinate_check(None, [1.0], [0]), r"values=\[1.0\] must name at least two values"),  # type: ignore[arg-type]
        (lambda: coordinate_check(None, [1.0, 1.0], [0]), "no value twice"),  # type: ignore[arg-type]
        (lambda: coordinate_check(None, [0.0, 1.0], [0]), "must all be above 0"),  # type: ignore[arg-type]
        (lambda: read_coordinates(None, 0), "steps=0 must be at least 1"),  # type: ignore[arg-type]
        (lambda: read_coordinates(Trial(nn.ReLU(), None, None), 1), "a module with parameters of its own"),  # type: ignore[arg-type]
    ],
)
def test_what_cannot_be_checked_is_one_line(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        call()


# -- verdicts --------------------------------------------------------------------------------------------------------

LR = {"adam": 2e-3, "sgd": 0.2}


def trial(rules: Parameterization, value: float, seed: int, axis: str) -> Trial:
    # The depth check uses the base's width, because its deepest models dominate the cost.
    width = {"width": int(value), "depth": 64}.get(axis, 128)
    depth = int(value) if axis == "depth" else 2
    sparsity = 1.0 - value if axis == "density" else 0.0
    shape = ModelConfig(width, depth, width // 16, VOCAB, max_context=32, seed=seed, sparsity=sparsity, init_std=0.1)
    model = Transformer(shape, rules)
    groups = param_groups(model, rules, lr=LR[rules.optimizer])
    optimizer = torch.optim.SGD(groups) if rules.optimizer == "sgd" else torch.optim.AdamW(groups)

    def loss(step: int) -> Tensor:
        generator = torch.Generator().manual_seed(1000 * seed + step)
        # Each token mostly determines its successor, so that a few steps suffice to learn.
        start = torch.randint(0, VOCAB, (4, 1), generator=generator)
        tokens = (start + 3 * torch.arange(33)) % VOCAB
        return F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())

    return Trial(model, optimizer, loss)


VALUES = {"width": (64.0, 256.0), "density": (0.125, 0.5, 1.0), "depth": (2.0, 4.0, 16.0)}


@functools.cache
def checked(name: str, axis: str) -> list[Coordinate]:
    """Return the coordinates of six steps and two seeds."""
    # alpha_in makes embeddings as large as the blocks' outputs; otherwise alpha = 1 shows only the first blocks.
    options: dict[str, Any] = {"optimizer": "sgd" if name.endswith("/sgd") else "adam", "alpha_in": 10.0}
    rules = {
        "sp": lambda: P.sp(**options),
        "mup": lambda: P.mup(64, **options),
        "supar": lambda: P.supar(64, **options),
        "completep": lambda: P.completep(64, 2, **options),
        "completep(0.5)": lambda: P.completep(64, 2, 0.5, **options),
        "supar_completep": lambda: P.supar_completep(64, 1.0, 2, **options),
    }[name.partition("/")[0]]()
    return coordinate_check(lambda value, seed: trial(rules, value, seed, axis), VALUES[axis], (0, 1), 6, name)


def ratios(name: str, axis: str, quantity: str) -> dict[str, float]:
    return {s.kind: s.ratio for s in spreads(checked(name, axis)) if s.quantity == quantity}


def slopes(name: str, axis: str, quantity: str, step: int | None = None) -> dict[str, float]:
    return {s.kind: s.slope for s in spreads(checked(name, axis), step) if s.quantity == quantity}


KEEPS = [
    ("supar", "density"),
    ("supar_completep", "density"),
    ("mup", "width"),
    ("supar_completep", "width"),
    ("completep", "depth"),
    ("supar_completep", "depth"),
    ("supar/sgd", "density"),
    ("mup/sgd", "width"),
    ("completep/sgd", "depth"),
]


@pytest.mark.parametrize(("name", "axis"), KEEPS)
def test_what_a_parameterization_is_for_keeps_its_scale(name: str, axis: str) -> None:
    assert all(losses_fall(checked(name, axis)).values()), "the loss does not fall: the check would say nothing"
    for quantity in ("activation", "update"):
        found = ratios(name, axis, quantity)
        assert len(found) >= 8
        assert max(found.values()) <= 2.0, (quantity, found)


BREAKS = [
    ("sp", "density", "activation", "blocks.attn.out", 8.0),
    ("mup", "density", "activation", "blocks.attn.out", 8.0),
    ("mup", "density", "update", "blocks.attn.qkv", 2.5),
    ("sp", "width", "update", "blocks.mlp.down", 2.5),
    ("mup", "depth", "activation", "blocks.mlp.down", 2.5),
    ("mup/sgd", "density", "update", "blocks.mlp.up", 2.5),
    ("sp/sgd", "width", "update", "blocks.mlp.down", 2.5),
    ("mup/sgd", "depth", "update", "blocks.mlp_norm", 2.5),
]


@pytest.mark.parametrize(("name", "axis", "quantity", "kind", "least"), BREAKS)
def test_what_it_is_not_for_breaks_the_scale(name: str, axis: str, quantity: str, kind: str, least: float) -> None:
    found = ratios(name, axis, quantity)
    assert found[kind] >= least, found


@pytest.mark.parametrize("name", ["sp", "mup"])
def test_sp_and_mup_start_with_activations_that_fall_as_the_root_of_density(name: str) -> None:
    # nnz terms whose variance ignores the density give sqrt(density), and twice the slope after two sparse matrices.
    found = slopes(name, "density", "activation", step=0)
    for kind in ("blocks.attn.qkv", "blocks.mlp.up"):
        assert found[kind] == pytest.approx(0.5, abs=0.05)
    assert found["blocks.attn.out"] == pytest.approx(1.0, abs=0.2)
    assert slopes("supar", "density", "activation", step=0)["blocks.attn.out"] == pytest.approx(0.0, abs=0.1)


def test_gradients_keep_their_scale_over_density_and_fall_as_one_over_width() -> None:
    assert max(ratios("supar", "density", "gradient").values()) <= 2.0
    # All except the logits, whose gradient is that of the softmax.
    over_width = {kind: slope for kind, slope in slopes("mup", "width", "gradient").items() if kind != "head"}
    assert all(slope == pytest.approx(-1.0, abs=0.25) for slope in over_width.values()), over_width


def test_updates_under_alpha_one_half_fall_with_the_root_of_depth() -> None:
    half, one = (slopes(name, "depth", "update") for name in ("completep(0.5)", "completep"))
    for kind in ("blocks.mlp.up", "blocks.mlp.down"):
        assert half[kind] == pytest.approx(-0.5, abs=0.2)
        assert one[kind] == pytest.approx(0.0, abs=0.2)


def test_a_sparsified_hugging_face_model_is_checked_like_our_own() -> None:
    def model(width: int) -> GPT2LMHeadModel:
        shape = GPT2Config(vocab_size=VOCAB, n_positions=32, n_embd=width, n_layer=2, n_head=2, attn_pdrop=0.0)
        shape.resid_pdrop = shape.embd_pdrop = 0.0
        return GPT2LMHeadModel(shape)

    def build(name: str) -> Callable[[float, int], Trial]:
        def make(density: float, seed: int) -> Trial:
            rules = P.supar(32) if name == "supar" else P.mup(32)
            gpt = model(64) if density == 1.0 else sparsify(model(64), 1.0 - density, seed=seed)
            parameterize(gpt, rules, model(32), sigma=0.1, seed=seed)
            tokens = torch.randint(0, VOCAB, (4, 32), generator=torch.Generator().manual_seed(seed))
            return Trial(
                gpt, torch.optim.AdamW(param_groups(gpt, rules, lr=1e-3)), lambda _s: gpt(tokens, labels=tokens).loss
            )

        return make

    rows = [row for name in ("supar", "mup") for row in coordinate_check(build(name), (0.125, 1.0), (0, 1), 3, name)]
    found = {(s.scheme, s.kind): s.ratio for s in spreads(rows) if s.quantity == "activation"}
    assert found["supar", "transformer.h.mlp.c_proj"] <= 1.5
    assert found["mup", "transformer.h.mlp.c_proj"] >= 5.0
