"""Losses as sums of powers, ``L = E + sum_k A_k / X_k^a_k``, by variable projection, and the law of loss L(N, D).

For given exponents the other parameters are linear and not negative, so a non-negative least-squares problem gives them
(Golub and Pereyra's variable projection). What is searched is the exponents alone: first over a grid, then all
parameters are polished together. Without the projection the five parameters of L(N, D) have a condition number of some
1e11, and the result depends on where the search begins.

Residuals are relative: the polish works on logarithms, the projection on (L - model) / L.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from sparsetrain.errors import UserError, check_choice
from sparsetrain.scaling.law import LossLaw, Quantity
from sparsetrain.scaling.points import Numbers, checked_numbers, checked_seeds

LOSSES = ("log_huber", "squared")
_EXPONENTS = (0.02, 3.0)  # between which exponents are searched
_GRID = 16  # exponents of the grid, for each input
_NOTHING = 1e-3  # share of the loss below which a term is not told from noise
_SMALLEST = 1e-12  # of an amplitude relative to the loss, below which its logarithm means nothing


@dataclass(frozen=True)
class PowerSum:
    """``floor + sum_k amplitude_k * (x_k / scale_k) ** -exponent_k``.

    Args:
        floor: E.
        amplitudes, exponents: A_k and a_k, ``[k]``.
        scales: the geometric means of the inputs, which keep the amplitudes near the losses; ``[k]``.
    """

    floor: float
    amplitudes: np.ndarray
    exponents: np.ndarray
    scales: np.ndarray

    def __call__(self, inputs: np.ndarray) -> np.ndarray:
        """Return the losses at inputs ``[n, k]``."""
        powers = np.exp(-self.exponents * np.log(inputs / self.scales))
        value: np.ndarray = self.floor + powers @ self.amplitudes
        return value

    def inverse(self, loss: float) -> float:
        """Return the input at which a sum of one power reaches a loss; infinity if it stays above it."""
        above = loss - self.floor
        if above <= 0.0 or self.amplitudes[0] <= 0.0:
            return math.inf
        return float(self.scales[0] * (self.amplitudes[0] / above) ** (1.0 / self.exponents[0]))

    @property
    def vector(self) -> np.ndarray:
        """Return floor, amplitudes and exponents in one array."""
        return np.concatenate([[self.floor], self.amplitudes, self.exponents])


def fit_power_sum(
    inputs: np.ndarray, losses: np.ndarray, loss: str = "squared", delta: float = 1e-3, start: PowerSum | None = None
) -> PowerSum:
    """Return the power sum that fits losses best.

    Args:
        inputs: ``[n, k]``, above 0.
        losses: ``[n]``, above 0.
        loss: ``squared``, or ``log_huber``, for which outliers count less.
        delta: with ``log_huber``, the residual in natural logarithms from which a run counts linearly.
        start: where to begin, instead of the search by variable projection.
    """
    logs = np.log(inputs)
    center = logs.mean(axis=0) if start is None else np.log(start.scales)
    u = logs - center
    vector = _projected(u, losses) if start is None else start.vector
    vector = _polished(u, losses, vector, delta if loss == "log_huber" else None)
    k = inputs.shape[1]
    return PowerSum(float(vector[0]), vector[1 : 1 + k], vector[1 + k :], np.exp(center))


def _projected(u: np.ndarray, losses: np.ndarray) -> np.ndarray:
    """Return the parameters at the best exponents, with the linear ones of each by non-negative least squares."""
    from scipy.optimize import minimize, nnls  # slow to import

    def linear(logs: np.ndarray) -> tuple[np.ndarray, float]:
        design = np.concatenate([np.ones((len(losses), 1)), np.exp(-np.exp(logs) * u)], axis=1)
        found, residual = nnls(design / losses[:, None], np.ones(len(losses)))
        return found, float(residual)

    grid = itertools.product(np.log(np.geomspace(*_EXPONENTS, _GRID)), repeat=u.shape[1])
    start = min(map(np.array, grid), key=lambda logs: linear(logs)[1])
    search = {"xatol": 1e-7, "fatol": 1e-12, "maxiter": 400}
    bounds = [tuple(np.log(_EXPONENTS))] * u.shape[1]
    best = minimize(lambda logs: linear(logs)[1], start, method="Nelder-Mead", bounds=bounds, options=search).x
    return np.concatenate([linear(best)[0], np.exp(best)])


def _polished(u: np.ndarray, losses: np.ndarray, start: np.ndarray, delta: float | None) -> np.ndarray:
    from scipy.optimize import least_squares  # slow to import

    k, log_losses, least = u.shape[1], np.log(losses), _SMALLEST * float(losses.mean())

    def model(vector: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        powers = np.exp(-vector[1 + k :] * u)
        return np.maximum(vector[0] + powers @ vector[1 : 1 + k], least), powers

    def residuals(vector: np.ndarray) -> np.ndarray:
        found: np.ndarray = np.log(model(vector)[0]) - log_losses
        return found

    def jacobian(vector: np.ndarray) -> np.ndarray:
        value, powers = model(vector)
        columns = [np.ones((len(u), 1)), powers, -u * powers * vector[1 : 1 + k]]
        found: np.ndarray = np.concatenate(columns, axis=1) / value[:, None]
        return found

    low = np.concatenate([[0.0], np.full(k, least), np.full(k, _EXPONENTS[0] / 2)])
    high = np.concatenate([np.full(1 + k, np.inf), np.full(k, 2 * _EXPONENTS[1])])
    inside = np.clip(start, low + 1e-9 * np.maximum(1.0, np.abs(low)), high)
    kind = {"loss": "linear"} if delta is None else {"loss": "huber", "f_scale": delta}
    done = least_squares(
        residuals, inside, jacobian, bounds=(low, high), x_scale="jac", ftol=1e-12, xtol=1e-12, max_nfev=200, **kind
    )
    vector: np.ndarray = done.x
    return vector


def fit_loss_law(
    parameters: Numbers,
    tokens: Numbers,
    losses: Numbers,
    seeds: Sequence[int] | np.ndarray | None = None,
    *,
    loss: str = "log_huber",
    delta: float = 1e-3,
    samples: int = 200,
) -> LossLaw:
    """Return ``L(N, D) = floor + a / N^alpha + b / D^beta`` with intervals.

    With seeds of which each could be fitted by itself, the intervals are Student's t over the seeds' own fits; else
    they come from a bootstrap over runs, the same for the same runs.

    Args:
        parameters, tokens, losses: N, D and the loss of each run.
        seeds: of each run.
        loss: ``log_huber``, or ``squared`` relative residuals.
        delta: with ``log_huber``, the residual in natural logarithms from which a run counts linearly.
        samples: of the bootstrap.

    Raises:
        UserError: there are fewer than six runs, or fewer than three different N or D; a number is not above 0 and
            finite; or the lengths differ.
    """
    check_choice("loss", loss, LOSSES)
    named = {"parameters": parameters, "tokens": tokens, "losses": losses}
    n, d, y = (checked_numbers(name, values) for name, values in named.items())
    if not len(n) == len(d) == len(y):
        raise UserError(
            f"parameters, tokens and losses have {len(n)}, {len(d)} and {len(y)} values; as many are needed"
        )
    inputs = np.stack([n, d], axis=1)
    if not _enough(inputs):
        sizes, lengths = (len(np.unique(column)) for column in inputs.T)
        raise UserError(
            f"{len(y)} runs of {sizes} sizes and {lengths} lengths: a law of loss needs at least 6 runs, 3 sizes and "
            "3 lengths"
        )
    fitted = fit_power_sum(inputs, y, loss, delta)
    given = None if seeds is None else checked_seeds(seeds)
    if given is not None and given.shape != y.shape:
        raise UserError(f"seeds has shape {list(given.shape)}; it must have {len(y)} values")
    usable = [] if given is None else [seed for seed in np.unique(given) if _enough(inputs[given == seed])]
    if len(usable) > 1:
        fits = [fit_power_sum(inputs[given == seed], y[given == seed], loss, delta, fitted) for seed in usable]
        share, freedom = 1.0 / len(usable), len(usable) - 1.0
    else:
        generator, fits = np.random.default_rng(0), []
        for _ in range(samples):
            drawn = generator.integers(len(y), size=len(y))
            if _enough(inputs[np.unique(drawn)]):
                fits.append(fit_power_sum(inputs[drawn], y[drawn], loss, delta, fitted))
        share, freedom = 1.0, max(1.0, len(y) - 5.0)
    rows = np.array([_coordinates(fit) for fit in fits])
    covariance = np.cov(rows.T) * share
    floor, log_a, log_b, alpha, beta = _coordinates(fitted)
    residuals = np.log(fitted(inputs)) - np.log(y)
    total = float(np.square(np.log(y) - np.log(y).mean()).sum())
    return LossLaw(
        parameters={"floor": floor, "a": math.exp(log_a), "b": math.exp(log_b), "alpha": alpha, "beta": beta},
        kind="loss",
        inputs=(Quantity("parameters", "parameters"), Quantity("tokens", "tokens")),
        output=Quantity("loss", "nats per token"),
        covariance=tuple(tuple(map(float, row)) for row in covariance),
        freedom=freedom,
        ranges=((float(n.min()), float(n.max())), (float(d.min()), float(d.max()))),
        r_squared=1.0 - float(np.square(residuals).sum()) / total if total > 0.0 else None,
        points=len(y),
        runs=len(y),
        seeds=None if given is None else len(np.unique(given)),
    )


def losses(law: LossLaw, parameters: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """Return the law's losses at arrays of parameters and tokens above 0, which broadcast."""
    values = law.parameters
    by_size = values["a"] * np.power(parameters, -values["alpha"])
    return np.asarray(values["floor"] + by_size + values["b"] * np.power(tokens, -values["beta"]))


