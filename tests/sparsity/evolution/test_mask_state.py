"""What a manager saves and loads, as other torch objects do, and what it says of masks that it has not drawn."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from regression import adamw, batch, loss_of, mlp
from torch import Tensor, nn

import sparsetrain as st
from sparsetrain.errors import UserError

pytestmark = pytest.mark.filterwarnings(
    "ignore:.* have no weight", "ignore:.torch.jit:DeprecationWarning", "ignore:torch.distributed is disabled"
)

RULE = st.RigL(sparsity=0.8, every=2)


class Run:
    """A training that can be cut: a model, what manages its masks, and an optimizer."""

    def __init__(self, rule: st.sparsity.Rule = RULE, seed: int = 0, compiled: bool = False) -> None:
        self.model = mlp()
        self.manager = st.MaskManager(torch.compile(self.model) if compiled else self.model, rule, seed=seed)
        self.optimizer = adamw(self.model)

    def train(self, start: int, stop: int) -> Run:
        for step in range(start, stop):
            loss_of(self.model, batch(step)).backward()
            self.optimizer.step()
            self.manager.step(self.optimizer)
            self.optimizer.zero_grad()
        return self

    def state(self) -> dict[str, Any]:
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "manager": self.manager.state_dict(),
        }

    def load(self, state: dict[str, Any]) -> Run:
        for name in ("model", "optimizer", "manager"):
            getattr(self, name).load_state_dict(state[name])
        return self


def assert_same(one: Run, other: Run) -> None:
    assert one.manager.hash() == other.manager.hash()
    assert one.manager.report() == other.manager.report()
    assert all(map(torch.equal, one.model.parameters(), other.model.parameters()))


def through_a_file(state: Any, folder: Path) -> Any:
    torch.save(state, folder / "state.pt")
    return torch.load(folder / "state.pt", weights_only=True)


@pytest.mark.parametrize(("step", "compiled"), [(0, False), (3, True), (4, False)])
def test_a_training_cut_in_two_is_the_whole_one(step: int, compiled: bool, tmp_path: Path) -> None:
    whole = Run().train(0, 9)
    cut = Run(compiled=compiled).train(0, step)
    state = through_a_file(cut.state(), tmp_path)
    resumed = Run(seed=7, compiled=not compiled).load(state)
    assert resumed.manager.steps == step
    assert_same(resumed.train(step, 9), whole)


def test_a_distributed_checkpoint_holds_it(tmp_path: Path) -> None:
    saved = Run().train(0, 3)
    entries = {"model": saved.model.state_dict(), "manager": saved.manager.state_dict()}
    dcp.save(entries, checkpoint_id=tmp_path, no_dist=True)
    fresh = Run(seed=7)
    into = {"model": fresh.model.state_dict(), "manager": fresh.manager.state_dict()}
    dcp.load(into, checkpoint_id=tmp_path, no_dist=True)
    assert fresh.manager.watch()["mask_overlap"] == 1.0  # what was loaded into were copies
    fresh.model.load_state_dict(into["model"])
    fresh.manager.load_state_dict(into["manager"])
    assert fresh.manager.hash() == saved.manager.hash()
    assert fresh.manager.state()[0] == saved.manager.state()[0]
    assert fresh.manager.report() == saved.manager.report()


def test_a_state_does_not_change_when_the_training_goes_on() -> None:
    run = Run().train(0, 3)
    state = run.manager.state_dict()
    before = copy.deepcopy(state)
    run.train(3, 7)
    assert state["history"]["0"].keys() == {"first", "ever"}
    for name, bits in state["history"].items():
        assert all(torch.equal(tensor, before["history"][name][key]) for key, tensor in bits.items())
    assert run.manager.state_dict()["steps"] == 7


def broken(change: Callable[[dict[str, Any]], object]) -> dict[str, Any]:
    state = Run().train(0, 3).manager.state_dict()
    change(state)
    return state


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("history"), "has no history, so state_dict"),
        (lambda state: state.update(history={"0": 3}), "has no history"),
        (lambda state: state["history"].pop("2"), "has other layers: '2': the state has no such layer"),
        (lambda state: state["history"].update({"4": {}}), "'4': the model has no such managed layer"),
        (lambda state: state["history"]["0"].pop("ever"), "has no 'ever' of 48 bytes"),
        (lambda state: state["history"]["0"].update(first=torch.zeros(3)), "has no 'first' of 48 bytes"),
        (lambda state: state.pop("hash"), "has no 'hash'"),
        (lambda state: state.update(rule="SET"), "saved under SET and cannot go on under RigL"),
        (lambda state: state.update(steps="many"), "steps='many' and seed=0: integers are needed"),
        (lambda state: state.update(hash="00"), "differ from the masks of the manager's state"),
    ],
)
def test_a_state_that_does_not_fit_changes_nothing(change: Callable[[dict[str, Any]], object], message: str) -> None:
    state, run = broken(change), Run().train(0, 3)
    report, steps = run.manager.report(), run.manager.steps
    with pytest.raises(UserError, match=message) as caught:
        run.manager.load_state_dict(state)
    assert "\n" not in str(caught.value)
    assert (run.manager.report(), run.manager.steps) == (report, steps)


@pytest.mark.parametrize("rule", [st.SET(sparsity=0.8), st.GMP(sparsity=0.8, stop=9)], ids=lambda rule: rule.name)
def test_restored_masks_without_their_managers_state_are_noticed_at_the_first_step(rule: st.sparsity.Rule) -> None:
    run, other = Run(rule), mlp()
    st.sparsify(other, 0.8, seed=1)
    run.model.load_state_dict(other.state_dict())
    with pytest.warns(UserWarning, match=rf"{rule.name} begins at step 0 with other masks.*load the manager's state"):
        run.train(0, 1)
    run.train(1, 2)  # said once


def test_masks_that_were_restored_whole_or_are_the_drawn_ones_are_not_spoken_of() -> None:
    saved = Run().train(0, 3)
    Run(seed=5).load(saved.state()).train(3, 4)
    same = Run()
    same.model.load_state_dict(Run().model.state_dict())
    same.train(0, 1)
    late = mlp()
    st.sparsify(late, 0.8, seed=3)
    late.load_state_dict(saved.model.state_dict())
    masks = st.MaskManager(late, RULE, seed=0)
    optimizer = adamw(late)
    loss_of(late, batch(0)).backward()
    optimizer.step()
    masks.step(optimizer)


def test_the_older_form_of_the_state_is_the_same_state() -> None:
    saved = Run().train(0, 5)
    document, tensors = saved.manager.state()
    assert all(isinstance(value, str | int) for value in document.values())
    assert all(isinstance(tensor, Tensor) and tensor.dtype == torch.uint8 for tensor in tensors.values())
    one, other = Run(seed=1), Run(seed=2)
    for run in (one, other):
        run.model.load_state_dict(saved.model.state_dict())
    one.manager.load_state(document, tensors)
    other.manager.load_state_dict(saved.manager.state_dict())
    assert one.manager.report() == other.manager.report() == saved.manager.report()
    assert one.manager.seed == other.manager.seed == 0


def test_names_do_not_depend_on_a_wrapper() -> None:
    wrapped = nn.ModuleDict({"body": torch.compile(mlp())})
    plain = nn.ModuleDict({"body": mlp()})
    names = [list(st.MaskManager(model, RULE, seed=0).state_dict()["history"]) for model in (wrapped, plain)]
    assert names == [["body.0", "body.2"]] * 2
