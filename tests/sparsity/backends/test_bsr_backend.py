"""The bsr backend in torch: against the dense layer, what it refuses, and that every element is written."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hardship import work_for_every_thread
from torch import Tensor

from sparsetrain.bench.memory import pattern_bytes
from sparsetrain.errors import UserError
from sparsetrain.sparsity import SparseLinear, SparsityPattern, sparse_linear
from sparsetrain.sparsity.backends.base import BACKENDS
from sparsetrain.sparsity.backends.bsr import BsrBackend

BACKEND = BsrBackend()


@pytest.fixture(autouse=True, scope="module")
def _all_threads() -> Iterator[None]:
    with work_for_every_thread():
        yield


def pattern_of(block: tuple[int, int], rows: int = 5, columns: int = 6, density: float = 0.5) -> SparsityPattern:
    occupied = torch.rand(rows, columns, generator=torch.Generator().manual_seed(0)) < density
    return SparsityPattern.from_mask(occupied.repeat_interleave(block[0], 0).repeat_interleave(block[1], 1), block)


def products(x: Tensor, values: Tensor, g: Tensor, pattern: SparsityPattern) -> tuple[Tensor, Tensor, Tensor]:
    y, kept = BACKEND.forward(x, values, pattern, keep=True)
    return y, *BACKEND.backward(g, x, values, kept, pattern, need_x=True, need_values=True)


@pytest.mark.parametrize("block", [(16, 16), (4, 4), (6, 10), (64, 8)])
@pytest.mark.parametrize("leading", [(3,), (2, 70), (0,)])
def test_value_and_gradients_match_the_masked_backend(block: tuple[int, int], leading: tuple[int, ...]) -> None:
    torch.set_num_threads(2)
    pattern = pattern_of(block)
    rows, columns = pattern.shape
    results = []
    x = torch.randn(*leading, columns, requires_grad=True)
    values, bias = torch.randn(pattern.nnz, requires_grad=True), torch.randn(rows, requires_grad=True)
    g = torch.randn(*leading, rows)
    for backend in ("masked", "bsr"):
        y = sparse_linear(x, values, pattern, bias, backend)
        results.append([y, *torch.autograd.grad(y, (x, values, bias), g)])
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)


def test_the_plain_contractions_match_the_dense_matrix() -> None:
    pattern = pattern_of((8, 4))
    rows, columns = pattern.shape
    values = torch.randn(pattern.nnz)
    dense, g = pattern.scatter(values), torch.randn(70, rows)
    wide = torch.randn(70, 3 * columns)
    for x in (wide[:, :columns], wide[:, ::3]):
        torch.testing.assert_close(BACKEND.matmul(x, values, pattern), x @ dense.t(), rtol=1e-4, atol=1e-4)
        expected = pattern.gather(g.t() @ x)
        torch.testing.assert_close(BACKEND.sampled(g, x, pattern), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(BACKEND.matmul_t(g, values, pattern), g @ dense, rtol=1e-4, atol=1e-4)


def test_gradient_and_input_of_two_types_are_multiplied_as_the_gradient_s() -> None:
    # Both are passed to the kernels as addresses, which say nothing about the type.
    g, x = torch.randn(70, 80), torch.randn(70, 96).bfloat16()
    for backend, block in (("bsr", (16, 16)), ("csr", (1, 1))):
        pattern = pattern_of(block, 80 // block[0], 96 // block[1])
        found, expected = (BACKENDS[backend].sampled(g, each, pattern) for each in (x, x.float()))
        assert found.dtype == torch.bfloat16
        torch.testing.assert_close(found.float(), expected, rtol=1e-2, atol=1e-2)


def test_autocast_computes_in_bfloat16() -> None:
    layer = SparseLinear(96, 80, pattern=pattern_of((16, 16)), backend="bsr")
    x = torch.randn(70, 96)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), layer.to_linear()(x), atol=5e-2, rtol=5e-2)
    y.sum().backward()
    assert layer.values.grad is not None


@pytest.mark.parametrize(("block", "message"), [((1, 1), "blocks of 1x1"), ((2, 8), "2x8"), ((8, 128), "8x128")])
def test_blocks_it_cannot_compute_are_refused_in_a_line(block: tuple[int, int], message: str) -> None:
    pattern = pattern_of(block, 3, 3, 1.0)
    with pytest.raises(UserError, match=message):
        sparse_linear(torch.randn(2, pattern.shape[1]), torch.randn(pattern.nnz), pattern, backend="bsr")


def test_index_structures_take_little_beside_the_values() -> None:
    pattern = pattern_of((16, 16), 64, 64, 0.25)
    own = pattern_bytes(pattern)
    products(torch.randn(3, 1024), torch.randn(pattern.nnz), torch.randn(3, 1024), pattern)
    assert 0 < pattern_bytes(pattern) - own <= 0.05 * pattern.nnz


def test_block_lists_have_block_columns_of_their_own() -> None:
    # Shared with the pattern they would change when a layer loads another mask in place, and would be counted once.
    pattern = pattern_of((16, 8))
    rows, columns = pattern.shape
    products(torch.randn(3, columns), torch.randn(pattern.nnz), torch.randn(3, rows), pattern)
    blocks, turned = (pattern._derived[name] for name in ("bsr", "bsr_transposed"))
    before = blocks.index.copy()
    assert not any(np.shares_memory(each.index, pattern.col.numpy()) for each in (blocks, turned))
    pattern.col.add_(1)
    np.testing.assert_array_equal(blocks.index, before)
