"""The Triton kernels of LayerNorm and RMSNorm against torch in float64; `test_triton_norm.py` runs these cases.

To run one case by hand, use ``TRITON_INTERPRET=1 python -m pytest tests/kernels/triton_norm_cases.py -k NAME``, or omit
the variable on a GPU.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sparsetrain.kernels import triton_norm
from sparsetrain.kernels.triton_bsr import INTERPRETED

DEVICE = torch.device("cpu" if INTERPRETED else "cuda")
EPS = 1e-5
# The interpreter computes with numpy, which warns about overflows and invalid values; a GPU and torch do not.
NUMPY_WARNS = pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered in:RuntimeWarning")


def draw(shape: tuple[int, ...], dtype: torch.dtype, gap: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return x, g, weight and bias; rows of x and g are ``gap`` elements further apart than contiguous ones."""
    x, g = torch.randn(2, *shape[:-1], shape[-1] + gap).to(DEVICE, dtype)[..., : shape[-1]]
    return x, g, torch.randn(shape[-1]).to(DEVICE, dtype), torch.randn(shape[-1]).to(DEVICE, dtype)


def run(
    x: Tensor, g: Tensor, weight: Tensor | None, bias: Tensor | None, rms: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return y, dx, the gradients ``[2, F]`` and the squares ``[2, E]``; all new memory is filled with NaN before."""
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(1).isnan().all()
        y, moments = triton_norm.forward(x, weight, bias, EPS, rms)
        return y, *triton_norm.backward(g, x, weight, moments, x.shape[0], rms)
    finally:
        torch.use_deterministic_algorithms(False)


def exact(
    x: Tensor, g: Tensor, weight: Tensor | None, bias: Tensor | None, rms: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the same by torch's operations in float64, the norms from one example at a time."""
    ones, zeros = x.new_ones(x.shape[-1]), x.new_zeros(x.shape[-1])
    x, weight, bias = (one.detach().double().requires_grad_() for one in (x, _or(weight, ones), _or(bias, zeros)))

    def result(x: Tensor) -> Tensor:
        normal = F.rms_norm(x, x.shape[-1:], eps=EPS) if rms else F.layer_norm(x, x.shape[-1:], eps=EPS)
        return normal * weight + bias

    y = result(x)
    dx, *totals = torch.autograd.grad(y, (x, weight, bias), g.double())
    each = [
        torch.autograd.grad(result(one), (weight, bias), its.double()) for one, its in zip(x.detach(), g, strict=True)
    ]
    squares = torch.stack([torch.stack([part.square().sum() for part in parts]) for parts in each], 1)
    return y.detach(), dx, torch.stack(totals), squares


def _or(one: Tensor | None, other: Tensor) -> Tensor:
    return other if one is None else one


def assert_right(x: Tensor, g: Tensor, weight: Tensor | None, bias: Tensor | None, rms: bool) -> None:
    mine, other = run(x, g, weight, bias, rms), exact(x, g, weight, bias, rms)
    assert mine[0].dtype == mine[1].dtype == x.dtype
    assert mine[2].dtype == mine[3].dtype == torch.float32
    assert all(one.is_contiguous() for one in mine)
    rounded = 2.0**-8 if x.dtype == torch.bfloat16 else 0.0
    # r is at most 1 / sqrt(eps) = 316, where it multiplies the rounding of a sum: of nearly equal features.
    off = 1e-3 if x.shape[-1] < 4 else 2e-5
    for ours, theirs, relative in zip(mine, other, (rounded, rounded, 0.0, 0.0), strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=relative + off, atol=off * max(1, x.shape[-1] ** 0.5))


@settings(max_examples=15)  # the interpreter takes milliseconds for a row
@given(
    examples=st.integers(1, 3),
    length=st.one_of(st.integers(1, 12), st.sampled_from([31, 32, 33, 64])),
    features=st.sampled_from([1, 2, 3, 16, 17, 100]),
    gap=st.integers(0, 2),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    affine=st.sampled_from(["both", "weight", "bias", "neither"]),
    rms=st.booleans(),
    seed=st.integers(0, 99),
)
def test_any_shape_matches_float64(
    examples: int, length: int, features: int, gap: int, dtype: torch.dtype, affine: str, rms: bool, seed: int
) -> None:
    torch.manual_seed(seed)
    x, g, weight, bias = draw((examples, length, features), dtype, gap)
    given_weight = weight if affine in ("both", "weight") else None
    assert_right(x, g, given_weight, bias if affine in ("both", "bias") and not rms else None, rms)


@pytest.mark.parametrize("rms", [False, True])
@pytest.mark.parametrize("shape", [(1, 129, 40), (3, 64, 20), (40, 20), (2, 2, 3, 33)])
def test_units_of_pieces_and_of_several_examples(shape: tuple[int, ...], rms: bool) -> None:
    x, g, weight, bias = draw(shape, torch.float32)
    first, second = run(x, g, weight, bias, rms), run(x, g, weight, bias, rms)
    assert all(torch.equal(*pair) for pair in zip(first, second, strict=True))
    other = exact(x, g, weight, bias, rms)
    torch.testing.assert_close([one.double() for one in first[:3]], list(other[:3]), rtol=1e-5, atol=5e-5)
    torch.testing.assert_close(first[3].double(), other[3], rtol=1e-5, atol=0.0)


@pytest.mark.parametrize("value", [0.0, 0.1, -1e4 - 0.3, 3e7])
def test_a_constant_row_gives_the_bias(value: float) -> None:
    _, g, weight, bias = draw((1, 2, 48), torch.float32)
    y = run(torch.full((1, 2, 48), value, device=DEVICE), g, weight, bias, rms=False)[0]
    assert torch.equal(y, bias.expand(1, 2, -1))


@NUMPY_WARNS
@pytest.mark.parametrize("rms", [False, True])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_no_number_reaches_its_row_and_its_example(value: float, rms: bool) -> None:
    x, g, weight, bias = draw((4, 9, 20), torch.float32)
    x[2, 3, 7] = value
    mine, other = run(x, g, weight, bias, rms), exact(x, g, weight, bias, rms)
    assert torch.equal(mine[0].isnan(), other[0].isnan())
    assert torch.equal(mine[2].isfinite(), other[2].isfinite())
    assert torch.equal(mine[3].isfinite(), other[3].isfinite())
