"""The product of few tokens and an unstructured sparse matrix, by the kernels of `sparsetrain.kernels.few_tokens`.

Legend: N rows (tokens), K in_features, M out_features, nnz stored values.
"""

from __future__ import annotations

import functools
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sparsetrain.sparsity.backends import cpu
from sparsetrain.sparsity.backends.cpu import scratch, with_whole_rows
from sparsetrain.sparsity.patterns.pattern import SparsityPattern

MOST = 48  # tokens, as in the kernels, which would import a compiler


class _Kernels(NamedTuple):
    few_tokens: ModuleType
    layout: ModuleType


@functools.cache
def _kernels() -> _Kernels:
    # Imported late: importing the library must not import a compiler.
    from sparsetrain.kernels import few_tokens, few_tokens_layout

    return _Kernels(few_tokens, few_tokens_layout)


def few_tokens(x: Tensor, values: Tensor, pattern: SparsityPattern) -> Tensor:
    """Return ``x @ W.T``, ``[N, K] -> [N, M]``, for N from 1 to `MOST`; values are read in place.

    Args:
        x, values: float32 or bfloat16; sums are in float32.
    """
    kernels, tokens, (out_features, in_features) = _kernels().few_tokens, x.shape[0], pattern.shape
    threads = max(1, min(torch.get_num_threads(), pattern.nnz // cpu.NONZEROS_A_THREAD))
    stored = values.detach()
    if not stored.is_contiguous():
        stored = stored.contiguous()
    wide = x if x.dtype == torch.float32 else x.float()
    y, narrow = scratch(tokens, out_features), stored.dtype == torch.bfloat16
    if tokens == 1:
        one = kernels.one_bfloat16 if narrow else kernels.one
        one(threads, x=with_whole_rows(wide), y=y, values=stored, **_columns(pattern).arguments)
    else:
        several = kernels.several_bfloat16 if narrow else kernels.several
        several(
            threads,
            x=with_whole_rows(wide),
            y=y,
            tokens=tokens,
            packed=scratch(threads * (in_features + 16) * MOST),
            scratch=scratch(threads * (kernels.PANEL + 16) * MOST),
            values=stored,
            **_columns(pattern).arguments,
        )
    return y if x.dtype == torch.float32 else y.to(x.dtype)


def _columns(pattern: SparsityPattern) -> Any:
    def build() -> Any:
        return _kernels().layout.build_columns(pattern.row_ptr.numpy(), pattern.col.numpy(), pattern.shape[1])

    return pattern.derived("few_tokens", build)
