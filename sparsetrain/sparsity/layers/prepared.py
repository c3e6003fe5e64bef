"""Sparse layers prepared for decoding: products of few tokens with weights that stay as they are.

A product of one token with a matrix of 768 x 768 takes less time than the checks before it. While a text is generated
the weights do not change, so what is checked before each product is checked once, and so is which product is faster.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparsetrain.sparsity.backends.auto import FEW_TOKENS, decoding_limit
from sparsetrain.sparsity.backends.base import BACKENDS
from sparsetrain.sparsity.backends.few_tokens import MOST, few_tokens
from sparsetrain.sparsity.backends.masked import scattered
from sparsetrain.sparsity.layers.linear import SparseLinear
from sparsetrain.sparsity.layers.ops import dispatched

_lock = threading.Lock()


class Prepared:
    """The product of a layer for up to `MOST` tokens in float32 on a CPU.

    Where a dense product of some number of tokens is faster (`auto.decoding_limit`), a dense copy of the weights
    computes it. It is made when it is first needed.

    Attributes:
        users: how many `prepared` are open for the layer.
    """

    __slots__ = ("_bias", "_columns", "_copy", "_pattern", "_sparse", "_values", "users")

    def __init__(self, layer: SparseLinear) -> None:
        self._pattern, self._values, self._bias = layer.pattern, layer.values, layer.bias
        self._columns, self.users = layer.in_features, 0
        density = self._pattern.density
        # By number of tokens: whether the sparse product is the faster one.
        self._sparse = [
            layer.backend != "auto" or density <= decoding_limit(self._pattern.shape, max(1, tokens))
            for tokens in range(MOST + 1)
        ]
        self._copy: Tensor | None = None

    def __call__(self, x: Tensor) -> Tensor | None:
        """Return the layer's output for ``x`` ``[..., K]``; None for an input that the layer itself has to compute."""
        tokens = x.numel() // self._columns
        if not 1 <= tokens <= MOST or x.dtype != torch.float32 or x.shape[-1] != self._columns:
            return None
        if torch.is_grad_enabled() or type(x) is not Tensor or not x.is_cpu:
            return None
        if not self._sparse[tokens]:
            if self._copy is None:
                self._copy = scattered(self._values.detach(), self._pattern)
            return F.linear(x, self._copy, self._bias)
        y = few_tokens(x if x.ndim == 2 else x.reshape(tokens, self._columns), self._values, self._pattern)
        if self._bias is not None:
            y += self._bias
        return y if x.ndim == 2 else y.view(*x.shape[:-1], y.shape[1])


@contextmanager
def prepared(model: object) -> Iterator[None]:
    """Prepare the sparse layers of a model while its weights do not change; the layers compute the same as before.

    A layer stays as it is with weights that no kernel for few tokens takes, and with a backend that has none.
    Nothing is prepared under autocast, a compiler, a tracer or a dispatch mode, nor in what is no module.
    """
    layers = []
    if isinstance(model, nn.Module) and not (torch.is_autocast_enabled("cpu") or dispatched()):
        layers = [layer for layer in model.modules() if type(layer) is SparseLinear and _suits(layer)]
    with _lock:
        for layer in layers:
            if layer.prepared is None:
                layer.prepared = Prepared(layer)
            layer.prepared.users += 1
    try:
        yield
    finally:
        with _lock:
            for layer in layers:
                if layer.prepared is not None:
                    layer.prepared.users -= 1
                    if layer.prepared.users == 0:
                        layer.prepared = None


def _suits(layer: SparseLinear) -> bool:
    values, pattern = layer.values, layer.pattern
    if type(values) is not nn.Parameter or values.dtype != torch.float32:
        return False
    if layer.bias is not None and layer.bias.dtype != torch.float32:
        return False
    names = FEW_TOKENS if layer.backend == "auto" else [name for name in FEW_TOKENS if name == layer.backend]
    if all(BACKENDS[name].refusal(values.dtype, values.device, pattern) is not None for name in names):
        return False
    return values.is_contiguous() and values.shape == pattern.fit and pattern.request is None
