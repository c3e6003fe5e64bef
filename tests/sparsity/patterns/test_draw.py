"""Random patterns: the exact count, and uniformity."""

from __future__ import annotations

import pytest
import scipy.stats
import torch
from hypothesis import given
from hypothesis import strategies as st

from sparsetrain import seeds
from sparsetrain.errors import UserError
from sparsetrain.sparsity.patterns.draw import make_pattern, random_pattern
from sparsetrain.sparsity.patterns.spec import check_sparsity


@given(rows=st.integers(1, 40), columns=st.integers(1, 40), density=st.floats(0.001, 1.0), seed=st.integers(0, 2**62))
def test_number_of_nonzeros_is_exact(rows: int, columns: int, density: float, seed: int) -> None:
    expected = round(density * rows * columns)
    draws = seeds.generator(seed, "mask")
    if expected == 0:
        with pytest.raises(UserError, match=f"leaves no weight at all in a {rows}x{columns} matrix"):
            random_pattern((rows, columns), density, draws)
    else:
        assert random_pattern((rows, columns), density, draws).nnz == expected


def test_positions_are_uniform_by_chi_square() -> None:
    # How often each position is chosen, in 1500 masks; drawing without replacement shrinks the variance by 1 - density.
    density, draws, shape = 0.25, 1500, (6, 8)
    source = seeds.generator(0, "mask")
    counts = sum(random_pattern(shape, density, source).mask().double() for _ in range(draws))
    expected = draws * density
    statistic = float(((counts - expected) ** 2 / expected).sum()) / (1 - density)
    assert 0.001 < scipy.stats.chi2.sf(statistic, shape[0] * shape[1] - 1) < 0.999


def test_nonzeros_per_row_are_hypergeometric() -> None:
    # A pattern balanced by rows, or clustered in some, has another variance of the count per row.
    rows, columns, density = 400, 64, 0.25
    per_row = random_pattern((rows, columns), density, seeds.generator(1, "mask")).mask().sum(1).double()
    nnz = round(density * rows * columns)
    expected = scipy.stats.hypergeom(rows * columns, nnz, columns).var()
    assert 0.8 < float(per_row.var()) / expected < 1.25


def test_the_default_device_changes_no_position() -> None:
    expected = random_pattern((8, 8), 0.5, seeds.generator(0, "mask"))
    with torch.device("meta"):
        pattern = random_pattern((8, 8), 0.5, seeds.generator(0, "mask"))
    assert pattern.equals(expected)


@pytest.mark.parametrize("density", [0.0, -0.1, 1.1, float("nan")])
def test_density_out_of_range_is_named(density: float) -> None:
    with pytest.raises(UserError, match=r"density=.* must lie in \(0, 1\]"):
        random_pattern((4, 4), density, seeds.generator(0))


@pytest.mark.parametrize("sparsity", [1.0, -0.1, 2, float("nan"), "0.5", None, True])
def test_sparsity_out_of_range_is_named(sparsity: float) -> None:
    with pytest.raises(UserError, match=r"sparsity of group 'x'=.* must be a number in \[0, 1\)"):
        check_sparsity(sparsity, "sparsity of group 'x'")


def test_an_unknown_pattern_is_named() -> None:
    with pytest.raises(UserError, match=r"pattern='randon' is not one of .*did you mean 'random'"):
        make_pattern("randon", (4, 4), 0.5, seeds.generator(0))
