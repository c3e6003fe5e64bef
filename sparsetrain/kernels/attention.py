"""Causal attention with ALiBi and its gradients, block by block: nothing as large as the scores of a head ever exists.

Shapes: B batch, T tokens, H query heads, K heads of keys and values, D features of a head. Query head h reads keys and
values of head ``h // (H / K)``. Activations are fused, ``[B, T, H + 2 K, D]``: queries, keys, values.

A block is 64 queries by 64 keys. Its scores lie transposed, ``[keys, queries]``, so that maxima, sums and exponentials
work on whole vectors of queries. Queries are multiplied by ``scale / ln 2`` when they are copied, and powers are those
of two. ALiBi's ``m (j - i)`` is added to score (i, j) without what depends on i alone, as ``m (j - first)`` for the
first query of the block: that cancels in the softmax, and stays small where the weights are large.

    forward    S = K Q^T, P = 2^(S - max), Y = P^T V, with maximum and sum corrected as keys come in
    backward   S again, P = 2^(S - L) for the L = log2(sum 2^S) that the forward pass stored; R = V dY^T - (dY . Y),
               dV = P dY, dK = (P R) Q, dQ = (P R)^T K

Blocks above the diagonal are skipped, and in those on it the products leave out most of what is masked. One thread
computes a head of a sequence (backward: the query heads that share a head of keys) in a fixed order: the bits of a
result do not depend on the number of threads.

Copies in scratch have rows of ``pitch(D)`` floats, zero behind D; see `forward_scratch` and `backward_scratch`.
"""

from __future__ import annotations

import math
from typing import Annotated, Any

import numpy as np

from sparsetrain.kernels.simd.arguments import Array, Int, Output, Team, computed, float32, step, where
from sparsetrain.kernels.simd.compile import inlined
from sparsetrain.kernels.simd.elementwise import exp2, larger, mul, sub
from sparsetrain.kernels.simd.gemm import ROWS_TO_LANE, TERMS_FROM_ROW, TERMS_TO_ROW, WHOLE, WIDTH, multiply_add
from sparsetrain.kernels.simd.kernel import Kernel
from sparsetrain.kernels.simd.lanes import load_head, store_head, sum_lanes, transpose16
from sparsetrain.kernels.simd.tiles import clear
from sparsetrain.kernels.simd.vectors import add, element, fma, load, splat, store
from sparsetrain.kernels.simd.words import share

# Queries, and keys, of a block; a multiple of WIDTH. The scores of a block take 20 KB, so they fit into L1 beside the
# rows that a product reads.
BLOCK = 64
# Rows lie an odd number of cache lines apart. At a power of two all of them would compete for a few sets of L1.
_PITCH = BLOCK + 16

_ZERO, _ONE, _INF = np.float32(0.0), np.float32(1.0), np.float32(np.inf)
_LOG2_E, _LN_2 = np.float32(1.0 / math.log(2.0)), np.float32(math.log(2.0))


