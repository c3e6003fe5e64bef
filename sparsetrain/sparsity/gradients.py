"""The gradient of weights that do not exist: made for one layer at a time, and only while someone asks for it.

Legend: N rows (tokens), K in_features, M out_features.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from sparsetrain.sparsity.linear import SparseLinear
from sparsetrain.sparsity.select import row_slices

Result = TypeVar("Result")


class DenseGradientProbe(Generic[Result]):
    """Watches the backward passes of one layer and hands ``g.T @ x``, ``[M, K]``, to a function that digests it.

    A layer stores the gradient of its nonzeros only. While a probe is armed, a hook on the layer's output computes the
    dense one as soon as the output's gradient is there, ``digest`` keeps what is needed of it, and it is freed before
    the backward pass reaches the next layer. Nothing is computed in a forward pass without gradients.

    Args:
        layer: not changed; its operator is not touched.
        digest: called with the dense gradient in at least float32, which it may overwrite.
        accumulate: add up the gradients of all backward passes until `finish`, which takes one dense matrix meanwhile;
            otherwise each backward pass replaces the result of the one before.
    """

    def __init__(self, layer: SparseLinear, digest: Callable[[Tensor], Result], accumulate: bool = False) -> None:
        self.layer, self.digest, self.accumulate = layer, digest, accumulate
        self._dense: Tensor | None = None
        self._result: Result | None = None
        self._open = 0
        # Before other hooks: those of a parameterization scale the output, and the gradient is that of the matrix.
        self._handle: RemovableHandle | None = layer.register_forward_hook(self._forward, prepend=True)

    def _forward(self, _module: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        if torch.is_grad_enabled() and output.requires_grad:
            self._open += 1
            output.register_hook(partial(self._backward, inputs[0].detach()))

    def _backward(self, x: Tensor, g: Tensor) -> None:
        if self._handle is None:  # a graph that outlived the probe
            return
        with torch.no_grad():
            # A layer that is used several times in one pass has the sum of its gradients.
            rows = g.reshape(-1, g.shape[-1])
            self._add(rows, x.reshape(-1, x.shape[-1]).to(g.dtype))
            self._open -= 1
            if self._open <= 0 and not self.accumulate:
                self._digest()

    def _add(self, g: Tensor, x: Tensor) -> None:
        dtype = torch.promote_types(g.dtype, torch.float32)
        if self._dense is None and g.dtype == dtype:
            self._dense = g.t() @ x
            return
        if self._dense is None:
            self._dense = torch.zeros(g.shape[1], x.shape[1], dtype=dtype, device=g.device)
        # By rows, so that there is one dense matrix and not a second one to be added to it.
        for part in row_slices(*self._dense.shape):
            self._dense[part] += g[:, part].t() @ x

    def _digest(self) -> None:
        assert self._dense is not None
        self._result = self.digest(self._dense)
        self._dense, self._open = None, 0

    def finish(self) -> Result | None:
        """Remove the hook and return the result; None if the layer took part in no backward pass."""
        if self._handle is not None:
            self._handle.remove()
            self._handle = None
        if self._dense is not None:
            with torch.no_grad():
                self._digest()
        return self._result
