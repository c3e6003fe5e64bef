"""SparseLinear's state: loaded, refused, saved; copies of a layer, and its moves between types and devices."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from layers import K, M, assert_same_function, layer
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from sparsetrain.sparsity import SparseLinear, SparsityPattern


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("density", [0.2, 0.4, 0.9])
def test_load_state_dict_adopts_another_topology(density: float, assign: bool, device: torch.device) -> None:
    source, target = layer(density, seed=1), layer(0.4, seed=2, device=device)
    state = {key: tensor.to(device if assign else "cpu") for key, tensor in source.state_dict().items()}
    parameter = target.values
    target.load_state_dict(state, assign=assign)
    assert target.pattern.equals(source.pattern)
    assert torch.equal(target.dense_weight().cpu(), source.dense_weight())
    assert (target.values is parameter) == (not assign)
    assert target.values.device.type == target.col.device.type == device.type
    assert_same_function(target.cpu(), source)


def test_an_adopted_state_shares_no_memory_with_its_source() -> None:
    source, target = layer(0.3, seed=1), layer(0.6, seed=2)
    target.load_state_dict(source.state_dict())
    expected = source.dense_weight().detach().clone()
    with torch.no_grad():
        target.values.zero_()
        target.col.zero_()
    assert torch.equal(source.dense_weight(), expected)
    assert source.pattern.equals(layer(0.3, seed=1).pattern)


def test_an_optimizer_built_before_the_load_works_after_it() -> None:
    source, target = layer(0.3, seed=1), layer(0.6, seed=2)
    optimizer = torch.optim.AdamW(target.parameters(), lr=0.1)
    target(torch.randn(2, K)).sum().backward()
    target.load_state_dict(source.state_dict())
    # The gradient of the old topology is gone: a step with it would be one of another matrix.
    assert target.values.grad is None
    target.zero_grad()
    target(torch.randn(2, K)).sum().backward()
    optimizer.step()
    assert target.values.shape == source.values.shape
    assert bool((target.values != source.values).any())


def test_strict_topology_refuses_any_difference() -> None:
    target = layer(0.4, seed=1, strict_topology=True)
    before = target.dense_weight().detach().clone()
    same = layer(0.4, seed=1)
    nn.init.ones_(same.values)
    for other in (layer(0.4, seed=2), layer(0.3, seed=1)):
        with pytest.raises(RuntimeError, match=r"differs from the layer's .* and strict_topology is set"):
            target.load_state_dict(other.state_dict())
        assert torch.equal(target.dense_weight(), before)
    target.load_state_dict(same.state_dict())
    assert torch.equal(target.values, same.values)


def _state(**changes: Tensor | None) -> dict[str, Tensor]:
    state: dict[str, Any] = dict(layer(0.4, seed=1).state_dict())
    return {key: tensor for key, tensor in {**state, **changes}.items() if tensor is not None}


GOOD = _state()


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (_state(col=GOOD["col"].flip(0)), "they must increase"),
        (_state(col=GOOD["col"] + K), "columns go from 0 to 15"),
        (_state(col=GOOD["col"].float()), "col has dtype torch.float32"),
        (_state(row_ptr=GOOD["row_ptr"] + 1), "it must run from 0"),
        (_state(row_ptr=GOOD["row_ptr"][:6]), "fit no 12 rows"),
        (_state(values=GOOD["values"][:-1]), "do not fill 77 stored blocks"),
        (_state(values=GOOD["values"][:, None]), r"values have shape \(77, 1\); one dimension"),
        (_state(values=None), "the state has row_ptr, col; row_ptr, col and values belong together"),
        (_state(row_ptr=None, col=None), "the state has values; row_ptr, col and values belong together"),
        (
            _state(row_ptr=torch.zeros(M + 1), col=torch.zeros(0), values=torch.zeros(0)),
            "row_ptr with 13 and col with 0 entries",
        ),
    ],
)
@pytest.mark.parametrize("strict", [True, False])
def test_malformed_states_are_refused_by_one_message(state: dict[str, Tensor], message: str, strict: bool) -> None:
    model = nn.Sequential(layer(0.4, seed=2))
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    with pytest.raises(RuntimeError, match=message) as caught:
        model.load_state_dict({f"0.{key}": tensor for key, tensor in state.items()}, strict=strict)
    assert str(caught.value).count("\n") == 1
    assert "0: " in str(caught.value)
    after = model.state_dict()
    assert all(torch.equal(after[key], tensor) for key, tensor in before.items())


def test_a_state_without_the_layer_is_reported_as_missing() -> None:
    missing, unexpected = layer().load_state_dict({}, strict=False)
    assert set(missing) == {"values", "bias", "row_ptr", "col"}
    assert unexpected == []


def test_blocks_survive_the_state_dict() -> None:
    tiles = torch.tensor([[1, 0, 1], [0, 1, 1]], dtype=torch.bool)
    pattern = SparsityPattern.from_mask(tiles.repeat_interleave(2, 0).repeat_interleave(4, 1), (2, 4))
    source = SparseLinear(12, 4, pattern=pattern, seed=0)
    target = SparseLinear(12, 4, density=0.5, seed=1)
    target.load_state_dict(source.state_dict())
    assert target.pattern.equals(pattern)
    assert_same_function(source, target, 12)


def test_safetensors_round_trip(tmp_path: Path) -> None:
    # Two layers of one pattern: safetensors refuses tensors that share memory.
    pattern = layer().pattern
    models = [
        nn.Sequential(*(SparseLinear(K, M, pattern=pattern, seed=s) for s in seeds)) for seeds in ((0, 1), (2, 3))
    ]
    save_file(models[0].state_dict(), tmp_path / "model.safetensors")
    models[1].load_state_dict(load_file(tmp_path / "model.safetensors"))
    for a, b in zip(models[0], models[1], strict=True):
        assert_same_function(a, b)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_are_equal_and_independent(duplicate: Callable[[SparseLinear], SparseLinear]) -> None:
    original = layer(backend="masked")
    original(torch.randn(2, K))
    other = duplicate(original)
    assert_same_function(original, other)
    assert other.backend == "masked"
    assert other.pattern.row_ptr is other.row_ptr
    assert other.pattern is not original.pattern
    expected = original.dense_weight().detach().clone()
    other.load_state_dict(layer(0.8, seed=5).state_dict())
    nn.init.zeros_(other.values)
    assert torch.equal(original.dense_weight(), expected)


def test_saved_by_torch_and_loaded_as_weights_only() -> None:
    stream = io.BytesIO()
    torch.save(layer().state_dict(), stream)
    stream.seek(0)
    target = layer(0.7, seed=9)
    target.load_state_dict(torch.load(stream, weights_only=True))
    assert_same_function(target, layer())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_dtype_changes_values_and_no_index(dtype: torch.dtype) -> None:
    made = layer().to(dtype)
    assert made.values.dtype == dtype
    assert (made.row_ptr.dtype, made.col.dtype) == (torch.int64, torch.int32)
    assert made(torch.randn(2, K, dtype=dtype)).dtype == dtype
    # Loading keeps the layer's own type, as torch does.
    made.load_state_dict(layer(0.8, seed=3).state_dict())
    assert made.values.dtype == dtype


def test_device_moves_keep_the_function(device: torch.device) -> None:
    made = layer()
    x = torch.randn(3, K)
    expected = made(x)
    made.to(device)
    torch.testing.assert_close(made(x.to(device)).cpu(), expected)
    assert made.pattern.device.type == device.type
    torch.testing.assert_close(made.cpu()(x), expected)


def test_a_layer_emptied_by_to_empty_loads() -> None:
    made = layer().to_empty(device="cpu")
    made.load_state_dict(layer(0.6, seed=4).state_dict())
    assert_same_function(made, layer(0.6, seed=4))
