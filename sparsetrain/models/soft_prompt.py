"""Learned vectors that stand where a prompt's tokens would, in front of a frozen or trained model."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sparsetrain.errors import UserError


class SoftPrompt(nn.Module):
    """``n_tokens`` trainable vectors in the space of a model's token embeddings (Lester et al. 2021).

    They take the place of `Transformer.embed_tokens`' rows, before alpha_in and positions, so that an initialisation
    from embedding rows acts exactly like the tokens themselves.

    Args:
        n_tokens: number of vectors n.
        d_model: width of the embeddings D.
        std: standard deviation of the initial values, drawn from torch's global generator; use `from_embeddings` to
            start from real tokens.
    """

    def __init__(self, n_tokens: int, d_model: int, std: float = 0.02) -> None:
        super().__init__()
        for name, value in (("n_tokens", n_tokens), ("d_model", d_model)):
            if value < 1:
                raise UserError(f"{name}={value} is not a positive integer")
        self.vectors = nn.Parameter(torch.empty(n_tokens, d_model).normal_(0.0, std))

    @classmethod
    def from_embeddings(cls, rows: Tensor) -> SoftPrompt:
        """Return a prompt that starts as a copy of ``rows`` ``[n, D]``."""
        if rows.ndim != 2:
            raise UserError(f"rows have shape {tuple(rows.shape)}; a soft prompt needs [n_tokens, d_model]")
        prompt = cls(*rows.shape)
        prompt.vectors = nn.Parameter(rows.detach().clone())
        return prompt

    def inject(self, embeddings: Tensor, slots: Tensor) -> Tensor:
        """Return ``embeddings`` ``[B, T, D]`` with ``vectors[slots]`` wherever ``slots`` ``[B, T]`` is 0 or more.

        Raises:
            UserError: shapes that do not fit.
        """
        if slots.shape != embeddings.shape[:2] or embeddings.shape[2] != self.vectors.shape[1]:
            raise UserError(
                f"slots {tuple(slots.shape)} and embeddings {tuple(embeddings.shape)} do not fit a soft prompt of "
                f"width {self.vectors.shape[1]}"
            )
        rows = self.vectors[slots.clamp_min(0)].to(embeddings.dtype)
        return torch.where((slots >= 0)[..., None], rows, embeddings)
