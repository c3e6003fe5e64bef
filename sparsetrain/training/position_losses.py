"""Loss at several positions of a sequence, over the same target tokens.

Some tokens of a text are harder than others, and a model that reads more text before a token predicts it better. So the
loss at position 1,000 of some windows and at position 100 of others says little about positions. Here every block of
target tokens is predicted once per length, from passes that end with it and begin earlier or later. Losses at two
lengths then differ in the context and its positions alone, and those of two models at one length in the models alone.

Shapes: K blocks of W target tokens, N lengths.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from sparsetrain.data import Batch
from sparsetrain.data.tokens import IGNORED, TokenFile
from sparsetrain.errors import UserError
from sparsetrain.training.evaluate import TokenLosses, evaluating


@dataclass(frozen=True)
class PositionLosses:
    """Mean cross-entropy in nats of the last W tokens of passes of several lengths.

    Args:
        lengths: tokens that a pass reads; the bucket of a length is its last W positions.
        width: W.
        blocks: float64 ``[N, K]``, the mean over the targets of a block, for each length.
    """

    lengths: tuple[int, ...]
    width: int
    blocks: npt.NDArray[np.float64]

    def loss(self, length: int) -> float:
        """Return the mean loss at a length, in nats."""
        return float(self._row(length).mean())

    def difference(self, length: int, other: int) -> tuple[float, float]:
        """Return the mean of loss at ``length`` less loss at ``other``, and its standard error over the blocks.

        The standard error is NaN for a single block.
        """
        paired = self._row(length) - self._row(other)
        error = float(paired.std(ddof=1)) / math.sqrt(len(paired)) if len(paired) > 1 else math.nan
        return float(paired.mean()), error

    def _row(self, length: int) -> npt.NDArray[np.float64]:
        if length not in self.lengths:
            raise UserError(f"length={length} was not evaluated; there are {', '.join(map(str, self.lengths))}")
        return self.blocks[self.lengths.index(length)]


def position_losses(
    model: nn.Module,
    losses: TokenLosses,
    text: TokenFile,
    lengths: Sequence[int],
    width: int = 32,
    blocks: int = 64,
    batch_size: int = 8,
) -> PositionLosses:
    """Return the loss of the same targets at the end of passes of several lengths.

    The blocks do not overlap and are spread evenly over the text; they are the same at each call. Windows disregard the
    borders of documents, as training does.

    Args:
        model: the model, in evaluation mode during the call.
        losses: see `TokenLosses`.
        text: the tokens.
        lengths: tokens that a pass reads, each at least ``width``.
        width: target tokens W at the end of a pass.
        blocks: largest number K of blocks.
        batch_size: passes of one length that are computed together.

    Raises:
        UserError: a number is out of range, or the text is shorter than the longest pass and its last target.
    """
    for name, value in (("width", width), ("blocks", blocks), ("batch_size", batch_size)):
        if value < 1:
            raise UserError(f"{name}={value} is not a positive integer")
    if not lengths or min(lengths) < width:
        raise UserError(f"lengths={list(lengths)} must be at least width={width}, and there must be one")
    longest, tokens = max(lengths), len(text)
    if tokens <= longest:
        raise UserError(f"{text.path.name} holds {tokens} tokens; passes of {longest} need {longest + 1}")
    there = (tokens - 1 - longest) // width + 1
    chosen = np.arange(min(blocks, there), dtype=np.int64) * there // min(blocks, there)
    ends = longest + chosen * width  # index of the last target of each block
    found = np.empty((len(lengths), len(ends)))
    with evaluating(model), torch.no_grad():
        for row, length in enumerate(lengths):
            done = 0
            for batch in _batches(text, ends, length, width, batch_size):
                mean = losses(batch)[:, -width:].double().mean(1).cpu().numpy()
                found[row, done : done + len(mean)] = mean
                done += len(mean)
    return PositionLosses(tuple(lengths), width, found)


def _batches(text: TokenFile, ends: npt.NDArray[np.int64], length: int, width: int, batch_size: int) -> Iterator[Batch]:
    """Yield the passes of a length: tokens and targets ``[B, length]``, of which the last ``width`` count."""
    for start in range(0, len(ends), batch_size):
        rows = text.windows(ends[start : start + batch_size] - length, length + 1)
        targets = rows[:, 1:].clone()
        targets[:, : length - width] = IGNORED
        yield Batch(rows[:, :-1].contiguous(), targets)
