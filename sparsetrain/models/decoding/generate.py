"""Sampling from a language model with a key-value cache."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from sparsetrain.errors import UserError
from sparsetrain.models.decoding.protocol import AnyCache, Decoder
from sparsetrain.models.soft_prompt import SoftPrompt
from sparsetrain.sparsity import prepared


@torch.no_grad()
def generate(
    model: Decoder[AnyCache],
    tokens: Tensor,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_p: float = 1.0,
    stop_token: int | None = None,
    generator: torch.Generator | None = None,
    prompt: SoftPrompt | None = None,
    lengths: Tensor | None = None,
) -> Tensor:
    """Continue each row of ``tokens``, without dropout, with a key-value cache.

    Every token is drawn from the logits of a pass over all tokens before it. With a cache each token is read once. A
    `Transformer` with ``positions_scale=dynamic`` does so up to ``max_context`` tokens; beyond, it reads all tokens
    again for each new one.

    Args:
        tokens: ``[B, T]``.
        max_new_tokens: maximum number of new tokens.
        temperature: divisor of the logits; 0 takes the most likely token.
        top_p: sample from the smallest set of tokens whose probabilities sum to at least this (Holtzman et al. 2020).
        stop_token: after drawing it, a row is filled with it; generation ends when all rows have drawn it.
        generator: generator for sampling, on the model's device; None means torch's global one.
        prompt: a soft prompt, read between ``tokens`` and the new tokens, or before ``tokens`` if its ``front`` is set.
        lengths: tokens of each row, int64 ``[B]``, where rows are shorter than T; what stands behind them may be any
            token. None if all rows have T.

    Returns:
        ``[B, T + n]`` with n at most ``max_new_tokens``: the tokens of each row followed by its new ones. A row shorter
        than T is filled up with ``stop_token``, or with 0.

    Raises:
        UserError: a setting is out of range, there are more tokens than learned positions, or lengths differ under
            ``positions_scale=dynamic``.
    """
    embeddings = model.embed_tokens(tokens)
    read = lengths
    if prompt is not None:
        embeddings, read = _with_prompt(prompt, embeddings, lengths)
    new = continued(model, embeddings, max_new_tokens, temperature, top_p, stop_token, generator, read)
    if lengths is None:
        return torch.cat((tokens, new), dim=1)
    places = torch.arange(tokens.shape[1] + new.shape[1], device=tokens.device)
    found = torch.full((len(tokens), len(places)), stop_token or 0, dtype=tokens.dtype, device=tokens.device)
    ends = lengths[:, None]
    found[places < ends] = tokens[places[: tokens.shape[1]] < ends]
    found[(places >= ends) & (places < ends + new.shape[1])] = new.flatten()
    return found


def _with_prompt(prompt: SoftPrompt, embeddings: Tensor, lengths: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Return rows with a soft prompt in its place, and their lengths."""
    if lengths is None:
        return prompt.attach(embeddings), None
    rows = [prompt.attach(row[None, :length])[0] for row, length in zip(embeddings, lengths.tolist(), strict=True)]
    return pad_sequence(rows, batch_first=True), torch.tensor([len(row) for row in rows], device=lengths.device)


@torch.no_grad()
def continued(
    model: Decoder[AnyCache],
    embeddings: Tensor,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_p: float = 1.0,
    stop_token: int | None = None,
    generator: torch.Generator | None = None,
    lengths: Tensor | None = None,
) -> Tensor:
    """Return the new tokens ``[B, n]`` that `generate` appends to rows of embeddings ``[B, T, D]``.

    The rows are as the model's ``embed_tokens`` returns them, and may hold a soft prompt. The other arguments and the
    errors are those of `generate`.
    """
    _check_settings(max_new_tokens, temperature, top_p)
    was_training = model.training
    model.train(False)
    try:
        with prepared(model):
            return _drawn(model, embeddings, max_new_tokens, temperature, top_p, stop_token, generator, lengths)
    finally:
        model.train(was_training)


def _drawn(
    model: Decoder[AnyCache],
    embeddings: Tensor,
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    stop_token: int | None,
    generator: torch.Generator | None,
    lengths: Tensor | None,
) -> Tensor:
    capacity = embeddings.shape[1] + max_new_tokens - 1
    if model.max_positions is not None and capacity > model.max_positions:
        raise UserError(
            f"max_new_tokens={max_new_tokens} after {embeddings.shape[1]} tokens needs {capacity} positions, but "
            f"the model has learned only {model.max_positions}"
        )
    cache = model.new_cache(embeddings, capacity)
    hidden = model.hidden(embeddings=embeddings, cache=cache)
    last = hidden[:, -1]
    if lengths is not None:
        cache.cut(lengths)
        last = hidden[torch.arange(len(hidden), device=hidden.device), lengths - 1]
    tokens = torch.empty(len(embeddings), 0, dtype=torch.int64, device=embeddings.device)
    finished = torch.zeros(len(embeddings), dtype=torch.bool, device=embeddings.device)
    for step in range(max_new_tokens):
        if step > 0:
            last = model.hidden(tokens[:, -1:], cache=cache)[:, -1]
        drawn = sample(model.logits(last), temperature, top_p, generator)
        if stop_token is not None:
            drawn = torch.where(finished, stop_token, drawn)
            finished |= drawn == stop_token
        tokens = torch.cat((tokens, drawn[:, None]), dim=1)
        if stop_token is not None and bool(finished.all()):
            break
    return tokens


def sample(logits: Tensor, temperature: float, top_p: float, generator: torch.Generator | None) -> Tensor:
    """Draw one token from each row of logits ``[B, V]``: int64 ``[B]``; temperature 0 takes the most likely one."""
    if temperature == 0.0:
        return logits.argmax(dim=-1)
    probabilities = nucleus(logits.float() / temperature, top_p).softmax(dim=-1)
    return torch.multinomial(probabilities, 1, generator=generator).squeeze(1)


def nucleus(logits: Tensor, top_p: float) -> Tensor:
    """Return logits ``[B, V]`` with -inf outside the smallest set of top tokens that sums to at least ``top_p``."""
    if top_p >= 1.0:
        return logits
    ranked, order = logits.sort(dim=-1, descending=True, stable=True)
    probabilities = ranked.softmax(dim=-1)
    # A token stays if the sum before it is below top_p; the first one always stays.
    before = probabilities.cumsum(dim=-1) - probabilities
    dropped = before >= top_p
    dropped[..., 0] = False
    return logits.masked_fill(dropped.scatter(-1, order, dropped), -torch.inf)


def _check_settings(max_new_tokens: int, temperature: float, top_p: float) -> None:
    if max_new_tokens < 1:
        raise UserError(f"max_new_tokens={max_new_tokens} is not a positive integer")
    if not temperature >= 0.0:
        raise UserError(f"temperature={temperature} is negative")
    if not 0.0 < top_p <= 1.0:
        raise UserError(f"top_p={top_p} is not in (0, 1]")
