"""What the backends that compute on a CPU by `sparsetrain.kernels` have in common: types, and memory."""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor

from sparsetrain.sparsity.backends.base import Backend
from sparsetrain.sparsity.backends.layouts import check_shapes
from sparsetrain.sparsity.patterns.pattern import SparsityPattern

TILE = 64  # tokens of a tile, as in the kernels, which would import a compiler
A_THREAD = 1 << 19  # a thread is not woken for fewer multiply-adds
NONZEROS_A_THREAD = 1 << 14  # nor, where few tokens are bound by memory, for fewer nonzeros
_DTYPES = (torch.float32, torch.bfloat16)
_CPU = torch.device("cpu")


class CpuBackend(Backend):
    """Takes float32 and bfloat16 on a CPU, sums in float32, on no more threads than torch has.

    Keeps nothing but the input for the backward pass, which packs a tile of it again: that costs less than writing all
    tiles to memory on the way forward and reading them back. Subclasses define `unsuited`, `forward` and `backward`.
    """

    def refusal(self, dtype: torch.dtype, device: torch.device, pattern: SparsityPattern) -> str | None:
        if device.type != "cpu":
            return f"computes on a CPU; the input is on {device}"
        if dtype not in _DTYPES:
            return f"computes in float32 and bfloat16; the input has dtype {dtype}"
        if pattern.nnz >= 2**31:
            return f"counts nonzeros in 32 bits; this pattern has {pattern.nnz}"
        return self.unsuited(pattern)

    @abstractmethod
    def unsuited(self, pattern: SparsityPattern) -> str | None:
        """Return why this backend cannot compute such a pattern, or None."""

    # Here the products are made of the two passes, and not the passes of the products.

    @abstractmethod
    def forward(self, *arguments: Any, **options: Any) -> tuple[Tensor, Tensor]: ...

    @abstractmethod
    def backward(self, *arguments: Any, **options: Any) -> tuple[Tensor, Tensor]: ...

    def matmul(self, x: Tensor, values: Tensor, pattern: SparsityPattern) -> Tensor:
        check_shapes(pattern, x=x, values=values)
        return self.forward(x, values, pattern, keep=False)[0]

    def matmul_t(self, g: Tensor, values: Tensor, pattern: SparsityPattern) -> Tensor:
        check_shapes(pattern, g=g, values=values)
        return self.backward(g, g, values, g.new_empty(0), pattern, need_x=True, need_values=False)[0]

    def sampled(self, g: Tensor, x: Tensor, pattern: SparsityPattern) -> Tensor:
        check_shapes(pattern, g=g, x=x)
        nothing = x.new_empty(0)
        return self.backward(g, x, x.new_empty(pattern.nnz), nothing, pattern, need_x=False, need_values=True)[1]

    def sampled_by_example(
        self, g: Tensor, x: Tensor, pattern: SparsityPattern, examples: int
    ) -> tuple[Tensor, Tensor]:
        check_shapes(pattern, g=g, x=x)
        threads = workers(len(g), pattern)
        parts = pieces_of(examples, threads)
        squared = scratch(examples, parts)
        total = self.by_example(
            threads,
            pattern,
            g=with_whole_rows(g),
            x=with_whole_rows(x.to(g.dtype)),
            tokens=len(g),
            examples=examples,
            rows=pattern.shape[0],
            columns=pattern.shape[1],
            squared=squared,
            pieces=parts,
            sharing=torch.empty(1, dtype=torch.int64, device=_CPU),
        )
        return total.to(g.dtype), squared.sum(1)

    @abstractmethod
    def by_example(self, threads: int, pattern: SparsityPattern, **arguments: Any) -> Tensor:
        """Return what `sampled` returns, float32, by a kernel that takes these arguments and some more."""


def in_float32(values: Tensor) -> Tensor:
    """Return values as kernels read them."""
    return values.detach().float().contiguous()


def workers(tokens: int, pattern: SparsityPattern) -> int:
    """Return how many of torch's threads to wake for a product."""
    return max(1, min(torch.get_num_threads(), tokens * pattern.nnz // A_THREAD))


def pieces(tokens: int, tiles: int, threads: int) -> int:
    """Return into how many pieces a kernel cuts ``tiles`` tiles of tokens, so that all threads get equally many."""
    return threads // math.gcd(-(-tokens // (tiles * TILE)), threads)


def pieces_of(examples: int, threads: int) -> int:
    """Return into how many pieces a kernel cuts each example, so that all threads get equally many."""
    return threads // math.gcd(examples, threads)


def enough(threads: int, elements: int) -> int:
    """Return how many threads to wake for a pass over ``elements`` elements."""
    return max(1, min(threads, elements // 65536))


def scratch(*shape: int) -> Tensor:
    """Return uninitialised memory of the type that kernels compute in, whatever torch's default type and device are."""
    return torch.empty(*shape, dtype=torch.float32, device=_CPU)  # a tuple or a name would cost half a microsecond


_NOTHING = {dtype: torch.empty(0, 0, dtype=dtype, device=_CPU) for dtype in _DTYPES}


def nothing(dtype: torch.dtype) -> Tensor:
    """Return an empty matrix, for an argument that a kernel does not need: it cannot be taken for one that it does."""
    return _NOTHING[dtype]


def with_whole_rows(x: Tensor) -> Tensor:
    """Return a matrix whose rows are contiguous each; their distance may be anything."""
    return x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous()
