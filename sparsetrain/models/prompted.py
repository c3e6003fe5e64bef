"""A transformer together with the soft prompt that its rows hold."""

from __future__ import annotations

from torch import Tensor, nn

from sparsetrain.models.soft_prompt import SoftPrompt
from sparsetrain.models.transformer import Transformer


class Prompted(nn.Module):
    """A transformer and a soft prompt whose vectors stand at given places of its rows.

    Shapes: B batch, T tokens, D = d_model, V vocabulary.
    """

    def __init__(self, model: Transformer, prompt: SoftPrompt) -> None:
        super().__init__()
        self.model, self.prompt = model, prompt

    def forward(self, tokens: Tensor, targets: Tensor | None = None, slots: Tensor | None = None) -> Tensor:
        """Return logits ``[B, T, V]`` or, given ``targets``, the mean cross-entropy in nats, as `Transformer` does.

        Args:
            tokens: int64 ``[B, T]``. targets: int64 ``[B, T]``, the token that follows, or -100.
            slots: int64 ``[B, T]``: which vector of the prompt stands in the token's place, below 0 for none. Without
                slots the model reads the tokens alone.

        Raises:
            UserError: shapes that do not fit.
        """
        embeddings = None if slots is None else self.embeddings(tokens, slots)
        result: Tensor = self.model(tokens, targets, embeddings)
        return result

    def embeddings(self, tokens: Tensor, slots: Tensor) -> Tensor:
        """Return ``[B, T, D]``: the tokens' embeddings, with the prompt's vectors at the slots; see `forward`."""
        return self.prompt.inject(self.model.embed_tokens(tokens), slots)
