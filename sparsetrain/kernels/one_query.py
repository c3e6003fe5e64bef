"""Attention of one new token a row to the keys and values of a cache, as in decoding.

Shapes: B batch, S capacity of the cache, H query heads, K heads of keys and values, D features of a head.

The cache is ``[B, K, S, D]``: what a query reads of a head lies in one piece. A thread takes heads of keys of a row; it
first stores the new key and value behind the row's others, and then computes each query head that shares them. Scores
are in powers of two. The bits of a result do not depend on the number of threads.
"""

from __future__ import annotations

import math
from typing import Annotated, Any

import numpy as np

from sparsetrain.kernels.simd.arguments import Array, Int, Output, Team, computed, float32, int64, step, where
from sparsetrain.kernels.simd.compile import inlined
from sparsetrain.kernels.simd.elementwise import exp2, larger, mul, sub
from sparsetrain.kernels.simd.kernel import Kernel
from sparsetrain.kernels.simd.lanes import add_sums4, load_head, store_head, sum_lanes
from sparsetrain.kernels.simd.tiles import copy
from sparsetrain.kernels.simd.vectors import add, element, fma, load, splat, store
from sparsetrain.kernels.simd.words import share

_ZERO, _INF = np.float32(0.0), np.float32(np.inf)
_LOG2_E = np.float32(1.0 / math.log(2.0))


