"""What the tests of LayerNorm and RMSNorm share: inputs, torch's own results, and what was called."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sparsetrain.models import cpu_norm

EPS = 1e-5


class Collected(list[tuple[Tensor | None, Tensor | None]]):
    """Receives norms, and the gradients."""

    gradients: tuple[Tensor | None, ...] = ()

    def __call__(self, weight: Tensor | None, bias: Tensor | None, *gradients: Tensor | None) -> None:
        self.append((weight, bias))
        self.gradients = gradients


@contextlib.contextmanager
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Yield the names of the kernels' functions that are called inside."""
    seen: list[str] = []

    def spy(name: str, real: Callable[..., Any], *arguments: Any) -> Any:
        seen.append(name)
        return real(*arguments)

    with monkeypatch.context() as patch:
        for name in ("forward", "backward"):
            patch.setattr(cpu_norm, name, partial(spy, name, getattr(cpu_norm, name)))
        yield seen


def theirs(x: Tensor, weight: Tensor | None, bias: Tensor | None, rms: bool) -> Tensor:
    if rms:
        return F.rms_norm(x, x.shape[-1:], weight, EPS)
    return F.layer_norm(x, x.shape[-1:], weight, bias, EPS)


def leaves(shape: tuple[int, ...], rms: bool = False, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Return x, weight and, but for RMSNorm, bias."""
    sizes = (shape, shape[-1:]) if rms else (shape, shape[-1:], shape[-1:])
    return [torch.randn(size, dtype=dtype, requires_grad=True) for size in sizes]


def padded(given: list[Tensor]) -> tuple[Tensor, Tensor | None, Tensor | None]:
    return (*given, *[None] * (3 - len(given)))  # type: ignore[return-value]
