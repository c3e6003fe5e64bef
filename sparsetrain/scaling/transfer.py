"""The optimum of a swept hyperparameter, its uncertainty, and its shift between curves.

A curve is the loss over one hyperparameter x (a learning rate, an initial standard deviation) at a few values and a few
seeds. All computations use log2 x. The optimum is the vertex of the parabola through the best point and its two
neighbours. Three rules avoid false claims:

- If the best point is at the end of the grid, it is an *edge* and not an optimum: the grid has to grow.
- A point at which any seed diverged counts as infinitely bad. Next to the best point it brackets the optimum, but no
  parabola goes through it, so the optimum is then the grid point itself.
- Intervals are Student's t over seeds (`scaling.intervals`). Each seed has its own vertex, that of the parabola through
  its losses at the three points of the mean curve; only seeds that ran at all three count. An end of the interval
  beyond the grid is open, because nothing was measured there. With one seed there is no interval, with two a very wide
  one.

Not every point needs every seed: one seed over the whole grid and three around the minimum suffice. A missing loss is
filled in from the additive model loss = f(x) + g(seed), fitted to the losses that exist.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from sparsetrain.errors import UserError
from sparsetrain.scaling.intervals import Interval, difference_interval, mean_interval, paired

_NEAR = 1e-9  # points closer than this in log2 x are the same


class Row(NamedTuple):
    """One run: its curve, its x above 0, its seed, and its loss (NaN or infinite if it diverged)."""

    curve: Hashable
    x: float
    seed: int
    loss: float


@dataclass(frozen=True)
class Curve:
    """Losses over a grid.

    Args:
        log2: ascending, ``[n]``.
        seeds: ascending, length s.
        losses: ``[n, s]``; NaN without a run, infinite if the run diverged.
    """

    log2: np.ndarray
    seeds: tuple[int, ...]
    losses: np.ndarray

    @property
    def step(self) -> float:
        """The most common distance between neighbouring points; 0 for a single point."""
        gaps = Counter(round(float(gap), 6) for gap in np.diff(self.log2))
        return max(gaps, key=lambda gap: (gaps[gap], -gap)) if gaps else 0.0

    @property
    def usable(self) -> bool:
        """Whether at least one point has no diverged seed."""
        return bool(np.isfinite(self.filled().mean(axis=1)).any())

    def filled(self) -> np.ndarray:
        """Return the losses ``[n, s]`` with missing ones filled in from the additive model in x and seed."""
        missing = np.isnan(self.losses)
        if not missing.any():
            return self.losses
        points, seeds = np.nonzero(np.isfinite(self.losses))
        n = len(self.log2)
        design = np.zeros((len(points), n + len(self.seeds)))
        design[np.arange(len(points)), points] = 1.0
        design[np.arange(len(points)), n + seeds] = 1.0
        effects = np.linalg.lstsq(design, self.losses[points, seeds], rcond=None)[0]
        filled = np.where(missing, effects[:n, None] + effects[None, n:], self.losses)
        filled[np.isinf(self.losses).any(axis=1)] = np.inf
        return filled


@dataclass(frozen=True)
class Optimum:
    """The minimum of a curve.

    Args:
        log2: its position; None at an edge.
        edge: ``low`` or ``high`` if the best point is an end of the grid, else None.
        loss: loss at the parabola's vertex, or at the best point if there is no parabola.
        best: best point of the grid, log2.
        interpolated: whether the position is a parabola's vertex.
        interval: 95 % interval, Student's t over the seeds' own vertices, log2. An end beyond the grid is infinite, and
            both are if a seed's losses have no minimum. None at an edge, next to a diverged point, and below two seeds.
        seeds: number of seeds.
    """

    log2: float | None
    edge: str | None
    loss: float
    best: float
    interpolated: bool
    interval: Interval | None
    seeds: int


@dataclass(frozen=True)
class Shift:
    """The distance of an optimum from that of another curve, in steps of the grid.

    Args:
        steps: positive for a larger x.
        at_least: whether the optimum is at an edge, so that ``steps`` is only a lower bound.
        interval: 95 % interval, Student's t over the seeds' own shifts, paired by seed; None if an optimum has none.
    """

    steps: float
    at_least: bool
    interval: Interval | None


@dataclass(frozen=True)
class Gap:
    """Relative difference of two losses, ``a / b - 1`` from the mean log ratio, with Student's interval over seeds."""

    relative: float
    interval: Interval | None
    seeds: int


