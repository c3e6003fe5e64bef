"""Every kind of pattern: the exact count, the structure that it promises, and its seed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import scipy.sparse
import torch
from hypothesis import HealthCheck, given, reject, settings
from hypothesis import strategies as st
from torch import Tensor

from sparsetrain import seeds
from sparsetrain.errors import UserError
from sparsetrain.sparsity import (
    SET,
    MaskManager,
    PatternSpec,
    SparsityConfig,
    SparsityPattern,
    pattern_nnz,
    register_pattern,
)
from sparsetrain.sparsity.patterns.draw import (
    PATTERNS,
    balanced_pattern,
    block_pattern,
    full_pattern,
    given_pattern,
    magnitude_pattern,
    make_pattern,
    nm_pattern,
    random_pattern,
)
from sparsetrain.sparsity.patterns.select import top_entries
from sparsetrain.sparsity.patterns.spec import PatternKind

SPECS = [
    PatternSpec(),
    PatternSpec("balanced"),
    PatternSpec("balanced", fan_out=True),
    PatternSpec("magnitude"),
    PatternSpec("magnitude", block=(2, 3)),
    PatternSpec("block", block=(3, 4)),
    PatternSpec("block", block=(2, 2)),
    PatternSpec("nm", m=4),
    PatternSpec("banded"),
    PatternSpec("checkerboard"),
    PatternSpec("random", bands=(2, 1)),
    PatternSpec("magnitude", bands=(2, 2)),
]


@given(
    spec=st.sampled_from(SPECS),
    rows=st.integers(1, 24),
    columns=st.integers(1, 24),
    density=st.floats(0.01, 1.0),
    seed=st.integers(0, 2**40),
)
@settings(suppress_health_check=[HealthCheck.filter_too_much])
def test_the_count_is_known_before_and_exact(
    spec: PatternSpec, rows: int, columns: int, density: float, seed: int
) -> None:
    shape = (rows, columns)
    if spec.name == "nm":
        density = max(1, round(density * 4)) / 4
    weight = torch.randn(shape, generator=seeds.generator(seed))
    try:
        expected = pattern_nnz(spec, shape, density)
    except UserError:  # a block that does not fit, no weight left, bands that do not divide
        reject()
    if spec.name == "magnitude" and (rows % spec.block[0] or columns % spec.block[1]):
        reject()
    pattern = make_pattern(spec, shape, density, seeds.generator(seed, "mask"), weight)
    assert pattern.shape == shape
    assert pattern.nnz == int(pattern.mask().sum()) == expected
    again = make_pattern(spec, shape, density, seeds.generator(seed, "mask"), weight)
    assert again.equals(pattern)
    if spec.block == (1, 1) and spec.name != "nm":
        assert pattern.nnz == round(density * rows * columns)


@pytest.mark.parametrize("name", ["random", "balanced", "nm", "block"])
def test_another_seed_is_another_mask(name: str) -> None:
    spec = PatternSpec(name, block=(4, 4) if name == "block" else (1, 1))
    one, other = (make_pattern(spec, (32, 32), 0.25, seeds.generator(seed)) for seed in (0, 1))
    assert not one.equals(other)


@given(rows=st.integers(1, 30), columns=st.integers(1, 30), density=st.floats(0.05, 1.0), seed=st.integers(0, 2**40))
def test_balanced_rows_and_columns_differ_by_at_most_one(rows: int, columns: int, density: float, seed: int) -> None:
    if round(density * rows * columns) < 1:
        return
    for fan_out in (False, True):
        mask = balanced_pattern((rows, columns), density, seeds.generator(seed), fan_out).mask()
        fan_in = mask.sum(1)
        assert int(fan_in.max() - fan_in.min()) <= 1
        if fan_out:
            assert int(mask.sum(0).max() - mask.sum(0).min()) <= 1


def test_balanced_columns_are_uniform_and_pairs_of_rows_independent() -> None:
    # Dealing columns round and round, without trades, would make consecutive rows disjoint; the overlap of two random
    # rows with 8 of 32 columns is 2 on average.
    overlaps, places = [], torch.zeros(16, 32)
    for seed in range(200):
        mask = balanced_pattern((16, 32), 0.25, seeds.generator(seed), fan_out=True).mask()
        overlaps.append(float((mask[0] & mask[1]).sum()))
        places += mask
    # With exact column sums two rows overlap a little less than 2: 8 * (4 - 1) / (16 - 1) = 1.6 by symmetry.
    assert np.mean(overlaps) == pytest.approx(1.6, abs=0.25)
    assert float((places / 50 - 1).abs().max()) < 0.6


def test_nm_keeps_n_of_every_m() -> None:
    mask = nm_pattern((10, 32), 2, 4, seeds.generator(0)).mask()
    assert bool((mask.view(10, 8, 4).sum(2) == 2).all())
    counts = sum(nm_pattern((1, 4), 2, 4, seeds.generator(seed)).mask().long() for seed in range(400))
    assert float((counts / 200 - 1).abs().max()) < 0.2  # each of the four places as often as the others


@pytest.mark.parametrize("shape", [(48, 32), (50, 33), (7, 10), (4, 5)])
def test_blocks_are_whole_but_at_the_edges(shape: tuple[int, int]) -> None:
    bh, bw = 3, 4
    pattern = block_pattern(shape, 0.5, seeds.generator(0), (bh, bw))
    mask = pattern.mask()
    for row in range(0, shape[0], bh):
        for column in range(0, shape[1], bw):
            tile = mask[row : row + bh, column : column + bw]
            assert bool(tile.all()) or not bool(tile.any())
    divides = shape[0] % bh == 0 and shape[1] % bw == 0
    assert pattern.block == ((bh, bw) if divides else (1, 1))


def test_magnitude_matches_numpy_and_keeps_the_largest_per_head() -> None:
    weight = torch.randn(12, 10, generator=seeds.generator(3))
    mask = magnitude_pattern(weight, 0.3).mask()
    order = np.argsort(-weight.abs().numpy().reshape(-1), kind="stable")[:36]
    assert sorted(mask.view(-1).nonzero()[:, 0].tolist()) == sorted(order.tolist())
    weight[:4] *= 100.0  # one head whose weights are larger than all others takes everything, unless heads are ranked
    assert int(magnitude_pattern(weight, 0.3).mask()[4:].sum()) == 0
    per_head = magnitude_pattern(weight, 0.3, bands=(3, 1)).mask()
    assert [int(per_head[4 * head : 4 * head + 4].sum()) for head in range(3)] == [12, 12, 12]


def test_magnitude_of_blocks_ranks_their_sums() -> None:
    weight = torch.zeros(4, 4)
    weight[0, 0] = 3.0  # the largest single weight
    weight[2:, 2:] = 1.0  # the largest sum
    pattern = magnitude_pattern(weight, 0.25, block=(2, 2))
    assert pattern.block == (2, 2)
    assert pattern.mask()[2:, 2:].all()


def test_banded_hugs_the_diagonal_and_checkerboard_alternates() -> None:
    source = seeds.generator(0)
    band = make_pattern("banded", (16, 16), 5 / 16, source).mask()
    row, column = band.nonzero().T
    assert int(((column - row + 8) % 16 - 8).abs().max()) == 2
    board = make_pattern("checkerboard", (6, 8), 0.5, source).mask()
    expected = (torch.arange(6)[:, None] + torch.arange(8)) % 2 == 0
    assert torch.equal(board, expected)


@pytest.mark.parametrize("form", ["tensor", "numpy", "csr", "coo", "csc array", "pattern"])
def test_a_given_mask_comes_in_any_form(form: str) -> None:
    mask = torch.rand(5, 7, generator=seeds.generator(1)) < 0.4
    array = mask.numpy()
    forms = {
        "tensor": lambda: mask,
        "numpy": lambda: array,
        "csr": lambda: scipy.sparse.csr_matrix(array.astype(np.float64) * -2.5),
        "coo": lambda: scipy.sparse.coo_matrix(array),
        "csc array": lambda: scipy.sparse.csc_array(array),
        "pattern": lambda: SparsityPattern.from_mask(mask),
    }
    assert torch.equal(given_pattern(forms[form]()).mask(), mask)


def test_a_given_scipy_matrix_counts_entries_other_than_zero() -> None:
    matrix = scipy.sparse.coo_matrix((np.array([1.0, 0.0, 2.0]), ([0, 1, 2], [1, 1, 0])), shape=(3, 2))
    assert given_pattern(matrix).mask().tolist() == [[False, True], [False, False], [True, False]]


def test_a_full_pattern_stores_blocks() -> None:
    assert full_pattern((6, 8), (3, 4)).block == (3, 4)
    assert full_pattern((6, 8), (3, 4)).nnz == full_pattern((6, 8)).nnz == 48


def test_the_random_pattern_is_what_it_was() -> None:
    # Positions of the first release: a run that is resumed must find its masks again.
    pattern = random_pattern((4, 6), 0.25, seeds.generator(0, "mask", "layer"))
    drawn = torch.randperm(24, generator=seeds.generator(0, "mask", "layer"))[:6]
    assert pattern.positions().tolist() == sorted(drawn.tolist())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: PatternSpec("blok"), r"pattern='blok' is not one of .*did you mean 'block'"),
        (lambda: PatternSpec("random", block=(2, 2)), r"block=\[2, 2\] is an option of block and magnitude, not of ra"),
        (lambda: PatternSpec("block"), "needs a larger block"),
        (lambda: PatternSpec("block", block=(0, 2)), r"block=\[0, 2\] must be two whole numbers"),
        (lambda: PatternSpec("nm", bands=(2, 1)), "bands="),
        (lambda: PatternSpec("nm", m=0), "m=0 must be at least 1"),
        (lambda: block_pattern((8, 8), 0.5, seeds.generator(0), (16, 4)), "block 16x4 is larger than the matrix 8x8"),
        (lambda: block_pattern((8, 8), 0.01, seeds.generator(0), (4, 4)), "leaves no block of 4x4 at all"),
        (lambda: nm_pattern((4, 6), 2, 4, seeds.generator(0)), "m=4 does not divide the 6 inputs"),
        (lambda: make_pattern("nm", (4, 8), 0.3, seeds.generator(0)), "multiple of 0.25, such as sparsity=0.75"),
        (lambda: make_pattern("magnitude", (4, 8), 0.3, seeds.generator(0)), "no weight was given"),
        (lambda: magnitude_pattern(torch.full((2, 2), torch.nan), 0.5), "not a number"),
        (lambda: magnitude_pattern(torch.ones(4, 5), 0.5, block=(2, 2)), "block 2x2 does not divide"),
        (lambda: given_pattern([[True]]), "mask is a list"),
        (lambda: given_pattern(torch.ones(2, 2)), "mask has dtype torch.float32"),
        (lambda: random_pattern((4, 6), 0.5, seeds.generator(0), bands=(3, 1)), r"bands=\[3, 1\] do not divide"),
    ],
)
def test_what_cannot_be_meant_is_one_line(make: object, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        make()  # type: ignore[operator]
    assert "\n" not in str(caught.value)


def test_every_name_has_a_test() -> None:
    assert {spec.name for spec in SPECS} == set(PATTERNS)


# Patterns of one's own.


@pytest.fixture
def registry() -> Iterator[None]:
    before = PATTERNS.names()
    yield
    for name in set(PATTERNS) - set(before):
        PATTERNS.unregister(name)


def corner(spec: Any, shape: Any, density: float, generator: Any, weight: Any, *, size: int, extra: int = 0) -> Tensor:
    mask = torch.zeros(shape, dtype=torch.bool)
    mask[:size, : size + extra] = True
    return mask


@pytest.mark.usefixtures("registry")
def test_a_registered_pattern_has_its_options_and_its_count() -> None:
    register_pattern("corner", corner, count=lambda spec, shape, density: spec.options["size"] ** 2)
    spec = PatternSpec("corner", options={"size": 3})
    assert pattern_nnz(spec, (8, 8), 0.5) == 9
    pattern = make_pattern(spec, (8, 8), 0.5, seeds.generator(0))
    assert pattern.mask().nonzero().tolist() == [[row, column] for row in range(3) for column in range(3)]
    with pytest.raises(UserError, match=r"'corner' drew 12 weights in a 8x8 matrix; at density=0.5 it must draw 9"):
        make_pattern(PatternSpec("corner", options={"size": 3, "extra": 1}), (8, 8), 0.5, seeds.generator(0))
    with pytest.raises(UserError, match=r"options.size is missing: the pattern corner needs it"):
        PatternSpec("corner")
    with pytest.raises(UserError, match=r"options.sise is no option of the pattern corner \(did you mean 'size'"):
        PatternSpec("corner", options={"sise": 3})
    with pytest.raises(UserError, match=r"block=.* not of corner"):
        PatternSpec("corner", block=(2, 2), options={"size": 3})
    with pytest.raises(UserError, match="'corner' is taken; registered are random,"):
        register_pattern("corner", lambda *_: None)


@pytest.mark.usefixtures("registry")
def test_a_registered_pattern_ranks_the_weights_of_a_layer_and_may_evolve() -> None:
    @register_pattern("smallest", evolves=True)
    def smallest(spec: Any, shape: tuple[int, int], density: float, generator: Any, weight: Tensor) -> Tensor:
        return top_entries(-weight.detach().abs(), round(density * weight.numel()))

    model = torch.nn.Sequential(torch.nn.Linear(64, 8))
    weight = model[0].weight.detach().abs().clone()
    MaskManager(model, SET(sparsity=0.75, every=1), pattern="smallest", seed=0)
    mask = model[0].pattern.mask()
    assert weight[mask].max() < weight[~mask].min()
    PATTERNS.register("smallest", PatternKind(smallest, PATTERNS["smallest"].count), replace=True)
    with pytest.raises(UserError, match="pattern='smallest' would not outlast the first update of SET"):
        MaskManager(torch.nn.Sequential(torch.nn.Linear(64, 8)), SET(sparsity=0.75), pattern="smallest", seed=0)


@pytest.mark.usefixtures("registry")
def test_options_of_a_section_go_to_the_patterns_that_have_them() -> None:
    register_pattern("corner", corner)
    section = SparsityConfig(sparsity=0.5, pattern="corner", options={"size": 3})
    assert section.spec() == PatternSpec("corner", options={"size": 3})
    assert section.spec("random") == PatternSpec()
    with pytest.raises(UserError, match=r"^sparsity.options.size is no option of the pattern random; it has none"):
        SparsityConfig(sparsity=0.5, options={"size": 3})
