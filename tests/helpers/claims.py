"""The statistics that a text about an experiment may state, each with its interval, computed by SciPy from the rows."""

from __future__ import annotations

import csv
import functools
import itertools
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import scipy.stats

from sparsetrain.report.sweep import Line, lines_of
from sparsetrain.scaling.transfer import losses_at
from sparsetrain.studies.sweep import read_sweep

NUMBER = r"[+-]?\d+(?:\.\d+)?"
UNIT = r"(?: %| points| steps| (?:grid )?steps of 2x| doublings)?"
BRACKETS = re.compile(rf"(?:({NUMBER}){UNIT} )?\[({NUMBER}|open), ({NUMBER}|open)\]")
PLUS_MINUS = re.compile(rf"({NUMBER}) ± (\d+(?:\.\d+)?)")
Seeds = Mapping[int, float]


class Claim(NamedTuple):
    """A number, possibly in two definitions, with the ends of its interval."""

    points: tuple[float, ...]
    low: float
    high: float


def student(samples: Iterable[float]) -> tuple[float, float, float]:
    """Return the mean and the ends of Student's 95 % interval."""
    values = np.array(list(samples))
    middle, half = float(values.mean()), _quantile(len(values)) * float(values.std(ddof=1)) / math.sqrt(len(values))
    return middle, middle - half, middle + half


@functools.cache
def _quantile(count: int) -> float:
    return float(scipy.stats.t.ppf(0.975, count - 1))


def unsupported(text: str, claims: Sequence[Claim]) -> list[str]:
    """Return the intervals in a text that match no claim to the printed digits; the sign of a claim may be reversed.

    Paragraphs that begin with ``**Bar`` are skipped, since the limits of a bar are no intervals; so is code.
    """
    text = re.sub(r"```.*?```|^\*\*Bar.*?(?=\n\n)", "", text, flags=re.DOTALL | re.MULTILINE)
    text = " ".join(text.split())
    signed = [(claim, sign) for claim in claims for sign in (1, -1)]
    return [
        match[0]
        for match in BRACKETS.finditer(text)
        if not any(_same(match[1], *match.group(2, 3), claim, sign) for claim, sign in signed)
    ] + [
        match[0]
        for match in PLUS_MINUS.finditer(text)
        if not any(
            _printed(sign * point, match[1]) and _printed((claim.high - claim.low) / 2, match[2])
            for claim, sign in signed
            for point in claim.points
        )
    ]


def _same(number: str | None, low: str, high: str, claim: Claim, sign: int) -> bool:
    ends = sorted((sign * claim.low, sign * claim.high))
    known = number is None or any(_printed(sign * point, number) for point in claim.points)
    return known and _printed(ends[0], low) and _printed(ends[1], high)


def _printed(value: float, text: str) -> bool:
    if text == "open" or not math.isfinite(value):
        return text == "open" and not math.isfinite(value)
    return abs(value - float(text)) <= 0.5 * 10.0 ** -len(text.partition(".")[2]) + 1e-9


def sweep_claims(rows: Path, x: str) -> list[Claim]:
    """Return the claims of a sweep's table: optima, distances between them, and differences of losses in percent."""
    found = read_sweep([rows])
    lines = lines_of(found.rows, x, [name for name in found.varied if name != x])
    lines = [line for line in lines if line.optimum.interval is not None]  # a minimum inside, and seeds
    bases = {line.scheme: line for line in reversed(lines)}
    own = [_vertices(line) for line in lines]
    claims = []
    for line, positions in zip(lines, own, strict=True):
        assert line.optimum.log2 is not None
        _, low, high = student(positions.values())
        low = 2**low if low >= line.curve.log2[0] else -math.inf
        high = 2**high if high <= line.curve.log2[-1] else math.inf
        claims.append(Claim((2**line.optimum.log2,), low, high))
    for (one, mine), (other, theirs) in itertools.permutations(zip(lines, own, strict=True), 2):
        assert one.optimum.log2 is not None
        assert other.optimum.log2 is not None
        mean, low, high = student(mine[seed] - theirs[seed] for seed in mine)
        claims.append(Claim((mean, one.optimum.log2 - other.optimum.log2), low, high))
    logs = {(index, where): losses for index, line in enumerate(lines) for where, losses in _logs(line).items()}
    for one_place, other_place in itertools.permutations(logs, 2):
        claims += _percent(minus(logs[one_place], logs[other_place]))
    for (index, where), (other_index, other_where) in itertools.permutations(logs, 2):
        line, other = lines[index], lines[other_index]
        if line.shape == other.shape and line.scheme != other.scheme:
            base, other_base = (lines.index(bases[scheme]) for scheme in (line.scheme, other.scheme))
            gap = minus(logs[index, where], logs[other_index, other_where])
            claims += _percent(minus(gap, minus(logs[base, "own"], logs[other_base, "own"])))
    return claims