def unidentified(law: LossLaw) -> list[str]:
    """Return a sentence for each part of a fitted law that the losses do not tell, in whose numbers is no meaning."""
    found = []
    ranges = law.ranges or ()
    for of, amplitude, exponent, ends in zip(("parameters", "tokens"), "ab", ("alpha", "beta"), ranges, strict=False):
        power = law.parameters[exponent]
        largest, whole = law.parameters[amplitude] / ends[0] ** power, law(*(low for low, _ in ranges))
        if largest < _NOTHING * whole or not _EXPONENTS[0] <= power <= _EXPONENTS[1]:
            found.append(
                f"The losses do not tell how they depend on {of}: {exponent} = {power:.3g}, and the term is at most "
                f"{largest / whole:.2%} of the loss."
            )
    if law.r_squared is not None and law.r_squared <= 0.0:
        found.append("The law explains none of the differences between the losses.")
    return found


def _enough(inputs: np.ndarray) -> bool:
    return len(inputs) >= 6 and all(len(np.unique(column)) >= 3 for column in inputs.T)


def _coordinates(fit: PowerSum) -> np.ndarray:
    """Return floor, ln a, ln b, alpha and beta, without the scales."""
    logs = np.log(np.maximum(fit.amplitudes, 1e-300)) + fit.exponents * np.log(fit.scales)
    return np.concatenate([[fit.floor], logs, fit.exponents])
