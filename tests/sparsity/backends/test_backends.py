"""Backends by name, one of the test's own among them; and the registry of layouts."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from products import K, M, arguments, assert_matches_dense, inputs, pattern_of
from torch import Tensor

from sparsetrain.errors import UserError
from sparsetrain.sparsity import Backend, SparseLinear, SparsityPattern, backend_names, register_backend
from sparsetrain.sparsity.backends import layouts
from sparsetrain.sparsity.backends.base import BACKENDS
from sparsetrain.sparsity.backends.masked import MaskedBackend
from sparsetrain.sparsity.layers import ops

# -- backends --------------------------------------------------------------------------------------------------------


class Loops(Backend):
    """Three contractions in the plainest torch, and a list of the calls."""

    name = "loops"

    def __init__(self) -> None:
        self.calls: list[str] = []

    def _entries(self, pattern: SparsityPattern) -> list[tuple[int, int]]:
        return [(int(at) // pattern.shape[1], int(at) % pattern.shape[1]) for at in pattern.positions()]

    def matmul(self, x: Tensor, values: Tensor, pattern: SparsityPattern) -> Tensor:
        self.calls.append("matmul")
        y = x.new_zeros(x.shape[0], pattern.shape[0])
        for value, (row, column) in zip(values, self._entries(pattern), strict=True):
            y[:, row] += value * x[:, column]
        return y

    def matmul_t(self, g: Tensor, values: Tensor, pattern: SparsityPattern) -> Tensor:
        self.calls.append("matmul_t")
        x = g.new_zeros(g.shape[0], pattern.shape[1])
        for value, (row, column) in zip(values, self._entries(pattern), strict=True):
            x[:, column] += value * g[:, row]
        return x

    def sampled(self, g: Tensor, x: Tensor, pattern: SparsityPattern) -> Tensor:
        self.calls.append("sampled")
        return torch.stack([g[:, row] @ x[:, column] for row, column in self._entries(pattern)])


@pytest.fixture
def loops() -> Iterator[Loops]:
    backend = Loops()
    register_backend(backend)
    yield backend
    BACKENDS.unregister("loops")


def test_a_registered_backend_is_used_and_matches_masked(loops: Loops) -> None:
    assert backend_names() == ["auto", *BACKENDS]
    assert backend_names()[-1] == "loops"
    layer = SparseLinear(K, M, density=0.3, seed=0, backend="loops", dtype=torch.float64)
    x = torch.randn(2, 3, K, dtype=torch.float64, requires_grad=True)
    results = []
    for name in ("loops", "masked"):
        layer.backend = name
        output = layer(x)
        results.append((output, *torch.autograd.grad(output.square().sum(), (x, *layer.parameters()))))
    assert loops.calls == ["matmul", "matmul_t", "sampled"]
    torch.testing.assert_close(*results)
    call = arguments(layer.pattern, x.detach()[0], layer.values.detach())
    torch.library.opcheck(ops._sparse_linear, (*call[:6], "loops", *call[7:]))


def test_frozen_values_and_frozen_inputs_skip_their_gradient(loops: Loops) -> None:
    layer = SparseLinear(K, M, density=0.3, seed=0, backend="loops")
    layer(torch.randn(2, K)).sum().backward()
    assert loops.calls == ["matmul", "sampled"]
    loops.calls.clear()
    assert layer.values.grad is not None
    trained = layer.values.grad.clone()
    layer.requires_grad_(False)
    x = torch.randn(2, K, requires_grad=True)
    layer(x).sum().backward()
    assert loops.calls == ["matmul", "matmul_t"]
    assert torch.equal(layer.values.grad, trained)
    loops.calls.clear()
    assert not layer(torch.randn(2, K)).requires_grad
    assert loops.calls == ["matmul"]


def test_the_masked_backends_contractions_match_numpy() -> None:
    backend, pattern = MaskedBackend(), pattern_of()
    x, values, _, g = (tensor.detach() for tensor in inputs(pattern, 4))
    dense = pattern.scatter(values).numpy()
    torch.testing.assert_close(backend.matmul(x, values, pattern), torch.from_numpy(x.numpy() @ dense.T))
    torch.testing.assert_close(backend.matmul_t(g, values, pattern), torch.from_numpy(g.numpy() @ dense))
    torch.testing.assert_close(
        backend.sampled(g, x, pattern), torch.from_numpy((g.numpy().T @ x.numpy())[pattern.mask().numpy()])
    )


def test_bad_backend_names_are_refused() -> None:
    layer = SparseLinear(K, M, density=0.5, seed=0)
    with pytest.raises(UserError, match=r"backend='maskd' is not one of auto, .*masked.* \(did you mean 'masked'\?\)"):
        layer.backend = "maskd"
    assert layer.backend == "auto"
    with pytest.raises(UserError, match="'auto' is taken"):
        register_backend("auto", Loops())


# -- the registry of layouts -----------------------------------------------------------------------------------------


def test_a_collected_pattern_is_rebuilt_from_its_tensors() -> None:
    pattern = pattern_of()
    x, values, _, g = inputs(pattern, 3)
    call = arguments(pattern, x, values)
    expected = F.linear(x, pattern.scatter(values))
    output = ops._sparse_linear(*call)[0]
    expected_gradients = torch.autograd.grad(expected, (x, values), g)
    number = call[-2]
    del pattern
    gc.collect()
    assert number not in layouts.LAYOUTS
    torch.testing.assert_close(ops._sparse_linear(*call)[0], expected)
    torch.testing.assert_close(torch.autograd.grad(output, (x, values), g), expected_gradients)


def test_two_layers_never_hit_each_others_layout() -> None:
    # As many patterns as a run goes through, each collected before the next: a number is never given twice.
    numbers = []
    for seed in range(20):
        pattern = pattern_of(seed=seed)
        numbers.append(layouts.layout_id(pattern))
        assert layouts.layout_id(pattern) == numbers[-1]
        x, values, bias, g = inputs(pattern, 2)
        assert_matches_dense(pattern, x, values, bias, g)
        del pattern
    assert len(set(numbers)) == 20


def test_a_topology_that_changes_between_forward_and_backward_does_not_matter() -> None:
    layer = SparseLinear(K, M, density=0.5, seed=0, bias=False)
    x = torch.randn(3, K, requires_grad=True)
    expected = torch.ones(3, M) @ layer.dense_weight().detach()
    output = layer(x)
    pattern = pattern_of(seed=9)
    layer.set_topology(pattern, torch.randn(pattern.nnz))
    gc.collect()
    (gradient,) = torch.autograd.grad(output.sum(), (x,))
    torch.testing.assert_close(gradient, expected)


def test_the_first_call_may_be_compiled() -> None:
    layer = SparseLinear(16, 16, density=0.5, seed=0)
    x = torch.randn(3, 16)
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), layer(x))
