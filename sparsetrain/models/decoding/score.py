"""Log-probabilities of given continuations of a text.

Shapes: B rows, T tokens, D features, C continuations.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sparsetrain.errors import UserError
from sparsetrain.models.decoding.protocol import AnyCache, Decoder
from sparsetrain.sparsity import prepared


@torch.no_grad()
def continuation_scores(model: Decoder[AnyCache], embeddings: Tensor, continuations: Sequence[Sequence[int]]) -> Tensor:
    """Return the log-probability, in nats, of each continuation after each row: float32 ``[B, C]``.

    The rows are read once; each continuation then starts from their cached keys and values. With
    ``positions_scale=dynamic`` the first token of a continuation is scored by a pass over the row alone, and the others
    by a pass over the row and the continuation but its last token, whose factor may be larger.

    Args:
        embeddings: ``[B, T, D]``, rows of equal length without padding, as the model's ``embed_tokens`` returns them.
        continuations: C lists of at least one token.

    Raises:
        UserError: a continuation is empty.
    """
    if not all(continuations):
        raise UserError("continuations must not be empty: an empty one has no score")
    with prepared(model):
        return _scores(model, embeddings, continuations)


def _scores(model: Decoder[AnyCache], embeddings: Tensor, continuations: Sequence[Sequence[int]]) -> Tensor:
    rows, length = embeddings.shape[:2]
    capacity = length + max(len(tokens) for tokens in continuations) - 1
    cache = model.new_cache(embeddings, capacity)
    first = _log_probabilities(model, model.hidden(embeddings=embeddings, cache=cache)[:, -1])
    scores = []
    for tokens in continuations:
        score = first[:, tokens[0]]
        if len(tokens) > 1:
            cache.rewind(length)
            ids = torch.tensor(tokens, device=embeddings.device)
            rest = _log_probabilities(model, model.hidden(ids[:-1].expand(rows, -1), cache=cache))
            score = score + rest.gather(2, ids[1:].expand(rows, -1)[..., None]).sum((1, 2))
        scores.append(score)
    return torch.stack(scores, dim=1)


@torch.no_grad()
def own_continuation_scores(
    model: Decoder[AnyCache], embeddings: Tensor, continuations: Sequence[Sequence[Sequence[int]]]
) -> Tensor:
    """Return the log-probability, in nats, of each row's own continuations: float32 ``[B, C]``.

    C is the largest number of continuations of a row; a row with fewer has -inf behind them. Each pass reads the
    continuations at one place of all rows, padded to the longest. With ``positions_scale=dynamic`` the padding would
    change the factor, so B must be 1.

    Args:
        embeddings: as for `continuation_scores`.
        continuations: B lists of lists of at least one token.

    Raises:
        UserError: a continuation is empty.
    """
    if not all(tokens for row in continuations for tokens in row):
        raise UserError("continuations must not be empty: an empty one has no score")
    with prepared(model):
        return _own_scores(model, embeddings, continuations)


def _own_scores(
    model: Decoder[AnyCache], embeddings: Tensor, continuations: Sequence[Sequence[Sequence[int]]]
) -> Tensor:
    length, device = embeddings.shape[1], embeddings.device
    capacity = length + max(len(tokens) for row in continuations for tokens in row) - 1
    cache = model.new_cache(embeddings, capacity)
    first = _log_probabilities(model, model.hidden(embeddings=embeddings, cache=cache)[:, -1])
    scores = []
    for place in range(max(len(row) for row in continuations)):
        given = [list(row[place]) if place < len(row) else [] for row in continuations]
        width = max(len(tokens) for tokens in given)
        ids = torch.tensor([tokens + [0] * (width - len(tokens)) for tokens in given], device=device)
        counts = torch.tensor([len(tokens) for tokens in given], device=device)
        score = first.gather(1, ids[:, :1])[:, 0]
        if width > 1:
            cache.rewind(length)
            rest = _log_probabilities(model, model.hidden(ids[:, :-1], cache=cache)).gather(2, ids[:, 1:, None])[..., 0]
            counted = torch.arange(1, width, device=device) < counts[:, None]
            score = score + torch.where(counted, rest, 0.0).sum(1)
        scores.append(torch.where(counts > 0, score, -torch.inf))
    return torch.stack(scores, dim=1)


def _log_probabilities(model: Decoder[AnyCache], hidden: Tensor) -> Tensor:
    return model.logits(hidden).float().log_softmax(dim=-1)
