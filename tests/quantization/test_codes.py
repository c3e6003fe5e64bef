"""Codes and gaps: a plain NumPy quantizer, NumPy's own unpacking, and the entropy of random positions."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsetrain.errors import UserError
from sparsetrain.quantization.codes import decode, encode
from sparsetrain.quantization.gaps import decode_gaps, encode_gaps


def bf16(values: np.ndarray) -> np.ndarray:
    """Round float32 to the nearest bfloat16, ties to even, by its bits."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32).astype(np.uint64)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) & 0xFFFF0000).astype(np.uint32).view(np.float32)


def plain(group: np.ndarray, bits: int) -> np.ndarray:
    """Quantize a group from its least to its largest weight, with scale and offset in bfloat16, and return it."""
    levels = 2**bits - 1
    offset = bf16(group.min(keepdims=True))[0]
    scale = bf16((group.max(keepdims=True) - group.min()) / np.float32(levels))[0]
    codes = np.clip(np.round((group - offset) / (scale or 1.0)), 0, levels)
    return codes * scale + offset


@settings(max_examples=25, deadline=None)
@given(
    rows=st.integers(1, 4),
    columns=st.integers(1, 70),
    group=st.integers(2, 80),
    bits=st.sampled_from([4, 8]),
    size=st.sampled_from([1e-30, 1e-3, 1.0, 1e30]),
    seed=st.integers(0, 2**31),
)
def test_codes_are_those_of_numpy_and_no_worse_than_a_plain_quantizer(
    rows: int, columns: int, group: int, bits: int, size: float, seed: int
) -> None:
    weights = (np.random.default_rng(seed).standard_t(4, (rows, columns)) * size).astype(np.float32)
    codes, scales, offsets = encode(torch.from_numpy(weights), bits, group)
    groups = -(-columns // group)
    assert codes.dtype == torch.uint8
    assert scales.dtype == offsets.dtype == torch.bfloat16
    assert codes.shape == (rows, math.ceil(columns * bits / 8))
    assert scales.shape == offsets.shape == (rows, groups)
    decoded = decode(codes, scales, offsets, columns, bits, group).numpy()
    # NumPy reads the bits: the first code of a byte is its low half.
    read = np.unpackbits(codes.numpy(), axis=1, bitorder="little").reshape(rows, -1, bits)[:, :columns]
    numbers = np.packbits(np.pad(read, ((0, 0), (0, 0), (0, 8 - bits))), axis=2, bitorder="little")[..., 0]
    scale, offset = (np.repeat(part.float().numpy(), group, axis=1)[:, :columns] for part in (scales, offsets))
    assert np.array_equal(decoded, numbers.astype(np.float32) * scale + offset)
    for row in range(rows):
        for first in range(0, columns, group):
            part = weights[row, first : first + group]
            exact = part.astype(np.float64) / size  # so that the squares neither vanish nor overflow
            ours = np.square(decoded[row, first : first + group].astype(np.float64) / size - exact).sum()
            theirs = np.square(plain(part, bits).astype(np.float64) / size - exact).sum()
            assert ours <= theirs * (1 + 1e-4) + 1e-12


@pytest.mark.parametrize("weight", [1e-30, 3.0, 1e30])
def test_a_group_of_equal_weights_keeps_them(weight: float) -> None:
    matrix = torch.full((2, 3), weight)
    found = decode(*encode(matrix, 4, 2), 3, 4, 2)
    assert torch.allclose(found, matrix, rtol=2**-8, atol=0.0)


def test_equal_weights_and_zeros_are_kept() -> None:
    weights = torch.tensor([[0.0, 0.0, 0.0, 1.5, 1.5]])
    codes, scales, offsets = encode(weights, 4, 3)
    assert torch.equal(decode(codes, scales, offsets, 5, 4, 3), weights)


@pytest.mark.parametrize("bad", [math.nan, math.inf, 2e38])
def test_a_weight_without_a_code_is_refused(bad: float) -> None:
    with pytest.raises(UserError, match="NaN, infinite or above 1e38"):
        encode(torch.tensor([[0.0, bad]]), 4, 64)


@settings(max_examples=40, deadline=None)
@given(
    places=st.integers(1, 3000),
    density=st.sampled_from([1.0, 0.9, 0.5, 0.25, 0.05, 0.01, 0.001]),
    seed=st.integers(0, 2**31),
)
def test_gaps_give_the_places_back(places: int, density: float, seed: int) -> None:
    mask = np.random.default_rng(seed).random(places) < density
    mask[seed % places] = True
    stored = torch.from_numpy(np.flatnonzero(mask))
    packed, width = encode_gaps(stored)
    assert packed.dtype == torch.uint8
    assert torch.equal(decode_gaps(packed, width, len(stored)), stored)


def test_a_gap_far_beyond_a_unit_is_continued() -> None:
    stored = torch.tensor([5, 6, 10**9, 10**9 + 70000])
    packed, width = encode_gaps(stored)
    assert torch.equal(decode_gaps(packed, width, 4), stored)


def test_an_index_that_is_too_short_is_refused() -> None:
    packed, width = encode_gaps(torch.arange(100))
    with pytest.raises(UserError, match=r"the index has \d+ places; 1000 are needed"):
        decode_gaps(packed, width, 1000)


@pytest.mark.parametrize("density", [0.5, 0.25, 0.1, 0.05])
def test_an_index_is_within_a_fifth_of_the_entropy(density: float) -> None:
    """Shannon: random positions need H(density) / density bits each."""
    stored = torch.from_numpy(np.flatnonzero(np.random.default_rng(0).random(100_000) < density))
    packed, _ = encode_gaps(stored)
    entropy = -(density * math.log2(density) + (1 - density) * math.log2(1 - density)) / density
    assert 0.99 * entropy < 8 * len(packed) / len(stored) < 1.2 * entropy
