"""Evaluation of a model: loss and bits per byte on held-out text, accuracy on a labelled task.

Shapes: B rows, T positions, E examples, C labels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy.stats import binomtest
from torch import Tensor, nn

from sparsetrain.data import Batch, ScoringBatch

TokenLosses = Callable[[Batch], Tensor]
"""Maps a batch to the cross-entropy of each target in nats, ``[B, T]``; 0 where there is no target."""


RowScores = Callable[[ScoringBatch], Tensor]
"""Maps a batch of questions to the log-probability of each answer in nats, ``[B, C]``."""


@dataclass(frozen=True)
class TextScore:
    """A score on held-out text: cross-entropy in nats per token, and in bits per byte of the text of the targets."""

    loss: float
    bits_per_byte: float
    tokens: int
    bytes: int

    @classmethod
    def of(cls, parts: Sequence[TextScore]) -> TextScore:
        """Return the score over the targets of all parts."""
        if len(parts) == 1:
            return parts[0]
        tokens, size = (sum(getattr(part, name) for part in parts) for name in ("tokens", "bytes"))
        loss = sum(part.loss * part.tokens for part in parts) / tokens
        return cls(loss, sum(part.bits_per_byte * part.bytes for part in parts) / size, tokens, size)


@torch.no_grad()
def score_text(model: nn.Module, losses: TokenLosses, batches: Iterable[Batch]) -> TextScore:
    """Return loss and bits per byte over ``batches``.

    Bits per byte are the total cross-entropy in bits, divided by the UTF-8 bytes of the text that the targets stand
    for, so that models with different tokenizers can be compared. The cross-entropy of the end of a document counts.

    Args:
        model: the model, in evaluation mode during the call.
        losses: see `TokenLosses`.
        batches: each with its ``bytes``, as `sequential_windows` gives them.

    Raises:
        ValueError: a batch has no ``bytes``.
    """
    nats, tokens, size = 0.0, 0, 0
    with evaluating(model):
        for batch in batches:
            counted = batch.targets >= 0
            nats += losses(batch).double().sum().item()
            tokens += int(counted.sum())
            if batch.bytes is None:
                raise ValueError("the bytes of the targets are not known")
            size += int(batch.bytes.sum())
    return TextScore(nats / tokens, nats / math.log(2) / size, tokens, size)


def label_likelihoods(model: nn.Module, score: RowScores, batches: Iterable[ScoringBatch], examples: int) -> Tensor:
    """Return float64 ``[E, C]``: the log-likelihood in nats of each label's answer after each example's question.

    It is NaN where the model returns NaN, as a diverged model does.

    Args:
        model: the model, in evaluation mode during the call.
        score: see `RowScores`.
        batches: each of the E ``examples`` exactly once, in any order.
    """
    result: Tensor | None = None
    missing = set(range(examples))
    with evaluating(model), torch.no_grad():
        for batch in batches:
            scores = score(batch).double().cpu()
            if result is None:
                result = scores.new_full((examples, scores.shape[1]), float("nan"))
            result[batch.examples] = scores
            missing -= set(batch.examples.tolist())
    if result is None or missing:
        raise ValueError(f"{len(missing)} of {examples} examples were not scored")
    return result


def wilson(right: int, n: int) -> tuple[float, float]:
    """Return the Wilson interval of 95 % of an accuracy of ``right`` in ``n``."""
    interval = binomtest(right, n).proportion_ci(0.95, method="wilson")
    return float(interval.low), float(interval.high)


def macro_f1(predicted: np.ndarray, truth: np.ndarray) -> float:
    """Return the unweighted mean over labels of F1, the harmonic mean of precision and recall."""
    scores = []
    for label in np.union1d(predicted, truth):
        hits = int(((predicted == label) & (truth == label)).sum())
        scores.append(2 * hits / (int((predicted == label).sum()) + int((truth == label).sum())))
    return float(np.mean(scores))


class evaluating:  # noqa: N801 - lower case reads better: with evaluating(model)
    """Context manager: the model is in evaluation mode inside, and in its previous mode afterwards."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.was_training = model, model.training

    def __enter__(self) -> None:
        self.model.eval()

    def __exit__(self, *_: object) -> None:
        self.model.train(self.was_training)
