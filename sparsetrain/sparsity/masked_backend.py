"""The backend ``masked``: any pattern on any device, by dense products."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from sparsetrain.sparsity.ops import Backend
from sparsetrain.sparsity.pattern import SparsityPattern


class MaskedBackend(Backend):
    """Scatters the values into a dense matrix and computes densely: right on every device, and saves no time.

    The scattered matrix is kept for the backward pass, which costs the memory of the dense layer and no more.
    """

    name = "masked"

    def matmul(self, x: Tensor, values: Tensor, pattern: SparsityPattern) -> Tensor:
        return F.linear(x, pattern.scatter(values))

    def matmul_t(self, g: Tensor, values: Tensor, pattern: SparsityPattern) -> Tensor:
        return g @ pattern.scatter(values)

    def sampled(self, g: Tensor, x: Tensor, pattern: SparsityPattern) -> Tensor:
        return pattern.gather(g.t() @ x)

    def forward(self, x: Tensor, values: Tensor, pattern: SparsityPattern, keep: bool) -> tuple[Tensor, Tensor]:
        pattern.keep_positions()
        dense = pattern.scatter(values)
        return F.linear(x, dense), dense if keep else x.new_empty(0)

    def kept(self, x: Tensor, pattern: SparsityPattern) -> Tensor:
        return x.new_empty(pattern.shape)

    def backward(
        self,
        g: Tensor,
        x: Tensor,
        values: Tensor,
        kept: Tensor,
        pattern: SparsityPattern,
        need_x: bool,
        need_values: bool,
    ) -> tuple[Tensor, Tensor]:
        return (
            g @ kept if need_x else g.new_empty(0),
            self.sampled(g, x, pattern) if need_values else values.new_empty(0),
        )
