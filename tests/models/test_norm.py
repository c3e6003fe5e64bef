"""LayerNorm and RMSNorm as torch operations, against torch's own in float64; norms against one example at a time."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from norms import EPS, Collected, calls, leaves, padded, theirs
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sparsetrain.errors import UserError
from sparsetrain.models import cpu_norm
from sparsetrain.models import norm as module
from sparsetrain.models.norm import LayerNorm, RMSNorm, normalise
from sparsetrain.parameterization.norms import is_norm_of_torch

pytestmark = pytest.mark.usefixtures("every_norm")


@given(
    leading=st.lists(st.integers(1, 6), min_size=0, max_size=3),
    features=st.sampled_from([1, 2, 3, 16, 17, 40, 500]),
    layout=st.sampled_from(["contiguous", "turned", "columns", "expanded", "reversed dimensions"]),
    has=st.sampled_from(["both", "weight", "bias", "neither"]),
    rms=st.booleans(),
    seed=st.integers(0, 99),
)
def test_results_gradients_and_norms_match_float64(
    leading: list[int], features: int, layout: str, has: str, rms: bool, seed: int
) -> None:
    torch.manual_seed(seed)
    x = {
        "contiguous": lambda: torch.randn(*leading, features),
        "turned": lambda: torch.randn(*leading[::-1], features).permute(*range(len(leading))[::-1], len(leading)),
        "columns": lambda: torch.randn(*leading, features + 5)[..., 2 : features + 2],
        "expanded": lambda: torch.randn(features).expand(*leading, features),
        "reversed dimensions": lambda: torch.randn(features, *leading[::-1]).permute(*range(len(leading) + 1)[::-1]),
    }[layout]()
    weight = torch.randn(features) if has in ("both", "weight") else None
    bias = torch.randn(features) if has in ("both", "bias") and not rms else None
    mine = [one.detach().requires_grad_() for one in (x, weight, bias) if one is not None]
    wide = [one.detach().double().requires_grad_() for one in mine]

    def arrange(given: list[Tensor]) -> tuple[Tensor, Tensor | None, Tensor | None]:
        rest = iter(given[1:])
        return given[0], None if weight is None else next(rest), None if bias is None else next(rest)

    collected = Collected()
    y = normalise(*arrange(mine), EPS, rms, collected)
    exact = theirs(*arrange(wide), rms)
    g = torch.randn(y.shape)
    for ours, other in zip(torch.autograd.grad(y, mine, g), torch.autograd.grad(exact, wide, g.double()), strict=True):
        assert ours.dtype == torch.float32
        # r is at most 1 / sqrt(eps), where it multiplies the rounding of a sum: of two or three nearly equal features.
        torch.testing.assert_close(ours.double(), other, rtol=2e-4 if features < 4 else 2e-5, atol=2e-4)
    torch.testing.assert_close(y.double(), exact, rtol=1e-5, atol=2e-4 if features < 4 else 1e-5)
    assert y.is_contiguous()
    if len(mine) == 1:
        assert not collected
        return
    ((of_weight, of_bias),) = collected
    rows, its = (x, g) if x.ndim > 1 else (x[None], g[None])
    for squares, parameter in ((of_weight, weight), (of_bias, bias)):
        assert (squares is None) == (parameter is None)
        if squares is not None:
            assert squares.shape == rows.shape[:1]
            assert squares.dtype == torch.float32
    for place in range(len(rows)):
        single = [rows[place].double(), *(one.detach().requires_grad_() for one in wide[1:])]
        each = torch.autograd.grad(theirs(*arrange(single), rms), single[1:], its[place].double())
        found = [one[place] for one in (of_weight, of_bias) if one is not None]
        for squares, gradient in zip(found, each, strict=True):
            # The bound of a relative error needs a norm that is no difference of large numbers.
            torch.testing.assert_close(squares.double(), gradient.square().sum(), rtol=2e-4, atol=1e-4)


@pytest.mark.parametrize("rms", [False, True])
def test_norms_of_a_networks_mean_loss_are_right_to_a_hundred_thousandth(rms: bool) -> None:
    torch.manual_seed(1)
    given, head, tokens = leaves((6, 50, 64), rms), nn.Linear(64, 30), torch.randint(0, 30, (6, 50))

    def loss(x: Tensor, weight: Tensor, bias: Tensor | None = None, norms: Collected | None = None) -> Tensor:
        return F.cross_entropy(head(normalise(x, weight, bias, EPS, rms, norms)).flatten(0, 1), tokens.flatten())

    collected = Collected()
    loss(*padded(given), collected).backward()  # type: ignore[arg-type]
    ((of_weight, of_bias),) = collected
    for gradient, leaf in zip(collected.gradients, given[1:], strict=False):
        torch.testing.assert_close(gradient, leaf.grad)
    wide = nn.Linear(64, 30).double()
    wide.load_state_dict(head.state_dict())
    for place in range(6):
        parameters = [one.detach().double().requires_grad_() for one in given[1:]]
        y = wide(theirs(*padded([given[0][place].double(), *parameters]), rms))
        share = F.cross_entropy(y, tokens[place], reduction="sum") / tokens.numel()
        exact = [one.square().sum() for one in torch.autograd.grad(share, parameters)]
        found = [one[place].double() for one in (of_weight, of_bias) if one is not None]
        torch.testing.assert_close(found, exact, rtol=1e-5, atol=0.0)


@pytest.mark.parametrize("rms", [False, True])
@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
def test_bfloat16_is_rounded_once(kind: torch.dtype, rms: bool) -> None:
    x, *rest = leaves((5, 9, 70), rms, torch.bfloat16)
    parameters = [one.detach().to(kind).requires_grad_() for one in rest]
    collected = Collected()
    y = normalise(*padded([x, *parameters]), EPS, rms, collected)
    g = torch.randn(y.shape).bfloat16()
    wide = [one.detach().double().requires_grad_() for one in (x, *parameters)]
    exact = theirs(*padded(wide), rms)
    torch.testing.assert_close(y.double(), exact.detach(), rtol=2.0**-8, atol=1e-5)
    found = torch.autograd.grad(y, (x, *parameters), g)
    for ours, leaf, other in zip(found, (x, *parameters), torch.autograd.grad(exact, wide, g.double()), strict=True):
        assert ours.dtype == leaf.dtype
        torch.testing.assert_close(ours.double(), other, rtol=2.0**-8 + 1e-5, atol=1e-4)
    assert all(one is None or one.dtype == torch.float32 for pair in collected for one in pair)


@pytest.mark.parametrize("rms", [False, True])
def test_bits_depend_neither_on_threads_nor_on_who_reads_the_norms(rms: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_norm, "_LEAST", 100)
    given, g, results = leaves((3, 90, 70), rms), torch.randn(3, 90, 70), []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        for norms in (None, Collected()):
            y = normalise(*padded(given), EPS, rms, norms)
            results.append((y, *torch.autograd.grad(y, given, g)))
    for other in results[1:]:
        assert all(torch.equal(*pair) for pair in zip(results[0], other, strict=True))


def test_finite_differences() -> None:
    given = leaves((2, 7, 24))
    directions = [torch.randn(one.shape) for one in given]
    g = torch.randn(2, 7, 24).double()
    slope = sum(
        float((gradient * direction).double().sum())
        for gradient, direction in zip(
            torch.autograd.grad(normalise(*padded(given)), given, g.float()), directions, strict=True
        )
    )
    given = [one.detach() for one in given]
    step = 2.0**-7
    ends = [
        float((normalise(*padded([one + sign * step * d for one, d in zip(given, directions, strict=True)])) * g).sum())
        for sign in (1, -1)
    ]
    # The error of the difference is its third derivative times step^2, and the rounding of y over the step.
    assert slope == pytest.approx((ends[0] - ends[1]) / (2 * step), rel=2e-3, abs=2e-2)


def test_frozen_parameters_have_no_norms() -> None:
    x, weight, bias = leaves((3, 4, 8))
    for frozen in (weight, bias):
        frozen.requires_grad_(False)
        collected = Collected()
        normalise(x, weight, bias, norms=collected).sum().backward()
        if frozen is weight:
            ((of_weight, of_bias),) = collected
            assert of_weight is None
            torch.testing.assert_close(of_bias, torch.full((3,), 8 * 4.0**2))
        else:
            assert not collected
    with torch.no_grad():
        assert not normalise(x, weight.requires_grad_(), bias, norms=collected).requires_grad


@pytest.mark.parametrize("shape", [(0, 5, 8), (3, 0, 8), (0, 8), (2, 3, 0)])
@pytest.mark.parametrize("rms", [False, True])
def test_nothing_in_nothing_out(shape: tuple[int, ...], rms: bool) -> None:
    given, collected = leaves(shape, rms), Collected()
    y = normalise(*padded(given), EPS, rms, collected)
    assert y.shape == shape
    for gradient, leaf in zip(torch.autograd.grad(y.sum(), given), given, strict=True):
        assert torch.equal(gradient, torch.zeros_like(leaf))
    assert all(torch.equal(one, torch.zeros(shape[0])) for pair in collected for one in pair if one is not None)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_gives_the_same_gradients_and_norms_once(reentrant: bool) -> None:
    given, g = leaves((3, 40, 20)), torch.randn(3, 40, 20)
    plain, again = Collected(), Collected()
    normalise(*padded(given), norms=plain).backward(g)
    expected = [one.grad for one in given]
    for one in given:
        one.grad = None
    y = checkpoint(partial(normalise, norms=again), *given, use_reentrant=reentrant)
    assert isinstance(y, Tensor)
    y.backward(g)
    assert all(torch.equal(one.grad, other) for one, other in zip(given, expected, strict=True))
    assert len(again) == 1
    assert all(torch.equal(*pair) for pair in zip(plain[0], again[0], strict=True))


@pytest.mark.parametrize("least", [1, 10**9])
def test_writes_are_noticed_or_harmless(least: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LEAST", {"LayerNorm": least, "RMSNorm": least})
    x, weight, bias = leaves((3, 4, 8))
    read = x * 1.0
    y = normalise(read, weight, bias, norms=Collected())
    read.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
    y = normalise(x, weight, bias)
    y.mul_(2.0)
    assert torch.equal(torch.autograd.grad(y.sum(), bias)[0], torch.full((8,), 24.0))


def test_autocast_changes_what_it_changes_for_torch() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        for rms in (False, True):
            x, *rest = (one.detach().to(dtype) for one in leaves((3, 4, 8), rms))
            with torch.autocast("cpu", torch.bfloat16):
                mine, other = normalise(*padded([x, *rest]), EPS, rms), theirs(*padded([x, *rest]), rms)
            assert mine.dtype == other.dtype == dtype
            torch.testing.assert_close(mine, other, rtol=1e-5 if dtype == torch.float32 else 2.0**-7, atol=1e-5)


@pytest.mark.parametrize("eps", [None, 1e-3])
def test_modules_are_those_of_torch(eps: float | None) -> None:
    x = torch.randn(2, 5, 12)
    pairs: list[tuple[nn.Module, nn.Module]] = [(RMSNorm(12, eps), nn.RMSNorm(12, eps))]
    kinds: tuple[dict[str, bool], ...] = ({}, {"bias": False}, {"elementwise_affine": False})
    pairs += [(LayerNorm(12, eps or EPS, **kind), nn.LayerNorm(12, eps or EPS, **kind)) for kind in kinds]
    pairs += [(LayerNorm((5, 12)), nn.LayerNorm((5, 12))), (RMSNorm((5, 12)), nn.RMSNorm((5, 12)))]
    for mine, other in pairs:
        for parameter in mine.parameters():
            nn.init.normal_(parameter)
        other.load_state_dict(mine.state_dict())
        assert list(mine.state_dict()) == list(other.state_dict())
        torch.testing.assert_close(mine(x), other(x), rtol=1e-5, atol=1e-5)
        assert repr(mine) == repr(other)
        assert is_norm_of_torch(mine)
        with pytest.raises(RuntimeError, match="normalized_shape"):
            mine(torch.randn(2, 5, 11))


def test_modules_normalise_by_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    for norm in (LayerNorm(12), RMSNorm(12)):
        with calls(monkeypatch) as seen:
            norm(torch.randn(2, 5, 12)).sum().backward()
        assert seen == ["forward", "backward"]


def test_what_does_not_fit_is_named() -> None:
    x, weight, bias = leaves((2, 3, 8))
    with pytest.raises(UserError, match="rms=True has no bias"):
        normalise(x, weight, bias, rms=True)
    with pytest.raises(UserError, match="eps=None is for rms=True"):
        normalise(x, weight, bias, None)
    with pytest.raises(RuntimeError, match="shape"):
        normalise(x, torch.ones(7), bias)


def test_the_backward_pass_keeps_the_input_and_two_numbers_a_row() -> None:
    kept = 0

    def count(tensor: Tensor) -> Tensor:
        nonlocal kept
        kept += tensor.numel()
        return tensor

    given = leaves((4, 100, 32))
    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        normalise(*padded(given))
    assert kept == 4 * 100 * 32 + 32 + 2 * 400
