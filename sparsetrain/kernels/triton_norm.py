"""LayerNorm and RMSNorm of rows on a GPU, in Triton, with each example's squared gradient norms in the backward pass.

What is computed is written in `sparsetrain.kernels.norm`, whose counterpart this is: R rows, F features, E examples,
each a run of R / E rows. A program of the backward pass takes a unit of rows, which is a piece of a long example or
several short ones, and keeps its sums of gamma and beta in registers; torch adds the units. The division depends on the
shape alone, sums are float32, and nothing is added atomically: the same input gives the same bits.

This module imports triton, so it must be imported late; see `sparsetrain.kernels.triton_bsr`.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparsetrain.kernels.triton_bsr import on_device_of, stored

# A program holds whole rows in registers: the input, its gradient, the weight, and four rows of sums.
MAX_FEATURES = 8192
# The rows of a unit: 4,224 rows keep the 132 multiprocessors of a large card busy.
ROWS = 32


def forward(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, rms: bool) -> tuple[Tensor, Tensor]:
    """Return the result, contiguous and like ``x``, and the moments of its rows, as `backward` takes them.

    Args:
        x: ``[..., F]``, with at least one element and at most `MAX_FEATURES` features.
        weight, bias: ``[F]``, or None.
    """
    rows, features = _matrix(x), x.shape[-1]
    count = rows.shape[0]
    y = torch.empty(x.shape, dtype=stored(x.dtype), device=x.device)
    moments = torch.empty(1 if rms else 2, count, dtype=torch.float32, device=x.device)
    block = triton.next_power_of_2(features)
    with on_device_of(x):
        _forward[(count,)](
            *(rows, _given(weight, rows), _given(bias, rows), y, moments, count, rows.stride(0), features, eps),
            weighted=weight is not None,
            biased=bias is not None,
            centred=not rms,
            block=block,
            **_options(block),
        )
    return y.to(x.dtype), moments


def backward(
    g: Tensor, x: Tensor, weight: Tensor | None, moments: Tensor, examples: int, rms: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradient of x, those of weight and bias ``[2, F]``, and each example's squared norms ``[2, E]``.

    Args:
        g: ``[..., F]``, the gradient of the result.
        x, weight: as in `forward`, which gave ``moments``.
        examples: E, which divides the number of rows.
    """
    rows, given, features = _matrix(x), _matrix(g), x.shape[-1]
    length = rows.shape[0] // examples
    pieces, held = max(1, length // ROWS), max(1, ROWS // length)
    units = pieces * triton.cdiv(examples, held)
    dx = torch.empty(x.shape, dtype=stored(x.dtype), device=x.device)
    sums = torch.empty(units, 2, features, dtype=torch.float32, device=x.device)
    squares = torch.empty(2, examples, dtype=torch.float32, device=x.device)
    block = triton.next_power_of_2(features)
    with on_device_of(x):
        _backward[(units,)](
            *(given, rows, _given(weight, rows), moments, dx, sums, squares),
            *(given.stride(0), rows.stride(0), features, examples, length, pieces, held),
            weighted=weight is not None,
            centred=not rms,
            whole=pieces == 1,
            block=block,
            **_options(block),
        )
    if pieces > 1:
        squares = sums.view(examples, pieces, 2, features).sum(1).square().sum(-1).t().contiguous()
    return dx.to(x.dtype), sums.sum(0), squares


def _matrix(x: Tensor) -> Tensor:
    """Return ``x`` ``[..., F]`` as ``[R, F]`` with a contiguous last dimension."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()


def _given(parameter: Tensor | None, instead: Tensor) -> Tensor:
    """Return a parameter that a kernel can read, or a tensor that it does not touch where there is none."""
    return instead if parameter is None else parameter.contiguous()


def _options(block: int) -> dict[str, Any]:
    # At most sixteen elements of a row for a thread, in each of the seven rows that it holds. Fusion is spelled out
    # because its default differs between versions of Triton.
    return {"num_warps": max(1, min(16, block // 256)), "enable_fp_fusion": True}


# Not specialised to what counts tokens: text of another length must not mean another compilation.


@triton.jit(do_not_specialize=["rows"])
def _forward(
    x: tl.tensor,
    weight: tl.tensor,
    bias: tl.tensor,
    y: tl.tensor,
    moments: tl.tensor,
    rows: tl.tensor,
    x_step: tl.tensor,
    features: tl.tensor,
    eps: tl.tensor,
    weighted: tl.constexpr,
    biased: tl.constexpr,
    centred: tl.constexpr,
    block: tl.constexpr,
) -> None:
    """Write one row of y, its scale and its mean."""
    row = tl.program_id(0).to(tl.int64)
    f = tl.arange(0, block)
    inside = f < features
    each = 1.0 / features
    value = tl.load(x + row * x_step + f, mask=inside, other=0.0).to(tl.float32)
    if centred:
        # Twice: a float32 sum misses the mean by a few units in its last place, and the second sum finds them.
        middle = tl.sum(value * each, 0)
        value = tl.where(inside, value - middle, 0.0)
        rest = tl.sum(value * each, 0)
        value = tl.where(inside, value - rest, 0.0)
        tl.store(moments + rows + row, middle + rest)
    r = 1.0 / tl.sqrt_rn(tl.sum(value * value, 0) * each + eps)
    tl.store(moments + row, r)
    value = value * r
    if weighted:
        value = value * tl.load(weight + f, mask=inside, other=0.0).to(tl.float32)
    if biased:
        value = value + tl.load(bias + f, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + row * features + f, value.to(y.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["examples", "length", "pieces", "held"])
def _backward(
    g: tl.tensor,
    x: tl.tensor,
    weight: tl.tensor,
    moments: tl.tensor,
    dx: tl.tensor,
    sums: tl.tensor,
    squares: tl.tensor,
    g_step: tl.tensor,
    x_step: tl.tensor,
    features: tl.tensor,
    examples: tl.tensor,
    length: tl.tensor,
    pieces: tl.tensor,
    held: tl.tensor,
    weighted: tl.constexpr,
    centred: tl.constexpr,
    whole: tl.constexpr,
    block: tl.constexpr,
) -> None:
    """Write the rows of dx and the sums of one unit and, if it holds ``whole`` examples, their squared norms."""
    unit = tl.program_id(0).to(tl.int64)
    f = tl.arange(0, block)
    inside = f < features
    each = 1.0 / features
    if weighted:
        factor = tl.load(weight + f, mask=inside, other=0.0).to(tl.float32)
    all_gamma = tl.full((block,), 0.0, tl.float32)
    all_beta = tl.full((block,), 0.0, tl.float32)
    first = unit // pieces * held
    piece = unit % pieces
    for example in range(first, tl.minimum(first + held, examples)):
        gamma = tl.full((block,), 0.0, tl.float32)
        beta = tl.full((block,), 0.0, tl.float32)
        begin = example * length + length * piece // pieces
        end = example * length + length * (piece + 1) // pieces
        for row in range(begin, end):
            given = tl.load(g + row * g_step + f, mask=inside, other=0.0).to(tl.float32)
            normal = tl.load(x + row * x_step + f, mask=inside, other=0.0).to(tl.float32)
            r = tl.load(moments + row)
            if centred:
                normal = tl.where(inside, normal - tl.load(moments + examples * length + row), 0.0)
            normal = normal * r
            gamma += given * normal
            beta += given
            if weighted:
                given = given * factor
            rest = given - normal * (tl.sum(given * normal, 0) * each)
            if centred:
                rest = rest - tl.sum(given, 0) * each
            tl.store(dx + row * features + f, (rest * r).to(dx.dtype.element_ty), mask=inside)
        if whole:
            tl.store(squares + example, tl.sum(gamma * gamma, 0))
            tl.store(squares + examples + example, tl.sum(beta * beta, 0))
        all_gamma += gamma
        all_beta += beta
    tl.store(sums + unit * 2 * features + f, all_gamma, mask=inside)
    tl.store(sums + unit * 2 * features + features + f, all_beta, mask=inside)