def make_curves(rows: Iterable[Row]) -> dict[Hashable, Curve]:
    """Return the curves by key, in the order of their first rows.

    Raises:
        UserError: an x is not above 0, or a curve has two different losses for the same x and seed.
    """
    by_curve: dict[Hashable, dict[tuple[float, int], float]] = {}
    for row in rows:
        if not 0 < row.x < math.inf:
            raise UserError(
                f"x={row.x} of the curve {row.curve} must be above 0, because the optimum uses its logarithm"
            )
        losses_of = by_curve.setdefault(row.curve, {})
        key, loss = (math.log2(row.x), row.seed), row.loss if math.isfinite(row.loss) else math.inf
        if losses_of.get(key, loss) != loss:
            raise UserError(
                f"the curve {row.curve} has two losses at x={row.x:g}, seed={row.seed}: {losses_of[key]}, {loss}"
            )
        losses_of[key] = loss
    curves: dict[Hashable, Curve] = {}
    for name, losses_of in by_curve.items():
        xs, seeds = sorted({x for x, _ in losses_of}), tuple(sorted({seed for _, seed in losses_of}))
        losses = np.array([[losses_of.get((x, seed), np.nan) for seed in seeds] for x in xs])
        curves[name] = Curve(np.array(xs), seeds, losses)
    return curves


def optimum(curve: Curve) -> Optimum:
    """Return the minimum of ``curve`` with its interval.

    Raises:
        UserError: every point diverged.
    """
    means = curve.filled().mean(axis=1)
    if not curve.usable:
        raise UserError("every point of the curve diverged, so it has no optimum")
    best = float(curve.log2[np.argmin(means)])
    position, loss, interpolated = _vertex(curve.log2, means)
    if not math.isfinite(position):
        return Optimum(None, "low" if position < 0 else "high", loss, best, False, None, len(curve.seeds))
    interval = mean_interval(list(own_optima(curve).values()))
    if interval is not None:
        low, high = interval
        interval = (-math.inf if low < curve.log2[0] else low, math.inf if high > curve.log2[-1] else high)
    return Optimum(position, None, loss, best, interpolated, interval, len(curve.seeds))


def own_optima(curve: Curve) -> dict[int, float]:
    """Return log2 of each seed's own optimum, from the three points around the lowest mean.

    It is the vertex of the seed's parabola, even outside the three points. If the parabola has no minimum, the position
    is infinite, on the side on which the loss falls. A seed that did not run at all three points is left out. The
    result is empty if the lowest mean is at an end of the grid or next to a diverged point.
    """
    best = int(np.argmin(curve.filled().mean(axis=1)))
    if best in (0, len(curve.log2) - 1):
        return {}
    near = slice(best - 1, best + 2)
    x, found = curve.log2[near], {}
    for seed, losses in zip(curve.seeds, curve.losses[near].T, strict=True):
        if np.isfinite(losses).all():
            a, u = _parabola(x, losses)
            found[seed] = float(x[1]) + u if a > 0.0 else math.copysign(math.inf, losses[0] - losses[2])
    return found


def shift(curve: Curve, base: Curve) -> Shift | None:
    """Return the shift of the optimum of ``curve`` from that of ``base``, in the base's grid steps.

    It is None if the base has only one point or its optimum is at an edge.
    """
    ours, theirs = optimum(curve), optimum(base)
    if theirs.log2 is None or base.step == 0.0:
        return None
    if ours.log2 is None:
        return Shift((ours.best - theirs.log2) / base.step, True, None)
    interval = difference_interval(own_optima(curve), own_optima(base))
    if interval is not None:
        interval = (interval[0] / base.step, interval[1] / base.step)
    return Shift((ours.log2 - theirs.log2) / base.step, False, interval)


def losses_at(curve: Curve, log2: float) -> dict[int, float]:
    """Return the losses at ``log2`` of the seeds that ran at the nearest point; empty outside the grid.

    Losses that such a seed lacks at neighbouring points are filled in (`Curve.filled`). Between grid points the losses
    lie on a parabola: between the three points of the optimum it is that of the optimum, so that no loss is below the
    optimum; elsewhere it goes through the nearest point and its neighbours. If one of the three diverged, they lie on a
    straight line, and they are infinite if an end of that line diverged.
    """
    x = curve.log2
    if not x[0] - _NEAR <= log2 <= x[-1] + _NEAR:
        return {}
    nearest = int(np.argmin(np.abs(x - log2)))
    filled = curve.filled()
    best = int(np.argmin(filled.mean(axis=1)))
    inside = 0 < best < len(x) - 1 and x[best - 1] <= log2 <= x[best + 1]
    first = max(0, min((best if inside else nearest) - 1, len(x) - 3))
    points = np.arange(first, min(first + 3, len(x)))
    if abs(x[nearest] - log2) <= _NEAR:
        points = np.array([nearest])
    elif not np.isfinite(filled[points]).all():
        points = nearest + np.array([-1, 0] if log2 < x[nearest] else [0, 1])
    # Lagrange weights of the points.
    weights = np.array(
        [np.prod([(log2 - x[other]) / (x[i] - x[other]) for other in points if other != i]) for i in points]
    )
    found = filled[points]
    losses = weights @ found if np.isfinite(found).all() else np.full(len(curve.seeds), np.inf)
    ran = ~np.isnan(curve.losses[nearest])
    return {seed: float(loss) for seed, loss, here in zip(curve.seeds, losses, ran, strict=True) if here}


