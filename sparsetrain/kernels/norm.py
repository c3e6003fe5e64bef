"""LayerNorm and RMSNorm of rows, and their gradients together with each example's own, in one pass over x and g.

    forward    mean = sum x / F, var = sum (x - mean)^2 / F, r = 1 / sqrt(var + eps), y = (x - mean) r w + b
    backward   h = (x - mean) r, dx = r (g w - sum g w / F - h sum(g w h) / F),
               gamma_b = sum_t g_bt h_bt, beta_b = sum_t g_bt over the rows t of example b (arXiv 2411.00999),
               dw = sum_b gamma_b, db = sum_b beta_b

Shapes: R rows, F features, E examples, each a run of ``length`` consecutive rows. RMSNorm is the same with a mean of
zero, and without the term of dx that belongs to the mean. All sums are float32.

Rows are divided into units of about `ROWS` rows: a piece of a long example, or several short ones. Each unit sums on
its own, and `total` adds the units in their order. The division depends on E and ``length`` alone, and every call sums
each example apart, so the bits of a result depend neither on the number of threads nor on who reads the norms.
"""

from __future__ import annotations

import math
from typing import Annotated, Any

import numpy as np

from sparsetrain.kernels.simd.arguments import (
    Array,
    Int,
    Output,
    Team,
    bfloat16,
    computed,
    element_type,
    float32,
    step,
    where,
)
from sparsetrain.kernels.simd.compile import inlined
from sparsetrain.kernels.simd.elementwise import mul, sub
from sparsetrain.kernels.simd.kernel import Kernel
from sparsetrain.kernels.simd.lanes import sum_lanes
from sparsetrain.kernels.simd.vectors import add, element, fma, get, load, put, splat, store
from sparsetrain.kernels.simd.words import share

# The rows of a unit. A unit ends with two rows of sums, which are 6 % of what 64 rows of x and g and dx move.
ROWS = 64

_ZERO, _ONE = np.float32(0.0), np.float32(1.0)


