"""The vector type against numpy, element by element."""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
import pytest
import torch

from sparsetrain.kernels.simd import vectors
from sparsetrain.kernels.simd.lanes import (
    add_sums4,
    add_sums8,
    add_sums_head,
    load_head,
    store_head,
    sum_lanes,
    transpose16,
)
from sparsetrain.kernels.simd.vectors import (
    add,
    element,
    fma,
    get,
    lane,
    load,
    load8,
    load_four,
    load_quad,
    put,
    splat,
    splat8,
    store,
)

lane0, lane1, lane2, lane3 = lane


@numba.njit
def arithmetic(x: Any, y: Any, out: Any) -> None:
    store(out, 0, fma(load(x, 1), load(y, 0), splat(np.float32(0.5))))
    store(out, 16, add(load(x, 0), load(y, 1)))
    store(out, 32, fma(load8(x, 3), splat8(np.float32(2.0)), load8(y, 0)))
    out[40] = sum_lanes(load(x, 0))
    out[41] = sum_lanes(load8(x, 0))


@numba.njit
def picked(x: Any, out: Any) -> None:
    four = load_four(x, 1)
    store(out, 0, lane0(four))
    store(out, 16, lane1(four))
    store(out, 32, lane2(four))
    store(out, 48, lane3(four))


@numba.njit
def sums(x: Any, out: Any, count: int) -> None:
    a, b, c, d = load8(x, 0), load8(x, 8), load8(x, 16), load8(x, 24)
    add_sums4(out, 0, a, b, c, d)
    add_sums8(out, 4, a, b, c, d, load8(x, 32), load8(x, 40), load8(x, 48), load8(x, 56))
    add_sums_head(out, 12, count, a, b, c, d)
    add_sums4(out, 20, load(x, 0), load(x, 16), load(x, 32), load(x, 48))


@numba.njit
def heads(x: Any, out: Any, count: int) -> None:
    store(out, 16, load_head(x, 0, count))
    store_head(out, 0, load(x, 0), count)


@numba.njit
def transposed(x: Any, at: int, step: int, out: Any, to: int, out_step: int) -> None:
    transpose16(x, at, step, out, to, out_step)


@numba.njit
def converted(x: Any, out: Any) -> None:
    for place in range(0, len(x) - 15, 16):
        store(out, place, load(x, place))
    for place in range(len(x) // 16 * 16, len(x)):
        put(out, place, get(x, place))


@numba.njit
def quads(x: Any, out: Any) -> None:
    for place in range(len(x) - 3):
        out[place] = load_quad(x, place)


@numba.njit
def elements(x: Any, out: Any) -> None:
    for place in range(len(x)):
        out[place] = element(x, place)


def numbers(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(count, dtype=np.float32)


def test_arithmetic_matches_numpy() -> None:
    x, y, out = numbers(32), numbers(32, 1), np.full(48, np.nan, np.float32)
    arithmetic(x, y, out)
    exact = (x[1:17].astype(np.float64) * y[:16] + 0.5).astype(np.float32)
    np.testing.assert_allclose(out[:16], exact, rtol=2e-7, atol=1e-7)
    np.testing.assert_array_equal(out[16:32], x[:16] + y[1:17])
    np.testing.assert_allclose(out[32:40], 2 * x[3:11] + y[:8], rtol=2e-7, atol=1e-7)
    np.testing.assert_allclose(out[40:42], [x[:16].sum(), x[:8].sum()], rtol=1e-5)


def test_a_lane_of_four_fills_a_vector() -> None:
    x, out = numbers(5), np.empty(64, np.float32)
    picked(x, out)
    np.testing.assert_array_equal(out.reshape(4, 16), np.repeat(x[1:5, None], 16, 1))


@pytest.mark.parametrize("count", [1, 2, 3])
def test_sums_of_several_vectors_match_numpy_and_touch_nothing_else(count: int) -> None:
    x, before = numbers(64), numbers(24, 2)
    out = before.copy()
    sums(x, out, count)
    eight, sixteen = x.reshape(8, 8).sum(1), x.reshape(4, 16).sum(1)
    expected = before.copy()
    expected[:4] += eight[:4]
    expected[4:12] += eight
    expected[12 : 12 + count] += eight[:count]
    expected[20:24] += sixteen
    np.testing.assert_allclose(out, expected, rtol=2e-6, atol=2e-6)
    np.testing.assert_array_equal(out[12 + count : 20], before[12 + count : 20])


@pytest.mark.parametrize("count", [0, 1, 7, 15, 16])
def test_tails_read_zeros_and_write_nothing_behind_them(count: int) -> None:
    x, out = numbers(16), np.full(32, 7.0, np.float32)
    heads(x, out, count)
    np.testing.assert_array_equal(out[:count], x[:count])
    np.testing.assert_array_equal(out[count:16], 7.0)
    np.testing.assert_array_equal(out[16:], np.where(np.arange(16) < count, x, 0))


def test_transpose_matches_numpy() -> None:
    x, out = numbers(16 * 21 + 3), np.zeros(16 * 19 + 5, np.float32)
    transposed(x, 3, 21, out, 5, 19)
    square = np.stack([x[3 + 21 * row : 19 + 21 * row] for row in range(16)])
    np.testing.assert_array_equal(np.stack([out[5 + 19 * row : 21 + 19 * row] for row in range(16)]), square.T)


def test_bfloat16_is_rounded_as_torch_rounds() -> None:
    special = [0.0, -0.0, np.inf, -np.inf, 3.4e38, 1e-45, 1.00390625, 1.01171875, 65504.0, -2.5]
    x = np.concatenate([np.array(special, np.float32), numbers(200) * np.exp(30 * numbers(200, 1))]).astype(np.float32)
    out = np.empty(len(x), np.uint16)
    converted(x, out)
    expected = torch.from_numpy(x).bfloat16()
    np.testing.assert_array_equal(out, expected.view(torch.uint16).numpy())
    back = np.empty(len(x), np.float32)
    converted(out, back)
    np.testing.assert_array_equal(back, expected.float().numpy())


def test_bfloat16_keeps_every_nan() -> None:
    bits = np.concatenate([np.uint32(0x7F800001) + np.arange(16, dtype=np.uint32), np.full(16, 0xFFFFFFFF, np.uint32)])
    out = np.empty(len(bits), np.uint16)
    converted(bits.view(np.float32), out)
    assert bool(torch.from_numpy(out).view(torch.bfloat16).isnan().all())


def test_quads_are_four_neighbours_the_first_lowest() -> None:
    x = np.random.default_rng(0).integers(0, 1 << 16, 9, dtype=np.uint16)
    out = np.empty(6, np.uint64)
    quads(x, out)
    expected = [sum(int(x[at + k]) << (16 * k) for k in range(4)) for at in range(6)]
    assert [int(value) for value in out] == expected


def test_elements_are_read_as_they_are() -> None:
    x = numbers(5)
    out = np.empty(5, np.float32)
    elements(x, out)
    np.testing.assert_array_equal(out, x)


def test_vectors_of_other_types_are_refused() -> None:
    with pytest.raises(Exception, match="not from"):
        converted(np.zeros(16), np.zeros(16, np.float32))


def test_the_native_width_is_one_that_exists() -> None:
    assert vectors.NATIVE_LANES in (8, 16)
