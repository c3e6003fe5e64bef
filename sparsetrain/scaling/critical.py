"""The critical batch size: from loss curves at several batch sizes, or from runs that branch from one checkpoint.

From curves ("Power Lines", arXiv 2505.13738): for each batch size B, trainings of several lengths D give the curve
``L_B(D) = E_B + A_B D^-beta_B``. Its inverse at a loss is the number of tokens ``D_B`` that reach it. Over B these
tokens follow ``D_B = D_min (1 + B / B_crit)``, see `Hyperbola`. No training has to wait for a threshold.

By branching: trainings continue from one checkpoint with different batch sizes for equal tokens. The critical batch is
the largest one whose loss is still within a tolerance of the best.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from sparsetrain.errors import UserError
from sparsetrain.scaling.intervals import Interval, mean_interval, paired
from sparsetrain.scaling.law import Hyperbola, Quantity
from sparsetrain.scaling.loss_law import PowerSum, fit_power_sum
from sparsetrain.scaling.points import Numbers, checked_numbers, checked_seeds

_FARTHEST = 1e6  # how far beyond the batch sizes B_crit is searched, as a factor


def loss_curve(tokens: Numbers, losses: Numbers) -> PowerSum:
    """Return ``L(D) = E + A D^-beta`` for trainings of several lengths at one batch size.

    Raises:
        UserError: there are fewer than three different lengths, or a number is not above 0 and finite.
    """
    d, y = checked_numbers("tokens", tokens), checked_numbers("losses", losses)
    if len(d) != len(y) or len(np.unique(d)) < 3:
        raise UserError(f"{len(np.unique(d))} lengths and {len(y)} losses: a curve needs at least 3 different lengths")
    return fit_power_sum(d[:, None], y)


def tokens_to_reach(
    loss: float, batches: Numbers, tokens: Numbers, losses: Numbers, least: float = 0.0, most: float = math.inf
) -> dict[float, float]:
    """Return the tokens that reach ``loss`` for each batch size whose curve reaches it between two lengths.

    Args:
        loss: the target.
        batches, tokens, losses: batch size in tokens, training tokens and loss of each run.
        least, most: factors of the shortest and of the longest training of a batch size, beyond which the tokens would
            be an extrapolation that is not wanted.

    Raises:
        UserError: see `loss_curve`.
    """
    b, d, y = np.asarray(batches, dtype=float), np.asarray(tokens, dtype=float), np.asarray(losses, dtype=float)
    found = {}
    for batch in np.unique(b):
        of = b == batch
        reached = loss_curve(d[of], y[of]).inverse(loss)
        if least * d[of].min() <= reached <= most * d[of].max() and math.isfinite(reached):
            found[float(batch)] = reached
    return found


def fit_critical_batch(
    batches: Numbers, tokens: Numbers, seeds: Sequence[int] | np.ndarray | None = None, *, b_opt: float | None = None
) -> Hyperbola:
    """Return the hyperbola ``D = d_min (1 + B / b_crit)`` by least squares in logarithms, with intervals.

    Batches below the best one need more tokens again, so they are left out where that can be told: below ``b_opt`` if
    it is given, or else where over seeds they need more tokens than the best batch (paired, 95 %).

    Args:
        batches: B in tokens, of each point.
        tokens: D that reach the loss, of each point.
        seeds: the seed of each point. With two or more that have three batches, intervals are Student's t over their
            own fits, else those of the regression.
        b_opt: the best batch in tokens, if it is known.

    Raises:
        UserError: fewer than three different batches are left, a number is not above 0 and finite, or the tokens do not
            grow with the batch, so that no critical batch can be told.
    """
    b, d = checked_numbers("batches", batches), checked_numbers("tokens", tokens)
    given = np.zeros(len(b), dtype=int) if seeds is None else checked_seeds(seeds)
    if not len(b) == len(d) == len(given):
        raise UserError(
            f"batches, tokens and seeds have {len(b)}, {len(d)} and {len(given)} values; as many are needed"
        )
    least = _first_batch(b, d, given) if b_opt is None else b_opt
    kept = b >= least * (1 - 1e-9)
    b, d, given = b[kept], d[kept], given[kept]
    if len(np.unique(b)) < 3:
        raise UserError(f"{len(np.unique(b))} batch sizes of at least {least:g} tokens: a critical batch needs 3")
    middle = _hyperbola(np.log(b), np.log(d))
    residuals = np.log(d) - _log_tokens(middle, np.log(b))
    own = [given == seed for seed in np.unique(given) if len(np.unique(b[given == seed])) > 2]
    if len(own) > 1:
        fits = np.array([_hyperbola(np.log(b[of]), np.log(d[of])) for of in own])
        middle, freedom, covariance = fits.mean(axis=0), len(own) - 1.0, np.cov(fits.T) / len(own)
    else:
        ratio = b * np.exp(-middle[1])
        design = np.stack([np.ones(len(b)), -ratio / (1.0 + ratio)], axis=1)
        freedom = len(b) - 2.0
        covariance = float(np.square(residuals).sum()) / freedom * np.linalg.inv(design.T @ design)
    total = float(np.square(np.log(d) - np.log(d).mean()).sum())
    return Hyperbola(
        parameters={"d_min": math.exp(middle[0]), "b_crit": math.exp(middle[1])},
        kind="critical",
        inputs=(Quantity("batch", "tokens"),),
        output=Quantity("tokens", "tokens"),
        covariance=tuple(tuple(map(float, row)) for row in covariance),
        freedom=freedom,
        ranges=((float(b.min()), float(b.max())),),
        r_squared=1.0 - float(np.square(residuals).sum()) / total if total > 0.0 else None,
        points=len(b),
        seeds=None if seeds is None else len(np.unique(given)),
    )


def _first_batch(b: np.ndarray, d: np.ndarray, seeds: np.ndarray) -> float:
    """Return the smallest batch from which on no batch is told apart from the one that needs the fewest tokens."""
    by_batch: dict[float, dict[int, float]] = {}
    for batch, tokens, seed in zip(b, d, seeds, strict=True):
        by_batch.setdefault(float(batch), {})[int(seed)] = math.log(tokens)
    best = min(by_batch, key=lambda batch: float(np.mean(list(by_batch[batch].values()))))
    least = best
    for batch in sorted((batch for batch in by_batch if batch < best), reverse=True):
        more, half, _ = paired(by_batch[batch], by_batch[best])
        if more > half:
            break
        least = batch
    return least


def _log_tokens(vector: np.ndarray, log_b: np.ndarray) -> np.ndarray:
    found: np.ndarray = vector[0] + np.logaddexp(0.0, log_b - vector[1])
    return found


def _hyperbola(log_b: np.ndarray, log_d: np.ndarray) -> np.ndarray:
    """Return ln d_min and ln b_crit: for a given b_crit, ln d_min is a mean."""
    from scipy.optimize import minimize_scalar  # slow to import

    def spread(log_crit: float) -> float:
        return float(np.var(log_d - np.logaddexp(0.0, log_b - log_crit)))

    ends = (float(log_b.min()) - math.log(_FARTHEST), float(log_b.max()) + math.log(_FARTHEST))
    grid = np.linspace(*ends, 200)
    start = float(grid[np.argmin([spread(point) for point in grid])])
    step = float(grid[1] - grid[0])
    found = minimize_scalar(spread, bounds=(start - step, start + step), method="bounded", options={"xatol": 1e-9})
    log_crit = float(found.x)
    if not ends[0] + step < log_crit < ends[1] - step:
        raise UserError(
            f"batches from {math.exp(log_b.min()):g} to {math.exp(log_b.max()):g} tokens: the tokens "
            + (
                "do not grow with the batch, so b_crit lies far beyond"
                if log_crit > log_b.max()
                else "grow as the batch"
            )
            + "; no critical batch can be told"
        )
    return np.array([float(np.mean(log_d - np.logaddexp(0.0, log_b - log_crit))), log_crit])


@dataclass(frozen=True)
class BranchedBatch:
    """A critical batch by branching.

    Args:
        value: in the unit of the batches; infinity if even the largest batch is within the tolerance.
        interval: 95 %, Student's t over the seeds' own crossings in logarithms; None below two seeds or where a seed
            has none.
        best: the lowest mean loss.
    """

    value: float
    interval: Interval | None
    best: float


def branched_critical_batch(
    batches: Numbers, losses: Numbers, seeds: Sequence[int] | np.ndarray, *, tolerance: float
) -> BranchedBatch:
    """Return the largest batch whose loss, after equal tokens from one checkpoint, is within a tolerance of the best.

    Between two batches the loss is a line over the batch's logarithm ("Critical batch size revisited",
    arXiv 2505.23971, measures it by branches in this way).

    Args:
        batches: batch size of each branch.
        losses: loss of each branch after the same number of tokens.
        seeds: of each branch.
        tolerance: in nats; it is a choice, and the result depends on it.

    Raises:
        UserError: there are fewer than two different batches, a number is not above 0 and finite, or the lengths
            differ.
    """
    b, y, given = checked_numbers("batches", batches), checked_numbers("losses", losses), checked_seeds(seeds)
    if not len(b) == len(y) == len(given):
        raise UserError(
            f"batches, losses and seeds have {len(b)}, {len(y)} and {len(given)} values; as many are needed"
        )
    if not 0.0 < tolerance < math.inf:
        raise UserError(f"tolerance={tolerance} must be above 0 and finite")
    if len(np.unique(b)) < 2:
        raise UserError(f"{len(np.unique(b))} different batches: branches need at least 2")
    means = {float(batch): float(y[b == batch].mean()) for batch in np.unique(b)}
    own = []
    for seed in np.unique(given):
        of = given == seed
        if set(b[of]) == set(b):
            own.append(_crossing({float(batch): float(y[of & (b == batch)].mean()) for batch in means}, tolerance))
    logs = [math.log(value) for value in own]
    interval = mean_interval(logs) if all(map(math.isfinite, logs)) else None
    ends = None if interval is None else (math.exp(interval[0]), math.exp(interval[1]))
    return BranchedBatch(_crossing(means, tolerance), ends, min(means.values()))


def _crossing(losses: Mapping[float, float], tolerance: float) -> float:
    """Return the largest batch within the tolerance of the lowest loss; infinity beyond the largest one measured."""
    batches = sorted(losses)
    limit = min(losses.values()) + tolerance
    last = max(index for index, batch in enumerate(batches) if losses[batch] <= limit)
    if last == len(batches) - 1:
        return math.inf
    low, high = batches[last], batches[last + 1]
    share = (limit - losses[low]) / (losses[high] - losses[low])
    return float(low * (high / low) ** share)
