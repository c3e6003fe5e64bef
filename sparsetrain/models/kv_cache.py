"""A cache of keys and values of tokens already read, so that each new token is computed once."""

from __future__ import annotations

import torch
from torch import Tensor

from sparsetrain.errors import UserError
from sparsetrain.models.config import ModelConfig


class KVCache:
    """Preallocated keys and values of all layers, ``[batch, capacity, kv_heads, d_head]`` each.

    Keys are stored after rotation (for RoPE) and without the ALiBi bias, which depends on the distance to the query and
    is added at each read.
    """

    def __init__(
        self, config: ModelConfig, batch: int, capacity: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        shape = (config.n_layers, batch, capacity, config.kv_heads, config.d_head)
        self.keys = torch.empty(shape, device=device, dtype=dtype)
        self.values = torch.empty(shape, device=device, dtype=dtype)
        self.capacity = capacity
        self.length = 0

    def append(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Store ``[B, T, kv_heads, d_head]`` after the tokens of layer ``layer``; return views of all its tokens.

        Raises:
            UserError: the tokens exceed the capacity.
        """
        end = self.length + keys.shape[1]
        if end > self.capacity:
            raise UserError(f"the cache holds {self.capacity} tokens; {end} do not fit")
        self.keys[layer, :, self.length : end] = keys
        self.values[layer, :, self.length : end] = values
        return self.keys[layer, :, :end], self.values[layer, :, :end]

    def rewind(self, length: int) -> None:
        """Keep only the first ``length`` tokens; later tokens overwrite the others."""
        self.length = length

    def advance(self, tokens: int) -> None:
        """Count ``tokens`` more as read; call it once all layers have appended them."""
        self.length += tokens
