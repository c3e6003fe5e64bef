"""`MaskManager` against a dense twin: what drops, what grows and what stays."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from regression import WIDTH, adamw, batch, dense_gradients, loss_of, mlp
from torch import Tensor, nn

import sparsetrain as st
from sparsetrain.sparsity import Rule, sparse_layers, sparsify

# At 80 % some outputs of these tiny layers have no weight.
pytestmark = pytest.mark.filterwarnings("ignore:.* have no weight")


def step_of_nothing(model: nn.Module, manager: st.MaskManager) -> None:
    """Do an optimizer's step that changes no weight, and count it."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    optimizer.step()
    manager.step(optimizer)


RULES: dict[str, Callable[[], Rule]] = {
    "Static": lambda: st.Static(sparsity=0.8),
    "SET": lambda: st.SET(sparsity=0.8, every=2),
    "RigL": lambda: st.RigL(sparsity=0.8, every=2),
    "RigL staggered": lambda: st.RigL(sparsity=0.8, every=3, accumulation="staggered"),
    "RigL scaled": lambda: st.RigL(sparsity=0.8, every=2, grown_scale=0.1, protect_rows=True),
    "GMP": lambda: st.GMP(sparsity=0.8, every=2, start=1, stop=7),
    "VariableSparsity": lambda: st.VariableSparsity(sparsity=0.8, phases=((3, 0.4), (6, 0.0))),
    "VariableSparsity by gradient": lambda: st.VariableSparsity(sparsity=0.8, phases=((3, 0.4),), grow="gradient"),
}


@pytest.mark.parametrize("name", list(RULES))
def test_every_step_has_the_exact_number_of_weights_and_the_same_parameters(name: str) -> None:
    model = mlp()
    manager = st.MaskManager(model, RULES[name](), seed=0)
    parameters = list(model.parameters())
    optimizer = adamw(model)
    for step in range(1, 10):
        loss_of(model, batch(step)).backward()
        optimizer.step()
        update = manager.step(optimizer)
        assert (update is not None) == bool(manager.due(step)) or name == "GMP"
        assert {layer.name: layer.nnz for layer in manager.report()} == manager.nnz_at(step)
        for report in manager.report():
            assert report.density == report.target_density
        for layer in manager.layers.values():
            for state in (layer.values.grad, *optimizer.state[layer.values].values()):
                assert state.shape in ((layer.pattern.nnz,), ())
        optimizer.zero_grad()
    assert all(one is other for one, other in zip(parameters, model.parameters(), strict=True))
    if name == "GMP":
        assert manager.nnz_at(7) == {"0": round(0.2 * 16 * 24), "2": round(0.2 * 16 * 24)}


def test_set_drops_the_smallest_and_grows_elsewhere_with_zeros() -> None:
    model = mlp()
    manager = st.MaskManager(model, st.SET(sparsity=0.8, every=3, drop_fraction=0.4), seed=0)
    optimizer = adamw(model)
    for step in (1, 2, 3):
        loss_of(model, batch(step)).backward()
        optimizer.step()
        before = {name: (layer.pattern, layer.values.detach().clone()) for name, layer in manager.layers.items()}
        moments = {
            name: {key: value.clone() for key, value in optimizer.state[layer.values].items()}
            for name, layer in manager.layers.items()
        }
        update = manager.step(optimizer)
    assert update is not None
    for name, layer in manager.layers.items():
        old, values = before[name]
        k = int(0.4 * old.nnz)
        order = sorted(range(old.nnz), key=lambda index: (abs(float(values[index])), index))
        dropped = {int(old.positions()[index]) for index in order[:k]}
        was, now = set(old.positions().tolist()), set(layer.pattern.positions().tolist())
        assert was - now == dropped
        grown = layer.pattern.gather(~old.mask())
        assert int(grown.sum()) == k
        assert not bool(layer.values[grown].any())
        dense = old.scatter(values)
        assert torch.equal(layer.values[~grown], layer.pattern.gather(dense)[~grown])
        for key, moment in moments[name].items():
            if moment.shape == values.shape:
                assert torch.equal(optimizer.state[layer.values][key], layer.pattern.gather(old.scatter(moment)))
            else:
                assert torch.equal(optimizer.state[layer.values][key], moment)
    assert (update.dropped, update.grown, update.resized) == (60, 60, False)


def test_growth_of_set_is_uniform_over_empty_positions() -> None:
    counts = torch.zeros(24, 16)
    empty = torch.zeros(24, 16)
    for seed in range(300):
        model = mlp()
        manager = st.MaskManager(model, st.SET(sparsity=0.5, every=1, drop_fraction=0.3), seed=seed, include=["0"])
        old = manager.layers["0"].pattern.mask()
        step_of_nothing(model, manager)
        counts += manager.layers["0"].pattern.mask() & ~old
        empty += ~old
    # Of 192 empty positions 57 grow.
    assert float((counts / empty).mean()) == pytest.approx(57 / 192, rel=0.02)
    assert float((counts / empty).std()) < 0.06


