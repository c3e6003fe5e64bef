"""The kernels of LayerNorm and RMSNorm against torch in float64: any shape and any strides, every element written."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from sparsetrain.kernels import norm

UNIT = 2.0**-23  # twice the largest relative error of rounding to float32
EPS = 1e-5


@dataclass
class Results:
    """What the kernels wrote: y and dx ``[E, L, F]``, the gradients ``[2, F]``, each example's squares ``[2, E]``."""

    y: Tensor
    dx: Tensor
    totals: Tensor
    squares: Tensor

    def equal(self, other: Results) -> bool:
        return all(torch.equal(one, getattr(other, name)) for name, one in vars(self).items())


def poisoned(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.full(shape, torch.nan, dtype=dtype)


def run(x: Tensor, g: Tensor, weight: Tensor, bias: Tensor, rms: bool, threads: int = 1) -> Results:
    """Run all three kernels on ``[E, L, F]``; every output is filled with NaN before."""
    examples, length, features = x.shape
    shape = {"features": features, "centred": int(not rms)}
    wide = x.dtype == torch.float32
    rows, y = x.view(-1, features), poisoned(*x.shape, dtype=x.dtype)
    moments = poisoned(2 - rms, len(rows))
    forward = norm.forward if wide else norm.forward_bfloat16
    eps = torch.tensor([EPS])
    forward(threads, x=rows, weight=weight, bias=bias, eps=eps, rows=len(rows), y=y, moments=moments, **shape)
    units = norm.units_of(examples, length)
    sums, squares, dx = poisoned(units, 2, features), poisoned(2, examples), poisoned(*x.shape, dtype=x.dtype)
    given = {"examples": examples, "length": length}
    backward = norm.backward if wide else norm.backward_bfloat16
    written = {"own": poisoned(threads, 2, features), "sums": sums, "squares": squares, "dx": dx}
    backward(threads, g=g.view(-1, features), x=rows, weight=weight, moments=moments, **written, **given, **shape)
    totals = poisoned(2, features)
    norm.total(threads, sums=sums, squares=squares, totals=totals, features=features, **given)
    return Results(y, dx, totals, squares)


def exact(x: Tensor, g: Tensor, weight: Tensor, bias: Tensor, rms: bool) -> Results:
    """Return the same by torch's operations in float64, the norms from one example at a time."""
    leaves = [one.detach().double().requires_grad_() for one in (x, weight, bias)]

    def result(x: Tensor) -> Tensor:
        normal = F.rms_norm(x, x.shape[-1:], eps=EPS) if rms else F.layer_norm(x, x.shape[-1:], eps=EPS)
        return normal * leaves[1] + leaves[2]

    y = result(leaves[0])
    dx, *totals = torch.autograd.grad(y, leaves, g.double())
    each = [torch.autograd.grad(result(one), leaves[1:], its.double()) for one, its in zip(leaves[0], g, strict=True)]
    squares = torch.stack([torch.stack([part.square().sum() for part in parts]) for parts in each], 1)
    return Results(y.detach(), dx, torch.stack(totals), squares)


def assert_right(x: Tensor, g: Tensor, weight: Tensor, bias: Tensor, rms: bool, threads: int = 1) -> None:
    """Compare with float64.

    A row's mean is known to a unit of its largest element, which r makes an error of h; sums of n terms have n / 2
    units of the sum of their magnitudes at most (Higham).
    """
    mine, other = run(x, g, weight, bias, rms, threads), exact(x, g, weight, bias, rms)
    features, rows = x.shape[-1], x.shape[0] * x.shape[1]
    wide = x.double()
    centred = wide if rms else wide - wide.mean(-1, keepdim=True)
    r = (centred.square().mean(-1, keepdim=True) + EPS).rsqrt()
    h = centred * r
    off = UNIT * (2 * r * wide.abs().amax(-1, keepdim=True) + (4 + features**0.5) * h.abs().amax(-1, keepdim=True))
    rounded = 0.0 if x.dtype == torch.float32 else 2.0**-8
    allowed = (off + UNIT * h.abs()) * weight.abs() + UNIT * bias.abs() + rounded * other.y.abs()
    assert ((mine.y.double() - other.y).abs() <= allowed + 1e-30).all()
    size = (g.double() * weight).abs().amax(-1, keepdim=True)
    errors = (4 + features**0.5) * UNIT + off
    allowed = r * size * 4 * errors * (1 + h.abs()) * (1 + h.square().mean(-1, keepdim=True).sqrt())
    assert ((mine.dx.double() - other.dx).abs() <= allowed + rounded * other.dx.abs() + 1e-30).all()
    terms = torch.stack([(g * h).abs(), g.double().abs()])
    limits = (rows + 2) * UNIT * terms + torch.stack([g.abs() * off, torch.zeros_like(h)])
    assert ((mine.totals - other.totals).abs() <= limits.sum((1, 2)) + 1e-30).all()
    vectors = limits.sum(2).square().sum(-1).sqrt()
    roots, theirs = mine.squares.double().sqrt(), other.squares.sqrt()
    assert ((roots - theirs).abs() <= vectors + (4 + features**0.5) * UNIT * theirs + 1e-30).all()


def draw(
    examples: int, length: int, features: int, dtype: torch.dtype = torch.float32, gap: int = 0
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return x, g, weight and bias; rows of x and g are ``gap`` elements further apart than contiguous ones."""
    x, g = torch.randn(2, examples, length, features + gap).to(dtype)[..., :features]
    return x, g, torch.randn(features), torch.randn(features)


@given(
    examples=st.integers(1, 9),
    length=st.one_of(st.integers(1, 70), st.sampled_from([127, 128, 129, 200])),
    features=st.one_of(st.integers(1, 70), st.sampled_from([127, 500])),
    gap=st.integers(0, 3),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    rms=st.booleans(),
    threads=st.integers(1, 3),
    seed=st.integers(0, 99),
)
def test_any_shape_matches_float64(
    examples: int, length: int, features: int, gap: int, dtype: torch.dtype, rms: bool, threads: int, seed: int
) -> None:
    torch.manual_seed(seed)
    assert_right(*draw(examples, length, features, dtype, gap), rms, threads)


@pytest.mark.parametrize("rms", [False, True])
@pytest.mark.parametrize("features", [1, 3, 15, 16, 17, 31, 32, 33, 500, 513])
def test_around_the_edges_of_vectors(features: int, rms: bool) -> None:
    assert_right(*draw(3, 5, features), rms)


@pytest.mark.parametrize("length", [1, 2, 31, 32, 63, 64, 65, 127, 128, 300])
@pytest.mark.parametrize("examples", [1, 2, 65])
def test_around_the_edges_of_units(examples: int, length: int) -> None:
    assert_right(*draw(examples, length, 20), rms=False, threads=2)


@pytest.mark.parametrize(("examples", "length"), [(1, 500), (3, 130), (7, 9), (150, 1)])
@pytest.mark.parametrize("rms", [False, True])
def test_the_same_bits_for_any_number_of_threads(examples: int, length: int, rms: bool) -> None:
    drawn = draw(examples, length, 50)
    first = run(*drawn, rms)
    assert all(run(*drawn, rms, threads).equal(first) for threads in (1, 2, 3, 7))


@pytest.mark.parametrize(("examples", "length", "features"), [(4, 33, 500), (8, 256, 64), (2, 1000, 17), (90, 1, 256)])
def test_norms_are_right_to_a_hundred_thousandth(examples: int, length: int, features: int) -> None:
    drawn = draw(examples, length, features)
    for rms in (False, True):
        mine, other = run(*drawn, rms).squares, exact(*drawn, rms).squares
        torch.testing.assert_close(mine.double(), other, rtol=1e-5, atol=0.0)


@pytest.mark.parametrize("features", [3, 48, 500])
@pytest.mark.parametrize("value", [0.0, 0.1, -1e4 - 0.3, 3e7])
def test_a_constant_row_gives_the_bias(value: float, features: int) -> None:
    # A mean that is off by one unit would leave (x - mean) / sqrt(eps), which is 0.3 at 1e4.
    x = torch.full((1, 2, features), value)
    _, g, weight, bias = draw(1, 2, features)
    assert torch.equal(run(x, g, weight, bias, rms=False).y, bias.expand(1, 2, -1))


def test_a_large_offset_costs_no_more_than_the_rounding_of_x() -> None:
    x, g, weight, bias = draw(2, 9, 333)
    x += 1e4
    mine, other = run(x, g, weight, bias, rms=False), exact(x, g, weight, bias, rms=False)
    # The mean is rounded to a float, which lie 2^-10 apart there.
    assert float((mine.y - other.y).abs().max()) < 2.0**-11 * float(weight.abs().max()) * 1.2
    torch.testing.assert_close(mine.dx.double(), other.dx, rtol=0.0, atol=5e-3)


@pytest.mark.parametrize("rms", [False, True])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_what_is_no_number_reaches_its_row_and_its_example(value: float, rms: bool) -> None:
    x, g, weight, bias = draw(4, 70, 40)
    x[2, 30, 7] = value
    mine, other = run(x, g, weight, bias, rms), exact(x, g, weight, bias, rms)
    assert torch.equal(mine.y.isnan(), other.y.isnan())
    assert torch.equal(mine.dx.isfinite().all(-1), other.dx.isfinite().all(-1))
    assert torch.equal(mine.totals.isfinite(), other.totals.isfinite())
    assert torch.equal(mine.squares.isfinite(), other.squares.isfinite())
    assert mine.squares[:, [0, 1, 3]].isfinite().all()
