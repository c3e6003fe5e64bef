"""The calls of `sparsetrain.kernels.norm`: LayerNorm and RMSNorm of float32 or bfloat16 tensors on a CPU.

`sparsetrain.kernels.triton_norm` has the same two functions for a GPU.
"""

from __future__ import annotations

import functools
from types import ModuleType

import torch
from torch import Tensor

# A thread that gets fewer elements than this costs more to wake than it saves. The bits do not depend on it.
_LEAST = 1 << 15


@functools.cache
def _kernels() -> ModuleType:
    # Imported at the first use, because importing the library must not import a compiler.
    from sparsetrain.kernels import norm

    return norm


def forward(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, rms: bool) -> tuple[Tensor, Tensor]:
    """Return the result, contiguous and like ``x``, and the moments of its rows, as `backward` takes them.

    Args:
        x: ``[..., F]``, with at least one element. weight, bias: ``[F]`` or None.
    """
    kernels, rows = _kernels(), matrix(x)
    count, features = rows.shape
    y, moments = torch.empty_like(x, memory_format=torch.contiguous_format), _floats(1 if rms else 2, count)
    run = kernels.forward if x.dtype == torch.float32 else kernels.forward_bfloat16
    run(
        _threads(rows),
        x=rows,
        weight=_wide(weight, 1.0, features),
        bias=_wide(bias, 0.0, features),
        eps=_constant(eps, 1),
        rows=count,
        features=features,
        centred=int(not rms),
        y=y,
        moments=moments,
    )
    return y, moments


def backward(
    g: Tensor, x: Tensor, weight: Tensor | None, moments: Tensor, examples: int, rms: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradient of x, those of weight and bias ``[2, F]``, and each example's squared norms ``[2, E]``.

    Args:
        g: ``[..., F]``, the gradient of the result, of the type of ``x``.
        x, weight: as in `forward`, which gave ``moments``.
        examples: E; each is a run of as many rows.
    """
    kernels, rows = _kernels(), matrix(x)
    count, features = rows.shape
    length = count // examples
    units, threads = kernels.units_of(examples, length), _threads(rows)
    sums, squares = _floats(units, 2, features), _floats(2, examples)
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    run = kernels.backward if x.dtype == torch.float32 else kernels.backward_bfloat16
    run(
        threads,
        g=matrix(g),
        x=rows,
        weight=_wide(weight, 1.0, features),
        moments=moments,
        examples=examples,
        length=length,
        features=features,
        centred=int(not rms),
        own=_floats(threads, 2, features),
        sums=sums,
        squares=squares,
        dx=dx,
    )
    if units == 1:
        return dx, sums[0], squares
    totals = _floats(2, features)
    kernels.total(
        _threads(sums),
        sums=sums,
        examples=examples,
        length=length,
        features=features,
        squares=squares,
        totals=totals,
    )
    return dx, totals, squares


def matrix(x: Tensor) -> Tensor:
    """Return ``x`` ``[..., F]`` as a matrix ``[R, F]`` with a contiguous last dimension and any distance of rows."""
    rows = x if x.ndim == 2 else x.reshape(-1, x.shape[-1])
    return rows if rows.stride(1) == 1 or rows.shape[1] == 1 else rows.contiguous()


def _threads(work: Tensor) -> int:
    return max(1, min(torch.get_num_threads(), work.numel() // _LEAST))


def _floats(*shape: int) -> Tensor:
    # Explicit, because torch's default dtype and device may differ.
    return torch.empty(shape, dtype=torch.float32, device="cpu")


def _wide(parameter: Tensor | None, default: float, features: int) -> Tensor:
    """Return a parameter as float32, or what takes the place of one that is absent."""
    return _constant(default, features) if parameter is None else parameter.detach().float().contiguous()


@functools.lru_cache(maxsize=32)
def _constant(value: float, count: int) -> Tensor:
    return torch.full((count,), value, dtype=torch.float32, device="cpu")
