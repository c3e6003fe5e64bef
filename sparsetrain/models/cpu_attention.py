"""Causal attention with ALiBi on a CPU as one differentiable operation, computed by `sparsetrain.kernels.attention`.

Shapes: B batch, T tokens, H query heads, K key and value heads, D head width.
"""

from __future__ import annotations

import functools
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from sparsetrain.errors import UserError
from sparsetrain.flop_formulas import count_by

_A_THREAD = 1 << 18  # floats of keys in a cache


@functools.cache
def _kernels() -> ModuleType:
    # Imported at the first use, because importing the library must not import a compiler.
    from sparsetrain.kernels import attention

    return attention


@functools.cache
def _decoding() -> ModuleType:
    from sparsetrain.kernels import one_query

    return one_query


def _scratch(threads: int, each: int) -> Tensor:
    # Explicit, because torch's default dtype and device may differ: kernels compute in float32 on a CPU.
    return torch.empty(threads, each, dtype=torch.float32, device="cpu")


def suits(dtype: torch.dtype, device: torch.device) -> bool:
    """Return whether `fused_attention` should compute attention, rather than torch.

    It should in float32 on a CPU, where it takes half the time of torch's kernel. A compiler or an exporter gets the
    operation of torch, which it can decompose.
    """
    return device.type == "cpu" and dtype == torch.float32 and not torch.compiler.is_compiling()


def fused_attention(qkv: Tensor, slopes: Tensor, kv_heads: int, scale: float) -> Tensor:
    """Return ``softmax(scale * q k^T + m (j - i)) v`` over keys j up to query i: ``[B, T, H D]``.

    It is differentiable once, in ``qkv``. The bits of the result do not depend on the number of threads.

    Args:
        qkv: float32 ``[B, T, H + 2 K, D]`` on a CPU: queries, keys, values.
        slopes: ALiBi slopes m, float32 ``[H]``; zeros without ALiBi.
        kv_heads: K.
        scale: factor of the inner products.

    Raises:
        UserError: another dtype or device, or numbers of heads that contradict each other.
    """
    heads = slopes.numel()
    if qkv.device.type != "cpu" or qkv.dtype != torch.float32 or slopes.dtype != torch.float32:
        raise UserError(f"fused attention computes in float32 on a CPU; it was given {qkv.dtype} on {qkv.device}")
    if qkv.ndim != 4 or qkv.shape[2] != heads + 2 * kv_heads or kv_heads < 1 or heads % kv_heads:
        raise UserError(
            f"activations of shape {tuple(qkv.shape)} do not hold {heads} heads of queries and {kv_heads} of keys"
        )
    return _attention(qkv, slopes, kv_heads, scale)[0]


