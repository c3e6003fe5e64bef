"""The Triton kernels against dense float64; `test_triton_bsr.py` runs these cases in separate processes.

The import of triton decides for the whole process whether kernels are interpreted. To run one case by hand, use
``TRITON_INTERPRET=1 python -m pytest tests/kernels/triton_cases.py -k NAME``, or omit the variable on a GPU.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from sparsetrain.kernels import triton_bsr
from sparsetrain.sparsity import SparsityPattern

DEVICE = torch.device("cpu" if triton_bsr.INTERPRETED else "cuda")
# The unit roundoff: the largest relative error of rounding a number to the type.
ROUNDOFF = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
# The interpreter computes with numpy, which warns about overflows and invalid values; a GPU and torch do not.
NUMPY_WARNS = pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered in:RuntimeWarning")
SIDES = [4, 5, 8, 12, 16, 24, 32, 48, 63, 64]


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """Fill all new memory with NaN, so that an element that a kernel does not write is noticed."""
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(1).isnan().all()
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@dataclass
class Problem:
    """A block pattern and the factors of its products, all on the device; values and inputs have one dtype."""

    pattern: SparsityPattern
    x: Tensor
    g: Tensor
    values: Tensor

    @property
    def layout(self) -> triton_bsr.Layout:
        pattern = self.pattern
        return triton_bsr.layout(pattern.row_ptr, pattern.col, pattern.shape, pattern.block)

    def results(self) -> tuple[Tensor, Tensor, Tensor]:
        with poisoned():
            layout = self.layout
            return (
                triton_bsr.matmul(self.x, self.values, layout),
                triton_bsr.matmul_t(self.g, self.values, layout),
                triton_bsr.sampled(self.g, self.x, layout),
            )


def contiguous(tensor: Tensor) -> Tensor:
    return tensor


def transposed(tensor: Tensor) -> Tensor:
    return tensor.t().contiguous().t()


def surrounded(tensor: Tensor) -> Tensor:
    """Return the same numbers as a view of every second column of a matrix that is NaN everywhere else."""
    rows, columns = tensor.shape
    wide = torch.full((rows + 5, 2 * columns + 6), torch.nan, dtype=tensor.dtype, device=tensor.device)
    wide[2 : rows + 2, 3 : 2 * columns + 3 : 2] = tensor
    return wide[2 : rows + 2, 3 : 2 * columns + 3 : 2]


def broadcast(tensor: Tensor) -> Tensor:
    """Return a matrix whose rows all share the memory of the first row of ``tensor``."""
    return tensor[:1].expand(tensor.shape)


def problem(
    tiles: Tensor,
    block: tuple[int, int],
    tokens: int,
    dtype: torch.dtype = torch.float32,
    strides: Callable[[Tensor], Tensor] = contiguous,
    seed: int = 0,
) -> Problem:
    """Return random values in the blocks that ``tiles``, bool ``[block rows, block columns]``, marks."""
    draws = torch.Generator().manual_seed(seed)
    pattern = SparsityPattern.from_mask(tiles.repeat_interleave(block[0], 0).repeat_interleave(block[1], 1), block)
    x, g, values = (
        torch.randn(*shape, generator=draws).to(DEVICE, dtype)
        for shape in ((tokens, pattern.shape[1]), (tokens, pattern.shape[0]), (pattern.nnz,))
    )
    return Problem(pattern.to(DEVICE), strides(x), strides(g), values)


def some_tiles(rows: int, columns: int, density: float = 0.5, seed: int = 1) -> Tensor:
    """Return random blocks; the second row and the last column are empty."""
    tiles = torch.rand(rows, columns, generator=torch.Generator().manual_seed(seed)) < density
    tiles[0, 0] = True
    tiles[1], tiles[:, -1] = False, False
    return tiles


def assert_within_rounding(ours: Tensor, exact: Tensor, magnitude: Tensor, terms: int) -> None:
    """Fail unless ``ours`` is within the rounding error of float32 sums of ``terms`` products, rounded to its dtype.

    The bound is Higham's for sums in any order, which always holds: terms * u * (sum of absolute products), with the
    unit roundoff u of float32. Tensor cores truncate sums instead of rounding them, so it is four times larger there.
    The final rounding adds u of the result's dtype times the result, and the smallest subnormal number.
    """
    assert ours.shape == exact.shape
    cut_off = not triton_bsr.INTERPRETED and ours.dtype != torch.float32
    limit = (terms + 2) * (4 if cut_off else 1) * ROUNDOFF[torch.float32] * magnitude
    limit += ROUNDOFF[ours.dtype] * exact.abs()
    limit += torch.finfo(ours.dtype).smallest_normal * torch.finfo(ours.dtype).eps
    # The sum within the first bound is itself rounded to the dtype.
    error = (ours.double() - exact).abs()
    excess = error - limit * (1 + ROUNDOFF[ours.dtype])
    assert not ours.isnan().any()
    if excess.numel():
        assert float(excess.max()) <= 0, f"an error of {float(error.max())} exceeds its limit by {float(excess.max())}"


def assert_right(case: Problem) -> None:
    pattern = case.pattern
    x, g, dense = case.x.double(), case.g.double(), pattern.scatter(case.values.double())
    y, grad_x, grad_values = case.results()
    assert y.dtype == grad_x.dtype == grad_values.dtype == case.x.dtype
    assert y.is_contiguous()
    assert grad_x.is_contiguous()
    assert grad_values.is_contiguous()
    assert_within_rounding(y, x @ dense.t(), x.abs() @ dense.abs().t(), pattern.shape[1])
    assert_within_rounding(grad_x, g @ dense, g.abs() @ dense.abs(), pattern.shape[0])
    exact, magnitude = pattern.gather(g.t() @ x), pattern.gather(g.abs().t() @ x.abs())
    assert_within_rounding(grad_values, exact, magnitude, len(x))


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    rows, columns = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    stored = draw(st.lists(st.booleans(), min_size=rows * columns, max_size=rows * columns))
    return problem(
        torch.tensor(stored, dtype=torch.bool).view(rows, columns),
        (draw(st.sampled_from(SIDES)), draw(st.sampled_from(SIDES))),
        draw(st.one_of(st.integers(0, 40), st.sampled_from([127, 128, 129, 257]))),
        draw(st.sampled_from(triton_bsr.DTYPES)),
        draw(st.sampled_from([contiguous, transposed, surrounded, broadcast])),
        draw(st.integers(0, 2**31)),
    )


@given(case=problems())
def test_the_three_products_match_dense_float64(case: Problem) -> None:
    assert_right(case)


@pytest.mark.parametrize("dtype", triton_bsr.DTYPES)
@pytest.mark.parametrize("block", [(4, 4), (16, 16), (64, 64), (4, 64), (64, 4), (5, 12), (48, 20)])
def test_every_kind_of_block_in_every_type_matches_dense_float64(block: tuple[int, int], dtype: torch.dtype) -> None:
    assert_right(problem(some_tiles(4, 6), block, 70, dtype))


@pytest.mark.parametrize("tokens", [0, 1, 2, 15, 16, 17, 63, 64, 65, 128, 130])
def test_every_count_of_tokens_matches_dense_float64(tokens: int) -> None:
    assert_right(problem(some_tiles(3, 5), (16, 16), tokens))


def test_rows_of_very_different_lengths_match_dense_float64() -> None:
    # One row has many tiles of the weight gradient; its neighbours have one and none.
    tiles = torch.zeros(4, 80, dtype=torch.bool)
    tiles[0, 7], tiles[1], tiles[3, ::7] = True, True, True
    assert_right(problem(tiles, (8, 4), 33))


def test_float32_is_not_rounded_to_tf32() -> None:
    # The relative error of TF32 is about 3e-4; the bar for float32 is 2e-6 * sqrt(terms).
    case = problem(some_tiles(4, 33, 0.9), (32, 32), 64)
    dense, x, g = case.pattern.scatter(case.values.double()), case.x.double(), case.g.double()
    exact = (x @ dense.t(), g @ dense, case.pattern.gather(g.t() @ x))
    for ours, wanted, terms in zip(case.results(), exact, (33 * 32, 4 * 32, 64), strict=True):
        assert float((ours - wanted).norm() / wanted.norm()) < 2e-6 * terms**0.5
        assert float((ours - wanted).norm() / wanted.norm()) < 1e-5


def test_an_empty_matrix_gives_zeros() -> None:
    case = problem(torch.zeros(2, 3, dtype=torch.bool), (16, 8), 20)
    y, grad_x, grad_values = case.results()
    assert torch.equal(y, torch.zeros_like(case.g))
    assert torch.equal(grad_x, torch.zeros_like(case.x))
    assert grad_values.shape == (0,)


@pytest.mark.parametrize("dtype", triton_bsr.DTYPES)
def test_the_same_input_gives_the_same_bits(dtype: torch.dtype) -> None:
    case = problem(some_tiles(3, 4), (16, 16), 600, dtype)
    for first, second in zip(case.results(), case.results(), strict=True):
        assert torch.equal(first, second)


def test_a_gradient_summed_in_chunks_matches_one_summed_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    case = problem(torch.ones(1, 1, dtype=torch.bool), (16, 16), 1000)
    launched = []
    kernel = triton_bsr._sampled

    class Spy:
        def __getitem__(self, grid: tuple[int, int]) -> Callable[..., None]:
            launched.append(grid)
            return kernel[grid]

    monkeypatch.setattr(triton_bsr, "_sampled", Spy())
    chunked = triton_bsr.sampled(case.g, case.x, case.layout)
    monkeypatch.setattr(triton_bsr, "_PROGRAMS", 1)
    whole = triton_bsr.sampled(case.g, case.x, case.layout)
    assert launched == [(1, 8), (1, 1)]
    torch.testing.assert_close(chunked, whole, rtol=1e-5, atol=1e-4)
    monkeypatch.setattr(triton_bsr, "_PROGRAMS", 512)
    assert_right(case)


@NUMPY_WARNS
def test_numbers_that_are_not_finite_reach_only_what_their_blocks_touch() -> None:
    case = problem(some_tiles(4, 6), (16, 8), 40)
    bh, bw = case.pattern.block
    case.x[3, 9], case.x[39, 20], case.g[5, 0], case.g[39, 40] = torch.inf, torch.nan, -torch.inf, torch.nan
    case.values[100] = torch.inf
    # The products are computed block by block, so that no factor meets a zero that is not stored.
    x, g, values = case.x.double(), case.g.double(), case.values.double().view(-1, bh, bw)
    y, grad_x, grad_values = torch.zeros_like(g), torch.zeros_like(x), torch.zeros_like(values)
    for at, (row, column) in enumerate(zip(case.pattern.block_rows(), case.pattern.col, strict=True)):
        rows, columns = slice(int(row) * bh, (int(row) + 1) * bh), slice(int(column) * bw, (int(column) + 1) * bw)
        y[:, rows] += x[:, columns] @ values[at].t()
        grad_x[:, columns] += g[:, rows] @ values[at]
        grad_values[at] = g[:, rows].t() @ x[:, columns]
    assert not y.isfinite().all()
    assert y.isfinite().any()
    wanted = (y, grad_x, grad_values.view(-1))
    for ours, exact in zip(case.results(), wanted, strict=True):
        torch.testing.assert_close(ours.double(), exact, rtol=1e-4, atol=1e-4, equal_nan=True)


@NUMPY_WARNS
def test_float16_overflows_to_infinity_as_torch_does() -> None:
    case = problem(torch.ones(1, 2, dtype=torch.bool), (16, 16), 4, torch.float16)
    case.x.fill_(100.0)
    case.values.fill_(100.0)
    assert torch.equal(case.results()[0], torch.full_like(case.g, torch.inf))


def test_tokens_beyond_two_to_the_31_elements_are_found() -> None:
    # Three tokens are 2^30 elements apart: the stride fits in 32 bits, but the offset of the third does not. The memory
    # is reserved, and only three places in it are touched.
    case = problem(torch.ones(1, 2, dtype=torch.bool), (8, 8), 3, torch.float16)
    memory = torch.empty(2**31 + 64, dtype=torch.float16, device=DEVICE)
    far = memory.as_strided((3, case.x.shape[1]), (2**30, 1))
    far.copy_(case.x)
    case.x = far
    assert_right(case)


# -- the layout ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", [(4, 4), (16, 48), (64, 64)])
def test_the_layout_lists_the_blocks_of_the_transpose_and_every_tile_once(block: tuple[int, int]) -> None:
    pattern = problem(some_tiles(6, 70, 0.3), block, 1).pattern
    layout = triton_bsr.layout(pattern.row_ptr, pattern.col, pattern.shape, pattern.block)
    theirs, permutation = pattern.transpose()
    side = layout.columns
    assert side.order is not None
    assert torch.equal(side.ptr.long(), theirs.row_ptr)
    assert torch.equal(side.index, theirs.col)
    assert torch.equal(side.order.long(), permutation[:: block[0] * block[1]] // (block[0] * block[1]))
    for tensor in (layout.rows.ptr, layout.rows.index, side.ptr, side.index, side.order, layout.tile_row):
        assert tensor.dtype == torch.int32
    bytes_kept = 4 * (2 * len(side.index) + len(layout.tile_row) + len(layout.tile_place))
    assert bytes_kept <= 16 * len(pattern.col)
    covered = []
    for row, place in zip(layout.tile_row.tolist(), layout.tile_place.tolist(), strict=True):
        length = int(pattern.row_ptr[row + 1] - pattern.row_ptr[row]) * block[1]
        first = place * layout.tile_width
        covered += [(row, column) for column in range(first, min(first + layout.tile_width, length))]
    lengths = ((pattern.row_ptr[1:] - pattern.row_ptr[:-1]) * block[1]).tolist()
    assert covered == [(row, column) for row, length in enumerate(lengths) for column in range(length)]
