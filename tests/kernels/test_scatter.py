"""Writing a pattern's values out densely and reading them back, against numpy's own indexing, bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sparsetrain.kernels import scatter
from sparsetrain.sparsity import SparseLinear, SparsityPattern
from sparsetrain.sparsity.backends import masked as masked_backend
from sparsetrain.sparsity.backends.masked import MaskedBackend


def pattern_of(rows: int, columns: int, block: tuple[int, int], density: float, seed: int = 0) -> SparsityPattern:
    occupied = torch.rand(rows, columns, generator=torch.Generator().manual_seed(seed)) < density
    return SparsityPattern.from_mask(occupied.repeat_interleave(block[0], 0).repeat_interleave(block[1], 1), block)


def places(pattern: SparsityPattern) -> tuple[np.ndarray, np.ndarray]:
    """Return row and column of each value, block after block."""
    bh, bw = pattern.block
    rows = np.repeat(np.arange(len(pattern.row_ptr) - 1), np.diff(pattern.row_ptr.numpy()))
    inside_rows, inside_columns = np.divmod(np.arange(bh * bw), bw)
    columns = pattern.col.numpy()
    return (rows[:, None] * bh + inside_rows).ravel(), (columns[:, None] * bw + inside_columns).ravel()


@given(
    rows=st.integers(1, 40),
    columns=st.integers(1, 60),
    block=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    density=st.sampled_from([0.0, 0.02, 0.5, 1.0]),
    threads=st.integers(1, 4),
    wide=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_every_bit_arrives_where_numpy_puts_it(
    rows: int, columns: int, block: tuple[int, int], density: float, threads: int, wide: bool, seed: int
) -> None:
    pattern = pattern_of(rows, columns, block, density, seed)
    kind = np.uint32 if wide else np.uint16
    draw = np.random.default_rng(seed)
    # The values are arbitrary bits, with NaNs of any payload among them.
    values, full = draw.integers(0, 1 << 16, pattern.nnz).astype(kind), np.full(pattern.shape, 0xABCD, kind)
    values[::3] ^= kind(0x7FC00000 if wide else 0x7FC0)
    at, (bh, bw) = places(pattern), block
    indices = {"row_ptr": pattern.row_ptr, "col": pattern.col, "blocks": len(pattern.col), "bh": bh, "bw": bw}
    indices |= {"rows": len(pattern.row_ptr) - 1, "columns": pattern.shape[1]}
    dense, read = full.copy(), np.full(pattern.nnz, 0xABCD, kind)
    (scatter.scatter if wide else scatter.scatter16)(threads, values=values, dense=dense, **indices)
    expected = np.zeros(pattern.shape, kind)
    expected[at] = values
    np.testing.assert_array_equal(dense, expected)
    other = draw.integers(0, 1 << 16, pattern.shape).astype(kind)
    (scatter.gather if wide else scatter.gather16)(threads, dense=other, values=read, **indices)
    np.testing.assert_array_equal(read, other[at])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("block", [(1, 1), (4, 8)])
def test_a_large_matrix_is_computed_as_by_the_pattern_itself(
    dtype: torch.dtype, block: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    called: list[tuple[str, int]] = []

    def recorded(name: str) -> Callable[..., None]:
        def call(threads: int, **arguments: Any) -> None:
            called.append((name, threads))
            getattr(scatter, name)(threads, **arguments)

        return call

    names = ("scatter", "scatter16", "gather", "gather16")
    kernels = SimpleNamespace(**{name: recorded(name) for name in names})
    monkeypatch.setattr(masked_backend, "_kernels", lambda: kernels)
    torch.set_num_threads(2)
    pattern = pattern_of(512 // block[0], 384 // block[1], block, 0.3)
    values = torch.randn(pattern.nnz, 2).to(dtype)[:, 0]
    x, g = torch.randn(5, 384).to(dtype), torch.randn(5, 512).to(dtype)
    backend, dense = MaskedBackend(), pattern.scatter(values)
    found = (backend.matmul(x, values, pattern), backend.matmul_t(g, values, pattern), backend.sampled(g, x, pattern))
    expected = (torch.nn.functional.linear(x, dense), g @ dense, pattern.gather(g.t() @ x))
    for mine, other in zip(found, expected, strict=True):
        assert torch.equal(mine, other)
    kind = {torch.float64: None, torch.float32: ""}.get(dtype, "16")
    expected_calls = [] if kind is None else [(f"{name}{kind}", 2) for name in ("scatter", "scatter", "gather")]
    assert called == expected_calls


def test_what_is_read_from_need_not_be_contiguous() -> None:
    pattern = pattern_of(192, 128, (1, 1), 0.3)
    dense = torch.randn(128, 192).t()
    assert torch.equal(masked_backend._gathered(dense, pattern), pattern.gather(dense))


def test_a_large_masked_layer_holds_no_index_beside_its_pattern() -> None:
    layer = SparseLinear(256, 128, density=0.3, seed=0, backend="masked")
    layer(torch.randn(3, 256)).sum().backward()
    assert "positions" not in layer.pattern._derived
