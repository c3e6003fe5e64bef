"""Averages of models under masks that move: the oracle is the average of the dense matrices."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel as TorchAveragedModel
from torch.optim.swa_utils import get_ema_multi_avg_fn

import sparsetrain as st

X = torch.randn(8, 24, generator=torch.Generator().manual_seed(5))


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(24, 48), nn.GELU(), nn.Linear(48, 24))


def train(model: nn.Module, manager: st.MaskManager, update: object, steps: int = 6) -> list[dict[str, Tensor]]:
    """Train and call ``update(model)`` after each step; return the dense parameters after each."""
    optimizer, seen = torch.optim.SGD(model.parameters(), lr=0.1), []
    for _ in range(steps):
        model(X).square().mean().backward()
        optimizer.step()
        manager.step(optimizer)
        optimizer.zero_grad()
        update(model)  # type: ignore[operator]
        seen.append({k: p.detach().clone() for k, p in st.densify(copy.deepcopy(model)).named_parameters()})
    return seen


@pytest.mark.parametrize("decay", [0.9, None])
@pytest.mark.parametrize(
    "rule", [st.Static(sparsity=0.8), st.SET(sparsity=0.8, every=1), st.GMP(sparsity=0.8, every=1, stop=4)]
)
def test_the_average_is_that_of_the_matrices(rule: st.Static, decay: float | None) -> None:
    """Exponential and equal averages under static, exchanged and pruned masks, through a state that is saved."""
    model = mlp()
    manager = st.MaskManager(model, rule, seed=0)
    average = st.AveragedModel(model, decay)
    seen = train(model, manager, average.update_parameters)
    right = seen[0]
    for count, now in enumerate(seen[1:], 2):
        share = 1 / count if decay is None else 1 - decay
        right = {k: (1 - share) * right[k] + share * now[k] for k in now}
    expected = torch.func.functional_call(mlp(), right, (X,))
    torch.testing.assert_close(average(X), expected, rtol=1e-4, atol=1e-6)
    if isinstance(rule, st.Static):
        assert average.module[0].pattern.equals(model[0].pattern)
    other = st.AveragedModel(st.sparsify(mlp(), 0.5, seed=3), decay)
    other.load_state_dict(average.state_dict())
    torch.testing.assert_close(other(X), expected, rtol=1e-4, atol=1e-6)
    assert int(other.n_averaged) == len(seen)


def test_a_bad_decay_or_another_model_is_refused() -> None:
    """In one line each."""
    with pytest.raises(st.UserError, match=r"decay=1.0 must lie in \[0, 1\)"):
        st.AveragedModel(mlp(), 1.0)
    with pytest.raises(st.UserError, match=r"parameter '0\.(values|weight)' is in the average or in"):
        st.AveragedModel(mlp()).update_parameters(st.sparsify(mlp(), 0.5))


def test_torchs_average_of_values_under_moving_masks_is_refused() -> None:
    """It averages values of different positions, and then takes over the indices of the last mask."""
    model = mlp()
    manager = st.MaskManager(model, st.SET(sparsity=0.8, every=1), seed=0)
    average = TorchAveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    train(model, manager, average.update_parameters)
    with pytest.raises(st.UserError, match=r"average with sparsetrain.AveragedModel, or load other masks"):
        average(X)


def test_an_average_of_parameters_alone_under_moving_masks_is_warned_of() -> None:
    """A loop over parameters() leaves the copy's masks where they were, under weights of other positions."""
    model = mlp()
    manager = st.MaskManager(model, st.SET(sparsity=0.8, every=1), seed=0)
    average, snapshot = copy.deepcopy(model), copy.deepcopy(model)

    def update(model: nn.Module) -> None:
        with torch.no_grad():
            for mean, new in zip(average.parameters(), model.parameters(), strict=True):
                mean.lerp_(new, 0.1)

    train(model, manager, update)
    with pytest.warns(UserWarning, match="average weights of different positions"):
        average(X)
    snapshot(X)  # a copy that was kept as it was
    trained = copy.deepcopy(snapshot)
    own = torch.optim.SGD(trained.parameters(), lr=0.1)
    for _ in range(2):  # a copy that goes its own way
        trained(X).square().mean().backward()
        own.step()
        own.zero_grad()
    average.load_state_dict(model.state_dict())
    torch.testing.assert_close(average(X), model(X))


def test_a_copy_of_a_model_whose_masks_stay_follows_what_is_written_into_it() -> None:
    """A target network, or a checkpoint that is read into the tensors of a copy's state: no average is suspected."""
    model, other = (st.sparsify(mlp(), 0.5, seed=seed) for seed in (0, 1))
    copied = copy.deepcopy(model)
    copied(X)
    with torch.no_grad():
        for target, source in zip(copied.state_dict().values(), other.state_dict().values(), strict=True):
            target.copy_(source)
    torch.testing.assert_close(copied(X), other(X), rtol=0, atol=0)


def test_a_copy_of_an_average_is_an_average() -> None:
    """It goes on on its own, without a word."""
    model = mlp()
    manager = st.MaskManager(model, st.SET(sparsity=0.8, every=1), seed=0)
    average = st.AveragedModel(model, 0.9)
    copied = copy.deepcopy(average)
    train(model, manager, lambda model: [one.update_parameters(model) for one in (average, copied)])
    torch.testing.assert_close(copied(X), average(X), rtol=0, atol=0)


def test_a_copy_of_a_whole_training_updates_its_masks_as_the_original_does() -> None:
    """Model, optimizer and manager copied together in the middle of a period of RigL."""
    model = mlp()
    manager = st.MaskManager(model, st.RigL(sparsity=0.8, every=2), seed=0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)

    def step(model: nn.Module, optimizer: torch.optim.Optimizer, manager: st.MaskManager) -> str:
        model(X).square().mean().backward()
        optimizer.step()
        manager.step(optimizer)
        optimizer.zero_grad()
        return manager.hash()

    hashes = [step(model, optimizer, manager) for _ in range(3)]
    copies = copy.deepcopy((model, optimizer, manager))
    assert step(*copies) == step(model, optimizer, manager) != hashes[-1]
    assert pickle.loads(pickle.dumps((model, manager)))[1].hash() == manager.hash()
