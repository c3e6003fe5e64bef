"""The gradient noise scale: the batch size, in examples, at which noise and signal of a gradient are equal.

With G the true gradient, Sigma the covariance of one example's gradient, and mean squared norms n_small and n_big of
the gradients of batches of b and of B examples ("An empirical model of large-batch training", arXiv 1812.06162,
appendix A.1; per-example norms, b = 1, as in arXiv 2411.00999):

    |G|^2 = (B n_big - b n_small) / (B - b)        tr Sigma = (n_small - n_big) / (1/b - 1/B)

    noise scale = tr Sigma / |G|^2

Each estimate is unbiased, and their ratio in one step is not: both are averaged over steps first.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from sparsetrain.errors import UserError, as_number


class NoiseScale:
    """A running estimate of the gradient noise scale, by the ratio of two moving averages, with an interval.

    ```python
    scale = sparsetrain.NoiseScale()
    scale.update(mean_squared_small=example_norms.mean(), squared_big=batch_norm, big=len(example_norms))
    scale.value, scale.interval()
    ```

    Args:
        decay: of the moving averages in each step, in [0, 1); they reach back about 1 / (1 - decay) steps. With 1 they
            are plain means over all steps.

    Raises:
        UserError: ``decay`` lies outside [0, 1].
    """

    # Of numbers u = tr Sigma and v = |G|^2, step by step, weighted by powers of the decay: the sums of the weights, u
    # and v; and with squared weights, of which the variance of a weighted mean consists, of 1, u, v, u^2, u v and v^2.
    _SUMS = ("w", "u", "v", "ww", "wwu", "wwv", "wwuu", "wwuv", "wwvv")

    def __init__(self, decay: float = 0.99) -> None:
        decay = as_number("decay", decay)
        if not 0.0 <= decay <= 1.0:
            raise UserError(f"decay={decay} must lie in [0, 1]")
        self.decay = decay
        self._sums = dict.fromkeys(self._SUMS, 0.0)

    def update(self, mean_squared_small: float, squared_big: float, small: int = 1, big: int | None = None) -> None:
        """Add one step.

        Args:
            mean_squared_small: mean of the squared gradient norms of batches of ``small`` examples.
            squared_big: squared norm of the gradient of the mean loss over ``big`` examples.
            small: b, the examples of a small batch; 1 for norms of single examples.
            big: B, the examples of the big batch, above ``small``.

        Raises:
            UserError: ``big`` is missing or not above ``small``, or a norm is negative or not finite.
        """
        if big is None or not 0 < as_number("small", small) < as_number("big", big):
            raise UserError(f"small={small}, big={big}: the big batch must have more examples than the small one")
        n_small = as_number("mean_squared_small", mean_squared_small)
        n_big = as_number("squared_big", squared_big)
        for name, norm in (("mean_squared_small", n_small), ("squared_big", n_big)):
            if not 0.0 <= norm < math.inf:
                raise UserError(f"{name}={norm} must be a squared norm, at least 0 and finite")
        u = (n_small - n_big) / (1.0 / small - 1.0 / big)
        v = (big * n_big - small * n_small) / (big - small)
        new = {"w": 1.0, "u": u, "v": v, "ww": 1.0, "wwu": u, "wwv": v, "wwuu": u * u, "wwuv": u * v, "wwvv": v * v}
        for name, value in new.items():
            faded = self.decay**2 if name.startswith("ww") else self.decay
            self._sums[name] = faded * self._sums[name] + value

    @property
    def value(self) -> float:
        """The noise scale in examples: NaN before the first step, infinity if the gradient cannot be told from zero."""
        if self._sums["w"] == 0.0:
            return math.nan
        noise, signal = self.noise, self.signal
        if signal <= 0.0:
            return math.inf
        return max(0.0, noise) / signal

    @property
    def noise(self) -> float:
        """The average of tr Sigma."""
        return self._sums["u"] / self._sums["w"] if self._sums["w"] else math.nan

    @property
    def signal(self) -> float:
        """The average of |G|^2; noise can make it negative in a few steps."""
        return self._sums["v"] / self._sums["w"] if self._sums["w"] else math.nan

    def interval(self, level: float = 0.95) -> tuple[float, float]:
        """Return an interval of the noise scale, by Fieller's theorem with a t distribution.

        Steps count as independent, and as drawn around one noise scale; over many steps of a training neither is quite
        so. The upper end is infinity where the gradient cannot be told from zero at this level. With fewer than two
        effective steps the interval is all of [0, infinity].

        Raises:
            UserError: ``level`` lies outside (0, 1).
        """
        from scipy.stats import t as student  # slow to import

        if not 0.0 < as_number("level", level) < 1.0:
            raise UserError(f"level={level} must lie in (0, 1)")
        sums = self._sums
        effective = sums["w"] ** 2 / sums["ww"] if sums["ww"] else 0.0
        if effective < 2.0:
            return 0.0, math.inf
        u, v, square = self.noise, self.signal, sums["w"] ** 2 * (1.0 - 1.0 / effective)
        var_u = (sums["wwuu"] - 2 * u * sums["wwu"] + u * u * sums["ww"]) / square
        var_v = (sums["wwvv"] - 2 * v * sums["wwv"] + v * v * sums["ww"]) / square
        cov = (sums["wwuv"] - u * sums["wwv"] - v * sums["wwu"] + u * v * sums["ww"]) / square
        quantile = float(student.ppf((1.0 + level) / 2.0, effective - 1.0)) ** 2
        # All r with (u - r v)^2 <= q (var_u - 2 r cov + r^2 var_v): between the roots of a r^2 - 2 b r + c.
        a, b, c = v * v - quantile * var_v, u * v - quantile * cov, u * u - quantile * var_u
        root = math.sqrt(max(0.0, b * b - a * c))
        if a <= 0.0:  # |G|^2 may be zero: only a lower end, if any
            low = c / (b + root) if b + root > 0.0 else 0.0
            return max(0.0, low), math.inf
        if v <= 0.0:
            return 0.0, math.inf
        return max(0.0, (b - root) / a), max(0.0, (b + root) / a)

    def state_dict(self) -> dict[str, Any]:
        """Return what `load_state_dict` needs to go on."""
        return {"decay": self.decay, **self._sums}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a `state_dict`.

        Raises:
            UserError: the state is of something else.
        """
        if state.keys() != {"decay", *self._SUMS}:
            raise UserError(f"no state of a noise scale: it has {', '.join(sorted(map(str, state)))}")
        self.decay = float(state["decay"])
        self._sums = {name: float(state[name]) for name in self._SUMS}


@dataclass(frozen=True)
class Proportion:
    """How far a series y is proportional to a series x.

    Args:
        slope: of ``y = slope * x`` by least squares.
        correlation: Pearson's r; NaN if one of them is constant.
        variation: the standard deviation of ``y / x`` over its mean.
    """

    slope: float
    correlation: float
    variation: float


def proportion(x: np.ndarray, y: np.ndarray) -> Proportion:
    """Return how far ``y`` is proportional to ``x``, such as the noise scale of all parameters to that of a few.

    Args:
        x, y: ``[n]``, n of at least 2, above 0.
    """
    ratio = y / x
    spread = float(x.std() * y.std())
    correlation = float(((x - x.mean()) * (y - y.mean())).mean()) / spread if spread > 0.0 else math.nan
    return Proportion(float(x @ y / (x @ x)), correlation, float(ratio.std(ddof=1) / ratio.mean()))
