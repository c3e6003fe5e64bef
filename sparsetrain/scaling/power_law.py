"""Power laws ``y = c x^m`` from points, with intervals that hold for a few seeds.

The fit is a line in natural logarithms. There are three intervals:

- With seeds, each seed gives a line, and the interval is Student's t over these. It includes what all points of a seed
  have in common, which the scatter around a line does not show.
- Without seeds, it is the regression's own t interval, with two degrees of freedom fewer than points.
- Without seeds and with a Huber loss, the covariance is that of a bootstrap over the points' residuals.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from sparsetrain.errors import UserError, as_number, check_choice
from sparsetrain.scaling.law import PowerLaw
from sparsetrain.scaling.points import Numbers, checked_numbers, checked_seeds

LOSSES = ("least_squares", "log_huber")
_SAMPLES = 300  # of a bootstrap
_ROUNDS = 1000  # of reweighting, at most
_CLOSE = 1e-8  # change of a line's parameters at which reweighting stops


def fit_power_law(
    x: Numbers,
    y: Numbers,
    seeds: Sequence[int] | np.ndarray | None = None,
    *,
    loss: str = "least_squares",
    delta: float = 0.1,
) -> PowerLaw:
    """Return the power law ``y = coefficient * x ** exponent`` that fits points best, in logarithms.

    ```python
    law = sparsetrain.fit_power_law(tokens_per_weight, best_tau, seeds)
    law.exponent, law.interval(0.95), law.predict(80.0), law.predict_interval(80.0)
    ```

    Args:
        x, y: coordinates of the points, above 0.
        seeds: the seed of each point. With them the law is the mean of the lines of the seeds that have at least two
            different x, and its intervals are Student's t over these lines.
        loss: ``least_squares``, or ``log_huber``, for which an outlier counts less.
        delta: with ``log_huber``, the distance in natural logarithms from which a point counts linearly and not
            squared; 0.1 is about 10 %.

    Raises:
        UserError: there are fewer than three different x, x or y is not above 0 and finite, their lengths differ,
            fewer than two seeds have a line, a seed is no integer, or a choice is unknown.
    """
    check_choice("loss", loss, LOSSES)
    if not 0.0 < as_number("delta", delta) < np.inf:
        raise UserError(f"delta={delta} must be above 0 and finite")
    x, y = checked_numbers("x", x), checked_numbers("y", y)
    log_x, log_y = np.log(x), np.log(y)
    if len(log_x) != len(log_y):
        raise UserError(f"x has {len(log_x)} values and y has {len(log_y)}; they must have as many")
    different = len(np.unique(log_x))
    if different < 3:
        raise UserError(f"x has {different} different values; a power law needs at least 3")
    huber = delta if loss == "log_huber" else None
    if seeds is not None:
        given = checked_seeds(seeds)
        lines, groups = _lines_by_seed(log_x, log_y, given, huber), len(np.unique(given))
        middle, freedom = lines.mean(axis=0), len(lines) - 1.0
        covariance = np.cov(lines.T) / len(lines)
    else:
        middle, freedom, groups = _line(log_x, log_y, huber), len(log_x) - 2.0, None
        if huber is None:
            covariance = _regression(log_x, log_y - middle[0] - middle[1] * log_x)
        else:
            covariance = _bootstrap(log_x, log_y - middle[0] - middle[1] * log_x, huber)
    residuals = log_y - middle[0] - middle[1] * log_x
    total = float(np.square(log_y - log_y.mean()).sum())
    return PowerLaw(
        parameters={"coefficient": float(np.exp(middle[0])), "exponent": float(middle[1])},
        covariance=tuple(tuple(map(float, row)) for row in covariance),
        freedom=freedom,
        ranges=((float(np.min(x)), float(np.max(x))),),
        r_squared=1.0 - float(np.square(residuals).sum()) / total if total > 0.0 else None,
        points=len(log_x),
        seeds=groups,
    )


def _lines_by_seed(log_x: np.ndarray, log_y: np.ndarray, seeds: np.ndarray, huber: float | None) -> np.ndarray:
    """Return the line of each seed that has one, ``[s, 2]``."""
    if seeds.shape != log_x.shape:
        raise UserError(f"seeds has shape {list(seeds.shape)} and x {list(log_x.shape)}; they must have as many values")
    lines = []
    for seed in np.unique(seeds):
        of = seeds == seed
        if len(np.unique(log_x[of])) > 1:
            lines.append(_line(log_x[of], log_y[of], huber))
    if len(lines) < 2:
        raise UserError(
            f"seeds: {len(lines)} of {len(np.unique(seeds))} seeds have two different x; an interval over seeds needs "
            "at least 2 such seeds, and without seeds it is the regression's own"
        )
    return np.array(lines)


def _line(log_x: np.ndarray, log_y: np.ndarray, huber: float | None) -> np.ndarray:
    """Return intercept and slope, ``[..., 2]``, of points ``[..., n]``."""
    weights, before = np.ones_like(log_x), None
    for _ in range(_ROUNDS):
        total = weights.sum(axis=-1, keepdims=True)
        mean_x, mean_y = ((weights * v).sum(axis=-1, keepdims=True) / total for v in (log_x, log_y))
        u = log_x - mean_x
        slope = (weights * u * (log_y - mean_y)).sum(axis=-1, keepdims=True)
        slope = slope / (weights * u * u).sum(axis=-1, keepdims=True)
        line = np.concatenate([mean_y - slope * mean_x, slope], axis=-1)
        if huber is None or (before is not None and np.abs(line - before).max() < _CLOSE):
            break
        residuals = np.abs(log_y - line[..., :1] - line[..., 1:] * log_x)
        weights, before = huber / np.maximum(huber, residuals), line
    return line


def _regression(log_x: np.ndarray, residuals: np.ndarray) -> np.ndarray:
    """Return the covariance of intercept and slope of a least-squares line."""
    design = np.stack([np.ones_like(log_x), log_x], axis=1)
    variance = float(np.square(residuals).sum()) / (len(log_x) - 2) if len(log_x) > 2 else 0.0
    covariance: np.ndarray = variance * np.linalg.inv(design.T @ design)
    return covariance


def _bootstrap(log_x: np.ndarray, residuals: np.ndarray, huber: float) -> np.ndarray:
    """Return the covariance of intercept and slope over resampled residuals, the same for the same points.

    Every sample has all x, since among a few points many samples would have only two or three of them.
    """
    n = len(log_x)
    # Residuals around a fitted line have a variance that is too small by (n - 2) / n.
    wide = (residuals - residuals.mean()) * np.sqrt(n / (n - 2))
    samples = np.random.default_rng(0).choice(wide, size=(_SAMPLES, n))
    covariance: np.ndarray = np.cov(_line(np.broadcast_to(log_x, samples.shape), samples, huber).T)
    return covariance
