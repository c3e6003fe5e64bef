"""Values in the order of a layout, against scipy's transpose, for all blocks and numbers of threads."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse
from hypothesis import given
from hypothesis import strategies as st

from sparsetrain.kernels import csr
from sparsetrain.kernels.csr_layout import Layout, build_layout, build_transposed


def decoded(layout: Layout, values: np.ndarray) -> np.ndarray:
    """Return the dense matrix of a layout and of values in its order; padding must be zero."""
    dense = np.zeros((layout.rows, layout.columns + 1), np.float32)
    for chunk in range(len(layout.ends) - 1):
        block, row = divmod(chunk, layout.rows)
        for place in range(layout.ends[chunk], layout.ends[chunk + 1]):
            column = block * layout.width + int(layout.offsets[place]) // 64
            assert dense[row, column] == 0.0
            dense[row, column] = values[place]
    assert not dense[:, layout.columns].any()
    return dense[:, : layout.columns]


@given(
    shape=st.tuples(st.integers(1, 40), st.integers(1, 70)),
    density=st.sampled_from([0.02, 0.1, 0.3, 1.0]),
    width=st.sampled_from([3, 8, 64]),
    threads=st.sampled_from([1, 2, 5]),
    seed=st.integers(0, 2**16),
)
def test_both_orders_hold_every_value_once(
    shape: tuple[int, int], density: float, width: int, threads: int, seed: int
) -> None:
    draw = np.random.default_rng(seed)
    dense = np.where(draw.random(shape) < density, draw.uniform(1.0, 2.0, shape), 0.0).astype(np.float32)
    matrix = scipy.sparse.csr_array(dense)
    row_ptr, col = matrix.indptr.astype(np.int64), matrix.indices.astype(np.int32)
    columns = shape[1]
    own = build_layout(row_ptr, col, columns, width)
    values = np.full(own.stored, np.nan, np.float32)
    csr.reorder_runs(threads, values=matrix.data, nonzeros=len(col), target=values, **own.runs)
    np.testing.assert_array_equal(decoded(own, values), dense)
    turned = build_transposed(row_ptr, col, columns, width)
    values = np.full(turned.stored, np.nan, np.float32)
    csr.reorder(threads, values=matrix.data, nonzeros=len(col), order=turned.order, stored=turned.stored, target=values)
    np.testing.assert_array_equal(decoded(turned, values), matrix.T.toarray())


@pytest.mark.parametrize("width", [1, 1000])
def test_a_matrix_without_nonzeros_has_no_places(width: int) -> None:
    layout = build_transposed(np.zeros(4, np.int64), np.empty(0, np.int32), 5, width)
    assert (layout.rows, layout.columns, layout.stored) == (5, 3, 0)
