"""Where norms are left to torch: second derivatives, transforms, modes, subclasses, compilers and small inputs."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from norms import EPS, Collected, calls, leaves, padded, theirs
from torch import Tensor
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.flop_counter import FlopCounterMode

from sparsetrain.errors import UserError
from sparsetrain.models import norm as module
from sparsetrain.models.norm import normalise

pytestmark = pytest.mark.usefixtures("every_norm")


@pytest.mark.parametrize("rms", [False, True])
@pytest.mark.parametrize("affine", [False, True])
def test_second_derivatives_are_those_of_torch(rms: bool, affine: bool) -> None:
    given = leaves((2, 5, 12), rms)[: None if affine else 1]
    wide = [one.detach().double().requires_grad_() for one in given]
    g = torch.randn(2, 5, 12)
    collected = Collected()
    results = []
    for function, tensors in ((partial(normalise, eps=EPS, rms=rms, norms=collected), given), (None, wide)):
        x, weight, bias = padded(tensors)
        y = function(x, weight, bias) if function is not None else theirs(x, weight, bias, rms)
        first = torch.autograd.grad(y, tensors, g.to(y.dtype), create_graph=True)
        penalty = torch.stack([one.square().sum() for one in first]).sum()
        results.append((first, torch.autograd.grad(penalty, tensors, materialize_grads=True)))
    for ours, others in zip(*results, strict=True):
        for one, other in zip(ours, others, strict=True):
            torch.testing.assert_close(one.double(), other, rtol=1e-4, atol=1e-3)
    assert bool(collected) == affine


def test_batched_gradients_are_those_of_torch() -> None:
    given, g = leaves((2, 5, 12)), torch.randn(4, 2, 5, 12)
    ours = torch.autograd.grad(normalise(*padded(given)), given, g, is_grads_batched=True)
    other = torch.autograd.grad(theirs(*padded(given), False), given, g, is_grads_batched=True)
    torch.testing.assert_close(ours, other, rtol=1e-4, atol=1e-5)
    with pytest.raises(RuntimeError, match=r"inside of a transform of torch\.func"):
        torch.autograd.grad(normalise(*padded(given), norms=Collected()), given, g, is_grads_batched=True)


class Marked(torch.Tensor):
    """A Tensor subclass."""


def in_a_mode(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    with FlopCounterMode(display=False):
        return normalise(x, weight, bias)


LEFT_TO_TORCH: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "compiled": lambda x, weight, bias: torch.compile(normalise, backend="eager")(x, weight, bias),
    "traced": lambda x, weight, bias: make_fx(lambda *given: normalise(*given))(x, weight, bias)(x, weight, bias),
    "mode": in_a_mode,
    "subclass": lambda x, weight, bias: normalise(x.as_subclass(Marked), weight, bias).as_subclass(torch.Tensor),
    "vmap": lambda x, weight, bias: torch.func.vmap(normalise, (0, None, None))(x, weight, bias),
    "float64": lambda x, weight, bias: normalise(x.double(), weight.double(), bias.double()).float(),
    "negative bit": lambda x, weight, bias: -normalise(torch._neg_view(x), weight, -bias),
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("how", LEFT_TO_TORCH)
def test_what_must_be_seen_is_left_to_torch(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    given = [one.detach() for one in leaves((3, 4, 8))]
    with calls(monkeypatch) as seen:
        result = LEFT_TO_TORCH[how](*given)
    assert not seen
    torch.testing.assert_close(result, theirs(*padded(given), False), rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_transforms_and_forward_derivatives_are_those_of_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    given = [one.detach() for one in leaves((3, 4, 8))]
    x, weight, bias = given

    def tangent(function: Callable[[Tensor], Tensor]) -> Tensor:
        with forward_ad.dual_level():
            return forward_ad.unpack_dual(function(forward_ad.make_dual(x, x.flip(0)))).tangent

    with calls(monkeypatch) as seen:
        mine = tangent(lambda one: normalise(one, weight, bias))
        each = torch.func.vmap(torch.func.grad(lambda w, one: normalise(one, w, bias).square().sum()), (None, 0))
        gradients = each(weight, x)
        jacobian = torch.func.jacrev(lambda one: normalise(one, weight, bias).sum(-1))(x)
    assert not seen
    torch.testing.assert_close(mine, tangent(lambda one: theirs(one, weight, bias, False)))
    torch.testing.assert_close(
        gradients,
        torch.stack(
            [torch.func.grad(lambda w, one=one: theirs(one, w, bias, False).square().sum())(weight) for one in x]
        ),
    )
    torch.testing.assert_close(jacobian, torch.func.jacrev(lambda one: theirs(one, weight, bias, False).sum(-1))(x))
    with pytest.raises(UserError, match=r"torch\.func"):
        torch.func.grad(lambda w: normalise(x, w, bias, norms=Collected()).sum())(weight)


def test_a_mode_in_the_backward_pass_sees_torchs_operations(monkeypatch: pytest.MonkeyPatch) -> None:
    given, g = leaves((3, 4, 8)), torch.randn(3, 4, 8)
    y = normalise(*padded(given))
    with calls(monkeypatch) as seen, FlopCounterMode(display=False):
        ours = torch.autograd.grad(y, given, g)
    assert not seen
    torch.testing.assert_close(ours, torch.autograd.grad(theirs(*padded(given), False), given, g), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rms", [False, True])
@pytest.mark.parametrize("how", ["float64", "small", "subclass"])
def test_norms_are_right_where_torch_computes(how: str, rms: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if how == "small":
        monkeypatch.setattr(module, "LEAST", {"LayerNorm": 10**9, "RMSNorm": 10**9})
    given = leaves((3, 7, 20), rms, torch.float64 if how == "float64" else torch.float32)
    kernels, by_torch, g = Collected(), Collected(), torch.randn(3, 7, 20)
    with calls(monkeypatch) as seen:
        x = given[0].as_subclass(Marked) if how == "subclass" else given[0]
        y = normalise(x, *padded(given)[1:], EPS, rms, by_torch)
        torch.testing.assert_close(y.as_subclass(torch.Tensor), theirs(*padded(given), rms))
        y.backward(g.to(y.dtype))
    assert not seen
    monkeypatch.setattr(module, "LEAST", {"LayerNorm": 1, "RMSNorm": 1})
    single = [one.detach().float().requires_grad_() for one in given]
    normalise(*padded(single), EPS, rms, kernels).backward(g)
    for mine, other in zip(by_torch[0], kernels[0], strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=0.0)


def test_small_inputs_are_left_to_torch_with_norms_and_without(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LEAST", {"LayerNorm": 97, "RMSNorm": 96})
    for norms in (None, Collected()):
        for rms, expected in ((False, []), (True, ["forward", "backward"])):
            given = leaves((3, 4, 8), rms)
            with calls(monkeypatch) as seen:
                normalise(*padded(given), EPS, rms, norms).sum().backward()
            assert seen == expected