def padded(d: int) -> int:
    """Return the lanes that D features take."""
    return -(-d // WIDTH) * WIDTH


def pitch(d: int) -> int:
    """Return the distance between rows of D features in scratch."""
    return padded(d) if padded(d) // 16 % 2 else padded(d) + 16


def forward_scratch(tokens: int, d: int) -> int:
    """Return the floats of scratch that a thread needs for `forward`."""
    # Rows of D: all keys and values, a block of queries and of results. Rows of 64 queries: the queries transposed, the
    # scores; and one row each for the maximum, the sum and the change.
    return (2 * tokens + 2 * BLOCK) * pitch(d) + (padded(d) + BLOCK) * _PITCH + 3 * BLOCK


def backward_scratch(tokens: int, d: int) -> int:
    """Return the floats of scratch that a thread needs for `backward`."""
    # Rows of D: all keys, values and their gradients, a block of queries, of dY and of dQ. Rows of 64 queries: Q and dY
    # transposed, P, R; and one row each for L and for dY . Y.
    return (4 * tokens + 3 * BLOCK) * pitch(d) + 2 * (padded(d) + BLOCK) * _PITCH + 2 * BLOCK


# As the kernels see them: `padded` and `pitch` in compiled form.
_padded, _pitch = inlined(padded), inlined(lambda wide: wide if wide // 16 % 2 else wide + 16)


@inlined
def _copy_rows(
    source: Array, at: Int, step: Int, rows: Int, d: Int, factor: Any, target: Array, to: Int, width: Int
) -> None:
    """Write ``rows`` rows of D floats times ``factor`` to rows ``width`` apart, with zeros up to that width."""
    whole, by = d // 16 * 16, splat(factor)
    for row in range(rows):
        place, goal = at + row * step, to + row * width
        for feature in range(0, whole, 16):
            store(target, goal + feature, mul(load(source, place + feature), by))
        if whole < d:
            store(target, goal + whole, mul(load_head(source, place + whole, d - whole), by))
        for feature in range((d + 15) // 16 * 16, width, 16):
            store(target, goal + feature, splat(_ZERO))


@inlined
def _write_rows(
    source: Array, at: Int, width: Int, rows: Int, d: Int, factor: Any, target: Array, to: Int, step: Int
) -> None:
    """Write the first D floats of each row of scratch, times ``factor``."""
    whole, by = d // 16 * 16, splat(factor)
    for row in range(rows):
        place, goal = at + row * width, to + row * step
        for feature in range(0, whole, 16):
            store(target, goal + feature, mul(load(source, place + feature), by))
        if whole < d:
            store_head(target, goal + whole, mul(load(source, place + whole), by), d - whole)


@inlined
def _turn(source: Array, at: Int, width: Int, wide: Int, target: Array, to: Int) -> None:
    """Write the transpose of a block of 64 rows of ``wide`` floats, ``[wide, 64]``."""
    for row in range(0, BLOCK, 16):
        for feature in range(0, wide, 16):
            transpose16(source, at + row * width + feature, width, target, to + feature * _PITCH + row, _PITCH)


@inlined
def _mask(s: Array, at: Int, keys: Int) -> None:
    """Give the scores of a block on the diagonal -inf where the key comes after the query, in the same 16 queries."""
    hidden = splat(-_INF)
    for key in range(keys):
        before = key % 16
        if before > 0:
            store_head(s, at + key * _PITCH + key - before, hidden, before)


@inlined
def _seen(lane: Int, keys: Int, diagonal: bool) -> int:
    """Return the keys that any of 16 queries sees."""
    return min(keys, lane + 16) if diagonal else keys


@inlined
def _hide(s: Array, at: Int, lane: Int, first: Int, keys: Int) -> None:
    """Set to zero what products still read behind the last key that 16 queries see: up to a group of rows, less one."""
    for key in range(first, min(keys, first + 5)):
        store(s, at + key * _PITCH + lane, splat(_ZERO))


@inlined
def _scores(
    k: Array, k_at: Int, width: Int, q: Array, q_at: Int, d: Int, s: Array, s_at: Int, keys: Int, lanes: Int, m: Any,
    distance: Int, diagonal: bool,
) -> None:  # fmt: skip
    """Write a block of scores; ``distance`` is the position of the first key less that of the first query."""
    for key in range(keys):
        bias = splat(m * np.float32(distance + key))
        for query in range(0, BLOCK, 16):
            store(s, s_at + key * _PITCH + query, bias)
    edge = ROWS_TO_LANE if diagonal else WHOLE
    multiply_add(s, s_at, _PITCH, k, k_at, width, 1, q, q_at, _PITCH, keys, lanes, d, edge)
    if diagonal:
        _mask(s, s_at, keys)


@Kernel
def forward(
    team: Team,
    x: Annotated[Array, float32["== batch", "== tokens", "== heads + 2 * kv_heads", "== d"]],
    x_batch: Annotated[Int, step["x", 0]],
    x_token: Annotated[Int, step["x", 1]],
    x_head: Annotated[Int, step["x", 2]],
    y: Annotated[Output, float32["== batch * tokens * heads * d"]],
    logs: Annotated[Output, float32["== batch * heads * tokens"]],
    numbers: Annotated[Array, float32["== 1 + heads"]],
    batch: Int,
    tokens: Int,
    heads: Int,
    kv_heads: Annotated[Int, where["kv_heads > 0 and heads % kv_heads == 0"]],
    d: Int,
    s: Annotated[Output, float32["threads * forward_scratch(tokens, d)"]],
    scratch: Annotated[Int, computed["forward_scratch(tokens, d)"]],
) -> None:
    """Write y ``[B, T, H D]`` and the logarithms L ``[B, H, T]``.

    Args:
        x: queries, keys and values. numbers: the scale, and the slope of each head. s: scratch.
    """
    wide = _padded(d)
    width = _pitch(wide)
    factor = element(numbers, 0) * _LOG2_E
    first, last, index = share(team, batch * heads)
    k = index * scratch
    v = k + tokens * width
    q, o = v + tokens * width, v + (tokens + BLOCK) * width
    turned = o + BLOCK * width
    scores = turned + wide * _PITCH
    top = scores + BLOCK * _PITCH
    total, change = top + BLOCK, top + 2 * BLOCK
    shared = -1
    for unit in range(first, last):
        b, h = unit // heads, unit % heads
        group = h // (heads // kv_heads)
        if shared != b * kv_heads + group:
            # Keys and values are copied once for all query heads that share them.
            shared = b * kv_heads + group
            at = b * x_batch + (heads + group) * x_head
            _copy_rows(x, at, x_token, tokens, d, _ONE, s, k, width)
            _copy_rows(x, at + kv_heads * x_head, x_token, tokens, d, _ONE, s, v, width)
        m = element(numbers, 1 + h) * _LOG2_E
        for start in range(0, tokens, BLOCK):
            queries = min(BLOCK, tokens - start)
            lanes = (queries + 15) // 16 * 16
            _copy_rows(x, b * x_batch + start * x_token + h * x_head, x_token, queries, d, factor, s, q, width)
            clear(s, q + queries * width, q + BLOCK * width)
            _turn(s, q, width, wide, s, turned)
            clear(s, o, o + BLOCK * width)
            for lane in range(0, BLOCK, 16):
                store(s, top + lane, splat(-_INF))
                store(s, total + lane, splat(_ZERO))
            # Blocks of keys up to the block of the queries; later ones are masked as a whole.
            for other in range(0, start + 1, BLOCK):
                keys, diagonal = min(BLOCK, tokens - other), other == start
                _scores(
                    s, k + other * width, width, s, turned, d, s, scores, keys, lanes, m, other - start, diagonal
                )  # fmt: skip
                _weights(s, scores, keys, lanes, diagonal, top, total, change)
                if other > 0:
                    # The maxima grew: what was summed before is rescaled to them.
                    for query in range(queries):
                        by = splat(element(s, change + query))
                        for feature in range(o + query * width, o + query * width + wide, 16):
                            store(s, feature, mul(load(s, feature), by))
                edge = TERMS_TO_ROW if diagonal else WHOLE
                multiply_add(s, o, width, s, scores, 1, _PITCH, s, v + other * width, width, queries, wide, keys, edge)
            for query in range(queries):
                by = _ONE / element(s, total + query)
                at, token = o + query * width, b * tokens + start + query
                _write_rows(s, at, width, 1, d, by, y, (token * heads + h) * d, 0)
                logs[unit * tokens + start + query] = element(s, top + query) + np.float32(
                    math.log(element(s, total + query)) * _LOG2_E
                )


@inlined
def _weights(s: Array, at: Int, keys: Int, lanes: Int, diagonal: bool, top: Int, total: Int, change: Int) -> None:
    """Turn scores into powers below the maximum so far; what was summed before is to be multiplied by ``change``."""
    for lane in range(0, lanes, 16):
        seen = _seen(lane, keys, diagonal)
        before = load(s, top + lane)
        most = before
        for key in range(seen):
            most = larger(load(s, at + key * _PITCH + lane), most)
        by = exp2(sub(before, most))
        weights = mul(load(s, total + lane), by)
        for key in range(seen):
            place = at + key * _PITCH + lane
            power = exp2(sub(load(s, place), most))
            store(s, place, power)
            weights = add(weights, power)
        _hide(s, at, lane, seen, keys)
        store(s, top + lane, most)
        store(s, total + lane, weights)
        store(s, change + lane, by)


@Kernel
def backward(
    team: Team,
    x: Annotated[Array, float32["== batch", "== tokens", "== heads + 2 * kv_heads", "== d"]],
    x_batch: Annotated[Int, step["x", 0]],
    x_token: Annotated[Int, step["x", 1]],
    x_head: Annotated[Int, step["x", 2]],
    y: Annotated[Array, float32["== batch * tokens * heads * d"]],
    dy: Annotated[Array, float32["== batch * tokens * heads * d"]],
    logs: Annotated[Array, float32["== batch * heads * tokens"]],
    numbers: Annotated[Array, float32["== 1 + heads"]],
    batch: Int,
    tokens: Int,
    heads: Int,
    kv_heads: Annotated[Int, where["kv_heads > 0 and heads % kv_heads == 0"]],
    d: Int,
    s: Annotated[Output, float32["threads * backward_scratch(tokens, d)"]],
    scratch: Annotated[Int, computed["backward_scratch(tokens, d)"]],
    dx: Annotated[Output, float32["== batch * tokens * (heads + 2 * kv_heads) * d"]],
) -> None:
    """Write the gradient of the fused activations, contiguous ``[B, T, H + 2 K, D]``.

    Args:
        x, y, logs, numbers: as `forward` took and wrote them. dy: the gradient of y. s: scratch.
    """
    wide = _padded(d)
    width = _pitch(wide)
    scale = element(numbers, 0)
    first, last, index = share(team, batch * kv_heads)
    shared, all_heads = heads // kv_heads, heads + 2 * kv_heads
    k = index * scratch
    v, dk, dv = k + tokens * width, k + 2 * tokens * width, k + 3 * tokens * width
    q = k + 4 * tokens * width
    g, dq = q + BLOCK * width, q + 2 * BLOCK * width
    q_turned = dq + BLOCK * width
    g_turned = q_turned + wide * _PITCH
    p = g_turned + wide * _PITCH
    r = p + BLOCK * _PITCH
    log, inner = r + BLOCK * _PITCH, r + BLOCK * _PITCH + BLOCK
    y_token, dx_token = heads * d, all_heads * d
    for unit in range(first, last):
        b, group = unit // kv_heads, unit % kv_heads
        at = b * x_batch + (heads + group) * x_head
        _copy_rows(x, at, x_token, tokens, d, _ONE, s, k, width)
        _copy_rows(x, at + kv_heads * x_head, x_token, tokens, d, _ONE, s, v, width)
        clear(s, dk, dk + 2 * tokens * width)
        for h in range(group * shared, (group + 1) * shared):
            m = element(numbers, 1 + h) * _LOG2_E
            for start in range(0, tokens, BLOCK):
                queries = min(BLOCK, tokens - start)
                lanes = (queries + 15) // 16 * 16
                at = b * x_batch + start * x_token + h * x_head
                _copy_rows(x, at, x_token, queries, d, scale * _LOG2_E, s, q, width)
                clear(s, q + queries * width, q + BLOCK * width)
                _turn(s, q, width, wide, s, q_turned)
                at = (b * tokens + start) * y_token + h * d
                # dq holds y for a moment.
                _copy_rows(y, at, y_token, queries, d, _ONE, s, dq, width)
                _copy_rows(dy, at, y_token, queries, d, _ONE, s, g, width)
                clear(s, g + queries * width, g + BLOCK * width)
                _turn(s, g, width, wide, s, g_turned)
                for lane in range(0, BLOCK, 16):
                    # Queries that are not there have weights of zero.
                    store(s, log + lane, splat(_INF))
                    store(s, inner + lane, splat(_ZERO))
                for query in range(queries):
                    s[log + query] = element(logs, (b * heads + h) * tokens + start + query)
                    s[inner + query] = -_inner(s, dq + query * width, g + query * width, wide)
                clear(s, dq, dq + BLOCK * width)
                # dQ is complete after this loop; dK and dV grow with every block of queries and head.
                for other in range(0, start + 1, BLOCK):
                    keys, diagonal = min(BLOCK, tokens - other), other == start
                    k_at, v_at = k + other * width, v + other * width
                    _scores(s, k_at, width, s, q_turned, d, s, p, keys, lanes, m, other - start, diagonal)
                    # R begins as -(dY . Y), so that the product adds V dY^T to it and no pass of its own is needed.
                    for lane in range(0, BLOCK, 16):
                        minus = load(s, inner + lane)
                        for place in range(r + lane, r + lane + keys * _PITCH, _PITCH):
                            store(s, place, minus)
                    edge = ROWS_TO_LANE if diagonal else WHOLE
                    multiply_add(s, r, _PITCH, s, v_at, width, 1, s, g_turned, _PITCH, keys, lanes, d, edge)
                    for lane in range(0, lanes, 16):
                        less, seen = load(s, log + lane), _seen(lane, keys, diagonal)
                        for place in range(lane, lane + seen * _PITCH, _PITCH):
                            power = exp2(sub(load(s, p + place), less))
                            store(s, p + place, power)
                            store(s, r + place, mul(power, load(s, r + place)))
                        _hide(s, p, lane, seen, keys)
                        _hide(s, r, lane, seen, keys)
                    edge = TERMS_FROM_ROW if diagonal else WHOLE
                    dk_at, dv_at = dk + other * width, dv + other * width
                    multiply_add(s, dv_at, width, s, p, _PITCH, 1, s, g, width, keys, wide, queries, edge)
                    multiply_add(s, dk_at, width, s, r, _PITCH, 1, s, q, width, keys, wide, queries, edge)
                    edge = TERMS_TO_ROW if diagonal else WHOLE
                    multiply_add(s, dq, width, s, r, 1, _PITCH, s, k_at, width, queries, wide, keys, edge)
                to = (b * tokens + start) * dx_token + h * d
                _write_rows(s, dq, width, queries, d, scale, dx, to, dx_token)
        to = b * tokens * dx_token + (heads + group) * d
        # dK was summed with queries that hold scale / ln 2.
        _write_rows(s, dk, width, tokens, d, _LN_2, dx, to, dx_token)
        _write_rows(s, dv, width, tokens, d, _ONE, dx, to + kv_heads * d, dx_token)


@inlined
def _inner(s: Array, x: Int, y: Int, wide: Int) -> Any:
    """Return the inner product of two rows."""
    total = splat(_ZERO)
    for feature in range(0, wide, 16):
        total = fma(load(s, x + feature), load(s, y + feature), total)
    return sum_lanes(total)
