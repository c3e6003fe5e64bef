"""Soft prompts: learned vectors that replace token embeddings in the input of a frozen or trained model."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sparsetrain.errors import UserError


class SoftPrompt(nn.Module):
    """``n_tokens`` trainable vectors in the space of a model's token embeddings (Lester et al. 2021).

    They replace rows of `Transformer.embed_tokens`, before alpha_in and positions, so that vectors copied from
    embedding rows act exactly like the tokens themselves. In a foreign model, `sparsetrain.parameterize` applies
    alpha_in in a hook of the embedding, so the vectors come after it: pass that factor as ``scale``.

    Args:
        n_tokens: number of vectors n.
        d_model: width of the embeddings D.
        std: standard deviation of the initial values, drawn from torch's global generator; `from_embeddings` starts
            from real tokens instead.
        scale: factor applied to the vectors when they are inserted, for a model whose embedding multiplies its output:
            `sparsetrain.parameterization.input_scale` of that embedding.
        front: put the vectors before all tokens of a row, as peft does, wherever its slots are.
    """

    def __init__(self, n_tokens: int, d_model: int, std: float = 0.02, scale: float = 1.0, front: bool = False) -> None:
        super().__init__()
        self.scale, self.front = scale, front
        for name, value in (("n_tokens", n_tokens), ("d_model", d_model)):
            if value < 1:
                raise UserError(f"{name}={value} is not a positive integer")
        self.vectors = nn.Parameter(torch.empty(n_tokens, d_model).normal_(0.0, std))

    @classmethod
    def from_embeddings(cls, rows: Tensor, scale: float = 1.0, front: bool = False) -> SoftPrompt:
        """Return a prompt initialised with a copy of ``rows`` ``[n, D]`` of an embedding's weight."""
        if rows.ndim != 2:
            raise UserError(f"rows have shape {tuple(rows.shape)}; a soft prompt needs [n_tokens, d_model]")
        prompt = cls(rows.shape[0], rows.shape[1], scale=scale, front=front)
        prompt.vectors = nn.Parameter(rows.detach().clone())
        return prompt

    def inject(self, embeddings: Tensor, slots: Tensor) -> Tensor:
        """Return ``embeddings`` ``[B, T, D]`` with ``scale * vectors[slots]`` where ``slots`` ``[B, T]`` is at least 0.

        With ``front``, these places of a row then come first, in the order of their slots, and the tokens that were
        before them follow.

        Raises:
            UserError: the shapes contradict each other.
        """
        if slots.shape != embeddings.shape[:2] or embeddings.shape[2] != self.vectors.shape[1]:
            raise UserError(
                f"slots {tuple(slots.shape)} and embeddings {tuple(embeddings.shape)} do not fit a soft prompt of "
                f"width {self.vectors.shape[1]}"
            )
        rows = self(slots).to(embeddings.dtype)
        rows = rows if self.scale == 1.0 else rows * self.scale
        found = torch.where((slots >= 0)[..., None], rows, embeddings)
        if not self.front:
            return found
        places = torch.arange(slots.shape[1], device=slots.device)
        order = torch.where(slots >= 0, slots - len(self.vectors), places).argsort(dim=1, stable=True)
        return found.gather(1, order[..., None].expand_as(found))

    def attach(self, embeddings: Tensor) -> Tensor:
        """Return ``embeddings`` ``[B, T, D]`` with all vectors after them, or with ``front`` before them."""
        vectors = (self.vectors * self.scale).to(embeddings.dtype).expand(len(embeddings), -1, -1)
        return torch.cat((vectors, embeddings) if self.front else (embeddings, vectors), dim=1)

    def forward(self, slots: Tensor) -> Tensor:
        """Return ``vectors[slots]`` ``[..., D]``, and any vector where ``slots`` ``[...]`` is negative."""
        rows: Tensor = self.vectors[slots.clamp_min(0)]
        return rows
