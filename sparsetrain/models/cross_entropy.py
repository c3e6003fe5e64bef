"""Cross-entropy over a large vocabulary that never holds the logits of all tokens.

Shapes: N tokens, D features, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORED = -100  # a target that does not count
# Maximum logits held at once. On a CPU a chunk should fit into the cache, but below 256 tokens the pass over the weight
# gradient dominates. A GPU needs large products.
_CPU_ELEMENTS, _GPU_ELEMENTS, _LEAST_TOKENS = 1 << 21, 1 << 26, 256


def cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Return the mean cross-entropy, in nats, of ``softmax(hidden @ weight.T)`` over targets that are not -100.

    Logits exist for one chunk of tokens at a time. If gradients are needed, the forward pass computes them from each
    chunk, so that the backward pass recomputes nothing. The order of the sums is fixed. Only first derivatives exist.

    Args:
        hidden: ``[N, D]``.
        weight: ``[V, D]``.
        targets: int64 ``[N]``.

    Returns:
        A float32 (float64 for float64 input) scalar; NaN if every target is -100, as from
        ``torch.nn.functional.cross_entropy``.
    """
    kept = targets != IGNORED
    if not bool(kept.all()):
        # Rows of fine-tuning have few targets, and the head is the largest product of a small model: skip the others.
        hidden, targets = hidden[kept], targets[kept]
    return _CrossEntropy.apply(hidden, weight, targets)


def token_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Return each token's cross-entropy in nats ``[N]``, and 0 where the target is -100; without gradients."""
    kept = targets != IGNORED
    with torch.no_grad():
        chosen, weight = _in_autocast_dtype(hidden[kept], weight)
        losses = [
            F.cross_entropy(wide(h @ weight.t()), t, reduction="none")
            for h, t in zip(*_chunks(chosen, targets[kept], weight.shape[0]), strict=True)
        ]
        return wide(hidden.new_zeros(targets.shape)).masked_scatter(kept, torch.cat(losses))


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        needs_hidden, needs_weight, _ = ctx.needs_input_grad
        inputs = (hidden, weight)
        hidden, weight = _in_autocast_dtype(hidden, weight)
        count = max(1, len(targets))  # avoids 0/0; with no targets the loss is NaN (below) and nothing has a gradient
        total = torch.zeros((), dtype=wide(hidden[:0]).dtype, device=hidden.device)
        grad_hidden = torch.empty_like(hidden) if needs_hidden else None
        grad_weight = torch.zeros_like(inputs[1]) if needs_weight else None
        start = 0
        for h, t in zip(*_chunks(hidden, targets, weight.shape[0]), strict=True):
            logits = wide(h @ weight.t())
            index = t[:, None]
            top = logits.amax(dim=1, keepdim=True)
            label = logits.gather(1, index) - top
            # In place from here on: the logits become the softmax and then the gradient.
            sums = logits.sub_(top).exp_().sum(dim=1, keepdim=True)
            total += (sums.log() - label).sum()
            if grad_hidden is not None or grad_weight is not None:
                minus_one = logits.new_full(index.shape, -1.0 / count)
                grad = logits.mul_(1.0 / (count * sums)).scatter_add_(1, index, minus_one).to(h.dtype)
                if grad_hidden is not None:
                    torch.mm(grad, weight, out=grad_hidden[start : start + len(h)])
                if grad_weight is not None:
                    _accumulate(grad_weight, grad, h)
            start += len(h)
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.hidden_dtype = inputs[0].dtype
        return total / count if len(targets) else total * torch.nan

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        (grad,) = grads
        grad_hidden, grad_weight = ctx.saved_tensors
        if grad_hidden is not None:
            grad_hidden = (grad_hidden * grad).to(ctx.hidden_dtype)
        return grad_hidden, None if grad_weight is None else grad_weight * grad, None


def chunk_tokens(vocabulary: int, device: str = "cpu") -> int:
    """Return the number of tokens per chunk."""
    return max(_LEAST_TOKENS, (_CPU_ELEMENTS if device == "cpu" else _GPU_ELEMENTS) // vocabulary)


def _accumulate(total: Tensor, grad: Tensor, hidden: Tensor) -> None:
    """Add ``grad.T @ hidden`` to ``total`` ``[V, D]``, in the dtype of ``total``."""
    if total.dtype == grad.dtype:
        total.addmm_(grad.t(), hidden)
    else:
        total += grad.t() @ hidden


def _chunks(hidden: Tensor, targets: Tensor, vocabulary: int) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    size = chunk_tokens(vocabulary, hidden.device.type)
    return hidden.split(size), targets.split(size)


def _in_autocast_dtype(hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    # Autocast is off inside a custom autograd function, so the cast is made here.
    device = hidden.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        return hidden.to(dtype), weight.to(dtype)
    return hidden, weight


def wide(logits: Tensor) -> Tensor:
    """Return ``logits`` in float32 or float64, for sums over the vocabulary."""
    return logits if logits.dtype == torch.float64 else logits.float()
