"""The oracle of BPE training: the tokenizers library alone, on all texts at once."""

from __future__ import annotations

import tokenizers
from tokenizers import pre_tokenizers, trainers

from sparsetrain.data.tokenizer import END_OF_TEXT


def trained_by_the_library(inner: tokenizers.Tokenizer, texts: list[str], vocab_size: int) -> tokenizers.Tokenizer:
    """Train ``inner`` in place, with all bytes in its alphabet, and return it."""
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    inner.train_from_iterator(texts, trainer=trainer)
    return inner
