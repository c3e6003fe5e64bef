"""Confidence intervals of a mean over a few seeds, and of a difference of two means: Student's t.

A percentile bootstrap fails here: for three seeds it gives about their range, which covers the true mean in
1 - 2 (1/2)^3 = 75 % of cases. Each sample is the estimate of one seed. Differences are paired by seed, because two runs
with the same seed see the same batches.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from scipy.stats import t as student

LEVEL = 0.95
Interval = tuple[float, float]


def half_width(samples: Sequence[float] | np.ndarray) -> float:
    """Return half the width of the 95 % interval of the mean of ``samples`` (Student's t); infinite below two."""
    if len(samples) < 2:
        return math.inf
    spread = float(np.std(samples, ddof=1)) / math.sqrt(len(samples))
    return _quantile(len(samples) - 1) * spread


def mean_interval(samples: Sequence[float] | np.ndarray) -> Interval | None:
    """Return the 95 % interval of the mean of ``samples``, one per seed; None below two samples.

    Both ends are infinite if a sample is infinite, because the mean is then unknown.
    """
    if len(samples) < 2:
        return None
    if not np.isfinite(samples).all():
        return -math.inf, math.inf
    mean, half = float(np.mean(samples)), half_width(samples)
    return mean - half, mean + half


def paired(one: Mapping[int, float], other: Mapping[int, float]) -> tuple[float, float, int]:
    """Return mean and half the 95 % interval of ``one - other`` over their common seeds, and the number of these.

    The half width is infinite below two common seeds; the mean is NaN without any.
    """
    differences = [one[seed] - other[seed] for seed in one if seed in other]
    mean = float(np.mean(differences)) if differences else math.nan
    return mean, half_width(differences), len(differences)


def difference_interval(one: Mapping[int, float], other: Mapping[int, float]) -> Interval | None:
    """Return the 95 % interval of the mean of ``one`` minus that of ``other``, each by seed.

    It is paired over common seeds. Without common seeds the runs are independent, and the interval is Welch's. It is
    None if there is exactly one common seed, or without common seeds if one side has fewer than two.
    """
    common = one.keys() & other.keys()
    if common:
        return mean_interval([one[seed] - other[seed] for seed in sorted(common)])
    a, b = np.array(list(one.values())), np.array(list(other.values()))
    if min(len(a), len(b)) < 2:
        return None
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        return -math.inf, math.inf
    middle = float(a.mean() - b.mean())
    squares = np.array([a.var(ddof=1) / len(a), b.var(ddof=1) / len(b)])  # squared standard errors of the two means
    total = float(squares.sum())
    if total == 0.0:
        return middle, middle
    freedom = total**2 / float((squares**2 / np.array([len(a) - 1, len(b) - 1])).sum())
    half = _quantile(freedom) * math.sqrt(total)
    return middle - half, middle + half


def _quantile(freedom: float) -> float:
    return float(student.ppf(0.5 + LEVEL / 2, freedom))
