"""Intervals of means and differences against scipy's."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from sparsetrain.scaling.intervals import difference_interval, half_width, mean_interval, paired


@pytest.mark.parametrize("count", [2, 3, 10])
def test_the_interval_is_scipys(count: int) -> None:
    samples = np.random.default_rng(count).normal(size=count)
    low, high = stats.t.interval(0.95, count - 1, loc=samples.mean(), scale=stats.sem(samples))
    assert half_width(samples) == pytest.approx((high - low) / 2)
    assert half_width(list(samples)) == half_width(samples)
    assert mean_interval(samples) == pytest.approx((low, high))


def test_below_two_nothing_is_known() -> None:
    assert half_width([]) == half_width([1.0]) == math.inf
    assert mean_interval([1.0]) is None
    assert mean_interval([1.0, math.inf]) == (-math.inf, math.inf)
    assert paired({0: 1.0}, {0: 3.0}) == (-2.0, math.inf, 1)
    assert math.isnan(paired({0: 1.0}, {1: 3.0})[0])
    assert difference_interval({0: 1.0, 1: 2.0}, {1: 3.0, 2: 4.0}) is None
    assert difference_interval({0: 1.0, 1: 2.0}, {2: 3.0}) is None


def test_differences_are_scipys_paired_t_test_over_common_seeds() -> None:
    one, other = np.random.default_rng(0).normal(size=(2, 4))
    low, high = stats.ttest_rel(one, other).confidence_interval(0.95)
    ours, theirs = {**dict(enumerate(one)), 7: 9.0}, {**dict(enumerate(other)), 8: 9.0}
    assert difference_interval(ours, theirs) == pytest.approx((low, high))
    mean, half, count = paired(ours, theirs)
    assert (mean - half, mean + half, count) == (pytest.approx(low), pytest.approx(high), 4)


def test_runs_without_a_common_seed_are_compared_as_scipys_welch_test_does() -> None:
    rng = np.random.default_rng(0)
    one, other = rng.normal(size=3), rng.normal(1.0, 4.0, size=5)
    expected = stats.ttest_ind(one, other, equal_var=False).confidence_interval(0.95)
    found = difference_interval(dict(enumerate(one)), dict(enumerate(other, start=3)))
    assert found == pytest.approx((expected.low, expected.high))
    assert difference_interval({0: 2.0, 1: 2.0}, {2: 1.0, 3: 1.0}) == (1.0, 1.0)
    assert difference_interval({0: 2.0, 1: math.inf}, {2: 1.0, 3: 1.0}) == (-math.inf, math.inf)
