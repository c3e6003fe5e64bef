"""The head of a language model, which returns logits, or the loss without the logits of the whole batch.

Shapes: D features, V vocabulary; ``...`` stands for any dimensions, such as batch and tokens.
"""

from __future__ import annotations

from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from sparsetrain import wrappers
from sparsetrain.models.cross_entropy import IGNORED, cross_entropy, token_cross_entropy, wide

Reduction = Literal["mean", "none"]


class Head(nn.Linear):
    """A linear layer without a bias that returns logits or, given targets, their cross-entropy.

    The loss is computed inside the layer's own call, so that forward hooks, FSDP, activation checkpointing and
    reparameterizations of the weight take effect.
    """

    def __init__(self, d_model: int, vocab_size: int) -> None:
        super().__init__(d_model, vocab_size, bias=False)

    def forward(self, hidden: Tensor, targets: Tensor | None = None, reduction: Reduction = "mean") -> Tensor:
        """Return the logits ``[..., V]`` of ``hidden`` ``[..., D]`` or, given ``targets``, the cross-entropy in nats.

        Args:
            targets: int64 ``[...]``; -100 does not count.
            reduction: ``mean`` gives the mean over the targets that count, a float32 scalar (float64 for float64
                input); ``none`` gives each token's loss ``[...]``, 0 where the target is -100, without gradients.
        """
        if targets is None:
            return super().forward(hidden)
        if getattr(self, "bias", None) is not None:  # set after construction; chunked cross-entropy supports no bias
            return loss_of_logits(super().forward(hidden), targets, reduction)
        rows, flat = hidden.flatten(0, -2), targets.flatten()
        if reduction == "none":
            return token_cross_entropy(rows, self.weight, flat).view_as(targets)
        return cross_entropy(rows, self.weight, flat)


def head_loss(head: nn.Module, hidden: Tensor, targets: Tensor, reduction: Reduction = "mean") -> Tensor:
    """Return the cross-entropy of ``targets`` under the module that serves as a model's head.

    A `Head`, bare or inside a wrapper such as FSDP, receives the targets. Any other module, or a `Head` with another
    forward method, computes the logits of all tokens, which needs more memory.

    Args:
        head: maps ``[..., D]`` to ``[..., V]``.
        hidden, targets, reduction: as in `Head.forward`.
    """
    inner = wrappers.unwrap(head)
    own = vars(inner).get("forward")
    # An adapter or a quantized layer would ignore the targets or take them for something else.
    if type(inner).forward is Head.forward and (own is None or getattr(own, "takes_targets", False)):
        loss: Tensor = head(hidden, targets, reduction)
        return loss
    return loss_of_logits(head(hidden), targets, reduction)


def loss_of_logits(logits: Tensor, targets: Tensor, reduction: Reduction = "mean") -> Tensor:
    """Return the cross-entropy of ``targets`` ``[...]`` from logits ``[..., V]``, as `Head.forward` does."""
    losses = F.cross_entropy(wide(logits).flatten(0, -2), targets.flatten(), ignore_index=IGNORED, reduction=reduction)
    return losses.view_as(targets) if reduction == "none" else losses