class Best(NamedTuple):
    """The minimum of one curve in log2: of the mean over seeds, of each seed, and the ends of the grid."""

    mean: float
    own: Seeds
    ends: tuple[float, float]


def exponent_claims(rows: Path, budget: int, batch: int) -> list[Claim]:
    """Return the claims of a sweep of the weight decay over budgets and batch sizes, both in tokens, by sparsity.

    They are the best tau of each curve; two exponents, each the mean of the seeds' own lines: of the best weight decay
    over the batch sizes at ``budget``, and of the best tau over the budgets at ``batch``; and how far the best tau of
    sparse models lies from the dense one's along the dense law, as a share of the distance of tokens per nonzero from
    tokens per weight.
    """
    curves: dict[tuple[float, int, int], dict[int, dict[float, float]]] = {}
    with rows.open(newline="", encoding="utf-8") as stream:
        for row in csv.DictReader(stream):
            tokens, steps = int(row["tokens"]), int(row["steps"])
            tau = 1.0 / (float(row["lr"]) * float(row["optimizer.weight_decay"]) * steps)
            of = curves.setdefault((float(row["sparsity"]), tokens, round(tokens / steps)), {})
            of.setdefault(int(row["seed"]), {})[math.log2(tau)] = float(row["loss"])
    best = {key: found for key, of in curves.items() if (found := _minimum(of)) is not None}
    claims = []
    for mean, own, (smallest, largest) in best.values():
        middle, low, high = student(own.values())
        low, high = (2**low if low >= smallest else -math.inf), (2**high if high <= largest else math.inf)
        claims.append(Claim((2**middle, 2**mean), low, high))
    slopes = {}
    for sparsity in sorted({key[0] for key in best}):
        of_batches = {key[2]: found.own for key, found in best.items() if key[:2] == (sparsity, budget)}
        of_budgets = {key[1]: found.own for key, found in best.items() if (key[0], key[2]) == (sparsity, batch)}
        if len(of_batches) > 2:
            claims += mean_claim(1.0 - slope for slope in _slopes(of_batches))
        if len(of_budgets) > 2:
            slopes[sparsity] = _slopes(of_budgets)
            claims += mean_claim(slopes[sparsity])
        whole = float(np.mean(slopes[0.0])) * math.log2(1.0 / (1.0 - sparsity)) if 0.0 in slopes else 0.0
        if whole:
            dense = {tokens: best[0.0, tokens, batch].own for tokens in of_budgets if (0.0, tokens, batch) in best}
            apart = [minus(of_budgets[tokens], own) for tokens, own in dense.items()]
            claims += mean_claim(float(np.mean([each[seed] for each in apart])) / whole for seed in _common(apart))
    return claims


