"""The block kernels against scipy's BSR and dense float64: any block, any shape, and every written element."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import scipy.sparse
import torch
from hardship import strided
from hypothesis import given
from hypothesis import strategies as st

from sparsetrain.kernels import bsr
from sparsetrain.kernels.bsr_layout import build_blocks, build_turned
from sparsetrain.kernels.simd.tiles import TILE

Array = Any
BLOCKS = [(16, 16), (4, 4), (8, 8), (32, 32), (64, 64), (4, 16), (16, 4), (64, 4), (5, 7), (6, 9), (33, 13), (4, 63)]


@dataclass(frozen=True)
class Matrix:
    """A block matrix: the CSR structure of its blocks, and its values."""

    shape: tuple[int, int]
    block: tuple[int, int]
    row_ptr: Array
    col: Array
    values: Array

    @property
    def bsr(self) -> Any:
        """scipy's matrix in float64; zeros are kept."""
        data = self.values.astype(np.float64).reshape(-1, *self.block)
        return scipy.sparse.bsr_matrix((data, self.col, self.row_ptr), shape=self.shape)

    def places(self) -> tuple[Array, Array]:
        """Return row and column of each value."""
        (bh, bw), blocks = self.block, len(self.col)
        row_of = np.repeat(np.arange(len(self.row_ptr) - 1), np.diff(self.row_ptr))
        rows = row_of[:, None, None] * bh + np.arange(bh)[None, :, None]
        columns = self.col[:, None, None] * bw + np.arange(bw)[None, None, :]
        size = (blocks, bh, bw)
        return np.broadcast_to(rows, size).reshape(-1), np.broadcast_to(columns, size).reshape(-1)


def matrix_of(block: tuple[int, int], rows: int, columns: int, density: float, seed: int = 0) -> Matrix:
    """Return a matrix of ``rows`` by ``columns`` blocks."""
    draw = np.random.default_rng(seed)
    present = draw.random((rows, columns)) < density
    row_ptr = np.concatenate([[0], np.cumsum(present.sum(1))]).astype(np.int64)
    col = np.nonzero(present)[1].astype(np.int32)
    values = draw.standard_normal(len(col) * block[0] * block[1], dtype=np.float32)
    return Matrix((rows * block[0], columns * block[1]), block, row_ptr, col, values)


def products(
    matrix: Matrix, x: Array, g: Array, threads: int = 1, pieces: int = 1, poison: float = np.nan
) -> tuple[Array, Array, Array]:
    """Return ``x @ W.T``, ``g @ W`` and the gradient of the values; outputs are filled with ``poison`` before."""
    rows, columns = matrix.shape
    plain = build_blocks(matrix.row_ptr, matrix.col, matrix.shape, matrix.block)
    turned = build_turned(matrix.row_ptr, matrix.col, matrix.shape, matrix.block)
    tokens, nnz, wide = len(x), len(matrix.values), x.dtype == np.float32

    def empty(*shape: int, dtype: Any = np.float32) -> Array:
        return np.full(shape, poison if dtype == np.float32 else 0x7FC0, dtype)

    y, dx = empty(tokens, rows, dtype=x.dtype), empty(tokens, columns, dtype=g.dtype)
    shared = {"tokens": tokens, "columns": columns, "rows": rows, "values": matrix.values}
    shared |= {"scratch": empty(threads, bsr.PANEL, TILE), "pieces": pieces, **plain.arguments}
    multiply = bsr.multiply if wide else bsr.multiply_bfloat16
    multiply(threads, x=x, y=y, packed=empty(threads, columns, TILE), **shared)
    sums, gradient, sharing = empty(threads, nnz), empty(nnz), np.full(1, 1 << 40, np.int64)
    gradients = bsr.gradients if wide else bsr.gradients_bfloat16
    gradients(
        threads,
        g=g,
        dx=dx,
        x=x,
        need_dx=1,
        need_values=1,
        g_packed=empty(threads, 2, rows, TILE),
        x_packed=empty(threads, 2, columns, TILE),
        sums=sums,
        sharing=sharing,
        **turned.turned_arguments,
        **shared,
    )
    bsr.add_shares(threads, sums=sums, shares=threads, sharing=sharing, nonzeros=nnz, target=gradient)
    return y, dx, gradient


def data(matrix: Matrix, tokens: int, seed: int = 1) -> tuple[Array, Array]:
    draw = np.random.default_rng(seed)
    return tuple(draw.standard_normal((tokens, side), dtype=np.float32) for side in matrix.shape[::-1])


def exact(matrix: Matrix, x: Array, g: Array) -> list[tuple[Array, Array]]:
    """Return the three products in float64 and, for each element, the root of the sum of the squares of its terms."""
    x, g, (rows, columns) = x.astype(np.float64), g.astype(np.float64), matrix.places()
    w = matrix.bsr
    size = abs(w).power(2)
    results = [(w @ x.T).T, (w.T @ g.T).T, (g.T @ x)[rows, columns]]
    squares = [(size @ (x * x).T).T, (size.T @ (g * g).T).T, ((g * g).T @ (x * x))[rows, columns]]
    return list(zip(results, (np.sqrt(square) for square in squares), strict=True))


def bound(size: Array) -> Array:
    """Return the allowed error: 2e-6 sqrt(terms) times a large term, taken as four times the RMS of the terms."""
    return 2e-6 * 4 * np.maximum(size, 1e-3)


