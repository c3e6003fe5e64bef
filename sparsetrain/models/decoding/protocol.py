"""What generation and scoring need of a model.

Shapes: B rows, T tokens, D features, V vocabulary.
"""

from __future__ import annotations

from typing import Any, Protocol, TypeVar

from torch import Tensor


class Cache(Protocol):
    """What a model keeps of the tokens that it has read."""

    def rewind(self, length: int) -> None:
        """Forget all but the first ``length`` tokens."""
        ...


AnyCache = TypeVar("AnyCache", bound=Cache)


class Decoder(Protocol[AnyCache]):
    """A causal language model that reads tokens or embeddings, some now and the rest later.

    `sparsetrain.Transformer` is one. ``training`` and ``train`` are those of ``torch.nn.Module``.
    """

    training: bool

    @property
    def max_positions(self) -> int | None:
        """The most tokens that a row can have, None where the model sets no limit."""
        ...

    def train(self, mode: bool = True) -> Any:
        """Switch between training and evaluation."""
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
        """Read tokens or embeddings behind what the cache holds, and add them to it: ``[B, T, D]``."""
        ...

    def logits(self, hidden: Tensor) -> Tensor:
        """Map what `hidden` returns, ``[..., D]``, to logits ``[..., V]`` of the token that follows."""
        ...
