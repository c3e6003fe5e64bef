"""Position encodings: ALiBi as extra features of queries and keys, and rotary embeddings.

Shapes: B batch, T tokens, H heads, D head width, R features of a head that are rotated, E extra features.

ALiBi (Press et al. 2022; arXiv 2310.13017) adds ``-m_h (i - j)`` to the score of query i and key j. A term that depends
only on i cancels in the softmax, so ``m_h j`` suffices. That is an inner product: one extra feature of the key holds
``m_h j``, and that of the query holds a constant. A fused causal kernel can therefore compute ALiBi, and no array of
size ``[H, T, T]`` exists.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sparsetrain.errors import UserError

_EXACT_DTYPES = (torch.float32, torch.float64)
_SUMMANDS = 3  # of 8 (bfloat16) or 11 (float16) bits each; together they represent the bias as exactly as float32
# Turns within the trained length from which YaRN keeps a frequency, and up to which it divides it.
_FAST, _SLOW = 32.0, 1.0
_ALIGNMENT = 8  # fused kernels are fastest for head widths that are multiples of 8; others cost twice as much on a CPU


def alibi_slopes(n_heads: int) -> Tensor:
    """Return the slopes ``m_h > 0``, float64 ``[H]``.

    For a power of two, ``m_h = 2^(-8 h / H)`` for h = 1..H. Otherwise the slopes are those of the next lower power of
    two p, followed by every other slope of 2p, as in the authors' code.

    Raises:
        UserError: ``n_heads`` is not positive.
    """
    if isinstance(n_heads, bool) or not isinstance(n_heads, int) or n_heads < 1:
        raise UserError(f"n_heads={n_heads!r} is not a positive integer")
    power = 1 << (n_heads.bit_length() - 1)
    slopes = [2.0 ** (-8.0 * h / power) for h in range(1, power + 1)]
    slopes += [2.0 ** (-4.0 * h / power) for h in range(1, 2 * (n_heads - power), 2)]
    return torch.tensor(slopes, dtype=torch.float64, device="cpu")


def alibi_features(
    slopes: Tensor, length: int, scale: float, d_head: int, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """Return extra features with which plain causal attention computes ALiBi.

    Appended to the last dimension of queries, keys and values of positions 0..T-1, they add ``m_h (j - (T - 1) / 2)``
    to the scaled score of key j. Centring halves the magnitude of the bias, which keeps the float32 sum accurate. In
    16-bit types the bias is the sum of three features; each holds the rounding error of the sum before it.

    Args:
        slopes: ``[H]``.
        length: T.
        scale: factor that the kernel applies to the inner products.
        d_head: D; E is chosen so that D + E is a multiple of 8.
        dtype, device: of the queries and keys.

    Returns:
        ``[T, 3 H, E]``: features of all queries, then of all keys, then zeros for the values, because fused kernels
        need values as wide as the keys.
    """
    n_heads = slopes.numel()
    summands = 1 if dtype in _EXACT_DTYPES else _SUMMANDS
    width = summands + (-(d_head + summands)) % _ALIGNMENT
    # A power of two is exact in every dtype; this one keeps the key's feature in the range of float16.
    constant = 2.0 ** round(-math.log2(scale))
    positions = torch.arange(length, dtype=torch.float64, device="cpu") - (length - 1) / 2
    rest = positions[:, None] * slopes.to("cpu", torch.float64) / (constant * scale)
    features = torch.zeros(length, 3 * n_heads, width, dtype=dtype, device="cpu")
    features[:, :n_heads, :summands] = constant
    for summand in range(summands):
        rounded = rest.to(dtype)
        features[:, n_heads : 2 * n_heads, summand] = rounded
        rest = rest - rounded.double()
    return features.to(device)


def alibi_bias(slopes: Tensor, queries: Tensor, keys: Tensor, like: Tensor) -> Tensor:
    """Return the explicit bias ``-m_h |i - j|`` in the dtype of ``like``, ``[B, H, Q, n_keys]``.

    The product is computed in at least float32. The function is meant for decoding, where one query or one block of
    queries meets all keys of a cache.

    Args:
        queries: positions i, ``[B, 1, Q, 1]``. keys: positions j, ``[n_keys]``.
    """
    wide = torch.promote_types(like.dtype, torch.float32)
    return (-slopes.to(like.device, wide)[:, None, None] * (queries - keys).abs()).to(like.dtype)


def rope_frequencies(d_rotary: int, base: float, kind: str, factor: float, max_context: int) -> tuple[Tensor, float]:
    """Return the rotary frequencies, float64 ``[R / 2]``, in radians per token, and the factor of the tables.

    Pair p has the frequency ``base^(-2 p / R)`` (Su et al. 2021). A factor s above 1 changes it:

    * ``linear``: it is divided by s (arXiv 2306.15595).
    * ``ntk``: the base is multiplied by ``s^(R / (R - 2))``, so that the slowest pair is divided by s and the fastest
      stays. A single pair is the fastest.
    * ``yarn``: a pair that turns at least 32 times within ``max_context`` stays, one that turns at most once is divided
      by s, and a ramp over p lies between them. The tables, and with them queries and keys, are multiplied by
      ``0.1 ln s + 1`` (arXiv 2309.00071).

    Args:
        d_rotary: R.
        base: base of the geometric sequence.
        kind: ``linear``, ``ntk`` or ``yarn``.
        factor: s, at least 1.
        max_context: the trained length, in tokens.
    """
    pairs = torch.arange(0, d_rotary, 2, dtype=torch.float64, device="cpu")
    frequencies = base ** (-pairs / d_rotary)
    if factor == 1.0:
        return frequencies, 1.0
    if kind == "linear":
        return frequencies / factor, 1.0
    if kind == "ntk":
        return frequencies * factor ** (-pairs / max(1, d_rotary - 2)), 1.0
    first, last = (_pair_of_turns(turns, d_rotary, base, max_context) for turns in (_FAST, _SLOW))
    low = max(math.floor(first), 0)
    high = max(min(math.ceil(last), d_rotary - 1), low)
    # Both ends of the ramp may be the same pair.
    ramp = ((pairs / 2 - low) / (high - low or 0.001)).clamp(0.0, 1.0)
    return frequencies * (1.0 - ramp) + frequencies / factor * ramp, 0.1 * math.log(factor) + 1.0


def _pair_of_turns(turns: float, d_rotary: int, base: float, max_context: int) -> float:
    """Return the pair, as a real number, that turns ``turns`` times within ``max_context`` tokens."""
    return d_rotary * math.log(max_context / (turns * 2 * math.pi)) / (2 * math.log(base))


def rope_tables(
    first: int | Tensor, length: int, frequencies: Tensor, device: torch.device, factor: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Return cosines and sines of the rotary angles, float32 ``[T, 1, R]``, for positions ``first .. first + T - 1``.

    For first positions by row, int64 ``[B]``, they are ``[B, T, 1, R]``.

    Pair p consists of features p and p + R/2 and is rotated by ``position * frequencies[p]`` (Su et al. 2021).

    Args:
        frequencies: ``[R / 2]``, and ``factor``, by which the tables are multiplied: see `rope_frequencies`.
    """
    positions = torch.arange(length, dtype=torch.float64, device="cpu")
    if isinstance(first, Tensor):
        first = first.cpu()[:, None]
    angles = (positions + first)[..., None] * frequencies
    angles = torch.cat((angles, angles), dim=-1)[..., None, :]
    cos, sin = angles.cos(), angles.sin()
    if factor != 1.0:
        cos, sin = cos * factor, sin * factor
    return cos.float().to(device), sin.float().to(device)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the first R features of ``x`` ``[B, T, H, D]`` with tables ``[T, 1, R]``; the dtype of ``x`` is kept."""
    width = cos.shape[-1]
    if width < x.shape[-1]:
        return torch.cat((rotate(x[..., :width], cos, sin), x[..., width:]), dim=-1)
    first, second = x.chunk(2, dim=-1)
    turned = torch.cat((-second, first), dim=-1)
    return x * cos.to(x.dtype) + turned * sin.to(x.dtype)
