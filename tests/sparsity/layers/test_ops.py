"""The differentiable product against dense torch and torch's own CSR, and how it behaves inside torch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from products import K, M, arguments, assert_matches_dense, inputs, pattern_of
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from sparsetrain.errors import UserError
from sparsetrain.sparsity import SparseLinear, SparsityPattern, sparse_linear
from sparsetrain.sparsity.layers import ops


@st.composite
def problems(draw: st.DrawFn) -> tuple[SparsityPattern, tuple[int, ...], int]:
    """A pattern with at least one value, the leading dimensions of an input, and a seed."""
    block = draw(st.sampled_from([(1, 1), (1, 2), (2, 3)]))
    tiles = torch.tensor(draw(st.lists(st.booleans(), min_size=12, max_size=12)), dtype=torch.bool).view(3, 4)
    tiles[draw(st.integers(0, 2)), draw(st.integers(0, 3))] = True
    mask = tiles.repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)
    leading = tuple(draw(st.lists(st.integers(0, 3), max_size=3)))
    return SparsityPattern.from_mask(mask, block), leading, draw(st.integers(0, 2**31))


@given(problem=problems(), with_bias=st.booleans())
def test_forward_and_gradients_match_dense_torch(
    problem: tuple[SparsityPattern, tuple[int, ...], int], with_bias: bool
) -> None:
    pattern, leading, seed = problem
    torch.manual_seed(seed)
    x, values, bias, g = inputs(pattern, *leading)
    assert_matches_dense(pattern, x, values, bias if with_bias else None, g)


@pytest.mark.parametrize("leading", [(), (3,), (2, 3), (2, 1, 3), (0,), (2, 0)])
def test_any_leading_dimensions_match_dense_torch(leading: tuple[int, ...], device: torch.device) -> None:
    pattern = pattern_of().to(device)
    x, values, bias, g = inputs(pattern, *leading)
    assert sparse_linear(x, values, pattern, bias).shape == (*leading, M)
    assert_matches_dense(pattern, x, values, bias, g)


def test_non_contiguous_inputs_and_gradients_match_dense_torch() -> None:
    pattern = pattern_of()
    _, values, bias, _ = inputs(pattern, 1)
    wide = torch.randn(5, 2 * K, dtype=torch.float64)
    for x in (wide[:, :K].t().contiguous().t(), wide[:, ::2], wide[:1, :K].expand(5, K)):
        assert not x.is_contiguous()
        for g in (torch.randn(M, 5).double().t(), torch.ones((), dtype=torch.float64).expand(5, M)):
            assert_matches_dense(pattern, x.requires_grad_(), values, bias, g)


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta", "ignore:Sparse invariant checks")
def test_forward_and_gradients_match_torch_csr() -> None:
    pattern = pattern_of()
    x, values, bias, g = inputs(pattern, 7)
    ours = torch.autograd.grad(sparse_linear(x, values, pattern, bias), (x, values, bias), g)
    csr = torch.sparse_csr_tensor(pattern.row_ptr, pattern.col.long(), values, pattern.shape, check_invariants=True)
    theirs = (csr @ x.t()).t() + bias
    torch.testing.assert_close(sparse_linear(x, values, pattern, bias), theirs)
    for mine, other in zip(ours, torch.autograd.grad(theirs, (x, values, bias), g), strict=True):
        torch.testing.assert_close(mine, other)


@pytest.mark.parametrize("block", [(1, 1), (2, 3)])
def test_gradcheck_in_float64(block: tuple[int, int], device: torch.device) -> None:
    tiles = torch.tensor([[1, 0, 1], [0, 0, 0], [0, 1, 1]], dtype=torch.bool)
    mask = tiles.repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)
    pattern = SparsityPattern.from_mask(mask, block).to(device)
    x, values, bias, _ = inputs(pattern, 2, 2)
    assert torch.autograd.gradcheck(lambda *args: sparse_linear(args[0], args[1], pattern, args[2]), (x, values, bias))


# -- inside torch ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["masked", "csr", "bsr"])
@pytest.mark.parametrize("transposed", [False, True])
def test_opcheck_of_forward_and_backward(transposed: bool, backend: str, device: torch.device) -> None:
    if backend != "masked" and device.type != "cpu":
        return  # computes on a CPU
    pattern = pattern_of()
    if backend == "bsr":
        mask = torch.rand(3, 4, generator=torch.Generator().manual_seed(0)) < 0.5
        pattern = SparsityPattern.from_mask(mask.repeat_interleave(4, 0).repeat_interleave(8, 1), (4, 8))
    pattern = pattern.to(device)
    x, values, _, g = inputs(pattern, 3, dtype=torch.float32)
    if transposed:
        x = torch.randn(pattern.shape[1], 3, device=device).t().requires_grad_()
    call = arguments(pattern, x, values, backend)
    torch.library.opcheck(ops._sparse_linear, call)
    kept = ops._sparse_linear(*call)[1].detach()
    for needs in ((True, True), (False, True), (True, False)):
        detached = (g, x.detach(), values.detach(), kept, *call[2:8], *needs)
        torch.library.opcheck(ops._sparse_linear_backward, detached)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_computes_in_the_type_that_linear_does(dtype: torch.dtype, device: torch.device) -> None:
    layer = SparseLinear(K, M, density=0.5, seed=0, device=device)
    dense = layer.to_linear()
    x = torch.randn(6, K, device=device)
    with torch.autocast(device.type, dtype):
        ours, theirs = layer(x), dense(x)
    assert ours.dtype == theirs.dtype == dtype
    torch.testing.assert_close(ours, theirs, atol=2e-2, rtol=2e-2)
    ours.sum().backward()
    theirs.sum().backward()
    assert layer.values.grad is not None
    assert dense.weight.grad is not None
    assert layer.values.grad.dtype == dense.weight.grad.dtype == torch.float32
    torch.testing.assert_close(layer.values.grad, layer.pattern.gather(dense.weight.grad), atol=2e-2, rtol=2e-2)


def test_autocast_leaves_float64_alone_as_linear_does() -> None:
    layer = SparseLinear(K, M, density=0.5, seed=0, dtype=torch.float64)
    x = torch.randn(6, K, dtype=torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = layer(x), layer.to_linear()(x)
    assert ours.dtype == theirs.dtype == torch.float64
    torch.testing.assert_close(ours, theirs)


def test_compiled_without_graph_breaks_equals_eager() -> None:
    # `aot_eager` traces forward and backward through the shape functions but calls no C++ compiler.
    torch.compiler.reset()
    model = nn.Sequential(SparseLinear(K, M, density=0.5, seed=0), nn.GELU(), SparseLinear(M, 4, density=0.5, seed=1))
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    x = torch.randn(5, K)

    def assert_equal() -> None:
        outputs, gradients = [], []
        for run in (model, compiled):
            model.zero_grad()
            output = run(x)
            output.square().sum().backward()
            outputs.append(output.detach())
            gradients.append([parameter.grad for parameter in model.parameters()])
        torch.testing.assert_close(*outputs, rtol=0, atol=0)
        torch.testing.assert_close(*gradients, rtol=0, atol=0)

    assert_equal()
    # A new topology behind the compiled graph's back.
    layer = model[0]
    assert isinstance(layer, SparseLinear)
    pattern = pattern_of(seed=5)
    layer.set_topology(pattern, torch.randn(pattern.nnz))
    assert_equal()
    torch.compiler.reset()


def test_gradient_checkpointing_matches_plain_backward() -> None:
    layer = SparseLinear(K, M, density=0.5, seed=0)
    x = torch.randn(4, K, requires_grad=True)
    plain = torch.autograd.grad(layer(x).square().sum(), (x, *layer.parameters()))
    again = torch.autograd.grad(checkpoint(layer, x, use_reentrant=False).square().sum(), (x, *layer.parameters()))
    torch.testing.assert_close(again, plain, rtol=0, atol=0)


class Seen(TorchDispatchMode):
    """Notes the name of every operation."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("backend", ["masked", "csr"])
