"""The interface that generation and scoring need from a model.

Shapes: B rows, T tokens, D features, V vocabulary.
"""

from __future__ import annotations

from typing import Any, Protocol, TypeVar

from torch import Tensor


class Cache(Protocol):
    """The state that a model keeps about tokens it has read."""

    def rewind(self, length: int) -> None:
        """Keep only the first ``length`` tokens."""
        ...

    def cut(self, lengths: Tensor) -> None:
        """Keep only the first ``lengths`` tokens of each row, int64 ``[B]``."""
        ...


AnyCache = TypeVar("AnyCache", bound=Cache)


class Decoder(Protocol[AnyCache]):
    """A causal language model that reads tokens or embeddings in one or several calls.

    `sparsetrain.Transformer` is one. ``training`` and ``train`` are those of ``torch.nn.Module``.
    """

    training: bool

    @property
    def max_positions(self) -> int | None:
        """Maximum number of tokens per row, or None without a limit."""
        ...

    def train(self, mode: bool = True) -> Any:
        """Switch between training mode and evaluation mode."""
        ...

    def embed_tokens(self, tokens: Tensor) -> Tensor:
        """Map tokens ``[B, T]`` (int64) to embeddings ``[B, T, D]``."""
        ...

    def new_cache(self, embeddings: Tensor, capacity: int) -> AnyCache:
        """Return an empty cache of ``capacity`` tokens for each row of ``embeddings`` ``[B, T, D]``."""
        ...

    def hidden(
        self, tokens: Tensor | None = None, embeddings: Tensor | None = None, cache: AnyCache | None = None
    ) -> Tensor:
        """Read tokens or embeddings after those in the cache, append them to it, and return ``[B, T, D]``."""
        ...

    def logits(self, hidden: Tensor) -> Tensor:
        """Map an output of `hidden`, ``[..., D]``, to logits ``[..., V]`` of the next token."""
        ...
