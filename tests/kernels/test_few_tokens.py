"""The kernels for few tokens against scipy in float64: any shape, any number of tokens, both types of values."""

from __future__ import annotations

import ctypes
import math
import mmap
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import product
from unittest import mock

import numpy as np
import pytest
import scipy.sparse
import torch
from hardship import fill_with_poison, lend_at_most, strided, work_for_every_thread
from hypothesis import given
from hypothesis import strategies as st

from sparsetrain.kernels.few_tokens_bitmap import MOST as MOST_BY_BITMAP
from sparsetrain.kernels.few_tokens_bitmap import SPREADS, SPREADS_BFLOAT16
from sparsetrain.kernels.few_tokens_layout import WIDTH, build_bitmap, build_columns
from sparsetrain.sparsity import SparseLinear, SparsityPattern
from sparsetrain.sparsity.backends import few_tokens as backend
from sparsetrain.sparsity.backends.few_tokens import MOST, few_tokens, few_tokens_gradients

TOKENS = (1, 2, 7, 8, 9, 16, 17, 31, 32, 33, 47, 48)


def pattern_of(rows: int, columns: int, density: float, seed: int = 0) -> SparsityPattern:
    mask = torch.rand(rows, columns, generator=torch.Generator().manual_seed(seed)) < density
    return SparsityPattern.from_mask(mask)


@contextmanager
def way(bitmap: bool, *patterns: SparsityPattern) -> Iterator[None]:
    """Let a bit of each weight, or 16 bits of each nonzero, say where the nonzeros are, on any processor."""
    with mock.patch.object(backend, "_by_bitmap", lambda density, tokens, narrow: bitmap and tokens <= MOST_BY_BITMAP):
        for pattern in patterns:
            pattern._derived.pop("few_tokens_calls", None)
        yield
    for pattern in patterns:
        pattern._derived.pop("few_tokens_calls", None)


def check(pattern: SparsityPattern, x: torch.Tensor, values: torch.Tensor) -> None:
    """Compare both ways with scipy within 2e-6 of the root of the sum of the squares of the terms, times four."""
    arrays = (values.double().numpy(), pattern.col.numpy(), pattern.row_ptr.numpy())
    matrix = scipy.sparse.csr_matrix(arrays, shape=pattern.shape)
    wide = x.double().numpy()
    expected, size = (matrix @ wide.T).T, np.sqrt((matrix.power(2) @ (wide**2).T).T)
    rounding = 2.0**-8 * np.abs(expected) if x.dtype == torch.bfloat16 else 0.0
    for bitmap in (False, True):
        with way(bitmap, pattern):
            found = few_tokens(x, values, pattern)
        assert found.dtype == x.dtype
        assert found.shape == (len(x), pattern.shape[0])
        error = np.abs(found.double().numpy() - expected)
        assert (error <= 8e-6 * np.maximum(size, 1e-3) + rounding).all(), (bitmap, float(error.max()))


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16], ids=str)
def test_products_equal_scipy(tokens: int, kind: torch.dtype) -> None:
    with work_for_every_thread():
        for threads, (rows, columns, density) in product((1, 2, 3), ((37, 53, 0.3), (130, 96, 0.05), (16, 16, 1.0))):
            torch.set_num_threads(threads)
            pattern = pattern_of(rows, columns, density)
            check(pattern, torch.randn(tokens, columns), torch.randn(pattern.nnz).to(kind))
            check(pattern, torch.randn(tokens, columns).bfloat16(), torch.randn(pattern.nnz).to(kind))


@given(st.integers(1, 40), st.integers(1, 90), st.integers(1, MOST), st.floats(0.0, 1.0), st.integers(0, 99))
def test_any_shape(rows: int, columns: int, tokens: int, density: float, seed: int) -> None:
    pattern = pattern_of(rows, columns, density, seed)
    draws = torch.Generator().manual_seed(seed)
    x, values = torch.randn(tokens, columns, generator=draws), torch.randn(pattern.nnz, generator=draws)
    check(pattern, x, values)
    check(pattern, strided(x, 2, 1, 3), values)
    check(pattern, strided(x, 1, 3, 0), values)
    check(pattern, x.T.contiguous().T, values)