def test_who_looks_sees_the_custom_op_and_the_same_bits(backend: str) -> None:
    pattern = pattern_of()
    x, values, _, g = inputs(pattern, 70, dtype=torch.float32)

    def step() -> tuple[Tensor, ...]:
        y = sparse_linear(x, values, pattern, None, backend)
        return y, *torch.autograd.grad(y, (x, values), g)

    direct = step()
    with Seen() as seen:
        dispatched = step()
    assert {"sparsetrain.sparse_linear.default", "sparsetrain.sparse_linear_backward.default"} <= seen.names
    for ours, theirs in zip(direct, dispatched, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("backend", ["masked", "csr", "bsr"])
def test_a_penalty_on_the_gradient_of_a_linear_loss_is_refused_not_dropped(backend: str) -> None:
    pattern = (
        pattern_of() if backend != "bsr" else SparsityPattern.from_mask(torch.ones(8, 12, dtype=torch.bool), (4, 4))
    )
    x, values, *_ = inputs(pattern, 3, dtype=torch.float32)
    output = sparse_linear(x, values, pattern, None, backend).sum()
    (first,) = torch.autograd.grad(output, (x,), create_graph=True)
    with pytest.raises(RuntimeError, match="a sparse layer has no second derivative"):
        (output + first.square().sum()).backward()


def test_double_backward_is_refused_in_words() -> None:
    pattern = pattern_of()
    x, values, bias, _ = inputs(pattern, 3)
    output = sparse_linear(x, values, pattern, bias).square().sum()
    first = torch.autograd.grad(output, (x, values), create_graph=True)
    with pytest.raises(RuntimeError, match="a sparse layer has no second derivative"):
        sum(gradient.square().sum() for gradient in first).backward()


@pytest.mark.parametrize(
    ("shape", "nnz", "message"),
    [
        ((3, K + 1), 0, rf"the input has shape \(3, {K + 1}\); its last dimension must be {K}"),
        ((), 0, r"the input has shape \(\)"),
        ((3, K), 1, "values have shape .* nonzeros"),
    ],
)
def test_shapes_that_do_not_fit_are_named(shape: tuple[int, ...], nnz: int, message: str) -> None:
    pattern = pattern_of()
    with pytest.raises(UserError, match=message):
        sparse_linear(torch.randn(shape), torch.randn(pattern.nnz + nnz), pattern)


@pytest.mark.parametrize("leading", [(), (3,), (2, 3)])
@pytest.mark.parametrize("backend", ["masked", "csr"])
def test_an_output_may_be_changed_in_place(leading: tuple[int, ...], backend: str) -> None:
    layer = SparseLinear(K, M, density=0.5, bias=False, seed=0, backend=backend)
    x = torch.randn(*leading, K)
    (ours,) = torch.autograd.grad(torch.relu_(layer(x)).sum(), (layer.values,))
    (theirs,) = torch.autograd.grad(torch.relu(x @ layer.dense_weight().t()).sum(), (layer.values,))
    torch.testing.assert_close(ours, theirs)


class _Stop(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> None:
        return None


def test_no_gradient_stays_none() -> None:
    layer = SparseLinear(K, M, density=0.5, seed=0)
    _Stop.apply(layer(torch.randn(3, K))).sum().backward()
    assert layer.values.grad is None


@pytest.mark.parametrize("backend", ["auto", "masked"])
def test_a_layer_traced_with_symbolic_sizes_equals_itself(backend: str) -> None:
    layer = SparseLinear(128, 256, density=0.3, seed=0, backend=backend)
    x = torch.randn(6, 128)
    graph = make_fx(layer, tracing_mode="symbolic", _allow_non_fake_inputs=True)(x)
    torch.testing.assert_close(graph(x), layer(x))


def test_indices_on_another_device_are_refused_not_read() -> None:
    layer = SparseLinear(128, 256, density=0.3, seed=0)
    pattern = layer.pattern
    elsewhere = SparsityPattern.of_sorted(pattern, pattern.row_ptr.to("meta"), pattern.col.to("meta"))
    with pytest.raises((NotImplementedError, RuntimeError)):
        sparse_linear(torch.randn(3, 128), layer.values, elsewhere, backend="masked")
