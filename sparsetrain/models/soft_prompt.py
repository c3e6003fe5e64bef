"""Learned vectors that stand where a prompt's tokens would, in front of a frozen or trained model."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sparsetrain.errors import UserError


class SoftPrompt(nn.Module):
    """``n_tokens`` trainable vectors in the space of a model's token embeddings (Lester et al. 2021).

    They take the place of `Transformer.embed_tokens`' rows, before alpha_in and positions, so that an initialisation
    from embedding rows acts exactly like the tokens themselves. A model of another author has no place before its
    alpha_in, which is a hook on the embedding after `sparsetrain.parameterize`: give that factor as ``scale``.

    Args:
        n_tokens: number of vectors n.
        d_model: width of the embeddings D.
        std: standard deviation of the initial values, drawn from torch's global generator; use `from_embeddings` to
            start from real tokens.
        scale: factor of the vectors where they are written into embeddings, for a model whose embedding multiplies
            what it returns: `sparsetrain.parameterization.input_scale` of that embedding.
    """

    def __init__(self, n_tokens: int, d_model: int, std: float = 0.02, scale: float = 1.0) -> None:
        super().__init__()
        self.scale = scale
        for name, value in (("n_tokens", n_tokens), ("d_model", d_model)):
            if value < 1:
                raise UserError(f"{name}={value} is not a positive integer")
        self.vectors = nn.Parameter(torch.empty(n_tokens, d_model).normal_(0.0, std))

    @classmethod
    def from_embeddings(cls, rows: Tensor, scale: float = 1.0) -> SoftPrompt:
        """Return a prompt that starts as a copy of ``rows`` ``[n, D]`` of an embedding's weight."""
        if rows.ndim != 2:
            raise UserError(f"rows have shape {tuple(rows.shape)}; a soft prompt needs [n_tokens, d_model]")
        prompt = cls(rows.shape[0], rows.shape[1], scale=scale)
        prompt.vectors = nn.Parameter(rows.detach().clone())
        return prompt

    def inject(self, embeddings: Tensor, slots: Tensor) -> Tensor:
        """Return ``embeddings`` ``[B, T, D]`` with ``scale * vectors[slots]`` where ``slots`` ``[B, T]`` is 0 or more.

        Raises:
            UserError: shapes that do not fit.
        """
        if slots.shape != embeddings.shape[:2] or embeddings.shape[2] != self.vectors.shape[1]:
            raise UserError(
                f"slots {tuple(slots.shape)} and embeddings {tuple(embeddings.shape)} do not fit a soft prompt of "
                f"width {self.vectors.shape[1]}"
            )
        rows = self.vectors[slots.clamp_min(0)].to(embeddings.dtype)
        rows = rows if self.scale == 1.0 else rows * self.scale
        return torch.where((slots >= 0)[..., None], rows, embeddings)
