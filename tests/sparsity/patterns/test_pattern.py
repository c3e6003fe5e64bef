"""Patterns against scipy and numpy, and what a malformed one says."""

from __future__ import annotations

import copy
import dataclasses
import pickle
from typing import Any

import numpy as np
import pytest
import scipy.sparse
import torch
from hypothesis import given
from hypothesis import strategies as st

from sparsetrain.errors import UserError
from sparsetrain.sparsity import SparsityPattern

BLOCKS = [(1, 1), (1, 3), (2, 1), (2, 2), (3, 4)]


@st.composite
def block_masks(draw: st.DrawFn) -> tuple[torch.Tensor, tuple[int, int]]:
    """A mask whose blocks are wholly true or wholly false, and the block."""
    block = draw(st.sampled_from(BLOCKS))
    rows, columns = draw(st.integers(1, 6)), draw(st.integers(1, 6))
    bits = draw(st.lists(st.booleans(), min_size=rows * columns, max_size=rows * columns))
    tiles = torch.tensor(bits, dtype=torch.bool).view(rows, columns)
    return tiles.repeat_interleave(block[0], 0).repeat_interleave(block[1], 1), block


def numbered(mask: torch.Tensor) -> torch.Tensor:
    """A matrix that holds 1, 2, 3, ... in row-major order at the true positions of ``mask``."""
    return (torch.cumsum(mask.flatten().long(), 0).view(mask.shape) * mask).double()


@given(case=block_masks())
def test_indices_and_value_order_match_scipy(case: tuple[torch.Tensor, tuple[int, int]]) -> None:
    mask, block = case
    pattern = SparsityPattern.from_mask(mask, block)
    dense = numbered(mask)
    if block == (1, 1):
        theirs: Any = scipy.sparse.csr_matrix(dense.numpy())
    else:
        theirs = scipy.sparse.bsr_matrix(dense.numpy(), blocksize=block)
        theirs.sort_indices()
    np.testing.assert_array_equal(pattern.row_ptr, theirs.indptr)
    np.testing.assert_array_equal(pattern.col, theirs.indices)
    np.testing.assert_array_equal(pattern.gather(dense), theirs.data.reshape(-1))
    assert torch.equal(pattern.scatter(pattern.gather(dense)), dense)
    assert (pattern.row_ptr.dtype, pattern.col.dtype) == (torch.int64, torch.int32)


@given(case=block_masks())
def test_from_mask_round_trip_and_counts_match_numpy(case: tuple[torch.Tensor, tuple[int, int]]) -> None:
    mask, block = case
    pattern = SparsityPattern.from_mask(mask, block)
    assert torch.equal(pattern.mask(), mask)
    assert pattern.nnz == np.count_nonzero(mask.numpy())
    assert pattern.density == np.mean(mask.numpy())
    assert pattern.empty_rows == int((~mask.numpy().any(axis=1)).sum())
    assert pattern.equals(SparsityPattern(pattern.shape, pattern.row_ptr, pattern.col, block))


@given(case=block_masks())
def test_transpose_matches_scipy(case: tuple[torch.Tensor, tuple[int, int]]) -> None:
    mask, block = case
    pattern = SparsityPattern.from_mask(mask, block)
    dense = numbered(mask)
    transposed, permutation = pattern.transpose()
    assert transposed.shape == (mask.shape[1], mask.shape[0])
    assert transposed.block == (block[1], block[0])
    theirs: Any = scipy.sparse.bsr_matrix(dense.numpy().T, blocksize=transposed.block)
    theirs.sort_indices()
    np.testing.assert_array_equal(transposed.row_ptr, theirs.indptr)
    np.testing.assert_array_equal(transposed.col, theirs.indices)
    np.testing.assert_array_equal(pattern.gather(dense)[permutation], theirs.data.reshape(-1))
    # Twice is the identity, of the pattern and of the values.
    back, again = transposed.transpose()
    assert back.equals(pattern)
    assert torch.equal(permutation[again], torch.arange(pattern.nnz))


@given(case=block_masks(), seed=st.integers(0, 2**31))
def test_union_and_difference_match_numpy(case: tuple[torch.Tensor, tuple[int, int]], seed: int) -> None:
    first, block = case
    tiles = torch.rand(first.shape[0] // block[0], first.shape[1] // block[1], generator=torch.manual_seed(seed)) < 0.5
    second = tiles.repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)
    a, b = SparsityPattern.from_mask(first, block), SparsityPattern.from_mask(second, block)
    np.testing.assert_array_equal(a.union(b).mask(), np.logical_or(first.numpy(), second.numpy()))
    np.testing.assert_array_equal(a.difference(b).mask(), np.logical_and(first.numpy(), ~second.numpy()))
    assert a.equals(b) == bool((first == second).all())


