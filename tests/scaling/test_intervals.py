"""Intervals of the mean, against scipy's own."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from sparsetrain.scaling.intervals import half_width


@pytest.mark.parametrize("count", [2, 3, 10])
def test_the_interval_is_scipys(count: int) -> None:
    samples = np.random.default_rng(count).normal(size=count)
    low, high = stats.t.interval(0.95, count - 1, loc=samples.mean(), scale=stats.sem(samples))
    assert half_width(samples) == pytest.approx((high - low) / 2)
    assert half_width(list(samples)) == half_width(samples)


def test_below_two_nothing_is_known() -> None:
    assert half_width([]) == half_width([1.0]) == math.inf