def pieces_of(length: int) -> int:
    """Return how many units share an example of so many rows: 1 where units hold whole examples."""
    return max(1, length // ROWS)


def together(length: int) -> int:
    """Return how many examples of so many rows a unit holds."""
    return max(1, ROWS // length)


def units_of(examples: int, length: int) -> int:
    """Return the number of units."""
    return pieces_of(length) * -(-examples // together(length))


@inlined
def _mean(x: Array, at: Int, features: Int, each: np.float32) -> np.float32:
    """Return the mean of a row, as a sum of floats of which each counts ``each``, 1 / F."""
    whole, share_of, a, b = features // 32 * 32, splat(each), splat(_ZERO), splat(_ZERO)
    for place in range(at, at + whole, 32):
        a, b = fma(load(x, place), share_of, a), fma(load(x, place + 16), share_of, b)
    mean = sum_lanes(add(a, b))
    for place in range(at + whole, at + features):
        mean += get(x, place) * each
    return mean


@inlined
def _squares(x: Array, at: Int, features: Int, mean: np.float32, each: np.float32) -> tuple[np.float32, np.float32]:
    """Return the sum of the squares of a row less ``mean``, over F, and what the mean of the row is more than that."""
    whole, share_of, centre = features // 32 * 32, splat(each), splat(mean)
    a, b, c, d = splat(_ZERO), splat(_ZERO), splat(_ZERO), splat(_ZERO)
    for place in range(at, at + whole, 32):
        one, other = sub(load(x, place), centre), sub(load(x, place + 16), centre)
        a, b = fma(one, one, a), fma(other, other, b)
        c, d = fma(one, share_of, c), fma(other, share_of, d)
    squares, rest = sum_lanes(add(a, b)), sum_lanes(add(c, d))
    for place in range(at + whole, at + features):
        last = get(x, place) - mean
        squares += last * last
        rest += last * each
    return squares * each, rest


def _forward(
    team: Team,
    x: Annotated[Array, element_type["== rows", "== features"]],
    x_step: Annotated[Int, step["x"]],
    weight: Annotated[Array, float32["== features"]],
    bias: Annotated[Array, float32["== features"]],
    eps: Annotated[Array, float32["== 1"]],
    rows: Int,
    features: Annotated[Int, where["features > 0"]],
    centred: Int,
    y: Annotated[Output, element_type["== rows * features"]],
    moments: Annotated[Output, float32["== (1 + centred) * rows"]],
) -> None:
    """Write y, and what the backward pass needs of each row.

    Args:
        eps: what is added to the variance. centred: 1 for LayerNorm, 0 for RMSNorm.
        moments: r of each row, ``[1, R]``; for LayerNorm ``[2, R]``, with the means behind.
    """
    each, more = _ONE / np.float32(features), element(eps, 0)
    whole = features // 16 * 16
    first, last, _ = share(team, rows)
    for row in range(first, last):
        at, to, middle = row * x_step, row * features, _ZERO
        if centred != 0:
            middle = _mean(x, at, features, each)
        variance, rest = _squares(x, at, features, middle, each)
        if centred != 0:
            # A float32 sum misses the mean by a few units in its last place, which matters beside a small deviation.
            middle += rest
            variance -= rest * rest
            if variance < _ZERO:
                variance = _ZERO
            moments[rows + row] = middle
        r = _ONE / np.float32(math.sqrt(variance + more))
        moments[row] = r
        centre, by = splat(middle), splat(r)
        for place in range(0, whole, 16):
            normal = mul(sub(load(x, at + place), centre), by)
            store(y, to + place, fma(normal, load(weight, place), load(bias, place)))
        for place in range(whole, features):
            normal_of = (get(x, at + place) - middle) * r
            put(y, to + place, normal_of * element(weight, place) + element(bias, place))


forward = Kernel(_forward, "forward", float32)
forward_bfloat16 = Kernel(_forward, "forward_bfloat16", bfloat16)


def _backward(
    team: Team,
    g: Annotated[Array, element_type["== examples * length", "== features"]],
    g_step: Annotated[Int, step["g"]],
    x: Annotated[Array, element_type["== examples * length", "== features"]],
    x_step: Annotated[Int, step["x"]],
    weight: Annotated[Array, float32["== features"]],
    moments: Annotated[Array, float32["== (1 + centred) * examples * length"]],
    examples: Int,
    length: Annotated[Int, where["length > 0"]],
    features: Annotated[Int, where["features > 0"]],
    centred: Int,
    pieces: Annotated[Int, computed["pieces_of(length)"]],
    held: Annotated[Int, computed["together(length)"]],
    units: Annotated[Int, computed["units_of(examples, length)"]],
    own: Annotated[Output, float32["threads * 2 * features"]],
    sums: Annotated[Output, float32["== units * 2 * features"]],
    squares: Annotated[Output, float32["== 2 * examples"]],
    dx: Annotated[Output, element_type["== examples * length * features"]],
) -> None:
    """Write dx, the sums of gamma and beta over each unit, and the squared norms of examples that a unit holds whole.

    Args:
        moments, centred: as `forward` wrote and took them. own: scratch for gamma and beta of one example.
        sums: ``[units, 2, F]``. squares: ``[2, E]``, of gamma and of beta; if an example has several pieces, `total`
            writes them.
    """
    each, wide, rows = _ONE / np.float32(features), 2 * features, examples * length
    first, last, index = share(team, units)
    mine = index * wide
    for unit in range(first, last):
        at = unit * wide
        if pieces > 1:
            start, piece = unit // pieces * length, unit % pieces
            begin, stop = start + length * piece // pieces, start + length * (piece + 1) // pieces
            for row in range(begin, stop):
                middle = element(moments, rows + row) if centred != 0 else _ZERO
                _gradient(
                    g, row * g_step, x, row * x_step, weight, middle, element(moments, row), features, centred,
                    each, row == begin, sums, at, dx, row * features,
                )  # fmt: skip
        else:
            begin, stop = unit * held, min(examples, (unit + 1) * held)
            for example in range(begin, stop):
                start = example * length
                for row in range(start, start + length):
                    middle = element(moments, rows + row) if centred != 0 else _ZERO
                    _gradient(
                        g, row * g_step, x, row * x_step, weight, middle, element(moments, row), features, centred,
                        each, row == start, own, mine, dx, row * features,
                    )  # fmt: skip
                for part in range(2):
                    place = part * features
                    norm = _gather(own, mine + place, features, example == begin, sums, at + place)
                    squares[part * examples + example] = norm


@inlined
def _gradient(
    g: Array, g_at: Int, x: Array, x_at: Int, weight: Array, mean: np.float32, scale: np.float32, features: Int,
    centred: Int, each: np.float32, opens: bool, sums: Array, at: Int, dx: Array, to: Int,
) -> None:  # fmt: skip
    """Write a row of dx, and add the row's terms to gamma and beta in ``sums``; a row that ``opens`` them sets them."""
    whole, centre, by = features // 16 * 16, splat(mean), splat(scale)
    along, across = splat(_ZERO), splat(_ZERO)
    for place in range(0, whole, 16):
        given, normal = load(g, g_at + place), mul(sub(load(x, x_at + place), centre), by)
        if opens:
            store(sums, at + place, mul(given, normal))
            store(sums, at + features + place, given)
        else:
            store(sums, at + place, fma(given, normal, load(sums, at + place)))
            store(sums, at + features + place, add(given, load(sums, at + features + place)))
        weighted = mul(given, load(weight, place))
        along, across = fma(weighted, normal, along), add(weighted, across)
    a, b = sum_lanes(along), sum_lanes(across)
    for place in range(whole, features):
        one, h = get(g, g_at + place), (get(x, x_at + place) - mean) * scale
        sums[at + place] = one * h + (_ZERO if opens else element(sums, at + place))
        sums[at + features + place] = one + (_ZERO if opens else element(sums, at + features + place))
        one *= element(weight, place)
        a += one * h
        b += one
    # dx = r g w - h (r a / F) - r b / F.
    a, b = a * each, b * each if centred != 0 else _ZERO
    along, across = splat(-a), splat(-b)
    for place in range(0, whole, 16):
        normal = mul(sub(load(x, x_at + place), centre), by)
        rest = fma(load(g, g_at + place), load(weight, place), fma(normal, along, across))
        store(dx, to + place, mul(rest, by))
    for place in range(whole, features):
        h = (get(x, x_at + place) - mean) * scale
        put(dx, to + place, (get(g, g_at + place) * element(weight, place) - h * a - b) * scale)


@inlined
def _gather(source: Array, at: Int, count: Int, opens: bool, target: Array, to: Int) -> np.float32:
    """Add floats to ``target[to:]``, or set it to them if they ``open`` it; return the sum of their squares."""
    whole, squares = count // 16 * 16, splat(_ZERO)
    for place in range(0, whole, 16):
        some = load(source, at + place)
        squares = fma(some, some, squares)
        store(target, to + place, some if opens else add(some, load(target, to + place)))
    norm = sum_lanes(squares)
    for place in range(whole, count):
        one = element(source, at + place)
        norm += one * one
        target[to + place] = one if opens else one + element(target, to + place)
    return norm


backward = Kernel(_backward, "backward", float32)
backward_bfloat16 = Kernel(_backward, "backward_bfloat16", bfloat16)


@Kernel
def total(
    team: Team,
    sums: Annotated[Array, float32["== units * 2 * features"]],
    examples: Int,
    length: Annotated[Int, where["length > 0"]],
    features: Annotated[Int, where["features > 0"]],
    pieces: Annotated[Int, computed["pieces_of(length)"]],
    units: Annotated[Int, computed["units_of(examples, length)"]],
    squares: Annotated[Output, float32["== 2 * examples"]],
    totals: Annotated[Output, float32["== 2 * features"]],
) -> None:
    """Write gamma and beta ``[2, F]`` over all units, and the squared norms of examples that several units share."""
    wide = 2 * features
    whole = wide // 16 * 16
    first, last, _ = share(team, (wide + 15) // 16)
    for block in range(first, last):
        place = block * 16
        if place < whole:
            store(totals, place, _column(sums, place, units, wide))
        else:
            for single in range(whole, wide):
                totals[single] = _single(sums, single, units, wide)
    if pieces > 1:
        first, last, _ = share(team, 2 * examples)
        whole = features // 16 * 16
        for one in range(first, last):
            at, norms = one % examples * pieces * wide + one // examples * features, splat(_ZERO)
            for place in range(at, at + whole, 16):
                some = _column(sums, place, pieces, wide)
                norms = fma(some, some, norms)
            norm = sum_lanes(norms)
            for place in range(at + whole, at + features):
                last_of = _single(sums, place, pieces, wide)
                norm += last_of * last_of
            squares[one] = norm


@inlined
def _column(sums: Array, at: Int, rows: Int, width: Int) -> Any:
    """Return the sum of 16 floats over rows, ``width`` apart."""
    result = load(sums, at)
    for row in range(1, rows):
        result = add(result, load(sums, at + row * width))
    return result


@inlined
def _single(sums: Array, at: Int, rows: Int, width: Int) -> np.float32:
    """Return the sum of one float over rows, ``width`` apart."""
    result = element(sums, at)
    for row in range(1, rows):
        result += element(sums, at + row * width)
    return result