@pytest.mark.parametrize("block", [(4, 4), (16, 16), (5, 8), (64, 32), (7, 11)], ids=str)
@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16], ids=str)
def test_blocks_equal_scipy(block: tuple[int, int], kind: torch.dtype) -> None:
    coarse = torch.rand(7, 9, generator=torch.Generator().manual_seed(1)) < 0.4
    mask = coarse.repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)
    pattern = SparsityPattern.from_mask(mask, block)
    single = SparsityPattern.from_mask(mask)
    values = torch.randn(pattern.nnz).to(kind)
    dense = pattern.scatter(values)
    with work_for_every_thread():
        for threads, tokens in product((1, 3), TOKENS):
            torch.set_num_threads(threads)
            x = torch.randn(tokens, mask.shape[1])
            # The same matrix by single weights, which are compared with scipy above.
            expected = few_tokens(x.double().float(), single.gather(dense), single)
            torch.testing.assert_close(few_tokens(x, values, pattern), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("columns", [WIDTH, WIDTH + 1, 65536, 70003])
@pytest.mark.parametrize("tokens", [1, 3, 16, 40])
def test_wide_inputs(columns: int, tokens: int) -> None:
    for rows, density in ((19, 0.01), (2, 1.0)):
        pattern = pattern_of(rows, columns, density)
        check(pattern, torch.randn(tokens, columns), torch.randn(pattern.nnz))


def before_a_page_without_access(count: int) -> torch.Tensor:
    """Return ``count`` floats behind which nothing can be read."""
    page = mmap.PAGESIZE
    readable = -(-4 * count // page) * page
    memory = mmap.mmap(-1, readable + 16 * page)
    behind = ctypes.addressof(ctypes.c_char.from_buffer(memory)) + readable
    protect = ctypes.CDLL(None, use_errno=True).mprotect
    protect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    assert protect(behind, 16 * page, 0) == 0
    return torch.frombuffer(memory, dtype=torch.float32, count=count, offset=readable - 4 * count)


@pytest.mark.parametrize("bitmap", [False, True], ids=["columns", "bitmap"])
@pytest.mark.parametrize("tokens", [1, 3, 7])
def test_nothing_behind_the_end_of_an_array_is_read(bitmap: bool, tokens: int) -> None:
    """The nonzeros behind those of a row may belong to another segment; their columns lie behind the input there."""
    columns = WIDTH + 8
    mask = torch.zeros(64, columns, dtype=torch.bool)
    mask[:, [WIDTH - 192, WIDTH - 92, WIDTH]] = True
    pattern = SparsityPattern.from_mask(mask)
    x = before_a_page_without_access(tokens * columns).view(tokens, columns)
    x.copy_(torch.arange(tokens * columns).view(tokens, columns) % 999)
    values = before_a_page_without_access(pattern.nnz).fill_(1.0)
    with way(bitmap, pattern):
        y = few_tokens(x, values, pattern)
    assert y.tolist() == (x @ mask.float().t()).tolist()


def test_a_bitmap_has_a_bit_of_every_weight() -> None:
    mask = torch.rand(11, 40, generator=torch.Generator().manual_seed(0)) < 0.3
    pattern = SparsityPattern.from_mask(mask)
    found = build_bitmap(pattern.row_ptr.numpy(), pattern.col.numpy(), 40)
    bits = np.unpackbits(found.bitmap.astype("<u2").view(np.uint8), axis=1, bitorder="little")
    assert bits.shape == (11, 48)
    assert (bits[:, :40] == mask.numpy()).all()
    assert not bits[:, 40:].any()
    assert found.bounds.tolist() == pattern.row_ptr.tolist()


def test_segments_hold_every_nonzero_once() -> None:
    pattern = pattern_of(11, 100, 0.3)
    found = build_columns(pattern.row_ptr.numpy(), pattern.col.numpy(), 100, width=16)
    assert found.bounds.shape == (8, 11)
    for row, segment in product(range(11), range(7)):
        nonzeros = slice(found.bounds[segment, row], found.bounds[segment + 1, row])
        columns = segment * 16 + found.places[nonzeros].astype(np.int64)
        assert columns.tolist() == [
            column for column in pattern.col[nonzeros].tolist() if segment * 16 <= column < segment * 16 + 16
        ]
    assert found.bounds[0].tolist() == pattern.row_ptr[:-1].tolist()
    assert found.bounds[-1].tolist() == pattern.row_ptr[1:].tolist()


@pytest.mark.parametrize("tokens", [1, 5, 20])
def test_empty_rows_are_zero_and_every_element_is_written(tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    mask = torch.zeros(70, 40, dtype=torch.bool)
    mask[5, 3] = mask[69, 39] = True
    pattern = SparsityPattern.from_mask(mask)
    fill_with_poison(monkeypatch)
    with work_for_every_thread():
        torch.set_num_threads(4)
        check(pattern, torch.randn(tokens, 40), torch.randn(2))


@pytest.mark.parametrize("bitmap", [False, True], ids=["columns", "bitmap"])
@pytest.mark.parametrize("tokens", [1, 4, 16])
def test_what_a_row_does_not_read_does_not_reach_it(tokens: int, bitmap: bool) -> None:
    """An infinite input or value stays with the rows that have a nonzero there, unlike in a dense product."""
    pattern = pattern_of(64, 64, 0.2)
    x, values = torch.randn(tokens, 64), torch.randn(pattern.nnz)
    x[:, 7], values[100] = math.inf, math.nan
    with way(bitmap, pattern):
        found = few_tokens(x, values, pattern).isfinite().all(0)
    row_of_value = int((pattern.row_ptr <= 100).sum()) - 1
    for row in range(64):
        columns = pattern.col[pattern.row_ptr[row] : pattern.row_ptr[row + 1]].tolist()
        assert bool(found[row]) == (7 not in columns and row != row_of_value), row


@pytest.mark.parametrize("bitmap", [False, True], ids=["columns", "bitmap"])
def test_threads_do_not_change_a_bit(bitmap: bool) -> None:
    pattern, x = pattern_of(200, 128, 0.2), torch.randn(16, 128)
    values = torch.randn(pattern.nnz)
    found = []
    with work_for_every_thread(), way(bitmap, pattern):
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            found += [few_tokens(x, values, pattern), few_tokens(x[:1], values, pattern)]
    assert all(torch.equal(found[n], found[n % 2]) for n in range(6))


@pytest.mark.parametrize(
    ("density", "tokens", "kind", "by"),
    [
        *((0.9, tokens, torch.float32, "few_tokens_bitmap") for tokens in (1, 4, 5, 8, 9, 12)),
        *((0.9, tokens, torch.float32, "few_tokens") for tokens in (13, 16, 17)),
        *((0.3, tokens, torch.float32, "few_tokens_bitmap") for tokens in (1, 4)),
        *((0.3, tokens, torch.float32, "few_tokens") for tokens in (5, 9, 17)),
        *((0.2, tokens, torch.float32, "few_tokens") for tokens in (1, 4)),
        (0.9, 3, torch.bfloat16, "few_tokens_bitmap"),
    ],
)
def test_auto_takes_them_where_no_gradient_is_needed(density: float, tokens: int, kind: torch.dtype, by: str) -> None:
    # So small that a training step in float32 is dense on every processor.
    layer, x = SparseLinear(48, 32, density=density, seed=0, dtype=kind), torch.randn(tokens, 48, dtype=kind)
    before, derived = layer(x), layer.pattern._derived
    assert kind != torch.float32 or not derived.keys() & {"few_tokens", "few_tokens_bitmap"}
    with torch.no_grad():
        torch.testing.assert_close(layer(x), before)
    spreads = SPREADS if kind == torch.float32 else SPREADS_BFLOAT16
    assert derived.keys() & {"few_tokens", "few_tokens_bitmap"} == {by if spreads else "few_tokens"}


def check_gradients(pattern: SparsityPattern, g: torch.Tensor, x: torch.Tensor, values: torch.Tensor) -> None:
    """Compare both gradients with scipy within the same bounds; each alone has the same bits as together."""
    rows, columns = np.repeat(np.arange(pattern.shape[0]), np.diff(pattern.row_ptr.numpy())), pattern.col.numpy()
    matrix = scipy.sparse.csr_matrix((values.double().numpy(), (rows, columns)), shape=pattern.shape)
    wide, inputs = g.double().numpy(), x.double().numpy()
    expected = [(matrix.T @ wide.T).T, np.einsum("tn,tn->n", wide[:, rows], inputs[:, columns])]
    sizes = [
        np.sqrt((matrix.power(2).T @ (wide**2).T).T),
        np.sqrt(np.einsum("tn,tn->n", wide[:, rows] ** 2, inputs[:, columns] ** 2)),
    ]
    found = few_tokens_gradients(g, x, values, pattern, need_x=True, need_values=True)
    assert (found[0].dtype, found[1].dtype) == (g.dtype, values.dtype)
    assert (found[0].shape, found[1].shape) == (x.shape, values.shape)
    for one, there, size in zip(found, expected, sizes, strict=True):
        rounding = 2.0**-8 * np.abs(there) if one.dtype == torch.bfloat16 else 0.0
        error = np.abs(one.double().numpy() - there)
        assert (error <= 8e-6 * np.maximum(size, 1e-3) + rounding).all(), float(error.max())
    alone = few_tokens_gradients(g, x, values, pattern, need_x=True, need_values=False)
    assert torch.equal(alone[0], found[0])
    assert alone[1].numel() == 0
    alone = few_tokens_gradients(g, x, values, pattern, need_x=False, need_values=True)
    assert torch.equal(alone[1], found[1])
    assert alone[0].numel() == 0


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16], ids=str)
def test_gradients_equal_scipy(tokens: int, kind: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    fill_with_poison(monkeypatch)
    with work_for_every_thread():
        for threads, (rows, columns, density) in product((1, 2, 3), ((37, 53, 0.3), (130, 96, 0.05), (16, 16, 1.0))):
            torch.set_num_threads(threads)
            pattern = pattern_of(rows, columns, density)
            g, x, values = torch.randn(tokens, rows), torch.randn(tokens, columns), torch.randn(pattern.nnz)
            check_gradients(pattern, g, x, values.to(kind))
            check_gradients(pattern, g.bfloat16(), x.bfloat16(), values.to(kind))
            check_gradients(pattern, strided(g, 2, 1, 3), strided(x, 1, 3, 0), values)


def test_gradients_of_fewer_threads_than_were_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    pattern = pattern_of(130, 96, 0.3)
    asked = lend_at_most(2, monkeypatch)
    fill_with_poison(monkeypatch)
    torch.set_num_threads(5)
    with work_for_every_thread():
        check_gradients(pattern, torch.randn(9, 130), torch.randn(9, 96), torch.randn(pattern.nnz))
    assert asked == [5, 5, 5]


def test_gradients_of_wide_inputs_and_empty_rows() -> None:
    mask = torch.rand(9, 3 * WIDTH + 5, generator=torch.Generator().manual_seed(0)) < 0.01
    mask[4] = False
    pattern = SparsityPattern.from_mask(mask)
    for tokens in (1, 8, 40):
        check_gradients(pattern, torch.randn(tokens, 9), torch.randn(tokens, mask.shape[1]), torch.randn(pattern.nnz))
