"""The gradient of weights that do not exist: made by the backward pass of a layer's product, while someone asks for it.

Legend: N rows (tokens), K in_features, M out_features.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from sparsetrain.sparsity.patterns.select import row_slices

Result = TypeVar("Result")

_OUTSIDE = -1  # torch's number of the backward pass where none runs


def _current_pass() -> int:
    return torch._C._current_graph_task_id()


class DenseGradientRequest(Generic[Result]):
    """A request for ``g.T @ x``, ``[M, K]``, of one layer, attached to its pattern; `digest` turns it into the result.

    A layer stores the gradient of its nonzeros only. While a request hangs on a layer, the backward pass of its product
    (of its dense matrix, where something reads that instead) hands the dense one over. So it does not matter who calls
    the product: a module, a compiled graph, a module of torch's that reads ``layer.weight``.

    Of several backward passes the last one counts. A layer that is used several times in one pass has the sum of its
    gradients, which is digested when no use of it is open any more: then one dense matrix exists at a time. What cannot
    be told to be complete is digested by `finish`: where a compiled graph ran forward for a log and never backward,
    and where a layer is used in several segments of reentrant activation checkpointing after an evaluation.

    Args:
        digest: called with the dense gradient in at least float32, which it may overwrite.
        accumulate: add up the gradients of all backward passes until `finish`. hold: digest in `finish` only.
            Both take one dense matrix meanwhile.
    """

    def __init__(self, digest: Callable[[Tensor], Result], accumulate: bool = False, hold: bool = False) -> None:
        self.digest, self.accumulate, self.hold = digest, accumulate, hold or accumulate
        self.answered = False  # whether any backward pass has handed over a gradient
        self._dense: Tensor | None = None
        self._result: Result | None = None
        self._pass = _OUTSIDE  # the backward pass that the gradient is of
        # Uses whose gradient has not come yet: nodes of live graphs, calls of the custom op, and calls without a graph,
        # which reentrant checkpointing repeats inside the backward pass.
        self._nodes: weakref.WeakSet[Any] = weakref.WeakSet()
        self._calls = self._plain = 0

    def opened(self, node: Any = None) -> None:
        """Record a use that will have a gradient, by the node of its graph; None is a call of the custom op."""
        born = _current_pass()
        if node is not None:
            node.born = born
        if born != _OUTSIDE:
            return  # an activation that is computed again: the node of the first time runs, or this one, at once
        if node is None:
            self._calls += 1
        else:
            self._nodes.add(node)

    def passed(self) -> None:
        """Record a use without a graph."""
        if _current_pass() == _OUTSIDE:
            self._plain += 1

    def add(self, g: Tensor, x: Tensor, node: Any = None) -> None:
        """Add the gradient of one use, given by the product's two factors: g ``[N, M]`` and x ``[N, K]``."""
        dtype = torch.promote_types(g.dtype, torch.float32)
        with torch.no_grad():
            g, x = g.detach(), x.detach().to(g.dtype)
            self._begin(node)
            if self._dense is None and g.dtype == dtype:
                self._dense = g.t() @ x
            else:
                if self._dense is None:
                    self._dense = torch.zeros(g.shape[1], x.shape[1], dtype=dtype, device=g.device)
                # Added by rows, so that no second dense matrix exists.
                for rows in row_slices(*self._dense.shape):
                    self._dense[rows] += g[:, rows].t() @ x
            self._end(node)

    def add_dense(self, gradient: Tensor, node: Any = None) -> None:
        """Add the gradient ``[M, K]`` of one use of the dense matrix."""
        with torch.no_grad():
            self._begin(node)
            if self._dense is None:
                dtype = torch.promote_types(gradient.dtype, torch.float32)
                self._dense = gradient.detach().to(dtype, copy=True)
            else:
                self._dense += gradient.detach()
            self._end(node)

    def _begin(self, node: Any) -> None:
        born = getattr(node, "born", _OUTSIDE)
        # Reentrant checkpointing runs each segment in a separate pass, inside the pass that computes it again.
        now = _current_pass() if born == _OUTSIDE else born
        if now != self._pass:
            self._pass = now
            if not self.accumulate:
                self._dense, self._result = None, None

    def _end(self, node: Any) -> None:
        self.answered = True
        if node is None:
            self._calls = max(0, self._calls - 1)
        elif node.born == _OUTSIDE:
            self._nodes.discard(node)
        else:
            self._plain -= 1
        again = node is not None and node.born != _OUTSIDE
        complete = self._plain <= 0 if again else not self._nodes and not self._calls
        if complete:
            self._plain = 0
            if not self.hold:
                self._close()

    def _close(self) -> None:
        assert self._dense is not None
        dense, self._dense = self._dense, None
        self._result = self.digest(dense)

    def finish(self) -> Result | None:
        """Return the result; None if the layer took part in no backward pass."""
        if self._dense is not None:
            with torch.no_grad():
                self._close()
        return self._result
