"""`MaskManager` watched and asked: its report, what it refuses, what it adopts and whom it calls."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from regression import adamw, batch, loss_of, mlp
from torch import nn

import sparsetrain as st
from sparsetrain import seeds
from sparsetrain.errors import UserError
from sparsetrain.sparsity import sparse_layers, sparsify
from sparsetrain.sparsity.patterns.draw import balanced_pattern

# At 80 % some outputs of these tiny layers have no weight.
pytestmark = pytest.mark.filterwarnings("ignore:.* have no weight")


# Watching.


def test_exploration_matches_a_brute_force_count() -> None:
    model = mlp()
    manager = st.MaskManager(model, st.SET(sparsity=0.8, every=1, drop_fraction=0.4), seed=0)
    optimizer = adamw(model)
    masks = {name: [layer.pattern.mask()] for name, layer in manager.layers.items()}
    flow = None
    for step in range(6):
        loss_of(model, batch(step)).backward()
        optimizer.step()
        flow = sum(float(layer.values.grad.square().sum()) for layer in manager.layers.values())
        if step == 0:
            assert manager.watch()["gradient_flow"] == pytest.approx(flow)
        manager.step(optimizer)
        optimizer.zero_grad()
        for name, layer in manager.layers.items():
            masks[name].append(layer.pattern.mask())
    for report in manager.report():
        history = torch.stack(masks[report.name])
        assert report.itop_rate == pytest.approx(float(history.any(0).double().mean()))
        assert report.overlap == pytest.approx(float((history[0] & history[-1]).sum() / history[0].sum()))
    watched = manager.watch()
    everything = torch.cat([torch.stack(list_).flatten(1) for list_ in masks.values()], 1)
    assert watched["itop_rate"] == pytest.approx(float(everything.any(0).double().mean()))
    assert watched["density"] == watched["target_density"] == pytest.approx(float(everything[-1].double().mean()))
    assert "gradient_flow" not in watched


# Refusals.


def adopted(model: nn.Module, sparsity: float = 0.8) -> nn.Module:
    return sparsify(model, sparsity, seed=0)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: st.MaskManager(adopted(mlp(), 0.5), st.RigL(sparsity=0.9)),
            r"layer '0' is already sparse, with density 0.5 \(192 weights\), where RigL begins with 0.09895.* \(38\)",
        ),
        (lambda: st.MaskManager(adopted(mlp()), st.GMP(sparsity=0.8, stop=5)), r"where GMP begins with 1 \(384\)"),
        (
            lambda: st.MaskManager(adopted(mlp()), st.GMP(stop=5)),
            r"GMP changes densities; give it a sparsity, or plan=SparsityConfig\(\.\.\.\)",
        ),
        (lambda: st.MaskManager(mlp(), st.RigL()), "no layer is sparse; give the rule a sparsity above 0"),
        (lambda: st.MaskManager(mlp(), st.RigL(sparsity=0.0)), "RigL: sparsity=0.0 makes no layer sparse"),
        (lambda: st.MaskManager(mlp(), st.SET(sparsity=0.8), include=["*attn*"]), r"'\*attn\*' matches no linear"),
        (lambda: st.MaskManager(mlp(), st.SET(sparsity=0.75), pattern="nm"), "pattern='nm' would not outlast"),
        (lambda: st.MaskManager(mlp(), st.SET(sparsity=0.8, stop=50), total_steps=40), "after the end of training"),
        (
            lambda: st.MaskManager(mlp(), st.SET(sparsity=0.8), plan=st.SparsityConfig(sparsity=0.5)),
            "plan.sparsity=0.5",
        ),
        (
            lambda: st.MaskManager(mlp(), st.SET(), plan=st.SparsityConfig(sparsity=0.5), include=["*"]),
            "with plan=, give include",
        ),
        (
            lambda: st.MaskManager(
                mlp(), st.SET(), plan=st.SparsityConfig(sparsity=0.5, pattern="block", block=[5, 4])
            ),
            "block 5x4 does not divide it, and SET moves whole blocks",
        ),
        (
            lambda: st.MaskManager(mlp(), st.RigL(sparsity=0.8, every=1, accumulation="staggered")),
            "every=1 with accumulation=staggered must be at least the number of layers, 2",
        ),
    ],
)
def test_what_cannot_be_meant_is_one_line_before_the_first_step(make: Callable[[], object], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        make()
    assert "\n" not in str(caught.value)


def test_a_refusal_leaves_the_model_as_it_was() -> None:
    model = mlp()
    layers = list(model)
    with pytest.raises(UserError, match="staggered"):
        st.MaskManager(model, st.RigL(sparsity=0.8, every=1, accumulation="staggered"))
    with pytest.raises(UserError, match=r"bands=\[5, 1\] do not divide"):
        st.MaskManager(model, st.GMP(every=1, stop=2), plan=st.SparsityConfig(sparsity=0.5, bands=[5, 1]))
    assert list(model) == layers


def test_sparse_layers_are_adopted_where_densities_match() -> None:
    model = adopted(mlp())
    before = dict(sparse_layers(model))
    manager = st.MaskManager(model, st.RigL(sparsity=0.8), seed=0)
    assert manager.layers == before
    own = st.MaskManager(adopted(mlp(), 0.37), st.SET(every=1), seed=0)
    assert {layer.density for layer in own.report()} == {layer.target_density for layer in own.report()}


def test_optimizers_are_checked_before_the_first_update() -> None:
    model = mlp()
    early = adamw(model)
    manager = st.MaskManager(model, st.SET(sparsity=0.8), seed=0)
    with pytest.raises(UserError, match=r"the optimizer does not hold 0\.values"):
        manager.step(early)
    with pytest.raises(UserError, match="LBFGS is not known"):
        manager.attach(torch.optim.LBFGS(model.parameters()))
    assert manager.steps == 0


@pytest.mark.parametrize("where", ["weights", "gradient"])
def test_numbers_that_are_not_finite_are_named(where: str) -> None:
    model = mlp()
    manager = st.MaskManager(model, st.RigL(sparsity=0.8, every=1), seed=0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    if where == "gradient":
        (loss_of(model, batch(0)) * torch.inf).backward()  # not refused here: whether the step counts is not known yet
        optimizer.step()
        with pytest.raises(UserError, match="RigL: the gradient of layer '0' is not finite at step 1"):
            manager.step(optimizer)
        return
    loss_of(model, batch(0)).backward()
    optimizer.step()
    with torch.no_grad():
        manager.layers["0"].values[0] = torch.nan
    with pytest.raises(UserError, match="the weights of layer '0' are not finite at step 1"):
        manager.step(optimizer)


def test_on_resize_is_called_when_sizes_change_and_only_then() -> None:
    calls: list[int] = []
    model = mlp()
    rule = st.GMP(sparsity=0.8, every=2, stop=4)
    manager = st.MaskManager(model, rule, seed=0, on_resize=lambda: calls.append(manager.steps))
    optimizer = adamw(model)
    for step in range(6):
        loss_of(model, batch(step)).backward()
        optimizer.step()
        manager.step(optimizer)
        optimizer.zero_grad()
    assert calls == [2, 4]


def test_a_static_manager_leaves_everything_alone() -> None:
    model = mlp()
    sparsify(model, plan=st.SparsityConfig(sparsity=0.5, pattern="balanced"), seed=0)
    manager = st.MaskManager(model, st.Static(), plan=st.SparsityConfig(sparsity=0.5, pattern="balanced"), seed=0)
    pattern = manager.layers["0"].pattern
    assert manager.step(torch.optim.LBFGS(model.parameters())) is None
    assert manager.layers["0"].pattern is pattern
    assert balanced_pattern((24, 16), 0.5, seeds.generator(0, "mask", "0")).equals(pattern)
    assert F.mse_loss(model(batch(0)), model(batch(0))) == 0.0
