"""Multipliers that follow the density: against a static run at the same density, mean squares, and refused uses."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from math import sqrt
from typing import Any

import pytest
import torch
from tiny_models import VOCAB
from torch import Tensor, nn

from sparsetrain.errors import UserError
from sparsetrain.models import ModelConfig, Transformer
from sparsetrain.parameterization import Parameterization, follow_density, param_groups
from sparsetrain.sparsity import GMP, SET, MaskManager, Rule, SparsityConfig, VariableSparsity, sparse_layers

P = Parameterization
RULES = P.supar(16, base_density=0.5, follow="density")


@dataclass(frozen=True, kw_only=True)
class RandomPruning(GMP):
    """GMP that drops weights whatever their magnitude, as the derivation of SμPar assumes."""

    def score(self, values: Tensor, gradient: Tensor) -> Tensor:
        return (values.abs() * 1e6).frac()


def pruned(kind: type[GMP], sparsity: float, every: int = 1, steps: int = 4) -> GMP:
    return kind(sparsity=sparsity, every=every, start=0, stop=steps)


def prepared(
    rule: Rule, rules: Parameterization = RULES, width: int = 32, lr: float = 1e-3, optimizer: str = "adamw"
) -> tuple[Transformer, MaskManager, torch.optim.Optimizer]:
    """Return a model whose masks the rule changes, and its optimizer, as a user of the library builds them."""
    model = Transformer(ModelConfig(width, 2, 2, VOCAB, seed=0), rules)
    manager = MaskManager(model, rule, seed=0)
    model.parameterize(rules, seed=0)
    groups = param_groups(model, rules, lr=lr, weight_decay=0.1)
    kinds: dict[str, Callable[..., torch.optim.Optimizer]] = {"adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}
    return model, manager, kinds[optimizer](groups)


def step(model: Transformer, manager: MaskManager, optimizer: torch.optim.Optimizer, follow: bool = True) -> list[str]:
    tokens = torch.randint(0, VOCAB, (4, 9), generator=torch.Generator().manual_seed(manager.steps))
    model.loss(tokens[:, :-1], tokens[:, 1:]).backward()
    optimizer.step()
    manager.step(optimizer)
    changed = follow_density(model, optimizer) if follow else []
    optimizer.zero_grad()
    return changed


def settings(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, tuple[float, ...]]:
    """Return learning rate, weight decay and eps of each parameter."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {
        names[id(parameter)]: (group["lr"], group["weight_decay"], group.get("eps", 0.0))
        for group in optimizer.param_groups
        for parameter in group["params"]
    }


