"""Optimizer state by parameter name, against torch's own state dicts and uninterrupted training."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sparsetrain.errors import UserError
from sparsetrain.runs.optimizer_state import OptimizerTensors, optimizer_tensors, restore_optimizer

Build = Callable[[Iterable[Any]], torch.optim.Optimizer]

OPTIMIZERS: dict[str, Build] = {
    "adamw": lambda groups: torch.optim.AdamW(groups, betas=(0.9, 0.95)),
    "adamw_fused": lambda groups: torch.optim.AdamW(groups, fused=True),
    "adamw_foreach": lambda groups: torch.optim.AdamW(groups, foreach=True),
    "adamw_amsgrad": lambda groups: torch.optim.AdamW(groups, amsgrad=True),
    "adamw_tensor_lr": lambda groups: torch.optim.AdamW(groups, lr=torch.tensor(2e-3)),
    "nadam": torch.optim.NAdam,
    "adamax": torch.optim.Adamax,
    "adagrad": torch.optim.Adagrad,
    "rmsprop": lambda groups: torch.optim.RMSprop(groups, momentum=0.9, centered=True),
    "rprop": torch.optim.Rprop,
    "asgd": torch.optim.ASGD,
    "sgd": lambda groups: torch.optim.SGD(groups, lr=0.01),
    "sgd_momentum": lambda groups: torch.optim.SGD(groups, lr=0.01, momentum=0.9, nesterov=True),
    "adafactor": torch.optim.Adafactor,
}


def make_model() -> nn.Sequential:
    return nn.Sequential(nn.Linear(5, 7), nn.LayerNorm(7), nn.Linear(7, 3, bias=False))


def make_groups(model: nn.Module, reverse: bool = False) -> list[dict[str, Any]]:
    matrices = [p for p in model.parameters() if p.ndim == 2]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    if reverse:
        return [{"params": vectors[::-1], "weight_decay": 0.5}, {"params": matrices[::-1]}]
    return [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: Iterable[int]) -> None:
    for step in steps:
        parameter = next(model.parameters())
        x = torch.randn(4, 5, generator=torch.Generator().manual_seed(step)).to(parameter)
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()


def snapshot(saved: OptimizerTensors) -> OptimizerTensors:
    return OptimizerTensors(
        {name: tensor.to("cpu", copy=True) for name, tensor in saved.tensors.items()}, copy.deepcopy(saved.groups)
    )


def assert_same_parameters(one: nn.Module, other: nn.Module) -> None:
    for (name, a), (_, b) in zip(one.named_parameters(), other.named_parameters(), strict=True):
        assert a.isfinite().all(), name
        assert torch.equal(a, b), name


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_restored_optimizer_continues_as_torch_and_as_uninterrupted(name: str, device: torch.device) -> None:
    build = OPTIMIZERS[name]
    model = make_model().to(device)
    optimizer = build(make_groups(model))
    train(model, optimizer, range(3))

    saved = snapshot(optimizer_tensors(optimizer, model.named_parameters()))
    torch_saved = copy.deepcopy(optimizer.state_dict())
    ours, theirs = copy.deepcopy(model), copy.deepcopy(model)
    # The groups have another order and other options than the saved ones.
    our_optimizer, their_optimizer = build(make_groups(ours, reverse=True)), build(make_groups(theirs))
    restore_optimizer(our_optimizer, saved, ours.named_parameters())
    their_optimizer.load_state_dict(torch_saved)
    for p, q in zip(model.parameters(), ours.parameters(), strict=True):
        expected, restored = optimizer.state.get(p, {}), our_optimizer.state.get(q, {})
        assert expected.keys() == restored.keys()
        for key, value in expected.items():
            if isinstance(value, Tensor):
                assert torch.equal(value.cpu(), restored[key].cpu()), key
                assert value.dtype == restored[key].dtype, key
                if key == "step" and name.startswith("adamw"):
                    assert value.device == restored[key].device
            else:
                assert value == restored[key], key

    for network, updates in ((model, optimizer), (ours, our_optimizer), (theirs, their_optimizer)):
        train(network, updates, range(3, 7))
    assert_same_parameters(ours, model)
    assert_same_parameters(ours, theirs)


def test_options_return_in_the_form_that_the_optimizer_has() -> None:
    model = make_model()
    optimizer = torch.optim.AdamW(make_groups(model), lr=torch.tensor(3e-3), betas=(0.8, 0.9))
    saved = optimizer_tensors(optimizer, model.named_parameters())
    other = torch.optim.AdamW(make_groups(model), lr=torch.tensor(1.0), foreach=False)
    restore_optimizer(other, saved, model.named_parameters())
    for group in other.param_groups:
        assert isinstance(group["lr"], Tensor)
        assert torch.equal(group["lr"], torch.tensor(3e-3))
        assert group["betas"] == (0.8, 0.9)
        assert group["foreach"] is False


def test_restored_tensors_are_copies_and_keep_their_dtype() -> None:
    model = make_model().to(torch.bfloat16)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for parameter in model.parameters():
        optimizer.state[parameter]["momentum_buffer"] = torch.randn(parameter.shape)  # float32 beside bfloat16
    saved = optimizer_tensors(optimizer, model.named_parameters())
    other = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    restore_optimizer(other, saved, model.named_parameters())
    for name, parameter in model.named_parameters():
        buffer = other.state[parameter]["momentum_buffer"]
        assert buffer.dtype == torch.float32
        assert torch.equal(buffer, saved.tensors[f"{name}.momentum_buffer"])
        assert buffer.data_ptr() != saved.tensors[f"{name}.momentum_buffer"].data_ptr()


def test_names_may_be_a_mapping_and_entries_have_the_documented_keys() -> None:
    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters())
    train(model, optimizer, range(1))
    by_parameter = {parameter: name for name, parameter in model.named_parameters()}
    saved = optimizer_tensors(optimizer, by_parameter)
    assert set(saved.tensors) == {
        f"{name}.{key}" for name in by_parameter.values() for key in ("step", "exp_avg", "exp_avg_sq")
    }
    restore_optimizer(optimizer, saved, by_parameter)


def test_an_optimizer_that_never_stepped_is_restored_to_that() -> None:
    model = make_model()
    saved = optimizer_tensors(torch.optim.AdamW(model.parameters()), model.named_parameters())
    assert saved.tensors == {}
    optimizer = torch.optim.AdamW(model.parameters())
    train(model, optimizer, range(2))
    restore_optimizer(optimizer, saved, model.named_parameters())
    assert not optimizer.state


@pytest.fixture
def stepped() -> tuple[nn.Sequential, OptimizerTensors]:
    model = make_model()
    optimizer = torch.optim.AdamW(make_groups(model))
    train(model, optimizer, range(2))
    return model, snapshot(optimizer_tensors(optimizer, model.named_parameters()))


def refusal(model: nn.Module, saved: OptimizerTensors, groups: list[dict[str, Any]] | None = None) -> str:
    """Return the reason why ``saved`` is refused, after checking that the optimizer is unchanged."""
    optimizer = torch.optim.AdamW(groups or make_groups(model), lr=0.7)
    with pytest.raises(UserError) as caught:
        restore_optimizer(optimizer, saved, model.named_parameters())
    assert not optimizer.state
    assert all(group["lr"] == 0.7 for group in optimizer.param_groups)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_mismatch_names_the_parameter(stepped: tuple[nn.Sequential, OptimizerTensors]) -> None:
    model, saved = stepped
    wider = nn.Sequential(nn.Linear(5, 7), nn.LayerNorm(7), nn.Linear(7, 4, bias=False))
    assert refusal(wider, saved) == (
        "parameter 2.weight has shape (4, 7), but (3, 7) in the checkpoint's optimizer state"
    )
    deeper = nn.Sequential(*make_model(), nn.Linear(3, 3))
    assert refusal(deeper, saved) == "the checkpoint's optimizer state has no parameter 3.weight"
    shallower = nn.Sequential(*make_model()[:2])
    assert "has parameter 2.weight, which the optimizer does not have" in refusal(shallower, saved)
    one_group = [{"params": list(model.parameters())}]
    assert "parameter 0.weight is in another optimizer group" in refusal(model, saved, one_group)


def test_a_missing_or_misshapen_tensor_is_named(stepped: tuple[nn.Sequential, OptimizerTensors]) -> None:
    model, saved = stepped
    missing = {name: tensor for name, tensor in saved.tensors.items() if name != "0.bias.exp_avg"}
    assert "no tensor 0.bias.exp_avg" in refusal(model, OptimizerTensors(missing, saved.groups))
    wrong = {**saved.tensors, "0.bias.exp_avg": torch.zeros(3)}
    assert "0.bias.exp_avg has shape (3,), expected (7,)" in refusal(model, OptimizerTensors(wrong, saved.groups))


def test_state_that_is_not_per_parameter_is_refused() -> None:
    model = make_model()
    optimizer = torch.optim.LBFGS(model.parameters())
    optimizer.step(lambda: model(torch.ones(2, 5)).square().sum())
    model(torch.ones(2, 5)).square().sum().backward()
    optimizer.step(lambda: model(torch.ones(2, 5)).square().sum())
    with pytest.raises(UserError, match=r"0\.weight\.\w+ is a list, which a checkpoint cannot hold"):
        optimizer_tensors(optimizer, model.named_parameters())


def test_a_parameter_without_a_name_is_refused() -> None:
    model = make_model()
    with pytest.raises(UserError, match=r"group 0 holds a parameter of shape \(7,\) without a name"):
        optimizer_tensors(torch.optim.AdamW(model.parameters()), [("0.weight", model[0].weight)])
