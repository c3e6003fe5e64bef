"""Optimizers as training code hands them over: wrapped, several, held back on some calls."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from regression import adamw, batch, loss_of, mlp
from torch import nn
from torch.optim import Optimizer

import sparsetrain as st
from sparsetrain.errors import UserError
from sparsetrain.sparsity import sparsify
from sparsetrain.sparsity.evolution import manager
from sparsetrain.sparsity.evolution.optimizers import _ELEMENTWISE, register_elementwise_optimizer

pytestmark = pytest.mark.filterwarnings("ignore:.* have no weight")


class Wrapper(Optimizer):
    """What launchers make of an optimizer: its state and groups by reference, and a step that may do nothing."""

    state = property(lambda self: self.inner.state)  # type: ignore[assignment]
    param_groups = property(lambda self: self.inner.param_groups)  # type: ignore[assignment]

    def __init__(self, inner: Optimizer) -> None:
        self.inner, self.waiting = inner, False

    def step(self, closure: Any = None) -> Any:
        return None if self.waiting else self.inner.step(closure)

    def zero_grad(self, set_to_none: bool = True) -> None:
        if not self.waiting:
            self.inner.zero_grad(set_to_none)


class Imitation:
    """No optimizer itself, but of a class that says so, as Lightning's wrapper is."""

    def __init__(self, inner: Optimizer) -> None:
        self._optimizer = inner
        self.__class__ = type("Imitation", (Imitation, type(inner)), {})

    def __getattr__(self, name: str) -> Any:
        return getattr(self._optimizer, name)

    def step(self, closure: Any = None) -> Any:
        return self._optimizer.step(closure)


def train(
    wrap: Callable[[Optimizer], Any], call: Callable[[Any], Callable[[], Any]] = lambda optimizer: optimizer.step
) -> tuple[nn.Module, st.MaskManager]:
    """Return what six steps of SET lead to; ``call`` makes what is called in place of ``optimizer.step``."""
    model = mlp()
    masks = st.MaskManager(model, st.SET(sparsity=0.8, every=2), seed=0)
    optimizer = wrap(adamw(model))
    step = call(optimizer)
    for index in range(6):
        loss_of(model, batch(index)).backward()
        step()
        masks.step(optimizer)
        optimizer.zero_grad()
    return model, masks


