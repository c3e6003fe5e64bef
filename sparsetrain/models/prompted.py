"""A transformer together with a soft prompt."""

from __future__ import annotations

from torch import Tensor, nn

from sparsetrain.models.soft_prompt import SoftPrompt
from sparsetrain.models.transformer import Transformer


class Prompted(nn.Module):
    """A transformer that reads the vectors of a soft prompt at given positions of its rows.

    Shapes: B batch, T tokens, D = d_model, V vocabulary.
    """

    def __init__(self, model: Transformer, prompt: SoftPrompt) -> None:
        super().__init__()
        self.model, self.prompt = model, prompt

    def forward(self, tokens: Tensor, targets: Tensor | None = None, slots: Tensor | None = None) -> Tensor:
        """Return logits ``[B, T, V]`` or, given ``targets``, the mean cross-entropy in nats, as `Transformer` does.

        Args:
            tokens: int64 ``[B, T]``.
            targets: int64 ``[B, T]``, the next token, or -100.
            slots: int64 ``[B, T]``, the index of the prompt vector that replaces the token, negative to keep the token.
                Without slots the model reads only tokens.

        Raises:
            UserError: the shapes contradict each other.
        """
        embeddings = None if slots is None else self.embeddings(tokens, slots)
        result: Tensor = self.model(tokens, targets, embeddings)
        return result

    def embeddings(self, tokens: Tensor, slots: Tensor) -> Tensor:
        """Return ``[B, T, D]``: embeddings of the tokens, replaced by prompt vectors at the slots; see `forward`."""
        return self.prompt.inject(self.model.embed_tokens(tokens), slots)