@pytest.mark.parametrize("micro_batches", [1, 3])
@pytest.mark.parametrize("accumulation", ["last", "staggered"])
def test_rigl_grows_the_largest_gradients_of_the_densified_twin(micro_batches: int, accumulation: str) -> None:
    model = mlp()
    rule = st.RigL(sparsity=0.8, every=2, drop_fraction=0.4, accumulation=accumulation)
    manager = st.MaskManager(model, rule, seed=0)
    optimizer = adamw(model)
    seen = set()
    for step in range(1, 6):
        batches = [batch(10 * step + index) for index in range(micro_batches)]
        ranked = dense_gradients(model, batches if accumulation == "staggered" else batches[-1:])
        before = {name: layer.pattern for name, layer in manager.layers.items()}
        for x in batches:
            loss_of(model, x).backward()
        optimizer.step()
        update = manager.step(optimizer)
        optimizer.zero_grad()
        for name in update.layers if update is not None else ():
            seen.add((name, step))
            old, layer = before[name], manager.layers[name]
            k = int(0.4 * old.nnz)
            scores = ranked[name].abs().masked_fill(old.mask(), -1.0).view(-1)
            grown = (layer.pattern.mask() & ~old.mask()).view(-1)
            assert set(scores.topk(k).indices.tolist()) == set(grown.nonzero()[:, 0].tolist())
    staggered = {("0", 2), ("2", 3), ("0", 4), ("2", 5)}
    assert seen == (staggered if accumulation == "staggered" else {(name, step) for name in "02" for step in (2, 4)})


