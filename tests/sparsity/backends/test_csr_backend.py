"""The csr backend against scipy in float64: values and both gradients, any shape, and how it behaves in torch."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import scipy.sparse
import torch
from hardship import strided, work_for_every_thread
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sparsetrain.bench.memory import pattern_bytes
from sparsetrain.errors import UserError
from sparsetrain.models import ModelConfig, Transformer
from sparsetrain.sparsity import SparseLinear, SparsityPattern, sparse_layers, sparse_linear
from sparsetrain.sparsity.backends import layouts
from sparsetrain.sparsity.backends.csr import CsrBackend

BACKEND = CsrBackend()


@pytest.fixture(autouse=True, scope="module")
def _all_threads() -> Iterator[None]:
    with work_for_every_thread():
        yield


def pattern_of(rows: int, columns: int, density: float, seed: int = 0) -> SparsityPattern:
    mask = torch.rand(rows, columns, generator=torch.Generator().manual_seed(seed)) < density
    return SparsityPattern.from_mask(mask)


def bound(size: np.ndarray) -> np.ndarray:
    """2e-6 sqrt(terms) of a large term, which is four times the root of the mean of the squares."""
    return 2e-6 * 4 * np.maximum(size, 1e-3)


def exact(pattern: SparsityPattern, x: Tensor, values: Tensor, g: Tensor) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return the three products by scipy's CSR in float64, and the root of the sum of their terms' squares."""
    arrays = (values.double().numpy(), pattern.col.numpy(), pattern.row_ptr.numpy())
    matrix = scipy.sparse.csr_matrix(arrays, shape=pattern.shape)
    wide, wide_g = x.double().numpy(), g.double().numpy()
    rows, columns = matrix.nonzero() if matrix.nnz == matrix.count_nonzero() else _places(pattern)

    def products(w: Any, x: np.ndarray, g: np.ndarray) -> list[np.ndarray]:
        return [(w @ x.T).T, (w.T @ g.T).T, np.einsum("ti,ti->i", g[:, rows], x[:, columns])]

    squares = products(matrix.power(2), wide**2, wide_g**2)
    return list(zip(products(matrix, wide, wide_g), map(np.sqrt, squares), strict=True))


def _places(pattern: SparsityPattern) -> tuple[np.ndarray, np.ndarray]:
    return pattern.block_rows().numpy(), pattern.col.numpy()


def check(
    pattern: SparsityPattern,
    tokens: int,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    steps: tuple[int, int, int] = (1, 1, 0),
) -> None:
    torch.manual_seed(seed)
    rows, columns = pattern.shape
    x, g = (strided(torch.randn(tokens, side).to(dtype), *steps) for side in (columns, rows))
    values = torch.randn(pattern.nnz).to(dtype)
    ours = products(x, values, g, pattern)
    assert all(part.is_contiguous() for part in ours)
    rounding = 0.0 if dtype == torch.float32 else 2.0**-8
    for mine, (theirs, size) in zip(ours, exact(pattern, x, values, g), strict=True):
        limit = bound(size) + rounding * np.abs(theirs)
        assert np.all(np.abs(mine.double().numpy() - theirs) <= limit)


def products(x: Tensor, values: Tensor, g: Tensor, pattern: SparsityPattern) -> tuple[Tensor, Tensor, Tensor]:
    y, kept = BACKEND.forward(x, values, pattern, keep=True)
    return y, *BACKEND.backward(g, x, values, kept, pattern, need_x=True, need_values=True)


@given(
    rows=st.integers(1, 150),
    columns=st.integers(1, 300),
    tokens=st.integers(1, 300),
    density=st.sampled_from([0.0, 0.003, 0.05, 0.1, 0.25, 0.5, 0.9, 1.0]),
    threads=st.integers(1, 5),
    steps=st.tuples(st.integers(1, 3), st.integers(1, 2), st.integers(0, 20)),
    seed=st.integers(0, 2**31),
)
def test_the_three_products_match_scipy(
    rows: int, columns: int, tokens: int, density: float, threads: int, steps: tuple[int, int, int], seed: int
) -> None:
    torch.set_num_threads(threads)
    check(pattern_of(rows, columns, density, seed), tokens, seed, steps=steps)


@pytest.mark.parametrize("tokens", [1, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129, 192, 1000])
def test_every_tail_of_a_tile_matches_scipy(tokens: int) -> None:
    check(pattern_of(70, 131, 0.3), tokens)