def arm_losses(rows: Path, *names: str) -> dict[tuple[str, ...], dict[int, float]]:
    """Return the losses by seed of each arm, which the columns ``names`` identify, at its best rate of three seeds."""
    found: dict[tuple[str, ...], dict[str, dict[int, float]]] = {}
    with rows.open(newline="", encoding="utf-8") as stream:
        for row in csv.DictReader(stream):
            rates = found.setdefault(tuple(row[name] for name in names), {})
            rates.setdefault(row["lr"], {})[int(row["seed"])] = float(row["loss"])
    whole = {arm: [of for of in rates.values() if len(of) > 2] for arm, rates in found.items()}
    return {arm: min(of, key=lambda each: float(np.mean(list(each.values())))) for arm, of in whole.items() if of}


def paired_claims(rows: Path, *names: str) -> list[Claim]:
    """Return the mean loss of each arm of `arm_losses`, and the differences of any two, in nats and in percent."""
    return _compared(list(arm_losses(rows, *names).values()), in_percent=True)


def gap_claims(rows: Path, *names: str) -> list[Claim]:
    """Return how much wider, in points of a percent, one pair of arms lies apart than another, of `arm_losses`.

    The arms of a pair differ in the first of the columns ``names`` only, and both pairs have the same two values there.
    """
    logs = {arm: {seed: math.log(loss) for seed, loss in of.items()} for arm, of in arm_losses(rows, *names).items()}
    gaps: dict[tuple[str, str], list[Seeds]] = {}
    for one, other in itertools.permutations(logs, 2):
        if one[1:] == other[1:]:
            gap = {seed: 100 * -math.expm1(apart) for seed, apart in minus(logs[one], logs[other]).items()}
            gaps.setdefault((one[0], other[0]), []).append(gap)
    return [
        claim
        for of in gaps.values()
        for first, second in itertools.permutations(of, 2)
        for claim in mean_claim(minus(first, second).values())
    ]


def noise_claims(rows: Path) -> list[Claim]:
    """Return, by sparsity, the slope of the noise scale of all parameters over that of the norm layers, and its growth.

    Both are means of logarithms over seeds. A slope is NumPy's of least squares through the origin, from step 100 on;
    growth is the last value over that at the logged step nearest to 10 % of the tokens.
    """
    runs: dict[tuple[float, int], list[list[float]]] = {}
    with rows.open(newline="", encoding="utf-8") as stream:
        for row in csv.DictReader(stream):
            if int(row["step"]) >= 100 and row["noise_scale"] and row["noise_scale_all"]:
                numbers = [float(row[name]) for name in ("tokens", "noise_scale", "noise_scale_all")]
                runs.setdefault((float(row["sparsity"]), int(row["seed"])), []).append(numbers)
    slopes: dict[float, list[float]] = {}
    growths: dict[float, list[float]] = {}
    for (sparsity, _), points in runs.items():
        tokens, norms, whole = np.array(points).T
        slopes.setdefault(sparsity, []).append(math.log(np.linalg.lstsq(norms[:, None], whole, rcond=None)[0][0]))
        early = np.argmin(np.abs(tokens - 0.1 * tokens[-1]))
        growths.setdefault(sparsity, []).append(math.log(whole[-1] / whole[early]))
    claims = []
    for logs in (*slopes.values(), *growths.values()):
        mean, low, high = student(logs)
        claims.append(Claim((math.exp(mean),), math.exp(low), math.exp(high)))
    return claims


def mean_claim(samples: Iterable[float]) -> list[Claim]:
    values = list(samples)
    if len(values) < 2:
        return []
    mean, low, high = student(values)
    return [Claim((mean,), low, high)]


def _common(each: Iterable[Seeds]) -> list[int]:
    return sorted(set.intersection(*map(set, each)))


def _minimum(losses: Mapping[int, Mapping[float, float]]) -> Best | None:
    """Return the minimum of a curve, by parabolas through the three points around the lowest mean; None at an edge."""
    grid = sorted(set().union(*losses.values()))
    points = [point for point in grid if all(point in of for of in losses.values())]
    middle = int(np.argmin([np.mean([of[point] for of in losses.values()]) for point in points]))
    if len(losses) < 2 or middle in (0, len(points) - 1):
        return None
    near = points[middle - 1 : middle + 2]
    table = np.array([[of[point] for point in near] for of in losses.values()])
    a, b, _ = np.polyfit(near, np.vstack([table.mean(axis=0), table]).T, 2)
    if (a <= 0.0).any():
        return None
    mean, *own = (-b / (2.0 * a)).tolist()
    return Best(mean, dict(zip(losses, own, strict=True)), (grid[0], grid[-1]))