def test_rigl_under_hooks_autocast_and_repeated_layers_matches_the_twin() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(WIDTH, WIDTH, dtype=torch.float64)

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(torch.tanh(self.inner(x.view(3, 4, WIDTH)))).view(12, WIDTH)

    torch.manual_seed(0)
    model = Twice()
    model.inner.register_forward_hook(lambda _module, _inputs, output: output * 3.0)
    model.inner.register_forward_pre_hook(lambda _module, inputs: (inputs[0] * 0.5,))
    manager = st.MaskManager(model, st.RigL(sparsity=0.7, every=1), seed=0)
    old = manager.layers["inner"].pattern
    ranked = dense_gradients(model, [batch(0)])["inner"].abs().masked_fill(old.mask(), -1.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    loss_of(model, batch(0)).backward()
    optimizer.step()
    manager.step(optimizer)
    grown = manager.layers["inner"].pattern.mask() & ~old.mask()
    k = int(0.3 * old.nnz)
    assert set(ranked.view(-1).topk(k).indices.tolist()) == set(grown.view(-1).nonzero()[:, 0].tolist())


def test_rigl_makes_dense_gradients_at_update_steps_only_and_one_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    from sparsetrain.sparsity.layers.dense_gradient import DenseGradientRequest

    made: list[tuple[int, int]] = []
    references: list[weakref.ref[Tensor]] = []
    close = DenseGradientRequest._close

    def counting(self: DenseGradientRequest[Any]) -> None:
        held = sum(request._dense is not None for request in manager._growth._requests.values())
        assert all(reference() is None for reference in references)  # those of other layers are gone, not only hidden
        references.append(weakref.ref(self._dense))
        made.append((manager.steps, held))
        close(self)
        assert self._dense is None

    monkeypatch.setattr(DenseGradientRequest, "_close", counting)
    model = mlp()
    manager = st.MaskManager(model, st.RigL(sparsity=0.8, every=3), seed=0)
    optimizer = adamw(model)
    for step in range(1, 8):
        with torch.no_grad():
            loss_of(model, batch(0))  # an evaluation on the way asks for no gradient
        loss_of(model, batch(step)).backward()
        optimizer.step()
        manager.step(optimizer)
        optimizer.zero_grad()
    # During steps 3 and 6 (after two and five done), for two layers, never with another one's dense gradient alive.
    assert made == [(2, 1), (2, 1), (5, 1), (5, 1)]
    assert [layer.pattern.request for layer in manager.layers.values()] == [None, None]


def test_grown_weights_can_start_against_their_gradient() -> None:
    model = mlp()
    manager = st.MaskManager(model, st.RigL(sparsity=0.8, every=1, grown_scale=0.25), seed=0)
    ranked = dense_gradients(model, [batch(0)])
    old = {name: layer.pattern for name, layer in manager.layers.items()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    loss_of(model, batch(0)).backward()
    optimizer.step()
    manager.step(optimizer)
    for name, layer in manager.layers.items():
        new = layer.pattern.gather(~old[name].mask())
        gradient = layer.pattern.gather(ranked[name])[new]
        kept = layer.values[~new]
        expected = -0.25 * kept.square().mean().sqrt() * gradient / gradient.square().mean().sqrt()
        torch.testing.assert_close(layer.values[new].detach(), expected.detach())


def test_a_layer_without_part_in_the_step_keeps_its_mask() -> None:
    model = mlp()
    unused = nn.ModuleDict({"used": model, "unused": nn.Linear(8, 8, dtype=torch.float64)})
    manager = st.MaskManager(unused, st.RigL(sparsity=0.5, every=1), seed=0)
    before = {name: layer.pattern for name, layer in manager.layers.items()}
    optimizer = adamw(unused)

    def update(step: int) -> tuple[str, ...] | None:
        loss_of(model, batch(step)).backward()
        optimizer.step()
        changed = manager.step(optimizer)
        return changed and changed.layers

    with pytest.warns(UserWarning, match="RigL: layer 'unused' had no gradient at step 1"):
        assert update(0) == ("used.0", "used.2")
    assert update(1) == ("used.0", "used.2")  # and it is not said again
    assert manager.layers["unused"].pattern is before["unused"]


def test_blocks_move_as_wholes_and_heads_keep_their_shares() -> None:
    model = mlp()
    plan = st.SparsityConfig(sparsity=0.5, pattern="block", block=[4, 2], bands=[2, 1])
    manager = st.MaskManager(model, st.RigL(every=1, drop_fraction=0.3), plan=plan, seed=0)
    optimizer = adamw(model)
    for step in range(4):
        old = {name: layer.pattern for name, layer in manager.layers.items()}
        ranked = dense_gradients(model, [batch(step)])
        loss_of(model, batch(step)).backward()
        optimizer.step()
        assert manager.step(optimizer) is not None
        optimizer.zero_grad()
        for name, layer in manager.layers.items():
            assert layer.pattern.block == (4, 2)
            mask = layer.pattern.mask()
            half = mask.shape[0] // 2
            assert int(mask[:half].sum()) == int(mask[half:].sum()) == mask.numel() // 4
            scores = torch.nn.functional.avg_pool2d(ranked[name].abs()[None], (4, 2))[0].chunk(2)
            for band, (now, was) in enumerate(zip(mask.chunk(2), old[name].mask().chunk(2), strict=True)):
                new = (now & ~was)[::4, ::2]
                k = int(new.sum())
                assert k == int(0.3 * (was.sum() // 8))
                best = scores[band].masked_fill(was[::4, ::2], -1.0).view(-1).topk(k).indices
                assert set(best.tolist()) == set(new.reshape(-1).nonzero()[:, 0].tolist())


def test_gmp_keeps_the_largest_magnitudes_of_the_dense_model() -> None:
    model = mlp()
    weights = {name: module.weight.detach().clone() for name, module in model.named_children() if name != "1"}
    manager = st.MaskManager(model, st.GMP(sparsity=0.75, every=1, stop=1), seed=0)
    assert all(layer.pattern.density == 1.0 for layer in manager.layers.values())
    step_of_nothing(model, manager)
    for name, layer in manager.layers.items():
        top = weights[name].abs().view(-1).topk(96).indices
        assert set(top.tolist()) == set(layer.pattern.positions().tolist())


def test_erk_and_groups_keep_their_own_targets_under_gmp() -> None:
    plan = st.SparsityConfig(sparsity=0.8, groups=[st.SparsityGroup("2", 0.5)])
    model = mlp()
    manager = st.MaskManager(model, st.GMP(every=1, stop=4, curve="linear"), plan=plan, seed=0)
    for _ in range(4):
        step_of_nothing(model, manager)
    assert {name: layer.pattern.nnz for name, layer in manager.layers.items()} == {"0": 77, "2": 192}


def test_protected_rows_stay_alive() -> None:
    for protect, dead in ((False, True), (True, False)):
        model = mlp()
        with torch.no_grad():
            model[0].weight[0] *= 1e-6
        manager = st.MaskManager(model, st.GMP(sparsity=0.8, every=1, stop=1, protect_rows=protect), seed=0)
        step_of_nothing(model, manager)
        assert (manager.report()[0].dead_rows > 0) == dead


def test_it_is_a_function_of_the_seed() -> None:
    def masks(seed: int) -> str:
        model = mlp()
        manager = st.MaskManager(model, st.SET(sparsity=0.8, every=1), seed=seed)
        optimizer = adamw(model)
        for step in range(3):
            loss_of(model, batch(step)).backward()
            optimizer.step()
            manager.step(optimizer)
            optimizer.zero_grad()
        return manager.hash()

    assert masks(0) == masks(0) != masks(1)


def test_masks_are_those_of_sparsify() -> None:
    model, other = mlp(), mlp()
    manager = st.MaskManager(model, st.SET(sparsity=0.8), seed=3)
    sparsify(other, 0.8, seed=3)
    for name, layer in sparse_layers(other):
        assert manager.layers[name].pattern.equals(layer.pattern)