def assert_trained_alike(got: tuple[nn.Module, st.MaskManager], tolerance: float = 0.0) -> None:
    model, masks = train(lambda optimizer: optimizer)
    assert got[1].hash() == masks.hash()
    for ours, plain in zip(got[0].parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(ours, plain, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("wrap", [Wrapper, Imitation, lambda inner: Wrapper(Wrapper(inner))])
def test_a_wrapped_optimizer_trains_as_the_one_inside(wrap: Callable[[Optimizer], Any]) -> None:
    assert_trained_alike(train(wrap))


def test_accelerates_optimizer_counts_when_it_steps() -> None:
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=3)
    try:
        model = mlp()
        masks = st.MaskManager(model, st.SET(sparsity=0.8, every=1), seed=0)
        called, optimizer = accelerator.prepare(model, adamw(model))
        updates = []
        for index in range(6):
            with accelerator.accumulate(called):
                accelerator.backward(loss_of(called, batch(index)))
                optimizer.step()
                updates.append(masks.step(optimizer) is not None)
                optimizer.zero_grad()
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
    assert updates == [False, False, True] * 2


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_compiled_step_counts_as_an_eager_one() -> None:
    torch._dynamo.reset()
    compiled = train(lambda inner: inner, lambda inner: torch.compile(inner.step, backend="eager"))
    assert compiled[1].steps == 6
    assert_trained_alike(compiled, 1e-5)  # its step count is a float32 tensor


def test_a_compiled_step_of_an_optimizer_without_state_counts() -> None:
    torch._dynamo.reset()
    model = mlp()
    masks = st.MaskManager(model, st.SET(sparsity=0.8, every=1), seed=0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    masks.attach(optimizer)
    step = torch.compile(optimizer.step, backend="eager")
    for index in range(3):
        loss_of(model, batch(index)).backward()
        masks.step(optimizer)  # nothing yet
        step()
        masks.step(optimizer)
        optimizer.zero_grad()
    assert masks.steps == 3


@pytest.mark.parametrize("attached", [True, False])
def test_micro_batches_count_when_the_optimizer_steps(attached: bool) -> None:
    model = mlp()
    masks = st.MaskManager(model, st.SET(sparsity=0.8, every=1), seed=0)
    optimizer = adamw(model)
    if attached:
        masks.attach(optimizer)
    for micro in range(12):
        before, stepping = masks.hash(), micro % 4 == 3
        loss_of(model, batch(micro)).backward()
        if stepping:
            optimizer.step()
        update = masks.step(optimizer)
        assert (update is not None) == (masks.hash() != before) == stepping
        if stepping:
            optimizer.zero_grad()
    assert masks.steps == 3


def test_a_call_counts_one_step_however_many_were_taken() -> None:
    model = mlp()
    masks = st.MaskManager(model, st.SET(sparsity=0.8), seed=0)
    optimizer = adamw(model)
    for _ in range(3):
        optimizer.step()
        optimizer.step()
        masks.step(optimizer)
        masks.step(optimizer)
    assert masks.steps == 3


def test_steps_before_the_manager_was_built_do_not_count() -> None:
    model = mlp()
    sparsify(model, 0.8, seed=0)
    optimizer = adamw(model)
    loss_of(model, batch(0)).backward()
    optimizer.step()
    masks = st.MaskManager(model, st.SET(every=1), seed=0)
    assert masks.step(optimizer) is None
    optimizer.step()
    assert masks.step(optimizer) is not None


KINDS: dict[str, Callable[[nn.Module], Optimizer]] = {
    "AdamW": lambda model: torch.optim.AdamW(model.parameters(), lr=1e-2),
    "fused AdamW": lambda model: torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True),
    "fused SGD": lambda model: torch.optim.SGD(model.parameters(), lr=1e-2, fused=True),
}


@pytest.mark.parametrize("kind", list(KINDS))
@pytest.mark.parametrize("name", ["SET", "RigL", "staggered"])
def test_a_step_that_a_gradient_scaler_skips_changes_no_mask(name: str, kind: str) -> None:
    model = mlp(dtype=torch.float32)
    rule: st.sparsity.Rule = st.SET(sparsity=0.8, every=1)
    if name != "SET":
        staggered = name == "staggered"
        rule = st.RigL(sparsity=0.8, every=2 if staggered else 1, accumulation=name if staggered else "last")
    masks = st.MaskManager(model, rule, seed=0)
    optimizer = KINDS[kind](model)
    scaler, skipped = torch.amp.GradScaler("cpu", init_scale=2.0**127), 0
    for step in range(24):
        before, weights = masks.hash(), [parameter.clone() for parameter in model.parameters()]
        scaler.scale(loss_of(model, batch(step).float()) * 2.0**10).backward()
        scaler.step(optimizer)
        scaler.update()
        changed = not all(map(torch.equal, weights, model.parameters()))
        count = masks.steps
        update = masks.step(optimizer)
        assert masks.steps == count + changed
        assert (update is not None) == (masks.hash() != before) == (changed and bool(masks.due(masks.steps)))
        skipped += not changed
        optimizer.zero_grad()
    assert 0 < skipped < 20


def test_calls_that_never_follow_a_step_are_said_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(manager, "PATIENCE", 5)
    model = mlp()
    masks = st.MaskManager(model, st.SET(sparsity=0.8), seed=0)
    optimizer = adamw(model)
    for _ in range(4):
        masks.step(optimizer)
    with pytest.warns(UserWarning, match="was called 5 times since the optimizer's last step"):
        masks.step(optimizer)
    masks.step(optimizer)


# Which weights an optimizer holds.


def halves(model: nn.Module) -> tuple[Optimizer, Optimizer]:
    first, _, last = model  # type: ignore[misc]
    return torch.optim.AdamW(first.parameters(), lr=1e-2), torch.optim.SGD(last.parameters(), lr=1e-2, momentum=0.9)


def test_layers_of_two_optimizers_are_followed_when_both_are_given() -> None:
    model = mlp()
    masks = st.MaskManager(model, st.SET(sparsity=0.8, every=1), seed=0)
    one, other = halves(model)
    for step in range(3):
        loss_of(model, batch(step)).backward()
        one.step()
        with pytest.raises(UserError, match=r"does not hold 2\.values.*several optimizers hold the layers, give all"):
            masks.step(one)
        other.step()
        update = masks.step(one, other)
        assert update is not None
        assert update.layers == ("0", "2")
        for layer, optimizer, key in (("0", one, "exp_avg"), ("2", other, "momentum_buffer")):
            values = masks.layers[layer].values
            assert optimizer.state[values][key].shape == values.shape
    one.step()
    assert masks.step(one, other) is None  # a scaler may hold one of the two back
    assert masks.steps == 3


def test_a_wrapper_around_two_optimizers_says_what_to_give() -> None:
    model = mlp()
    masks = st.MaskManager(model, st.SET(sparsity=0.8), seed=0)
    both = Wrapper(halves(model)[0])
    both.other = halves(model)[1]  # type: ignore[attr-defined]
    with pytest.raises(UserError, match=r"wraps several optimizers.*step\(optimizer\.inner, optimizer\.other\)"):
        masks.attach(both)


def test_a_wrapper_with_a_state_of_its_own_is_refused() -> None:
    class Slow(Optimizer):
        """Keeps a copy of each weight beside the state of the optimizer inside, as Lookahead does."""

        def __init__(self, inner: Optimizer) -> None:
            super().__init__(inner.param_groups, {})
            self.base_optimizer = inner

        def step(self, closure: Any = None) -> Any:
            for group in self.param_groups:
                for parameter in group["params"]:
                    self.state[parameter]["slow"] = parameter.detach().clone()
            return self.base_optimizer.step(closure)

    with pytest.raises(
        UserError, match=r"keeps a state of its own \(slow\).*give the inner optimizer .optimizer\.base_opt"
    ):
        train(Slow)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_an_optimizer_whose_state_lies_on_other_ranks_is_refused_even_if_it_is_registered(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    from torch.distributed.optim import ZeroRedundancyOptimizer

    monkeypatch.setattr("sparsetrain.sparsity.evolution.optimizers._ELEMENTWISE", set(_ELEMENTWISE))
    register_elementwise_optimizer(ZeroRedundancyOptimizer)
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        with pytest.raises(UserError, match="ZeroRedundancyOptimizer keeps the state of each weight on one rank only"):
            train(lambda inner: ZeroRedundancyOptimizer(inner.param_groups[0]["params"], torch.optim.AdamW, lr=1e-2))
    finally:
        torch.distributed.destroy_process_group()


def test_what_is_no_optimizer_is_named() -> None:
    masks = st.MaskManager(mlp(), st.SET(sparsity=0.8), seed=0)
    with pytest.raises(UserError, match=r"LambdaLR is not a torch\.optim\.Optimizer"):
        masks.step(torch.optim.lr_scheduler.LambdaLR(adamw(mlp()), lambda step: 1.0))  # type: ignore[arg-type]


# Layers that are frozen.


@pytest.mark.parametrize(
    "rule",
    [
        st.SET(sparsity=0.8, every=1),
        st.RigL(sparsity=0.8, every=1),
        st.GMP(sparsity=0.8, every=1, stop=9),
        st.VariableSparsity(sparsity=0.8, phases=((2, 0.5),)),
    ],
    ids=lambda rule: rule.name,
)
@pytest.mark.parametrize("everything", [True, False])
def test_a_frozen_layer_keeps_its_matrix_and_changes_again_when_it_trains(
    rule: st.sparsity.Rule, everything: bool
) -> None:
    model = mlp()
    masks = st.MaskManager(model, rule, seed=0)
    model[2].requires_grad_(False)
    before = model[2].dense_weight().detach().clone()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if everything or p.requires_grad], lr=1e-2)
    moved = []
    for step in range(5):
        if step == 3:
            assert torch.equal(model[2].dense_weight(), before)
            model[2].requires_grad_(True)
            if not everything:
                optimizer.add_param_group({"params": list(model[2].parameters())})
        loss_of(model, batch(step)).backward()
        optimizer.step()
        update = masks.step(optimizer)
        moved.append(() if update is None else update.layers)
        optimizer.zero_grad()
    assert [("2" in layers) for layers in moved[:3]] == [False] * 3
    assert any("0" in layers for layers in moved)
    assert rule.name == "VariableSparsity" or "2" in moved[-1]


def test_a_layer_that_trains_again_but_is_in_no_optimizer_is_named() -> None:
    model = mlp()
    masks = st.MaskManager(model, st.SET(sparsity=0.8, every=2), seed=0)
    model[0].requires_grad_(False)
    optimizer = torch.optim.AdamW(model[2].parameters(), lr=1e-2)
    optimizer.step()
    masks.step(optimizer)
    model[0].requires_grad_(True)
    optimizer.step()
    with pytest.raises(
        UserError, match=r"does not hold 0\.values.*freeze a layer that is not trained by requires_grad_\(False\)"
    ):
        masks.step(optimizer)
