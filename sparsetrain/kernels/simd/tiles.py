"""Between token-major matrices and feature-major tiles of tokens.

A tile holds 64 tokens, ``[features, 64]``, so that one weight meets 64 neighbouring values of its input feature. A
feature of a tile is 256 bytes, four cache lines; 64 features are 16 KB, half of a common L1. 64 tokens are also the 8
accumulators of 8 lanes that hide the latency of two FMA ports. In the last tile of a matrix, tokens beyond the end are
zero.

Matrices are passed flat, with the distance between their rows; their elements are float32, or bfloat16 as uint16.
Tiles are float32.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from sparsetrain.kernels.simd.arguments import MAX_THREADS, Array, Int, where
from sparsetrain.kernels.simd.compile import inlined
from sparsetrain.kernels.simd.lanes import load_head, store_head, sum_lanes, transpose16
from sparsetrain.kernels.simd.vectors import add, fma, get, load, put, splat, store

TILE = 64
# Into how many pieces a tile may be cut; more pieces than threads have no use.
PIECES = where[f"1 <= pieces <= {MAX_THREADS}"]


@inlined
def tiles(tokens: Int) -> int:
    """Return the number of tiles of ``tokens`` tokens."""
    return (tokens + TILE - 1) // TILE


@inlined
def cut(total: Int, piece: Int, pieces: Int, step: Int) -> int:
    """Return where piece ``piece`` of ``pieces`` begins in ``total`` features, at a multiple of ``step``."""
    return total if piece == pieces else total * piece // pieces // step * step


@inlined
def pack(source: Array, at: Int, step: Int, tokens: Int, features: Int, target: Array, to: Int) -> None:
    """Write ``tokens`` (at most 64) rows from ``source[at]`` on as one tile to ``target[to:to + 64 * features]``."""
    whole_tokens, whole_features = tokens // 16 * 16, features // 16 * 16
    # Along 16 rows at a time: the prefetcher follows 16 streams (1.5 times as fast as going across the rows).
    for token in range(0, whole_tokens, 16):
        for feature in range(0, whole_features, 16):
            transpose16(source, at + token * step + feature, step, target, to + feature * TILE + token, TILE)
    for token in range(tokens):
        first = whole_features if token < whole_tokens else 0
        for feature in range(first, features):
            target[to + feature * TILE + token] = get(source, at + token * step + feature)
    if tokens < TILE:
        # Tokens that are not there are zero: they add nothing to the weight gradient, which sums over whole tiles.
        for feature in range(features):
            target[to + feature * TILE + tokens : to + (feature + 1) * TILE] = 0.0


@inlined
def unpack(source: Array, at: Int, tokens: Int, features: Int, target: Array, to: Int, step: Int) -> None:
    """Write the first ``tokens`` tokens of the tile at ``source[at]`` as rows of ``features`` to ``target[to:]``."""
    whole_tokens, whole_features = tokens // 16 * 16, features // 16 * 16
    for token in range(0, whole_tokens, 16):
        for feature in range(0, whole_features, 16):
            transpose16(source, at + feature * TILE + token, TILE, target, to + token * step + feature, step)
    for token in range(tokens):
        first = whole_features if token < whole_tokens else 0
        for feature in range(first, features):
            put(target, to + token * step + feature, source[at + feature * TILE + token])


@inlined
def store_tile(target: Array, to: Int, a: Any, b: Any, c: Any, d: Any) -> None:
    """Write one feature of a tile, four vectors of 16 tokens, to ``target[to:to + 64]``."""
    store(target, to, a)
    store(target, to + 16, b)
    store(target, to + 32, c)
    store(target, to + 48, d)


@inlined
def copy(source: Array, at: Int, target: Array, to: Int, count: Int) -> None:
    """Copy ``count`` float32."""
    whole = count // 16 * 16
    for place in range(0, whole, 16):
        store(target, to + place, load(source, at + place))
    if whole < count:
        store_head(target, to + whole, load_head(source, at + whole, count - whole), count - whole)


@inlined
def add_to(source: Array, at: Int, target: Array, to: Int, count: Int) -> None:
    """Add ``count`` float32 of ``source[at:]`` to ``target[to:]``."""
    whole = count // 16 * 16
    for place in range(0, whole, 16):
        store(target, to + place, add(load(source, at + place), load(target, to + place)))
    for place in range(whole, count):
        target[to + place] += source[at + place]


@inlined
def add_and_square(source: Array, at: Int, target: Array, to: Int, count: Int) -> float:
    """Add ``count`` float32 of ``source[at:]`` to ``target[to:]``, and return the sum of their squares."""
    whole = count // 16 * 16
    total = splat(np.float32(0.0))
    for place in range(0, whole, 16):
        one = load(source, at + place)
        store(target, to + place, add(one, load(target, to + place)))
        total = fma(one, one, total)
    squares = sum_lanes(total)
    for place in range(whole, count):
        target[to + place] += source[at + place]
        squares += source[at + place] * source[at + place]
    return squares


@inlined
def clear(target: Array, start: Int, end: Int) -> None:
    """Set ``target[start:end]`` to zero."""
    whole = start + (end - start) // 16 * 16
    for place in range(start, whole, 16):
        store(target, place, splat(np.float32(0.0)))
    for place in range(whole, end):
        target[place] = np.float32(0.0)