def relative_gap(a: dict[int, float], b: dict[int, float]) -> Gap | None:
    """Return how much larger the losses ``a`` are than ``b``, paired by seed; None if they share no seed.

    A diverged loss makes the gap infinite, without an interval. A parabola between points may give a loss that is not
    above 0 and has no logarithm; such a seed is left out.
    """
    shared = sorted(seed for seed in a.keys() & b.keys() if a[seed] > 0 and b[seed] > 0)
    if not shared:
        return None
    logs, their_logs = ({seed: math.log(losses[seed]) for seed in shared} for losses in (a, b))
    if not np.isfinite([logs[seed] - their_logs[seed] for seed in shared]).all():
        return Gap(math.inf if max(a[seed] for seed in shared) == math.inf else -1.0, None, len(shared))
    mean, half, _ = paired(logs, their_logs)
    interval = (math.expm1(mean - half), math.expm1(mean + half)) if len(shared) > 1 else None
    return Gap(math.expm1(mean), interval, len(shared))


def gap_beyond(
    a: dict[int, float], b: dict[int, float], a_base: dict[int, float], b_base: dict[int, float]
) -> Gap | None:
    """Return the part of the gap between ``a`` and ``b`` that the gap of their bases does not explain.

    It is the difference in differences, ``(a / b) / (a_base / b_base) - 1``, over the seeds common to all four. It is
    None without common seeds, or if one of these losses diverged.
    """
    shared = sorted(a.keys() & b.keys() & a_base.keys() & b_base.keys())
    if not shared or not all(math.isfinite(losses[seed]) for losses in (a, b, a_base, b_base) for seed in shared):
        return None
    return relative_gap({s: a[s] / b[s] for s in shared}, {s: a_base[s] / b_base[s] for s in shared})


def to_run(curve: Curve, seeds: Sequence[int], extend: int = 2, at: float | None = None) -> list[tuple[float, int]]:
    """Return the ``(log2 x, seed)`` points to run next, to get from a coarse grid to an interval at low cost.

    If the best point is at an edge, these are ``extend`` more points beyond it at the first seed. Otherwise they are
    the missing ``seeds`` at the best point and its neighbours, and the two points around ``at``, the optimum of another
    curve at which the loss is wanted, if it lies outside the grid. If none of these is missing and a seed's own optimum
    lies beyond an end of the grid that is one of the three points, it is the next point beyond that end, at all seeds.
    """
    found = optimum(curve)
    if found.edge is not None:
        sign = 1 if found.edge == "high" else -1
        step = curve.step or 1.0
        return [(found.best + sign * step * number, seeds[0]) for number in range(1, extend + 1)]
    center = int(np.argmin(np.abs(curve.log2 - found.best)))
    points = []
    for point in range(center - 1, center + 2):
        have = {seed for seed, loss in zip(curve.seeds, curve.losses[point], strict=True) if not math.isnan(loss)}
        points += [(float(curve.log2[point]), seed) for seed in seeds if seed not in have]
    if at is not None and not losses_at(curve, at):
        end = float(curve.log2[0] if at < curve.log2[0] else curve.log2[-1])
        steps = (at - end) / curve.step
        around = {math.floor(steps), math.ceil(steps)} - {0}
        points += [(end + number * curve.step, seed) for number in sorted(around) for seed in seeds]
    if not points:
        own = own_optima(curve).values()
        if center == 1 and min(own, default=math.inf) < curve.log2[0]:
            points += [(float(curve.log2[0]) - curve.step, seed) for seed in seeds]
        if center == len(curve.log2) - 2 and max(own, default=-math.inf) > curve.log2[-1]:
            points += [(float(curve.log2[-1]) + curve.step, seed) for seed in seeds]
    return points


def _vertex(x: np.ndarray, y: np.ndarray) -> tuple[float, float, bool]:
    """Return position, loss, and whether a parabola gave them; the position is infinite if an end is lowest."""
    best = int(np.argmin(y))
    if best in (0, len(x) - 1):
        # A single point is an edge too. The side is arbitrary; "high" suggests to extend the grid upwards.
        return (-math.inf if best == 0 and len(x) > 1 else math.inf), float(y[best]), False
    left, middle, right = y[best - 1 : best + 2]
    if not (math.isfinite(left) and math.isfinite(right)):
        return float(x[best]), float(middle), False
    a, u = _parabola(x[best - 1 : best + 2], y[best - 1 : best + 2])
    if a <= 0.0:  # three equal losses
        return float(x[best]), float(middle), True
    return float(x[best]) + u, float(middle) - a * u * u, True


def _parabola(x: np.ndarray, y: np.ndarray) -> tuple[float, float]:
    """Return the curvature a of the parabola through three points, and its vertex relative to the middle point.

    The vertex is 0 if a = 0.
    """
    # Newton's form around the middle: y = y[1] + b u + a u^2 with u = x - x[1].
    before, after = float(x[1] - x[0]), float(x[2] - x[1])
    fall, rise = float(y[1] - y[0]) / before, float(y[2] - y[1]) / after
    a = (rise - fall) / (before + after)
    b = fall + a * before
    return a, (-b / (2 * a) if a != 0.0 else 0.0)