@pytest.mark.parametrize(
    ("rows", "columns", "density"),
    [(1, 1, 1.0), (600, 1100, 0.02), (1100, 40, 0.3), (3, 5000, 0.01), (16, 4096, 0.0008), (513, 64, 1.0)],
)
def test_panels_blocks_and_long_gaps_match_scipy(rows: int, columns: int, density: float) -> None:
    check(pattern_of(rows, columns, density), 130)


def test_a_million_tokens_match_scipy() -> None:
    check(pattern_of(3, 2, 0.7), 1_000_000)


def test_bfloat16_is_multiplied_in_float32_and_rounded_once() -> None:
    check(pattern_of(70, 131, 0.3), 150, dtype=torch.bfloat16)


def test_no_nonzeros_give_zeros() -> None:
    pattern = SparsityPattern.from_mask(torch.zeros(5, 7, dtype=torch.bool))
    y, grad_x, grad_values = products(torch.randn(70, 7), torch.empty(0), torch.randn(70, 5), pattern)
    assert not y.any()
    assert not grad_x.any()
    assert grad_values.shape == (0,)


def test_the_plain_contractions_match_scipy() -> None:
    pattern = pattern_of(40, 30, 0.3)
    x, g, values = torch.randn(70, 30), torch.randn(70, 40), torch.randn(pattern.nnz)
    for mine, (theirs, size) in zip(
        (BACKEND.matmul(x, values, pattern), BACKEND.matmul_t(g, values, pattern), BACKEND.sampled(g, x, pattern)),
        exact(pattern, x, values, g),
        strict=True,
    ):
        assert np.all(np.abs(mine.numpy() - theirs) <= bound(size))


def test_strided_inputs_match_their_copies() -> None:
    pattern = pattern_of(40, 30, 0.3)
    values = torch.randn(pattern.nnz)
    wide = torch.randn(70, 90)
    for x in (wide[:, 20:50], wide[:, ::3], wide[:30, :70].t(), wide[:1, :30].expand(70, 30), wide[::2, :30]):
        assert torch.equal(BACKEND.matmul(x, values, pattern), BACKEND.matmul(x.contiguous(), values, pattern))
        g = torch.randn(len(x), 40)
        assert torch.equal(BACKEND.sampled(g, x, pattern), BACKEND.sampled(g, x.contiguous(), pattern))


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_the_same_call_gives_the_same_bits(threads: int) -> None:
    torch.set_num_threads(threads)
    pattern = pattern_of(200, 300, 0.2)
    x, g, values = torch.randn(500, 300), torch.randn(500, 200), torch.randn(pattern.nnz)
    first = products(x, values, g, pattern)
    for _ in range(3):
        for mine, other in zip(products(x, values, g, pattern), first, strict=True):
            assert torch.equal(mine, other)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_bad_numbers_reach_what_is_connected_to_them_and_nothing_else(bad: float) -> None:
    pattern = pattern_of(40, 30, 0.2)
    mask = pattern.mask()
    x, g, values = torch.randn(70, 30), torch.randn(70, 40), torch.randn(pattern.nnz)
    x[3, 5], g[6, 7] = bad, bad
    y, grad_x, grad_values = products(x, values, g, pattern)
    hit = torch.zeros(70, 40, dtype=torch.bool)
    hit[3] = mask[:, 5]
    assert torch.equal(~y.isfinite(), hit)
    hit = torch.zeros(70, 30, dtype=torch.bool)
    hit[6] = mask[7]
    assert torch.equal(~grad_x.isfinite(), hit)
    rows, columns = mask.nonzero(as_tuple=True)
    assert torch.equal(~grad_values.isfinite(), (columns == 5) | (rows == 7))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SparseLinear(8, 8, density=1.0, backend="csr", dtype=torch.float64), "float32 and bfloat16.*float64"),
        (
            lambda: SparseLinear(
                8, 8, pattern=SparsityPattern.from_mask(torch.ones(8, 8, dtype=torch.bool), (4, 4)), backend="csr"
            ),
            "blocks of 4x4",
        ),
    ],
)
def test_what_it_cannot_compute_is_refused_in_a_line_and_auto_takes_another(make: Any, message: str) -> None:
    layer = make()
    x = torch.randn(3, 8, dtype=layer.values.dtype)
    with pytest.raises(UserError, match=message):
        layer(x)
    layer.backend = "auto"
    torch.testing.assert_close(layer(x), layer.to_linear()(x))


# -- inside torch ----------------------------------------------------------------------------------------------------


