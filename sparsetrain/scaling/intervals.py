"""How sure the mean of a few seeds is."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from scipy.stats import t as student

LEVEL = 0.95


def half_width(samples: Sequence[float] | np.ndarray) -> float:
    """Return half the width of the 95 % interval of the mean of ``samples`` (Student's t); infinite below two."""
    if len(samples) < 2:
        return math.inf
    spread = float(np.std(samples, ddof=1)) / math.sqrt(len(samples))
    return float(student.ppf(0.5 + LEVEL / 2, len(samples) - 1)) * spread