@pytest.mark.parametrize(
    ("shape", "row_ptr", "col", "block", "message"),
    [
        ((0, 3), [0], [], (1, 1), "both sides must be at least 1"),
        ((3, 3), [0, 1, 2, 3], [0, 1, 2], (2, 1), "block 2x1 does not divide the matrix 3x3"),
        ((3, 3), [0, 1, 2, 3], [0, 1, 2], (0, 1), "block 0x1 does not divide"),
        ((3, 3), [0, 1, 2], [0, 1], (1, 1), r"row_ptr has shape \(3,\); a pattern with 3 rows needs \(4,\)"),
        ((3, 3), [1, 1, 2, 3], [0, 1, 2], (1, 1), "row_ptr runs from 1 to 3; it must run from 0 to the 3 stored"),
        ((3, 3), [0, 1, 2, 4], [0, 1, 2], (1, 1), "row_ptr runs from 0 to 4"),
        ((3, 3), [0, 2, 1, 3], [0, 1, 2], (1, 1), "row_ptr decreases at row 1"),
        ((3, 3), [0, 1, 2, 3], [0, 1, 3], (1, 1), "row 2 has column 3; columns go from 0 to 2"),
        ((3, 3), [0, 1, 2, 3], [0, -1, 2], (1, 1), "row 1 has column -1"),
        ((3, 3), [0, 1, 2, 3], [0, 2**32, 2], (1, 1), f"row 1 has column {2**32}"),
        ((3, 3), [0, 0, 2, 3], [1, 0, 2], (1, 1), "row 1 has columns 1 and then 0; they must increase"),
        ((3, 3), [0, 0, 1, 3], [1, 2, 2], (1, 1), "row 2 has columns 2 and then 2; they must increase, without rep"),
        ((4, 4), [0, 1, 2], [0, 2], (2, 2), "row 1 has column 2; columns go from 0 to 1"),
        ((3, 3), [0, 1, 2, 3], [[0, 1, 2]], (1, 1), "col has 2 dimensions; one is needed"),
        ((3, 3), [0.0, 1.0, 2.0, 3.0], [0, 1, 2], (1, 1), "row_ptr has dtype torch.float32; integers are needed"),
        ((3, 3), [0, 1, 2, 3], [0.5, 1.0, 2.0], (1, 1), "col has dtype torch.float32; integers are needed"),
        ((1, 2), [0, 1], [True], (1, 1), "col has dtype torch.bool"),
    ],
)
def test_malformed_indices_name_the_wrong_row(
    shape: tuple[int, int], row_ptr: Any, col: Any, block: tuple[int, int], message: str
) -> None:
    if not col:
        col = torch.zeros(0, dtype=torch.int64)
    with pytest.raises(UserError, match=message) as caught:
        SparsityPattern(shape, torch.as_tensor(row_ptr), torch.as_tensor(col), block)
    assert "\n" not in str(caught.value)


def test_indices_on_two_devices_or_on_meta_are_refused() -> None:
    row_ptr, col = torch.tensor([0, 1]), torch.tensor([0])
    with pytest.raises(UserError, match="row_ptr is on cpu and col on meta"):
        SparsityPattern((1, 1), row_ptr, col.to("meta"))
    with pytest.raises(UserError, match="meta device"):
        SparsityPattern((1, 1), row_ptr.to("meta"), col.to("meta"))


@pytest.mark.parametrize(
    ("mask", "block", "message"),
    [
        (torch.ones(3, dtype=torch.bool), (1, 1), "mask has 1 dimensions"),
        (torch.ones(3, 3), (1, 1), "mask has dtype torch.float32; torch.bool is needed"),
        (torch.ones(3, 4, dtype=torch.bool), (2, 2), "block 2x2 does not divide the matrix 3x4"),
        (torch.ones(0, 4, dtype=torch.bool), (1, 1), "both sides must be at least 1"),
    ],
)
def test_a_bad_mask_is_named(mask: torch.Tensor, block: tuple[int, int], message: str) -> None:
    with pytest.raises(UserError, match=message):
        SparsityPattern.from_mask(mask, block)