@pytest.mark.parametrize("wd_rule", ["coupled", "width", "width_density"])
@pytest.mark.parametrize("kind", ["adamw", "sgd"])
def test_the_settings_become_those_of_a_static_model_of_that_density(wd_rule: str, kind: str) -> None:
    options: dict[str, Any] = {"wd_rule": wd_rule, "optimizer": "sgd" if kind == "sgd" else "adam"}
    rules = P.supar(16, 0.5, follow="density", **options)
    model, manager, optimizer = prepared(pruned(GMP, 0.75), rules, optimizer=kind)
    start = settings(model, optimizer)
    while manager.steps < 6:
        step(model, manager, optimizer)
    sparse = Transformer(ModelConfig(32, 2, 2, VOCAB, seed=0), rules, SparsityConfig(0.75))
    found = settings(model, optimizer)
    made = {"adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}[kind]
    wanted = settings(sparse, made(param_groups(sparse, rules, lr=1e-3, weight_decay=0.1)))  # type: ignore[operator]
    assert set(found) == set(wanted)
    assert all(found[name] == pytest.approx(wanted[name], rel=0.02) for name in found)  # counts are rounded
    moved = {name for name in found if found[name] != start[name]}
    assert moved == {f"{name}.values" for name, _ in sparse_layers(model)}
    # To the last digits, from the density that each layer has.
    for name, layer in sparse_layers(model):
        assert found[f"{name}.values"][0] == pytest.approx(
            1e-3 / ((1.0 if kind == "sgd" else 2.0) * layer.pattern.density / 0.5), rel=1e-12
        )


def test_a_group_per_matrix_and_what_a_scheduler_needs() -> None:
    model, manager, optimizer = prepared(pruned(GMP, 0.75, steps=2))
    for group in optimizer.param_groups:
        group["initial_lr"] = group["lr"]
        group["lr"] *= 0.25
    assert sorted(group["params"][0].numel() for group in optimizer.param_groups if "density" in group) == sorted(
        layer.values.numel() for _, layer in sparse_layers(model)
    )
    while manager.steps < 3:
        step(model, manager, optimizer)
    for group in optimizer.param_groups:
        assert group["lr"] == pytest.approx(group["initial_lr"] / 4)
        if "density" in group:
            assert group["initial_lr"] == pytest.approx(1e-3 / (2.0 * group["density"] / 0.5))


def test_weights_follow_and_moments_keep_their_bits() -> None:
    rule = VariableSparsity(phases=[(0, 0.0), (1, 0.75), (2, 0.25)], sparsity=0.75)  # dense, a quarter, three quarters
    model, manager, optimizer = prepared(rule)
    for _ in range(2):
        tokens = torch.randint(0, VOCAB, (4, 9), generator=torch.Generator().manual_seed(9))
        model.loss(tokens[:, :-1], tokens[:, 1:]).backward()
        densities = {name: layer.pattern.density for name, layer in sparse_layers(model)}
        optimizer.step()
        manager.step(optimizer)
        values = {name: layer.values.detach().clone() for name, layer in sparse_layers(model)}
        moments = {name: optimizer.state[layer.values]["exp_avg"].clone() for name, layer in sparse_layers(model)}
        assert follow_density(model, optimizer) == list(densities)
        assert follow_density(model, optimizer) == []  # a second call finds nothing to do
        for name, layer in sparse_layers(model):
            factor = sqrt(densities[name] / layer.pattern.density)
            assert factor == pytest.approx(2.0 if manager.steps == 1 else sqrt(1 / 3), rel=0.01)
            assert torch.equal(layer.values, values[name] * factor)
            assert torch.equal(optimizer.state[layer.values]["exp_avg"], moments[name])
        optimizer.zero_grad()


def growth_of_output(rule: GMP, follow: bool) -> float:
    """Return the root mean square of the outputs of hidden matrices at the end, over that before any pruning."""
    model, manager, optimizer = prepared(rule, P.supar(64, follow="density"), width=128, lr=1e-9)
    inputs = torch.randn(256, 128, generator=torch.Generator().manual_seed(0))

    def spread() -> float:
        with torch.no_grad():
            outputs = [layer(inputs) for _, layer in sparse_layers(model) if layer.in_features == 128]
            return sqrt(sum(float(out.square().mean()) for out in outputs) / len(outputs))

    before = spread()
    while manager.steps < 5:
        step(model, manager, optimizer, follow)
    assert all(layer.pattern.density == pytest.approx(0.1, abs=0.01) for _, layer in sparse_layers(model))
    return spread() / before


def test_activations_keep_their_mean_square_from_dense_to_a_tenth() -> None:
    # Weights that are dropped at random: the case for which the rule is derived.
    assert growth_of_output(pruned(RandomPruning, 0.9), follow=True) == pytest.approx(1.0, abs=0.05)
    assert growth_of_output(pruned(RandomPruning, 0.9), follow=False) == pytest.approx(sqrt(0.1), rel=0.05)
    # The largest tenth of normal weights by magnitude has 0.437 of the sum of squares: 1 - P(3/2, q^2 / 2) with the
    # quantile q = 1.645, so that rescaling goes beyond the start by as much as its absence falls short of sqrt(0.191).
    kept = 0.4366
    assert growth_of_output(pruned(GMP, 0.9), follow=False) == pytest.approx(sqrt(kept), rel=0.05)
    assert growth_of_output(pruned(GMP, 0.9), follow=True) == pytest.approx(sqrt(10 * kept), rel=0.05)


def test_masks_of_one_density_change_nothing() -> None:
    model, manager, optimizer = prepared(SET(sparsity=0.75, every=1, drop_fraction=0.3))
    start = settings(model, optimizer)
    for _ in range(3):
        assert step(model, manager, optimizer) == []
    assert settings(model, optimizer) == start


def test_a_restored_optimizer_knows_the_density_that_its_settings_are_for() -> None:
    rule = pruned(GMP, 0.9, steps=6)
    one, first, trained = prepared(rule)
    while first.steps < 3:
        step(one, first, trained)
    other, second, again = prepared(rule)
    other.load_state_dict(one.state_dict())
    second.load_state_dict(first.state_dict())
    again.load_state_dict(deepcopy(trained.state_dict()))  # torch would share the moments
    assert follow_density(other, again) == []  # what is loaded was rescaled before it was saved
    for _ in range(4):
        step(one, first, trained)
        step(other, second, again)
    assert settings(one, trained) == settings(other, again)
    ours, theirs = one.state_dict(), other.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("scheme", ["sp", "mup", "completep"])
def test_a_scheme_without_density_has_nothing_to_follow(scheme: str) -> None:
    with pytest.raises(
        UserError, match=rf"parameterization.follow=density: {scheme} has no multiplier m_rho; use supa"
    ):
        Parameterization(scheme, base_width=16, base_layers=2, follow="density")
    with pytest.raises(UserError, match=r"parameterization.follow='rate' is not one of none, density"):
        Parameterization.supar(16, follow="rate")


def test_wrong_rules_and_wrong_optimizers_are_refused() -> None:
    model, _, optimizer = prepared(pruned(GMP, 0.9), P.supar(16))
    with pytest.raises(UserError, match=r"follow_density: the model was parameterized with follow=none; set"):
        follow_density(model, optimizer)
    model, _, _ = prepared(pruned(GMP, 0.9))
    with pytest.raises(UserError, match=r"follow_density: no group of the optimizer is for the layer 'blocks.0.attn"):
        follow_density(model, torch.optim.AdamW(model.parameters()))