def saved(output: Tensor) -> list[Tensor]:
    """Return what the graph of one sparse product keeps."""
    node = output.grad_fn
    while node is not None and not hasattr(node, "saved_tensors"):
        node = node.next_functions[0][0]
    assert node is not None
    return [tensor for tensor in node.saved_tensors if tensor is not None]


@pytest.mark.parametrize("backend", ["csr", "bsr"])
def test_what_is_saved_is_the_input_itself_and_the_values(backend: str) -> None:
    block = (4, 4) if backend == "bsr" else (1, 1)
    layers = [SparseLinear(64, 32, density=0.25, seed=seed, bias=False, backend="csr") for seed in (0, 1)]
    for seed, layer in enumerate(layers):
        mask = torch.rand(32 // block[0], 64 // block[1], generator=torch.Generator().manual_seed(seed)) < 0.25
        pattern = SparsityPattern.from_mask(mask.repeat_interleave(block[0], 0).repeat_interleave(block[1], 1), block)
        layer.set_topology(pattern, torch.randn(pattern.nnz))
        layer.backend = backend
    x = torch.randn(256, 64, requires_grad=True) * 1.0
    # Layers that read the same activation save the same memory, as dense layers do.
    for layer in layers:
        kept = [tensor for tensor in saved(layer(x)) if tensor.is_floating_point() and tensor.numel()]
        assert {tensor.data_ptr() for tensor in kept} == {x.data_ptr(), layer.values.data_ptr()}


@pytest.mark.parametrize("backend", ["csr", "masked"])
def test_frozen_values_leave_the_input_to_be_freed(backend: str) -> None:
    layer = SparseLinear(64, 32, density=0.25, seed=0, bias=False, backend=backend)
    layer.values.requires_grad_(False)
    leaf = torch.randn(256, 64, requires_grad=True)
    x = leaf * 1.0
    alive = weakref.ref(x)
    output = layer(x)
    del x
    gc.collect()
    assert alive() is None
    output.sum().backward()
    torch.testing.assert_close(leaf.grad, torch.ones(256, 32) @ layer.dense_weight())


def test_no_gradients_keep_nothing() -> None:
    layer = SparseLinear(64, 32, density=0.25, seed=0, backend="csr")
    x = torch.randn(70, 64, requires_grad=True) * 1.0
    with torch.no_grad():
        assert layer(x).grad_fn is None


def test_checkpointing_and_frozen_inputs_match_plain_backward() -> None:
    layer = SparseLinear(64, 32, density=0.25, seed=0, backend="csr")
    x = torch.randn(70, 64, requires_grad=True)
    plain = torch.autograd.grad(layer(x).square().sum(), (x, *layer.parameters()))
    again = torch.autograd.grad(checkpoint(layer, x, use_reentrant=False).square().sum(), (x, *layer.parameters()))
    frozen = torch.autograd.grad(layer(x.detach()).square().sum(), tuple(layer.parameters()))
    for mine, other in zip(again, plain, strict=True):
        assert torch.equal(mine, other)
    for mine, other in zip(frozen, plain[1:], strict=True):
        assert torch.equal(mine, other)


def test_more_nonzeros_than_32_bits_count_are_refused() -> None:
    pattern: Any = SimpleNamespace(nnz=2**31, block=(1, 1))
    reason = CsrBackend().refusal(torch.float32, torch.device("cpu"), pattern)
    assert reason == "counts nonzeros in 32 bits; this pattern has 2147483648"


def test_double_backward_is_refused_in_words() -> None:
    layer = SparseLinear(8, 8, density=0.5, seed=0, backend="csr")
    x = torch.randn(3, 8, requires_grad=True)
    (first,) = torch.autograd.grad(layer(x).square().sum(), (x,), create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        first.sum().backward()


@pytest.mark.parametrize("mlp", ["gelu", "swiglu"])
def test_a_transformer_has_the_gradients_of_the_masked_backend(mlp: str) -> None:
    config = ModelConfig(d_model=48, n_layers=2, n_heads=2, vocab_size=64, mlp=mlp, sparsity=0.7, seed=0)
    model = Transformer(config)
    tokens = torch.randint(0, 64, (3, 50))
    results = []
    for backend in ("masked", "csr"):
        for _, layer in sparse_layers(model):
            layer.backend = backend
        model.zero_grad()
        loss = model.loss(tokens, tokens.roll(-1, 1))
        loss.backward()
        results.append([loss.detach(), *(parameter.grad for parameter in model.parameters())])
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-6)


def test_autocast_matches_the_dense_layer() -> None:
    layer = SparseLinear(64, 32, density=0.25, seed=0, backend="csr")
    dense = layer.to_linear()
    x = torch.randn(70, 64)
    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = layer(x), dense(x)
    assert ours.dtype == theirs.dtype == torch.bfloat16
    torch.testing.assert_close(ours, theirs, atol=2e-2, rtol=2e-2)
    ours.sum().backward()
    assert layer.values.grad is not None
    assert layer.values.grad.dtype == torch.float32


@pytest.mark.parametrize("frozen", [False, True])
def test_a_compiled_model_equals_an_eager_one(frozen: bool) -> None:
    torch.compiler.reset()
    model = nn.Sequential(
        SparseLinear(64, 48, density=0.3, seed=0, backend="csr"),
        nn.GELU(),
        SparseLinear(48, 8, density=0.5, seed=1, backend="csr"),
    )
    model[2].values.requires_grad_(not frozen)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    x = torch.randn(70, 64)
    gradients = []
    for run in (model, compiled):
        model.zero_grad()
        run(x).square().sum().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    torch.testing.assert_close(*gradients, rtol=0, atol=0)
    torch.compiler.reset()


@pytest.mark.parametrize(("density", "most"), [(0.5, 32.0), (0.25, 32.0), (0.1, 32.0), (0.05, 32.0)])
def test_persistent_bytes_of_a_nonzero_stay_below_those_of_two_dense_weights(density: float, most: float) -> None:
    pattern = pattern_of(1024, 1024, density)
    own = pattern_bytes(pattern)
    products(torch.randn(3, 1024), torch.randn(pattern.nnz), torch.randn(3, 1024), pattern)
    assert pattern_bytes(pattern) > own  # the layouts of both directions exist by now
    # Value, gradient and two moments of Adam in float32, and every index structure.
    assert 16 + pattern_bytes(pattern) / pattern.nnz <= most


def test_an_autograd_function_is_called_with_what_it_needs_only() -> None:
    pattern = pattern_of(16, 16, 0.5)
    x = torch.randn(4, 16)
    values = torch.randn(pattern.nnz, requires_grad=True)
    (gradient,) = torch.autograd.grad(sparse_linear(x, values, pattern, backend="csr").sum(), (values,))
    expected = pattern.gather(torch.ones(4, 16).t() @ x)
    torch.testing.assert_close(gradient, expected)


@pytest.mark.parametrize("default", [torch.bfloat16, torch.float64])
def test_another_default_type_changes_nothing(default: torch.dtype) -> None:
    pattern = pattern_of(70, 131, 0.3)
    x, g, values = torch.randn(150, 131), torch.randn(150, 70), torch.randn(pattern.nnz)
    expected = products(x, values, g, pattern)
    torch.set_default_dtype(default)
    try:
        found = products(x, values, g, pattern)
    finally:
        torch.set_default_dtype(torch.float32)
    for mine, other in zip(found, expected, strict=True):
        assert torch.equal(mine, other)


def test_strided_values_match_their_copy() -> None:
    pattern = pattern_of(40, 30, 0.3)
    x, g = torch.randn(70, 30), torch.randn(70, 40)
    for values in (torch.randn(pattern.nnz, 3)[:, 1], torch.randn(1).expand(pattern.nnz)):
        for mine, other in zip(
            products(x, values, g, pattern), products(x, values.contiguous(), g, pattern), strict=True
        ):
            assert torch.equal(mine, other)


@pytest.mark.parametrize("density", [0.4, 0.1])
def test_a_graph_keeps_the_values_of_its_topology(density: float) -> None:
    layer = SparseLinear(30, 40, density=0.4, seed=0, bias=False, backend="csr")
    x = torch.randn(70, 30, requires_grad=True)
    expected = torch.ones(70, 40) @ layer.dense_weight().detach()
    output = layer(x).sum()
    pattern = pattern_of(40, 30, density, 9)
    layer.set_topology(pattern, torch.randn(pattern.nnz))
    torch.testing.assert_close(torch.autograd.grad(output, (x,))[0], expected)


def test_a_number_that_means_another_pattern_here_is_not_trusted() -> None:
    right, wrong = pattern_of(40, 30, 0.3), pattern_of(40, 30, 0.3, 1)
    found = layouts.find(layouts.layout_id(wrong), right.row_ptr.clone(), right.col.clone(), [40, 30], [1, 1])
    assert found.equals(right)
