"""A cache of keys and values of tokens already read, so that each new token is computed once."""

from __future__ import annotations

import torch
from torch import Tensor

from sparsetrain.errors import UserError
from sparsetrain.models.config import DYNAMIC, ModelConfig


class KVCache:
    """Preallocated keys and values of all layers, ``[batch, kv_heads, capacity, d_head]`` each.

    What one query reads of a head lies in one piece. Keys are stored after rotation (for RoPE) and without the ALiBi
    bias, which depends on the distance to the query and is added at each read.

    With ``positions_scale=dynamic`` the factor follows the number of tokens, and everything behind the first layer
    depends on it. The cache then also holds the embeddings of its tokens, ``[batch, capacity, d_model]``, so that
    `inputs` can have the pass repeated.

    Attributes:
        length: tokens of each row, or of the longest row.
        lengths: tokens of each row, int64 ``[batch]``; None if all have ``length``.
        factor: the factor of ``positions_scale`` that the keys and values were computed with.
    """

    def __init__(
        self, config: ModelConfig, batch: int, capacity: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        shape = (config.n_layers, batch, config.kv_heads, capacity, config.d_head)
        # What lies behind a row's tokens is hidden by a mask, and must be a number for that.
        self.keys = torch.zeros(shape, device=device, dtype=dtype)
        self.values = torch.zeros(shape, device=device, dtype=dtype)
        self.capacity = capacity
        self.length = 0
        self.lengths: Tensor | None = None
        self.factor = 1.0
        self._factor_of = config.positions_factor if config.positions_scale == DYNAMIC else None
        self._embeddings: Tensor | None = None

    def inputs(self, embeddings: Tensor) -> Tensor:
        """Return the embeddings ``[B, S, d_model]`` that a pass over the next tokens has to read.

        These are the given ones ``[B, T, d_model]``, or those of all tokens if the T tokens change the factor of
        ``positions_scale=dynamic``. The cache is then emptied and the pass is the same as without a cache. Beyond
        ``max_context`` each call changes the factor, so generation there reads all tokens again for each new one.

        Raises:
            UserError: the tokens exceed the capacity.
        """
        if self._factor_of is None:
            return embeddings
        end = self.length + embeddings.shape[1]
        self._check(end)
        if self._embeddings is None:
            self._embeddings = embeddings.new_empty(len(embeddings), self.capacity, embeddings.shape[2])
        self._embeddings[:, self.length : end] = embeddings
        before, self.factor = self.factor, self._factor_of(end)
        if self.length > 0 and self.factor != before:
            self.length = 0
            return self._embeddings[:, :end]
        return embeddings

    def append(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Store ``[B, T, kv_heads, d_head]`` after the tokens of layer ``layer``; return views of all its tokens.

        In a row that is shorter than another, the views also hold what lies behind its tokens, which may be anything.

        Raises:
            UserError: the tokens exceed the capacity.
        """
        end = self.length + keys.shape[1]
        self._check(end)
        held = self.keys[layer], self.values[layer]
        for place, new in zip(held, (keys, values), strict=True):
            if self.lengths is None:
                place[:, :, self.length : end] = new.transpose(1, 2)
            else:
                rows = torch.arange(len(new), device=new.device)[:, None]
                place[rows, :, positions_after(self.lengths, new.shape[1])] = new
        return held[0][:, :, :end].transpose(1, 2), held[1][:, :, :end].transpose(1, 2)

    def room(self, layer: int, tokens: int) -> tuple[Tensor, Tensor]:
        """Return keys and values of a layer with room for ``tokens`` more, ``[B, kv_heads, capacity, d_head]``.

        Raises:
            UserError: the tokens exceed the capacity.
        """
        self._check(self.length + tokens)
        return self.keys[layer], self.values[layer]

    def cut(self, lengths: Tensor) -> None:
        """Keep only the first ``lengths`` tokens of each row, int64 ``[batch]``.

        Raises:
            UserError: a length is outside of 1 to the tokens of the row, or ``positions_scale=dynamic``, whose factor
                would have to differ between rows.
        """
        if lengths.shape != self.keys.shape[1:2] or not bool(((lengths >= 1) & (lengths <= self.length)).all()):
            raise UserError(f"lengths={lengths.tolist()} must be one number from 1 to {self.length} for each row")
        if self._factor_of is not None:
            raise UserError("positions_scale=dynamic: rows of a cache must have equal lengths")
        self.length = int(lengths.max())
        self.lengths = None if bool((lengths == self.length).all()) else lengths.clone()

    def _check(self, end: int) -> None:
        if end > self.capacity:
            raise UserError(f"the cache holds {self.capacity} tokens; {end} do not fit")

    def rewind(self, length: int) -> None:
        """Keep only the first ``length`` tokens of each row; later tokens overwrite the others."""
        self.length, self.lengths = length, None

    def advance(self, tokens: int) -> None:
        """Count ``tokens`` more as read; call it once all layers have appended them."""
        self.length += tokens
        if self.lengths is not None:
            self.lengths = self.lengths + tokens


def positions_after(lengths: Tensor, tokens: int) -> Tensor:
    """Return the positions of the next ``tokens`` tokens of rows with these lengths, int64 ``[batch, tokens]``."""
    return lengths[:, None] + torch.arange(tokens, device=lengths.device)
