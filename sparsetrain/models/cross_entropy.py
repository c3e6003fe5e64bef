"""Cross-entropy over a large vocabulary that never holds the logits of all tokens.

Shapes: N tokens, D features, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sparsetrain.gradients.functions import weight_gradient
from sparsetrain.gradients.record import Use, digest

IGNORED = -100  # a target that does not count
# Maximum logits held at once. On a CPU a chunk should fit into the cache, but below 256 tokens the pass over the weight
# gradient dominates. A GPU needs large products.
_CPU_ELEMENTS, _GPU_ELEMENTS, _LEAST_TOKENS = 1 << 21, 1 << 26, 256


def cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor, use: Use | None = None) -> Tensor:
    """Return the mean cross-entropy, in nats, of ``softmax(hidden @ weight.T)`` over targets that are not -100.

    Logits exist for one chunk of tokens at a time. If gradients are needed, the forward pass computes them from each
    chunk, so that the backward pass recomputes nothing. The order of the sums is fixed. Only first derivatives exist.

    Args:
        hidden: ``[N, D]``.
        weight: ``[V, D]``.
        targets: int64 ``[N]``.
        use: receives the norms of the examples' own gradients of ``weight``; the N tokens are those of B examples, one
            after the other.

    Returns:
        A float32 (float64 for float64 input) scalar; NaN if every target is -100, as from
        ``torch.nn.functional.cross_entropy``.
    """
    kept = targets != IGNORED
    lengths = [len(targets)] if use is None else kept.view(use.examples, -1).sum(1).tolist()
    if not bool(kept.all()):
        # Rows of fine-tuning have few targets, and the head is the largest product of a small model: skip the others.
        hidden, targets = hidden[kept], targets[kept]
        lengths = lengths if use is not None else [len(targets)]
    return _CrossEntropy.apply(hidden, weight, targets, lengths, use)


def token_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Return each token's cross-entropy in nats ``[N]``, and 0 where the target is -100; without gradients."""
    kept = targets != IGNORED
    with torch.no_grad():
        chosen, weight = _in_autocast_dtype(hidden[kept], weight)
        losses = [
            F.cross_entropy(wide(h @ weight.t()), t, reduction="none")
            for h, t in _chunks(chosen, targets[kept], [len(chosen)], weight.shape[0])
        ]
        return wide(hidden.new_zeros(targets.shape)).masked_scatter(kept, torch.cat(losses))


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, lengths: list[int], use: Use | None
    ) -> Tensor:
        needs_hidden, needs_weight, *_ = ctx.needs_input_grad
        inputs = (hidden, weight)
        hidden, weight = _in_autocast_dtype(hidden, weight)
        count = max(1, len(targets))  # avoids 0/0; with no targets the loss is NaN (below) and nothing has a gradient
        total = torch.zeros((), dtype=wide(hidden[:0]).dtype, device=hidden.device)
        grad_hidden = torch.empty_like(hidden) if needs_hidden else None
        grad_weight = _WeightGradient(inputs[1], lengths, use) if needs_weight else None
        start = 0
        for h, t in _chunks(hidden, targets, lengths, weight.shape[0]):
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
                    grad_weight.add(grad, h)
            start += len(h)
        ctx.save_for_backward(grad_hidden, None if grad_weight is None else grad_weight.total)
        ctx.hidden_dtype, ctx.weight_dtype = inputs[0].dtype, inputs[1].dtype
        # Held only for the norms: it would keep the gradient in memory for as long as the graph.
        ctx.weight = None if use is None else grad_weight
        return total / count if len(targets) else total * torch.nan

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        grad_hidden, grad_weight = ctx.saved_tensors
        if grad_hidden is not None:
            grad_hidden = (grad_hidden * grad).to(ctx.hidden_dtype)
        if grad_weight is not None:
            grad_weight = grad_weight * grad
            if ctx.weight is not None:
                ctx.weight.report(grad, grad_weight)
            grad_weight = grad_weight.to(ctx.weight_dtype)
        return grad_hidden, grad_weight, None, None, None


class _WeightGradient:
    """The gradient of the head's weight, summed over chunks of tokens, and of single examples if their norms are asked.

    Args:
        weight: ``[V, D]``. lengths: of the examples, in tokens. use: as in `cross_entropy`.
    """

    def __init__(self, weight: Tensor, lengths: list[int], use: Use | None) -> None:
        self.total, self._use = torch.zeros_like(weight), use
        if use is None:
            return
        self.total = wide(self.total)  # of the examples' parts, which are added one after the other
        self._left, self._example = list(lengths), 0
        self._part: Tensor | None = None  # the gradient of an example of several chunks
        self._squared = wide(weight[:0]).new_zeros(len(lengths))
        tied = use.tied
        self._ids = None if tied is None else tied.ids
        self._rows = None if self._ids is None else wide(weight[:0]).new_zeros(*self._ids.shape, weight.shape[1])

    def add(self, grad: Tensor, hidden: Tensor) -> None:
        """Add ``grad.T @ hidden``, of tokens of one example, in the dtype of the total."""
        if self._use is None:
            _accumulate(self.total, grad, hidden)
            return
        while self._left[self._example] == 0:  # an example without targets
            self._example += 1
        example = self._example
        ids = None if self._ids is None else self._ids[example]
        self._left[example] -= len(grad)
        whole = self._left[example] == 0
        if whole and self._part is None:
            _, squared, rows = weight_gradient(grad[None], hidden[None], None if ids is None else ids[None], self.total)
            self._squared[example] = squared[0]
            if rows is not None and self._rows is not None:
                self._rows[example] = rows[0]
            return
        self._part = torch.zeros_like(self.total) if self._part is None else self._part
        _accumulate(self._part, grad, hidden)
        if whole:
            self._squared[example] = wide(self._part).square().sum()
            if ids is not None and self._rows is not None:
                self._rows[example] = self._part[ids]
            self.total += self._part
            self._part = None

    def report(self, scale: Tensor, total: Tensor) -> None:
        """Record the norms in a backward pass whose gradient of the loss is ``scale`` and of the weight ``total``."""
        use = self._use
        if use is None:
            return
        squared = self._squared * wide(scale).square()
        if self._rows is None:
            use.add(squared)
        else:
            use.add_rows(squared, self._rows * wide(scale))
        use.expect(digest(total))


def chunk_tokens(vocabulary: int, device: str = "cpu") -> int:
    """Return the number of tokens per chunk."""
    return max(_LEAST_TOKENS, (_CPU_ELEMENTS if device == "cpu" else _GPU_ELEMENTS) // vocabulary)


def _accumulate(total: Tensor, grad: Tensor, hidden: Tensor) -> None:
    """Add ``grad.T @ hidden`` to ``total`` ``[V, D]``, in the dtype of ``total``."""
    if total.dtype == grad.dtype:
        torch.addmm(total, grad.t(), hidden, out=total)  # torch's counter of FLOPs does not know addmm_
    else:
        total += grad.t() @ hidden


def _chunks(hidden: Tensor, targets: Tensor, lengths: list[int], vocabulary: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield chunks of tokens; none has tokens of two examples."""
    size = chunk_tokens(vocabulary, hidden.device.type)
    for h, t in zip(hidden.split(lengths), targets.split(lengths), strict=True):
        if len(t) or len(lengths) == 1:
            yield from zip(h.split(size), t.split(size), strict=True)


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
