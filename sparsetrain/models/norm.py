"""LayerNorm and RMSNorm whose backward pass also gives each example's squared gradient norms (arXiv 2411.00999).

Shapes: B examples, F features. Rows t of example b have the gradient g_bt and the normalised input h_bt, and the
example's own gradients are ``gamma_b = sum_t g_bt h_bt`` of the weight and ``beta_b = sum_t g_bt`` of the bias. Their
squared norms cost no pass of their own, since the gradients of weight and bias are the sums of these over b.

The fused kernels compute float32 and bfloat16, on a CPU or, where triton is installed, on a GPU. All else is left to
torch: small inputs, other types, compilers, tracers and transforms, and second derivatives. Which one computes does not
depend on whether norms are wanted, so that reading them changes no bit of a run.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad

from sparsetrain.errors import UserError
from sparsetrain.models import cpu_norm
from sparsetrain.sparsity.layers.ops import dispatched

# Takes the squared norms of the examples' gradients of weight and of bias, float32 [B], and then the gradients of both,
# [F]; None for a parameter that has no gradient.
Norms = Callable[[Tensor | None, Tensor | None, Tensor | None, Tensor | None], None]

# The elements of x from which the kernels are no slower than torch, forward and backward together and on one thread,
# since a call of theirs costs some 100 us beside its work. Torch computes RMSNorm by several operations.
LEAST = {"LayerNorm": 1 << 20, "RMSNorm": 1 << 15}


class LayerNorm(nn.LayerNorm):
    """`torch.nn.LayerNorm` by `normalise`: the same parameters and, up to rounding, the same results."""

    def forward(self, input: Tensor) -> Tensor:
        """Map ``input`` ``[..., *normalized_shape]`` to the same shape."""
        if _other_shape(input, self.normalized_shape) or input.numel() < LEAST["LayerNorm"]:
            return super().forward(input)
        return normalise(input, self.weight, self.bias, self.eps)


class RMSNorm(nn.RMSNorm):
    """`torch.nn.RMSNorm` by `normalise`: the same parameters and, up to rounding, the same results."""

    def forward(self, x: Tensor) -> Tensor:
        """Map ``x`` ``[..., *normalized_shape]`` to the same shape."""
        if _other_shape(x, self.normalized_shape) or x.numel() < LEAST["RMSNorm"]:
            return super().forward(x)
        return normalise(x, self.weight, None, self.eps, rms=True)


def _other_shape(x: Tensor, normalized: tuple[int, ...]) -> bool:
    """Return whether torch has to look: at several dimensions, at a nested tensor, or at an input that does not fit."""
    return x.is_nested or x.shape[-1:] != normalized


def normalise(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float | None = 1e-5,
    rms: bool = False,
    norms: Norms | None = None,
) -> Tensor:
    """Return LayerNorm or RMSNorm of ``x`` over its last dimension, as ``F.layer_norm`` and ``F.rms_norm`` do.

    Differentiable as those are. A second derivative and whatever the kernels do not take are computed by torch.

    Args:
        x: ``[B, ..., F]``. weight, bias: ``[F]`` or None; RMSNorm has no bias.
        eps: added to the variance, or to the mean square; None, for RMSNorm alone, is the machine epsilon.
        rms: whether to compute RMSNorm.
        norms: called in the backward pass with the squared norms of each example's gradient of ``weight`` and of
            ``bias``, each float32 ``[B]``, and then with the gradients of both, ``[F]``; None for a parameter without a
            gradient; not called if neither has one. The gradient of an example is its share of the gradient of what
            ``backward`` was called on. An ``x`` with one dimension is one example.

    Raises:
        UserError: RMSNorm with a bias, LayerNorm without ``eps``, or norms inside of a compiler, a tracer or a
            transform of `torch.func`.
    """
    if rms and bias is not None:
        raise UserError("normalise: rms=True has no bias; give bias=None")
    if eps is None and not rms:
        raise UserError("normalise: eps=None is for rms=True alone; give a number")
    wants = torch.is_grad_enabled() and any(one is not None and one.requires_grad for one in (x, weight, bias))
    if _fused(x, weight, bias, rms):
        eps = torch.finfo(torch.float32).eps if eps is None else eps
        if wants:
            return _Fused.apply(x, weight, bias, eps, rms, norms)
        return _kernels(x).forward(x, weight, bias, eps, rms)[0]
    y = F.rms_norm(x, x.shape[-1:], weight, eps) if rms else F.layer_norm(x, x.shape[-1:], weight, bias, _number(eps))
    if norms is None or not wants:
        return y
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or _transformed():
        raise UserError("normalise: norms cannot be collected inside of torch.compile, a tracer or torch.func")
    needed = tuple(one is not None and one.requires_grad for one in (weight, bias))
    if y.requires_grad:
        exact = torch.finfo(_wider(x[:0]).dtype).eps if eps is None else eps
        seen = x.detach()
        y.register_hook(lambda g: _tell(norms, g, seen, exact, rms, *needed))
    return y


def _number(eps: float | None) -> float:
    assert eps is not None
    return eps


def _fused(x: Tensor, weight: Tensor | None, bias: Tensor | None, rms: bool) -> bool:
    """Return whether the kernels compute this faster, and are what the caller may be given."""
    if torch.compiler.is_compiling():
        return False  # before anything that a compiler cannot read
    dtype = x.dtype
    if dtype not in (torch.float32, torch.bfloat16) or x.layout is not torch.strided:
        return False
    if x.numel() < LEAST["RMSNorm" if rms else "LayerNorm"] or x.is_neg():
        return False
    for one in (weight, bias):
        if one is not None and (
            one.shape != x.shape[-1:] or one.device != x.device or one.dtype not in (torch.float32, dtype)
        ):
            return False
    if not x.is_cpu and not _on_gpu(x):
        return False
    given = (one for one in (x, weight, bias) if one is not None)
    return not (dispatched(*given) or _transformed() or forward_ad._current_level >= 0)


def _on_gpu(x: Tensor) -> bool:
    """Return whether the kernels for a GPU take ``x``; autocast computes there in float32, whatever ``x`` is."""
    if not x.is_cuda or not _triton() or (x.dtype != torch.float32 and torch.is_autocast_enabled("cuda")):
        return False
    return bool(x.shape[-1] <= _kernels(x).MAX_FEATURES)


def _transformed(g: Tensor | None = None) -> bool:
    """Return whether a transform of `torch.func` is active, which must see what it differentiates or maps.

    ``autograd.grad(..., is_grads_batched=True)`` has a transform of its own, which only a gradient tells.
    """
    batched = g is not None and torch._C._functorch.is_legacy_batchedtensor(g)
    return batched or torch._C._are_functorch_transforms_active()


@functools.cache
def _triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def _kernels(x: Tensor) -> ModuleType:
    if x.is_cpu:
        return cpu_norm
    from sparsetrain.kernels import triton_norm

    return triton_norm


def _examples(x: Tensor) -> int:
    return x.shape[0] if x.ndim > 1 else 1


class _Fused(torch.autograd.Function):
    """The kernels, forward and backward."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, rms: bool, norms: Norms | None
    ) -> Tensor:
        y, moments = _kernels(x).forward(x, weight, bias, eps, rms)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, weight, moments)
        ctx.eps, ctx.rms, ctx.norms, ctx.bias_dtype = eps, rms, norms, None if bias is None else bias.dtype
        return y

    @staticmethod
    def backward(ctx: Any, g: Tensor | None) -> tuple[Tensor | None, ...]:
        if g is None:
            return (None,) * 6
        x, weight, moments = ctx.saved_tensors
        _, need_weight, need_bias, *_ = ctx.needs_input_grad
        if torch.is_grad_enabled() or dispatched(g, x) or _transformed(g):
            if ctx.norms is not None:
                _tell(ctx.norms, g, x, ctx.eps, ctx.rms, need_weight, need_bias)
            dx, of_weight, of_bias = _differentiable(g, x, weight, ctx.eps, ctx.rms)
        else:
            g = g.resolve_neg()
            dx, sums, squares = _kernels(x).backward(g, x, weight, moments, _examples(x), ctx.rms)
            of_weight, of_bias = sums
            if ctx.norms is not None and (need_weight or need_bias):
                ctx.norms(*_needed(squares, need_weight, need_bias), *_needed(sums, need_weight, need_bias))
        return (
            dx,
            # Copies, since the two are parts of one tensor.
            of_weight.to(weight.dtype, copy=True) if need_weight else None,
            of_bias.to(ctx.bias_dtype, copy=True) if need_bias else None,
            *(None,) * 3,
        )