def check(matrix: Matrix, tokens: int, threads: int = 1, pieces: int = 1, row_step: int = 1, before: int = 0) -> None:
    x, g = (strided(torch.from_numpy(array), row_step, 1, before).numpy() for array in data(matrix, tokens))
    ours = products(matrix, x, g, threads, pieces)
    for mine, (theirs, size) in zip(ours, exact(matrix, x, g), strict=True):
        assert mine.shape == theirs.shape
        assert np.all(np.abs(mine - theirs) <= bound(size))


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("tokens", [1, 65, 200])
def test_every_kind_of_block_matches_scipy(block: tuple[int, int], tokens: int) -> None:
    check(matrix_of(block, 5, 7, 0.4), tokens)


@given(
    block=st.tuples(st.integers(4, 64), st.integers(4, 64)),
    rows=st.integers(1, 12),
    columns=st.integers(1, 12),
    density=st.sampled_from([0.0, 0.1, 0.3, 0.7, 1.0]),
    tokens=st.integers(1, 300),
    threads=st.integers(1, 3),
    pieces=st.integers(1, 5),
    row_step=st.integers(1, 3),
    before=st.integers(0, 20),
    seed=st.integers(0, 2**31),
)
def test_the_three_products_match_scipy(
    block: tuple[int, int], rows: int, columns: int, density: float, tokens: int, seed: int, **how: int
) -> None:
    check(matrix_of(block, rows, columns, density, seed), tokens, **how)


@pytest.mark.parametrize("tokens", [1, 15, 16, 17, 31, 32, 33, 47, 48, 49, 63, 64, 65, 127, 128, 129, 192])
def test_every_tail_of_a_tile_matches_scipy(tokens: int) -> None:
    check(matrix_of((6, 5), 5, 9, 0.5), tokens)


def test_many_panels_of_rows_and_columns_match_scipy() -> None:
    check(matrix_of((4, 8), 300, 70, 0.05), 70)
    check(matrix_of((16, 16), 40, 70, 0.1), 70)


def test_a_million_tokens_match_scipy() -> None:
    check(matrix_of((4, 4), 1, 2, 1.0), 1_000_000, threads=2)


def test_the_products_are_those_of_the_dense_matrix() -> None:
    matrix = matrix_of((16, 16), 6, 5, 0.5)
    x, g = data(matrix, 90)
    dense, (rows, columns) = matrix.bsr.toarray(), matrix.places()
    y, dx, gradient = products(matrix, x, g)
    np.testing.assert_allclose(y, x @ dense.T, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(dx, g @ dense, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(gradient, (g.T @ x)[rows, columns], rtol=1e-4, atol=1e-4)


def test_rows_that_lie_apart_match_their_copies() -> None:
    matrix = matrix_of((8, 12), 4, 5, 0.5)
    x, g = data(matrix, 70)
    apart = []
    for array in (x, g):
        wide = np.full((70, array.shape[1] + 5), np.nan, np.float32)
        wide[:, 3:-2] = array
        apart.append(wide[:, 3:-2])
    for mine, other in zip(products(matrix, *apart), products(matrix, x, g), strict=True):
        assert np.array_equal(mine, other)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_the_same_call_gives_the_same_bits(threads: int) -> None:
    matrix = matrix_of((16, 16), 10, 12, 0.3)
    x, g = data(matrix, 500)
    first = products(matrix, x, g, threads)
    for poison in (np.nan, 0.0, 1e30):
        for mine, other in zip(products(matrix, x, g, threads, poison=poison), first, strict=True):
            assert np.array_equal(mine, other)


def test_empty_rows_and_columns_of_blocks_give_zeros() -> None:
    matrix = matrix_of((5, 6), 4, 3, 0.0)
    y, dx, gradient = products(matrix, *data(matrix, 70))
    assert not y.any()
    assert not dx.any()
    assert gradient.shape == (0,)


@pytest.mark.parametrize("block", [(16, 16), (5, 7)])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_bad_numbers_reach_what_is_connected_to_them_and_nothing_else(block: tuple[int, int], bad: float) -> None:
    matrix = matrix_of(block, 6, 7, 0.4)
    x, g = data(matrix, 70)
    rows, columns = matrix.places()
    mask = np.zeros(matrix.shape, bool)
    mask[rows, columns] = True
    x[69, 9], g[6, 20] = bad, bad
    y, dx, gradient = products(matrix, x, g)
    expected = np.zeros(y.shape, bool)
    expected[69] = mask[:, 9]
    assert np.array_equal(~np.isfinite(y), expected)
    expected = np.zeros(dx.shape, bool)
    expected[6] = mask[20]
    assert np.array_equal(~np.isfinite(dx), expected)
    assert np.array_equal(~np.isfinite(gradient), (columns == 9) | (rows == 20))


def test_bfloat16_is_multiplied_in_float32_and_rounded_once() -> None:
    matrix = matrix_of((16, 8), 5, 9, 0.5)
    short = [(array.view(np.uint32) >> 16).astype(np.uint16) for array in data(matrix, 150)]
    x, g = ((array.astype(np.uint32) << 16).view(np.float32) for array in short)
    y, dx, gradient = products(matrix, *short)
    wide = [(array.astype(np.uint32) << 16).view(np.float32) for array in (y, dx)]
    for mine, (theirs, size) in zip((*wide, gradient), exact(matrix, x, g), strict=True):
        rounding = 0.0 if mine is gradient else 2.0**-8
        assert np.all(np.abs(mine - theirs) <= bound(size) + rounding * np.abs(theirs))


def test_the_lists_of_blocks_take_a_few_bytes_a_block() -> None:
    matrix = matrix_of((16, 16), 64, 64, 0.25)
    arguments = (matrix.row_ptr, matrix.col, matrix.shape, matrix.block)
    lists = build_blocks(*arguments), build_turned(*arguments)
    arrays = [array for blocks in lists for array in (blocks.ends, blocks.index, blocks.order) if array is not None]
    assert sum(array.nbytes for array in arrays) <= 14 * len(matrix.col)