def scratch_of(capacity: int, d: int) -> int:
    """Return the floats of scratch that a thread needs: the scores, and a query."""
    return -(-capacity // 16) * 16 + 16 + -(-d // 16) * 16


@Kernel
def attend(
    team: Team,
    qkv: Annotated[Array, float32["== batch", "== (heads + 2 * kv_heads) * d"]],
    qkv_step: Annotated[Int, step["qkv"]],
    keys: Annotated[Output, float32["== batch * kv_heads * capacity * d"]],
    values: Annotated[Output, float32["== batch * kv_heads * capacity * d"]],
    lengths: Annotated[Array, int64["== batch"]],
    numbers: Annotated[Array, float32["== 1 + heads"]],
    y: Annotated[Output, float32["== batch * heads * d"]],
    scratch: Annotated[Output, float32["threads * scratch_of(capacity, d)"]],
    each: Annotated[Int, computed["scratch_of(capacity, d)"]],
    batch: Int,
    heads: Int,
    kv_heads: Annotated[Int, where["kv_heads > 0 and heads % kv_heads == 0"]],
    d: Int,
    capacity: Int,
) -> None:
    """Append keys and values to the cache and write ``y`` ``[B, H D]``.

    Args:
        qkv: queries, keys and values of the new tokens. lengths: tokens of each row in the cache, below its capacity.
        numbers: the scale of scores, and the ALiBi slope of each head, or zeros.
    """
    first, last, index = share(team, batch * kv_heads)
    line = index * each
    query = line + (capacity + 15) // 16 * 16 + 16
    scale = element(numbers, 0) * _LOG2_E
    for unit in range(first, last):
        b, group = unit // kv_heads, unit % kv_heads
        n, base = element(lengths, b), unit * capacity * d
        at = b * qkv_step + (heads + group) * d
        copy(qkv, at, keys, base + n * d, d)
        copy(qkv, at + kv_heads * d, values, base + n * d, d)
        for h in range(group * (heads // kv_heads), (group + 1) * (heads // kv_heads)):
            _scaled(qkv, b * qkv_step + h * d, d, scale, scratch, query)
            _scores(keys, base, n + 1, d, scratch, query, line, element(numbers, 1 + h) * _LOG2_E)
            total = _powers(scratch, line, n + 1)
            _mix(values, base, n + 1, d, scratch, line, np.float32(1.0) / total, y, (b * heads + h) * d)


@inlined
def _scaled(source: Array, at: Int, d: Int, factor: float, target: Array, to: Int) -> None:
    whole, by = d // 16 * 16, splat(factor)
    for feature in range(0, whole, 16):
        store(target, to + feature, mul(load(source, at + feature), by))
    if whole < d:
        store(target, to + whole, mul(load_head(source, at + whole, d - whole), by))


@inlined
def _scores(keys: Array, base: Int, count: Int, d: Int, scratch: Array, query: Int, line: Int, slope: float) -> None:
    """Write the scores of ``count`` keys, and -inf behind them up to a whole vector."""
    whole = d // 16 * 16
    for place in range(0, count, 16):
        store(scratch, line + place, splat(-_INF))
    for key in range(0, count // 4 * 4, 4):
        k = base + key * d
        a = b = c = e = splat(_ZERO)
        for feature in range(0, whole, 16):
            w, o = load(scratch, query + feature), k + feature
            a, b = fma(w, load(keys, o), a), fma(w, load(keys, o + d), b)
            c, e = fma(w, load(keys, o + 2 * d), c), fma(w, load(keys, o + 3 * d), e)
        if whole < d:
            # What lies behind the last key may be anything, so no more than a row is read.
            w, o, left = load(scratch, query + whole), k + whole, d - whole
            a, b = fma(w, load_head(keys, o, left), a), fma(w, load_head(keys, o + d, left), b)
            c, e = fma(w, load_head(keys, o + 2 * d, left), c), fma(w, load_head(keys, o + 3 * d, left), e)
        for one in range(4):
            scratch[line + key + one] = slope * np.float32(key + one - count + 1)
        add_sums4(scratch, line + key, a, b, c, e)
    for key in range(count // 4 * 4, count):
        a, k = splat(_ZERO), base + key * d
        for feature in range(0, whole, 16):
            a = fma(load(scratch, query + feature), load(keys, k + feature), a)
        if whole < d:
            a = fma(load(scratch, query + whole), load_head(keys, k + whole, d - whole), a)
        scratch[line + key] = slope * np.float32(key - count + 1) + sum_lanes(a)


@inlined
def _powers(scratch: Array, line: Int, count: Int) -> float:
    """Replace scores by powers of two relative to the largest, and return their sum."""
    top = splat(-_INF)
    for place in range(0, count, 16):
        top = larger(load(scratch, line + place), top)
    store(scratch, line + (count + 15) // 16 * 16, top)
    most = -_INF
    for lane in range(16):
        most = max(most, scratch[line + (count + 15) // 16 * 16 + lane])
    total, most_of_all = splat(_ZERO), splat(most)
    for place in range(0, count, 16):
        power = exp2(sub(load(scratch, line + place), most_of_all))
        store(scratch, line + place, power)
        total = add(total, power)
    return sum_lanes(total)


@inlined
def _mix(
    values: Array, base: Int, count: Int, d: Int, scratch: Array, line: Int, factor: Any, y: Array, to: Int
) -> None:
    """Write the sum of the values, each times its power."""
    by, feature = splat(factor), 0
    while feature + 64 <= d:
        a = b = c = e = splat(_ZERO)
        for key in range(count):
            w, o = splat(element(scratch, line + key)), base + key * d + feature
            a, b = fma(w, load(values, o), a), fma(w, load(values, o + 16), b)
            c, e = fma(w, load(values, o + 32), c), fma(w, load(values, o + 48), e)
        store(y, to + feature, mul(a, by))
        store(y, to + feature + 16, mul(b, by))
        store(y, to + feature + 32, mul(c, by))
        store(y, to + feature + 48, mul(e, by))
        feature += 64
    while feature + 16 <= d:
        a = splat(_ZERO)
        for key in range(count):
            a = fma(splat(element(scratch, line + key)), load(values, base + key * d + feature), a)
        store(y, to + feature, mul(a, by))
        feature += 16
    if feature < d:
        a, left = splat(_ZERO), d - feature
        for key in range(count):
            a = fma(splat(element(scratch, line + key)), load_head(values, base + key * d + feature, left), a)
        store_head(y, to + feature, mul(a, by), left)