def attend_to_cache(
    qkv: Tensor, keys: Tensor, values: Tensor, lengths: Tensor, numbers: Tensor, kv_heads: int
) -> Tensor:
    """Append the keys and values of one new token a row to a cache; return the token's attention, ``[B, H D]``.

    It is not differentiable.

    Args:
        qkv: float32 ``[B, (H + 2 K) D]`` on a CPU: queries, keys, values.
        keys, values: of the cache, float32 ``[B, K, S, D]``.
        lengths: tokens of each row in the cache, int64 ``[B]``, below S.
        numbers: the scale of scores and the ALiBi slope of each head, float32 ``[1 + H]``.
    """
    kernels, (batch, _, capacity, d) = _decoding(), keys.shape
    heads = len(numbers) - 1
    # A thread is not woken for few keys.
    threads = max(1, min(torch.get_num_threads(), batch * kv_heads, keys.numel() // _A_THREAD))
    y = qkv.new_empty(batch, heads * d)
    kernels.attend(
        threads,
        qkv=_rows(qkv),
        keys=keys,
        values=values,
        lengths=lengths,
        numbers=numbers,
        y=y,
        scratch=_scratch(threads, kernels.scratch_of(capacity, d)),
        batch=batch,
        heads=heads,
        kv_heads=kv_heads,
        d=d,
        capacity=capacity,
    )
    return y


def _rows(x: Tensor) -> Tensor:
    """Return ``x`` with a contiguous last dimension; the kernel accepts any other strides."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _numbers(slopes: Tensor, scale: float) -> Tensor:
    return torch.cat((slopes.new_full((1,), scale), slopes.detach()))


@torch.library.custom_op("sparsetrain::attention", mutates_args=())
def _attention(qkv: Tensor, slopes: Tensor, kv_heads: int, scale: float) -> tuple[Tensor, Tensor]:
    """Return the result and, for the backward pass, the logarithms of the softmax denominators ``[B, H, T]``."""
    kernels, heads, x = _kernels(), slopes.numel(), _rows(qkv.detach())
    batch, tokens, _, d = x.shape
    y, logs = x.new_empty(batch, tokens, heads * d), x.new_empty(batch, heads, tokens)
    threads = max(1, min(torch.get_num_threads(), batch * heads))
    kernels.forward(
        threads,
        x=x,
        y=y,
        logs=logs,
        numbers=_numbers(slopes, scale),
        batch=batch,
        tokens=tokens,
        heads=heads,
        kv_heads=kv_heads,
        d=d,
        s=_scratch(threads, kernels.forward_scratch(tokens, d)),
    )
    return y, logs


@_attention.register_fake
def _(qkv: Tensor, slopes: Tensor, kv_heads: int, scale: float) -> tuple[Tensor, Tensor]:
    batch, tokens, _, d = qkv.shape
    heads = slopes.numel()
    return qkv.new_empty(batch, tokens, heads * d), qkv.new_empty(batch, heads, tokens)


@torch.library.custom_op("sparsetrain::attention_backward", mutates_args=())
def _attention_backward(
    g: Tensor, qkv: Tensor, y: Tensor, logs: Tensor, slopes: Tensor, kv_heads: int, scale: float
) -> Tensor:
    """Return the gradient of ``qkv``, contiguous."""
    kernels, heads, x = _kernels(), slopes.numel(), _rows(qkv.detach())
    batch, tokens, _, d = x.shape
    # One thread handles all query heads that share a key head, so it computes the whole gradient of those keys.
    threads = max(1, min(torch.get_num_threads(), batch * kv_heads))
    grad = torch.empty_like(x, memory_format=torch.contiguous_format)
    kernels.backward(
        threads,
        x=x,
        y=y.detach().contiguous(),
        dy=g.detach().contiguous(),
        logs=logs.detach().contiguous(),
        numbers=_numbers(slopes, scale),
        batch=batch,
        tokens=tokens,
        heads=heads,
        kv_heads=kv_heads,
        d=d,
        s=_scratch(threads, kernels.backward_scratch(tokens, d)),
        dx=grad,
    )
    return grad


@_attention_backward.register_fake
def _(g: Tensor, qkv: Tensor, y: Tensor, logs: Tensor, slopes: Tensor, kv_heads: int, scale: float) -> Tensor:
    return torch.empty_like(qkv, memory_format=torch.contiguous_format)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    qkv, slopes, *ctx.rest = inputs
    y, logs = output
    ctx.save_for_backward(qkv, y, logs, slopes)
    ctx.mark_non_differentiable(logs)


def _backward(ctx: Any, g: Tensor, _logs: Tensor | None) -> tuple[Tensor | None, ...]:
    needed = ctx.needs_input_grad[0]
    return (_attention_backward(g, *ctx.saved_tensors, *ctx.rest) if needed else None, None, None, None)


def _refuse_double_backward(ctx: Any, *_gradients: Tensor) -> None:
    raise RuntimeError("attention on a CPU has no second derivative: call backward without create_graph=True")


_attention.register_autograd(_backward, setup_context=_setup)
_attention_backward.register_autograd(_refuse_double_backward)


def _flops(qkv: Any, slopes: Any, *_: Any, **__: Any) -> int:
    """Return 4 B T^2 H D: two products, of each query with every key, although the kernel skips later keys."""
    batch, tokens, _heads, d = qkv
    return int(4 * batch * tokens * tokens * slopes[0] * d)


def _flops_backward(g: Any, qkv: Any, y: Any, logs: Any, slopes: Any, *_: Any, **__: Any) -> int:
    """Return four products; the scores, which the kernel computes again, are not counted."""
    return 2 * _flops(qkv, slopes)


count_by("attention", _flops)
count_by("attention_backward", _flops_backward)
