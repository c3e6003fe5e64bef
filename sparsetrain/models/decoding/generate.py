"""Sampling from a language model with a key-value cache."""

from __future__ import annotations

import torch
from torch import Tensor

from sparsetrain.errors import UserError
from sparsetrain.models.decoding.protocol import AnyCache, Decoder
from sparsetrain.models.soft_prompt import SoftPrompt


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
) -> Tensor:
    """Continue each row of ``tokens``, without dropout, with a key-value cache.

    Every token is drawn from the logits of a pass over all tokens before it. With a cache each token is read once. A
    `Transformer` with ``positions_scale=dynamic`` does so up to ``max_context`` tokens; beyond, it reads all tokens
    again for each new one.

    Args:
        tokens: ``[B, T]``, rows of equal length.
        max_new_tokens: maximum number of new tokens.
        temperature: divisor of the logits; 0 takes the most likely token.
        top_p: sample from the smallest set of tokens whose probabilities sum to at least this (Holtzman et al. 2020).
        stop_token: after drawing it, a row is filled with it; generation ends when all rows have drawn it.
        generator: generator for sampling, on the model's device; None means torch's global one.
        prompt: a soft prompt, read between ``tokens`` and the new tokens, or before ``tokens`` if its ``front`` is set.

    Returns:
        ``[B, T + n]`` with n at most ``max_new_tokens``: the given tokens followed by the new ones.

    Raises:
        UserError: a setting is out of range, or there are more tokens than learned positions.
    """
    embeddings = model.embed_tokens(tokens)
    if prompt is not None:
        embeddings = prompt.attach(embeddings)
    new = continued(model, embeddings, max_new_tokens, temperature, top_p, stop_token, generator)
    return torch.cat((tokens, new), dim=1)


@torch.no_grad()
def continued(
    model: Decoder[AnyCache],
    embeddings: Tensor,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_p: float = 1.0,
    stop_token: int | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Return the new tokens ``[B, n]`` that `generate` appends to rows of embeddings ``[B, T, D]``.

    The rows are as the model's ``embed_tokens`` returns them, and may hold a soft prompt. The other arguments and the
    errors are those of `generate`.
    """
    _check_settings(max_new_tokens, temperature, top_p)
    was_training = model.training
    model.train(False)
    try:
        capacity = embeddings.shape[1] + max_new_tokens - 1
        if model.max_positions is not None and capacity > model.max_positions:
            raise UserError(
                f"max_new_tokens={max_new_tokens} after {embeddings.shape[1]} tokens needs {capacity} positions, but "
                f"the model has learned only {model.max_positions}"
            )
        cache = model.new_cache(embeddings, capacity)
        hidden = model.hidden(embeddings=embeddings, cache=cache)
        tokens = torch.empty(len(embeddings), 0, dtype=torch.int64, device=embeddings.device)
        finished = torch.zeros(len(embeddings), dtype=torch.bool, device=embeddings.device)
        for step in range(max_new_tokens):
            if step > 0:
                hidden = model.hidden(tokens[:, -1:], cache=cache)
            drawn = sample(model.logits(hidden[:, -1]), temperature, top_p, generator)
            if stop_token is not None:
                drawn = torch.where(finished, stop_token, drawn)
                finished |= drawn == stop_token
            tokens = torch.cat((tokens, drawn[:, None]), dim=1)
            if stop_token is not None and bool(finished.all()):
                break
        return tokens
    finally:
        model.train(was_training)


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