def _wider(x: Tensor) -> Tensor:
    """Return ``x`` in the type that sums are computed in: float32, or float64 for that."""
    return x if x.dtype == torch.float64 else x.float()


def _normal(x: Tensor, eps: float, rms: bool) -> tuple[Tensor, Tensor]:
    """Return h, the rows of ``x`` before weight and bias, and the factor r of each row."""
    x = _wider(x)
    centred = x if rms else x - x.mean(-1, keepdim=True)
    r = (centred.square().mean(-1, keepdim=True) + eps).rsqrt()
    return centred * r, r


def _tell(norms: Norms, g: Tensor, x: Tensor, eps: float, rms: bool, need_weight: bool, need_bias: bool) -> None:
    """Call ``norms`` with what torch's operations compute."""
    if not need_weight and not need_bias:
        return
    if _transformed(g):
        raise RuntimeError("norms of examples cannot be collected inside of a transform of torch.func")
    with torch.no_grad():
        g, h = _wider(g), _normal(x, eps, rms)[0]
        sums = [_by_example(g * h) if need_weight else None, _by_example(g) if need_bias else None]
        squares = (None if one is None else one.square().sum(1).float() for one in sums)
        norms(*squares, *(None if one is None else one.sum(0) for one in sums))


def _needed(pair: Sequence[Tensor], first: bool, second: bool) -> tuple[Tensor | None, Tensor | None]:
    return pair[0] if first else None, pair[1] if second else None


def _by_example(terms: Tensor) -> Tensor:
    """Return the sum of each example's rows, ``[B, F]``."""
    return terms[None] if terms.ndim == 1 else terms.flatten(1, -2).sum(1) if terms.ndim > 2 else terms


def _differentiable(
    g: Tensor, x: Tensor, weight: Tensor | None, eps: float, rms: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of x, weight and bias by operations that torch can differentiate again."""
    h, r = _normal(x, eps, rms)
    wide = _wider(g)
    rest = wide if weight is None else wide * weight
    along = h * (rest * h).mean(-1, keepdim=True)
    dx = r * (rest - along if rms else rest - along - rest.mean(-1, keepdim=True))
    return dx.to(x.dtype), (wide * h).reshape(-1, x.shape[-1]).sum(0), wide.reshape(-1, x.shape[-1]).sum(0)
