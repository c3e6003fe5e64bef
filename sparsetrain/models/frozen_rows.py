"""Training of some rows of a matrix, while an optimizer that knows whole parameters holds it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch.optim import Optimizer


def train_rows(parameter: nn.Parameter, rows: Sequence[int], optimizer: Optimizer) -> None:
    """Let the optimizer change only some rows of a parameter; the others keep their bits.

    The other rows have gradients of zero, so that they count neither for clipping nor in moments. Weight decay would
    change them all the same, so their values are written back after each step.

    Args:
        parameter: ``[V, ...]``, with the values that the other rows keep.
        rows: the rows to train.
        optimizer: holds the parameter.
    """
    kept = torch.ones(len(parameter), dtype=torch.bool, device=parameter.device)
    kept[list(rows)] = False
    values = parameter.detach()[kept].clone()
    mask = kept.view(-1, *(1,) * (parameter.ndim - 1))

    def restore(*_: object) -> None:
        with torch.no_grad():
            parameter[kept] = values

    parameter.register_hook(lambda gradient: gradient.masked_fill(mask, 0.0))
    optimizer.register_step_post_hook(restore)
