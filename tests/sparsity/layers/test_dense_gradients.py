"""RigL ranks the same gradient however a layer's product is called: by a module, a compiled graph, or once more.

The oracle is the gradient of a dense matrix by autograd.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import sparsetrain as st
from sparsetrain.sparsity.layers.dense_gradient import DenseGradientRequest

F = nn.functional


class Net(nn.Module):
    """Two layers, one of which is used twice; ``how`` calls a part of it."""

    def __init__(self, how: Callable[..., Tensor] = lambda part, x: part(x)) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down, self.how = nn.Linear(24, 48), nn.Linear(48, 24), how

    def block(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x)))

    def forward(self, x: Tensor) -> Tensor:
        return self.how(self.block, self.how(self.block, x))


def batch(seed: int, rows: int = 16) -> Tensor:
    return torch.randn(rows, 24, generator=torch.Generator().manual_seed(seed))


def dense_gradients(model: Net, x: Tensor) -> dict[str, Tensor]:
    """Return the gradients of the dense twin for one batch."""
    twin = Net()
    with torch.no_grad():
        for name in ("up", "down"):
            getattr(twin, name).weight.copy_(getattr(model, name).dense_weight())
            getattr(twin, name).bias.copy_(getattr(model, name).bias)
    twin(x).square().mean().backward()
    return {name: getattr(twin, name).weight.grad for name in ("up", "down")}


@pytest.fixture
def asked() -> tuple[Net, dict[str, DenseGradientRequest[Tensor]]]:
    """A sparse model whose layers are asked for their dense gradients."""
    model = st.sparsify(Net(), 0.7, seed=0, backend="csr")
    requests = {}
    for name in ("up", "down"):
        requests[name] = DenseGradientRequest(lambda dense: dense.clone())
        getattr(model, name).request_dense_gradient(requests[name])
    return model, requests


def reentrant(part: Callable[..., Tensor], x: Tensor) -> Tensor:
    return checkpoint(part, x, use_reentrant=True)


def recomputed(part: Callable[..., Tensor], x: Tensor) -> Tensor:
    return checkpoint(part, x, use_reentrant=False)


HOW = {
    "plain": lambda part, x: part(x),
    "checkpointed": recomputed,
    "checkpointed, reentrant": reentrant,
    "compiled": lambda part, x: part(x),
}


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("peek", [False, True])
def test_the_gradient_is_that_of_the_dense_matrix_for_the_last_batch(
    how: str, peek: bool, asked: tuple[Net, dict[str, DenseGradientRequest[Tensor]]]
) -> None:
    """Two micro-batches, a layer used twice in each; on the way a pass for a log, and an evaluation."""
    torch.compiler.reset()
    model, requests = asked
    model.how = HOW[how]
    called = torch.compile(model, backend="aot_eager") if how == "compiled" else model
    for micro in range(2):
        if peek:
            called(batch(8).requires_grad_())
            with torch.no_grad():
                called(batch(9).requires_grad_())
        called(batch(micro).requires_grad_()).square().mean().backward()
        if how in ("plain", "checkpointed") or (how != "compiled" and not peek):
            # Nothing is left of the dense matrices as soon as the backward pass is over.
            assert all(request._dense is None for request in requests.values())
    for name, right in dense_gradients(model, batch(1)).items():
        torch.testing.assert_close(requests[name].finish(), right, rtol=1e-4, atol=1e-7)
    torch.compiler.reset()


def test_gradients_of_all_passes_are_added_up_where_that_is_asked_for() -> None:
    """Staggered accumulation: the sum over micro-batches, in float32 also under autocast."""
    model = st.sparsify(Net(), 0.7, seed=0)
    request = DenseGradientRequest(lambda dense: dense, accumulate=True)
    model.up.request_dense_gradient(request)
    for micro in range(3):
        model(batch(micro)).square().mean().backward()
    right = sum(dense_gradients(model, batch(micro))["up"] for micro in range(3))
    torch.testing.assert_close(request.finish(), right, rtol=1e-4, atol=1e-6)
    request = DenseGradientRequest(lambda dense: dense)
    model.up.request_dense_gradient(request)
    with torch.autocast("cpu", torch.bfloat16):
        model(batch(0)).float().square().mean().backward()
    found = request.finish()
    assert found is not None
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, dense_gradients(model, batch(0))["up"], rtol=0.1, atol=2e-3)


@pytest.mark.parametrize("compiled", [False, True])
def test_a_matrix_that_is_read_in_place_of_calling_the_layer_answers_too(compiled: bool) -> None:
    """As nn.MultiheadAttention reads ``out_proj.weight``; here beside a call of the layer itself."""
    torch.compiler.reset()
    torch.manual_seed(0)
    layer = st.SparseLinear(24, 24, density=0.3, seed=0, bias=False)
    request = DenseGradientRequest(lambda dense: dense)
    layer.request_dense_gradient(request)

    def use(x: Tensor) -> Tensor:
        return F.linear(layer(x), layer.weight)

    (torch.compile(use, backend="aot_eager") if compiled else use)(batch(0)).square().sum().backward()
    weight = layer.dense_weight().detach().requires_grad_()
    F.linear(F.linear(batch(0), weight), weight).square().sum().backward()
    torch.testing.assert_close(request.finish(), weight.grad, rtol=1e-4, atol=1e-4)
    assert layer.values.grad is not None
    torch.testing.assert_close(layer.values.grad, layer.pattern.gather(weight.grad), rtol=1e-4, atol=1e-4)
    torch.compiler.reset()


def test_every_layer_of_torchs_encoder_explores() -> None:
    """Attention's output projection, whose forward is never called, is ranked as the other layers are."""
    torch.manual_seed(0)
    block = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True)
    model = nn.TransformerEncoder(block, 2, enable_nested_tensor=False)
    manager = st.MaskManager(model, st.RigL(sparsity=0.8, every=1), include=["*out_proj", "*linear*"], seed=0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for seed in range(3):
        model(torch.randn(2, 8, 32, generator=torch.Generator().manual_seed(seed))).square().mean().backward()
        optimizer.step()
        manager.step(optimizer)
        optimizer.zero_grad()
    assert len(manager.report()) == 6
    assert all(row.overlap < 1.0 for row in manager.report())


def test_a_copy_of_a_layer_is_not_asked_and_an_old_graph_does_not_answer() -> None:
    """A request belongs to the layer that it was given to, until it is taken back."""
    import copy

    layer = st.SparseLinear(24, 24, density=0.3, seed=0)
    held: list[weakref.ref[Tensor]] = []
    request = DenseGradientRequest(lambda dense: held.append(weakref.ref(dense)))
    layer.request_dense_gradient(request)
    twin, late = copy.deepcopy(layer), layer(batch(0)).sum()
    twin(batch(0)).sum().backward()
    assert not request.answered
    layer.request_dense_gradient(None)
    late.backward()
    assert not request.answered
    layer.request_dense_gradient(other := DenseGradientRequest(request.digest))
    layer(batch(0)).sum().backward()
    assert other.answered
    assert held[0]() is None
