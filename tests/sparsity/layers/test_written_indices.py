"""What a layer computes follows from the tensors that it stores, however these were written; or it says so.

The oracle reads ``row_ptr``, ``col`` and ``values`` itself and multiplies densely.
"""

from __future__ import annotations

import copy
import io
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import sparsetrain as st
from sparsetrain.sparsity import SparseLinear

K, M, SIDE = 64, 96, 4
BACKENDS = ["csr", "bsr", "masked"]
REFUSALS = (st.UserError, RuntimeError)


def net(backend: str, seed: int = 0) -> nn.Sequential:
    """Two layers in blocks that every CPU backend takes, or in single weights."""
    block = [SIDE, SIDE] if backend == "bsr" else [1, 1]
    plan = st.SparsityConfig(sparsity=0.75, pattern="block" if backend == "bsr" else "random", block=block)
    plan.backend = backend
    torch.manual_seed(seed)
    return st.sparsify(nn.Sequential(nn.Linear(K, M), nn.GELU(), nn.Linear(M, K)), plan=plan, seed=seed)


def batch(seed: int = 5) -> Tensor:
    return torch.randn(70, K, generator=torch.Generator().manual_seed(seed))


def dense_of(layer: SparseLinear) -> Tensor:
    side = layer.out_features // (layer.row_ptr.numel() - 1)
    width = layer.values.numel() // (layer.col.numel() * side)
    blocks = torch.zeros(layer.out_features // side, layer.in_features // width, side, width)
    rows = torch.arange(len(blocks)).repeat_interleave(layer.row_ptr.diff())
    blocks[rows, layer.col.long()] = layer.values.detach().view(-1, side, width)
    return blocks.transpose(1, 2).reshape(layer.out_features, layer.in_features)


def step(call: Callable[[Tensor], Tensor], model: nn.Module) -> list[Tensor]:
    """Return the output, the gradient of the input and those of the weights for one batch."""
    model.zero_grad()
    x = batch().requires_grad_()
    y = call(x)
    y.square().sum().backward()
    assert x.grad is not None
    return [y.detach(), x.grad, *(p.grad for p in model.parameters() if p.grad is not None)]


def outcome(action: Callable[[], Any]) -> Any:
    """Return what an action returns, or the words with which it refuses."""
    try:
        return action()
    except REFUSALS as error:
        return str(error)


def expected(model: nn.Sequential) -> list[Tensor]:
    """The same by dense torch."""
    first, second = (layer for layer in model if isinstance(layer, SparseLinear))
    weights = [dense_of(layer).requires_grad_() for layer in (first, second)]
    biases = [layer.bias.detach().clone().requires_grad_() for layer in (first, second)]
    x = batch().requires_grad_()
    hidden = nn.functional.gelu(nn.functional.linear(x, weights[0], biases[0]))
    y = nn.functional.linear(hidden, weights[1], biases[1])
    y.square().sum().backward()
    found = [y.detach(), x.grad]
    for layer, weight, bias in zip((first, second), weights, biases, strict=True):
        found += [layer.pattern.gather(weight.grad), bias.grad]
    return found


def by_copy(model: nn.Module, other: nn.Module) -> nn.Module:
    for target, source in zip(model.state_dict().values(), other.state_dict().values(), strict=True):
        target.copy_(source)
    return model


def by_set(model: nn.Module, other: nn.Module) -> nn.Module:
    for target, source in zip(model.state_dict().values(), other.state_dict().values(), strict=True):
        target.set_(source.clone())
    return model


def by_assignment(model: nn.Module, other: nn.Module) -> nn.Module:
    model.load_state_dict(other.state_dict(), assign=True)
    return model


def by_load(model: nn.Module, other: nn.Module) -> nn.Module:
    model.load_state_dict(other.state_dict())
    return model


def by_buffers(model: nn.Module, other: nn.Module) -> nn.Module:
    """As a wrapper does that sends rank 0's tensors: foreach copies, a flat one between."""
    targets = [*model.parameters(), *model.buffers()]
    sources = [*other.parameters(), *other.buffers()]
    with torch.no_grad():
        torch._foreach_copy_([t.detach() for t in targets], [s.detach() for s in sources])
    return model


def by_pickle(model: nn.Module, other: nn.Module) -> nn.Module:
    stream = io.BytesIO()
    torch.save(other, stream)
    stream.seek(0)
    return torch.load(stream, weights_only=False)


def by_apply(model: nn.Module, other: nn.Module) -> nn.Module:
    by_copy(model, other)
    return model.to(torch.float64).to(torch.float32)


def by_average(model: nn.Module, other: nn.Module) -> nn.Module:
    average = AveragedModel(other, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)
    average(batch())
    average.update_parameters(other)
    average.update_parameters(other)
    return average.module


WAYS = [by_copy, by_set, by_assignment, by_load, by_buffers, by_pickle, by_apply, by_average]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_a_write_takes_effect_at_the_next_step_or_is_refused(way: Callable[..., nn.Module], backend: str) -> None:
    """Other positions and values, after layouts of the old ones were made in both directions."""
    model, other = net(backend), net(backend, 1)
    step(model, model)
    with torch.no_grad():
        model = way(model, other)
    if way is by_average and isinstance(said := outcome(lambda: step(model, model)), str):
        assert "modified in place" in said or "average with sparsetrain.AveragedModel" in said
        return
    found = step(model, model)
    for got, right in zip(found, expected(model), strict=True):
        torch.testing.assert_close(got, right, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("backend", ["csr", "masked"])
def test_a_write_takes_effect_in_a_compiled_model(backend: str) -> None:
    """The graph was compiled for the old positions; it runs on, without another compilation for what is alike."""
    torch.compiler.reset()
    model, other = net(backend), net(backend, 1)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    step(compiled, model)
    with torch.no_grad():
        by_copy(model, other)
    for got, right in zip(step(compiled, model), expected(model), strict=True):
        torch.testing.assert_close(got, right, rtol=1e-3, atol=1e-3)
    with torch.no_grad():
        model[0].col[0] = 10**6
    with pytest.raises(st.UserError, match="0: its indices were modified in place"):
        compiled(batch())
    torch.compiler.reset()


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_a_distributed_checkpoint_read_in_place_takes_effect(tmp_path: Path) -> None:
    """``dcp.load`` writes into the tensors of a state; ``load_state_dict`` then finds them equal to what is there."""
    model, other = net("csr"), net("csr", 1)
    step(model, model)
    dcp.save({"model": other.state_dict()}, checkpoint_id=str(tmp_path), no_dist=True)
    for after in (lambda state: None, model.load_state_dict):
        model.load_state_dict(net("csr", 2).state_dict())
        step(model, model)
        state = {"model": model.state_dict()}
        dcp.load(state, checkpoint_id=str(tmp_path), no_dist=True)
        after(state["model"])
        for got, right in zip(step(model, model), step(other, other), strict=True):
            torch.testing.assert_close(got, right)


DAMAGE = {
    "a column outside": ("col", 3, 10**6),
    "a negative column": ("col", 0, -1),
    "a row that ends beyond": ("row_ptr", 2, 10**12),
    "a repeated column": ("col", 1, None),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("damage", DAMAGE)
def test_indices_of_no_mask_are_refused_by_name_and_can_be_repaired(damage: str, backend: str) -> None:
    """Each use says which layer it is, until a whole state is loaded or the entry is put right."""
    model = net(backend)
    right = copy.deepcopy(model.state_dict())
    step(model, model)
    name, place, value = DAMAGE[damage]
    with torch.no_grad():
        tensor = getattr(model[2], name)
        tensor[place] = tensor[place - 1] if value is None else value
    for use in (lambda: model(batch()), lambda: model[2].dense_weight(), lambda: model[2].pattern):
        with pytest.raises(st.UserError, match=r"^2: its indices were modified in place"):
            use()
    assert "SparseLinear" in repr(model)
    by_copy(model, net(backend, 1)) if damage == "a column outside" else model.load_state_dict(right)
    for got, wanted in zip(step(model, model), expected(model), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("when", ["before the first step", "between the passes", "after a step"])
def test_a_write_that_torch_does_not_record_reads_nothing_outside(when: str, backend: str) -> None:
    """Through ``.data``: garbage is never followed; what is computed is of the old mask, or refused, until a save."""
    model = net(backend)
    right = expected(model)
    if when == "after a step":
        step(model, model)
    x = batch().requires_grad_()
    y = model(x) if when == "between the passes" else None
    for layer in (model[0], model[2]):
        layer.col.data.fill_(2**31 - 1)
        layer.row_ptr.data.fill_(-(2**62))
    said = outcome(lambda: (model(x) if y is None else y).square().sum().backward())
    assert said is None or "modified in place" in said
    if said is None:
        torch.testing.assert_close(x.grad, right[1], rtol=1e-3, atol=1e-3)
    model.state_dict()
    with pytest.raises(st.UserError, match="do not describe a mask any more"):
        model(batch())


def test_valid_indices_that_torch_did_not_record_never_mix_with_old_layouts() -> None:
    """Between the forward pass, which made one layout, and the first backward pass, which makes the other."""
    model, other = net("csr"), net("csr", 1)
    x = batch().requires_grad_()
    y = model(x)
    for layer, source in ((model[0], other[0]), (model[2], other[2])):
        layer.col.data.copy_(source.col), layer.row_ptr.data.copy_(source.row_ptr)
    with pytest.raises(st.UserError, match="while it was in use"):
        y.sum().backward()
    model.state_dict()
    for got, right in zip(step(model, model), expected(model), strict=True):
        torch.testing.assert_close(got, right, rtol=1e-3, atol=1e-3)


def test_a_recorded_write_between_forward_and_backward_is_refused_as_torch_refuses_it() -> None:
    """The gradient of the old mask's output cannot be made by the new one; the same content again is no change."""
    model, other = net("csr"), net("csr", 1)
    y = model(batch())
    with torch.no_grad():
        [buffer.copy_(buffer.clone()) for buffer in model.buffers()]
    y.sum().backward()
    y = model(batch())
    with torch.no_grad():
        model[2].col.copy_(other[2].col), model[2].row_ptr.copy_(other[2].row_ptr)
    with pytest.raises(RuntimeError, match="2: its indices were changed in place between"):
        y.sum().backward()


def test_layouts_survive_a_write_of_the_same_content() -> None:
    """A wrapper that broadcasts buffers at every step costs one look at the indices, not new layouts."""
    model = net("csr")
    step(model, model)
    layouts = [layer.pattern._derived["csr"] for layer in (model[0], model[2])]
    by_copy(model, copy.deepcopy(model))
    step(model, model)
    assert all(layer.pattern._derived["csr"] is layout for layer, layout in zip(model[::2], layouts, strict=True))


def test_indices_made_in_inference_mode_are_watched_too() -> None:
    """Torch counts no writes into tensors of inference mode, so a layer keeps ordinary ones."""
    with torch.inference_mode():
        model = net("csr")
        model.load_state_dict(net("csr", 1).state_dict(), assign=True)
        model(batch())
    with torch.no_grad():
        model[0].col[0] = -5
        with pytest.raises(st.UserError, match="0: its indices were modified in place"):
            model(batch())


@pytest.mark.parametrize("backend", BACKENDS)
def test_threads_that_share_a_module_get_the_bits_of_sequential_use(backend: str) -> None:
    """Also while its indices are being written with what they already hold."""
    model = net(backend)
    inputs = [batch(seed) for seed in range(8)]
    right = [model(x).detach() for x in inputs]
    wrong: list[int] = []

    def work(start: int) -> None:
        for turn in range(12):
            n = (start + turn) % len(inputs)
            if turn % 4 == 3:
                model[0].col.copy_(model[0].col.clone())
            if not torch.equal(model(inputs[n]).detach(), right[n]):
                wrong.append(n)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert wrong == []


@pytest.mark.parametrize("compare", ["equals", "hash"])
def test_a_comparison_notices_what_torch_did_not_record(compare: str) -> None:
    """What two masks are compared by is what the layer computes with from then on."""
    model, other = net("csr"), net("csr", 1)
    step(model, model)
    for layer, source in ((model[0], other[0]), (model[2], other[2])):
        layer.col.data.copy_(source.col)
        layer.row_ptr.data.copy_(source.row_ptr)
    if compare == "equals":
        assert all(model[at].pattern.equals(other[at].pattern) for at in (0, 2))
    else:
        managers = [st.MaskManager(one, st.Static(), seed=0) for one in (model, other)]
        assert managers[0].hash() == managers[1].hash()
    for got, right in zip(step(model, model), expected(model), strict=True):
        torch.testing.assert_close(got, right, rtol=1e-3, atol=1e-3)