def test_a_partly_true_block_is_named() -> None:
    mask = torch.ones(4, 6, dtype=torch.bool)
    mask[3, 4] = False
    with pytest.raises(UserError, match="block 2x2 at block row 1, block column 2 is only partly true"):
        SparsityPattern.from_mask(mask, (2, 2))


def test_patterns_of_other_shape_or_block_do_not_combine() -> None:
    a = SparsityPattern.from_mask(torch.ones(4, 4, dtype=torch.bool))
    for other in (
        SparsityPattern.from_mask(torch.ones(4, 2, dtype=torch.bool)),
        SparsityPattern.from_mask(torch.ones(4, 4, dtype=torch.bool), (2, 2)),
    ):
        assert not a.equals(other)
        for combine in (a.union, a.difference):
            with pytest.raises(UserError, match="patterns differ in shape or block"):
                combine(other)


def test_the_empty_pattern_is_legal() -> None:
    pattern = SparsityPattern.from_mask(torch.zeros(3, 2, dtype=torch.bool))
    assert (pattern.nnz, pattern.empty_rows, pattern.density) == (0, 3, 0.0)
    assert torch.equal(pattern.scatter(torch.zeros(0)), torch.zeros(3, 2))
    transposed, permutation = pattern.transpose()
    assert transposed.shape == (2, 3)
    assert permutation.numel() == 0


def test_a_pattern_is_frozen_and_keeps_its_own_copy_of_the_indices() -> None:
    row_ptr, col = torch.tensor([0, 1, 2]), torch.tensor([0, 1], dtype=torch.int32)
    pattern = SparsityPattern((2, 2), row_ptr, col)
    with pytest.raises(dataclasses.FrozenInstanceError):
        pattern.col = col  # type: ignore[misc]
    row_ptr[1], col[0] = 2, 1
    assert torch.equal(pattern.mask(), torch.eye(2, dtype=torch.bool))


def test_copies_drop_the_derived_layouts() -> None:
    pattern = SparsityPattern.from_mask(torch.eye(3, dtype=torch.bool))
    pattern.derived("layout", lambda: "of this process")
    for other in (
        copy.copy(pattern),
        copy.deepcopy(pattern),
        pickle.loads(pickle.dumps(pattern)),
        dataclasses.replace(pattern, col=torch.tensor([2, 1, 0])),
    ):
        assert other.derived("layout", lambda: "new") == "new"
    assert pattern.derived("layout", lambda: "new") == "of this process"


def test_replacing_the_indices_moves_the_positions() -> None:
    pattern = SparsityPattern.from_mask(torch.eye(3, dtype=torch.bool))
    pattern.positions()
    flipped = dataclasses.replace(pattern, col=torch.tensor([2, 1, 0]))
    assert torch.equal(flipped.mask(), torch.eye(3, dtype=torch.bool).flip(1))


def test_a_derived_layout_is_built_once() -> None:
    pattern = SparsityPattern.from_mask(torch.eye(3, dtype=torch.bool))
    built = [pattern.derived("layout", object) for _ in range(3)]
    assert built[0] is built[1] is built[2]


def test_moving_to_a_device_keeps_the_positions(device: torch.device) -> None:
    pattern = SparsityPattern.from_mask(torch.rand(6, 8) < 0.4)
    moved = pattern.to(device)
    assert moved.device.type == device.type
    assert moved.equals(pattern)
    assert torch.equal(moved.mask().cpu(), pattern.mask())
    assert torch.equal(moved.transpose()[1].cpu(), pattern.transpose()[1])
    assert pattern.to("cpu") is pattern


def test_fingerprints_differ_wherever_one_index_does() -> None:
    """Also the one that is made on a GPU, which only the CPU runs here: order, place and value count."""
    from sparsetrain.sparsity.patterns.indices import mixed_sum

    indices = torch.randint(0, 50, (1000,), dtype=torch.int32, generator=torch.Generator().manual_seed(0))
    changed = [indices.flip(0), indices.roll(1), indices[:-1]]
    for place in (0, 1, 499, 999):
        other = indices.clone()
        other[place] += 1
        changed.append(other)
    swapped = indices.clone()
    swapped[[3, 7]] = indices[[7, 3]]
    sums = [mixed_sum(other) for other in (indices, *changed, swapped)]
    assert len(set(sums)) == len(sums)
    assert mixed_sum(indices.clone()) == sums[0]