def _slopes(best: Mapping[int, Seeds]) -> list[float]:
    """Return the slope of NumPy's line through the logarithms of each seed."""
    x = [math.log2(value) for value in best]
    return [float(np.polyfit(x, [own[seed] for own in best.values()], 1)[0]) for seed in _common(best.values())]


def _vertices(line: Line) -> dict[int, float]:
    """Return, by seed, the vertex of NumPy's parabola through the three points around the lowest mean."""
    best = int(np.argmin(line.curve.filled().mean(axis=1)))
    near = slice(best - 1, best + 2)
    a, b, _ = np.polyfit(line.curve.log2[near], line.curve.losses[near], 2)
    return dict(zip(line.curve.seeds, -b / (2 * a), strict=True))


def _logs(line: Line) -> dict[str, Seeds]:
    """Return the logs of the reported losses by seed, at a line's own optimum and at its base's optimum."""
    assert line.optimum.log2 is not None
    places = {"own": losses_at(line.reported, line.optimum.log2), "base": line.at_base}
    return {where: {seed: math.log(loss) for seed, loss in losses.items()} for where, losses in places.items()}


def minus(one: Seeds, other: Seeds) -> Seeds:
    return {seed: one[seed] - other[seed] for seed in one if seed in other}


def _percent(logs: Seeds) -> list[Claim]:
    if len(logs) < 2:
        return []
    mean, low, high = (100 * math.expm1(value) for value in student(logs.values()))
    return [Claim((mean,), low, high)]


def arm_claims(rows: Path, *names: str) -> list[Claim]:
    """Return the claims of a table of arms, identified by ``names``: means over seeds, paired differences, ratios."""
    with rows.open(newline="", encoding="utf-8") as stream:
        table = list(csv.DictReader(stream))
    claims = []
    for key, factor in (("loss", 1.0), ("bits_per_byte", 1.0), ("accuracy", 100.0)):
        arms: dict[Any, dict[int, float]] = {}
        for row in table:
            if row.get(key):
                arms.setdefault(tuple(row[name] for name in names), {})[int(row["seed"])] = factor * float(row[key])
        claims += _compared(list(arms.values()), in_percent=factor == 1.0)
    return claims


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


def pairs_of(found: Mapping[Any, Seeds]) -> Iterable[tuple[tuple[Any, Any], tuple[Seeds, Seeds]]]:
    for one, other in itertools.permutations(found, 2):
        yield (one, other), (found[one], found[other])


def difference(one: Seeds, other: Seeds, in_percent: bool) -> list[Claim]:
    """Return the paired difference, also in percent of the second."""
    claims = mean_claim(minus(one, other).values())
    if in_percent:
        claims += _percent(minus(*({s: math.log(v) for s, v in of.items()} for of in (one, other))))
    return claims


def _compared(arms: Sequence[Seeds], in_percent: bool) -> list[Claim]:
    """Return the mean of each arm, and the paired differences of any two, also in percent of the second."""
    claims = [claim for arm in arms for claim in mean_claim(arm.values())]
    for one, other in itertools.permutations(arms, 2):
        claims += difference(one, other, in_percent)
    return claims


def item_claims(rows: Path) -> list[Claim]:
    """Return the accuracies of a table, in percent, with the table's own intervals over test items."""
    with rows.open(newline="", encoding="utf-8") as stream:
        table = [row for row in csv.DictReader(stream) if row["accuracy"]]
    numbers = ([100 * float(row[name]) for name in ("accuracy", "ci_low", "ci_high")] for row in table)
    return [Claim((accuracy,), low, high) for accuracy, low, high in numbers]
