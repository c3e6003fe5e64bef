"""Sparse matrices of scipy and torch as masks: equal to their dense form, or one line before any index is followed."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
import scipy.sparse
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from sparsetrain.errors import UserError
from sparsetrain.sparsity import sparsify
from sparsetrain.sparsity.patterns.draw import given_pattern
from sparsetrain.sparsity.patterns.foreign import MAX_MASK_SIDE, pattern_of_arrays

FORMATS = ("csr", "csc", "bsr", "coo", "dia", "lil", "dok")


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("seed", range(3))
def test_a_scipy_matrix_of_any_format_equals_its_dense_form(form: str, seed: int) -> None:
    """Entries that are stored and zero are none."""
    matrix = scipy.sparse.random(12, 18, 0.2, random_state=seed, format="coo")
    matrix.data[::4] = 0.0
    assert np.array_equal(given_pattern(matrix.asformat(form)).mask().numpy(), matrix.toarray() != 0)
    array = scipy.sparse.coo_array(matrix).asformat(form)
    assert np.array_equal(given_pattern(array).mask().numpy(), matrix.toarray() != 0)


@settings(max_examples=60)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 4), st.integers(-1, 1)), min_size=1, max_size=20))
def test_entries_of_one_place_are_summed_as_scipy_sums_them(entries: list[tuple[int, int, int]]) -> None:
    """In any order, and in the formats in which a place may come twice."""
    row, col, data = (np.array(column) for column in zip(*entries, strict=True))
    matrix = scipy.sparse.coo_matrix((data, (row, col)), shape=(4, 5))
    order = np.argsort(row, kind="stable")
    indptr = np.concatenate([[0], np.cumsum(np.bincount(row, minlength=4))])
    rows = scipy.sparse.csr_matrix((data[order], col[order], indptr), shape=(4, 5))
    for each in (matrix, rows):
        assert np.array_equal(given_pattern(each).mask().numpy(), matrix.toarray() != 0)


def test_scipys_spare_room_and_diagonals_beyond_the_corner_are_no_entries() -> None:
    """Arrays may be longer than `indptr` says, and a diagonal may lie outside of the matrix."""
    matrix = scipy.sparse.csr_matrix(np.eye(3))
    matrix.data, matrix.indices = np.append(matrix.data, [1.0, 1.0]), np.append(matrix.indices, [-5, 10**6])
    assert np.array_equal(given_pattern(matrix).mask().numpy(), np.eye(3, dtype=bool))
    diagonals = scipy.sparse.dia_matrix((np.ones((3, 5)), [0, -7, 2**31 - 1]), shape=(3, 4))
    assert np.array_equal(given_pattern(diagonals).mask().numpy(), diagonals.toarray() != 0)


@pytest.mark.parametrize("form", ["csr", "csc", "bsr", "bsc", "coo"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bool, torch.bfloat16, torch.int64])
def test_a_sparse_tensor_of_torch_equals_its_dense_form(form: str, dtype: torch.dtype) -> None:
    """All layouts that torch has."""
    dense = (torch.rand(8, 12, generator=torch.Generator().manual_seed(0)) < 0.3).to(dtype)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse .* tensor support is in beta")
        blocks: dict[str, Any] = {"blocksize": (2, 3)} if form in ("bsr", "bsc") else {}
        sparse = dense.to_sparse(layout=getattr(torch, f"sparse_{form}"), **blocks)
    assert torch.equal(given_pattern(sparse).mask(), dense != 0)


def broken(form: str, index: int) -> Any:
    """A 4 x 4 matrix with one index that is not in it."""
    matrix = scipy.sparse.csr_matrix(np.eye(4)).asformat(form)
    if form == "coo":
        matrix.coords[0][1] = index
    elif form == "lil":
        matrix.rows[1] = [index]
    else:
        matrix.indices[1] = index
    return matrix


@pytest.mark.parametrize("index", [-1, 4, 10**7, -(2**31)])
@pytest.mark.parametrize("form", ["csr", "csc", "bsr", "coo", "lil"])
def test_an_index_outside_of_a_scipy_matrix_is_refused(form: str, index: int) -> None:
    """It would be followed into memory of others; the model is left alone."""
    model = nn.Sequential(nn.Linear(4, 4))
    with pytest.raises(UserError, match=r"must lie in \[0, 3\]"):
        sparsify(model, masks={"0": broken(form, index)})
    assert type(model[0]) is nn.Linear


@pytest.mark.parametrize(
    "ends", [[0, 1, 2, 10**7, 4], [0, 1, 0, 1, 4], [0, 1, 2, 3, 10**7], [1, 1, 2, 3, 4], [-5, 1, 2, 3, 4]]
)
@pytest.mark.parametrize("form", ["csr", "csc", "bsr"])
def test_pointers_that_describe_no_rows_are_refused(form: str, ends: list[int]) -> None:
    """The entries of a row begin where the row before ends."""
    matrix = scipy.sparse.csr_matrix(np.eye(4)).asformat(form)
    matrix.indptr = np.array(ends)
    with pytest.raises(UserError, match=r"indptr (runs|decreases)"):
        given_pattern(matrix)


@pytest.mark.parametrize("index", [-1, 4, 2**40])
@pytest.mark.parametrize("form", ["csr", "csc", "coo"])
def test_a_tensor_of_torch_that_nobody_checked_is_refused(form: str, index: int) -> None:
    """`check_invariants=False` takes any index."""
    places, ends, ones = torch.tensor([0, index]), torch.tensor([0, 1, 2, 2, 2]), torch.ones(2)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse .* tensor support is in beta")
        mask = {
            "csr": lambda: torch.sparse_csr_tensor(ends, places, ones, (4, 4), check_invariants=False),
            "csc": lambda: torch.sparse_csc_tensor(ends, places, ones, (4, 4), check_invariants=False),
            "coo": lambda: torch.sparse_coo_tensor(torch.stack([places] * 2), ones, (4, 4), check_invariants=False),
        }[form]()
    with pytest.raises(UserError, match=r"must lie in \[0, 3\]"):
        given_pattern(mask)


def test_sides_beyond_any_layer_are_refused_before_anything_is_allocated() -> None:
    """A row costs eight bytes, whether or not it has an entry."""
    empty = {name: np.array([], np.int64) for name in ("row", "col", "data")}
    for shape in [(2**40, 2), (2, 2**40), (MAX_MASK_SIDE + 1, 1), (0, 2), (-1, 2)]:
        with pytest.raises(UserError, match="must have sides from 1 to"):
            pattern_of_arrays("coo", shape, empty)
    with pytest.raises(UserError, match="must have sides from 1 to"):
        given_pattern(scipy.sparse.coo_matrix((2**40, 2)))


@pytest.mark.parametrize(
    ("layout", "change", "message"),
    [
        ("ell", {}, "format='ell' is not one of csr, csc, bsr, coo, dia"),
        ("csr", {"indices": np.array([0.5, 1.0])}, "indices has dtype float64; integers are needed"),
        ("csr", {"data": np.array(["1", "2"])}, "data has dtype <U1; numbers are needed"),
        ("csr", {"data": np.ones(3)}, r"data has shape \(3,\) and indices \(2,\)"),
        ("csr", {"indptr": np.zeros(2, np.int64)}, r"indptr has shape \(2,\); the matrix needs \(3,\)"),
        ("csr", {"indices": np.zeros((2, 1), np.int64)}, "one length is needed"),
        ("bsr", {}, "bh, bw"),
        ("bsr", {"data": np.ones((2, 2, 3))}, "block 2x3 does not divide the matrix 2x2"),
        ("bsr", {"data": np.ones((2, 0, 0))}, "block 0x0 does not divide"),
        ("coo", {"row": np.zeros(3, np.int64)}, r"row, col and data have shapes \(3,\), \(2,\) and \(2,\)"),
        ("coo", {"row": np.zeros((), np.int64)}, "row has 0 dimensions; one is needed"),
        ("dia", {}, "one row for each offset"),
        ("dia", {"data": np.ones((2, 2)), "offsets": np.array([1, 1])}, "offsets has an entry twice"),
    ],
)
def test_arrays_that_are_no_matrix_are_named(layout: str, change: dict[str, Any], message: str) -> None:
    """Types, lengths, blocks and the name of the format."""
    whole = {name: np.array([0, 1]) for name in ("indices", "row", "col", "offsets", "data")}
    with pytest.raises(UserError, match=message) as caught:
        pattern_of_arrays(layout, (2, 2), {**whole, "indptr": np.array([0, 1, 2]), **change})
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="needs"):
        pattern_of_arrays("csr", (2, 2), {})


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (np.ones((2, 2)), "mask has dtype float64; bool is needed"),
        (np.array([[{}]]), "mask has dtype object"),
        (np.array([["2001-01-01"]], "M8[D]"), "mask has dtype datetime64"),
        (np.ones(2, dtype=bool), "mask has 1 dimensions"),
        ([[True]], "mask is a list"),
        (torch.ones(2, 2, 2).to_sparse(), "mask has 3 dimensions"),
        (torch.ones(2, 2).to_sparse(1), "no mask; two are needed"),
    ],
)
def test_a_mask_of_another_type_is_one_line(mask: Any, message: str) -> None:
    """Numbers, objects, dates, lists and tensors of other dimensions."""
    with pytest.raises(UserError, match=message):
        given_pattern(mask)
