"""The settings of a corpus."""

from __future__ import annotations

from dataclasses import dataclass

from sparsetrain.data.sources.registry import SOURCES, SourceConfig
from sparsetrain.data.split import VALIDATION_FRACTION, check_fractions
from sparsetrain.data.tokenizer import SMALLEST_VOCABULARY
from sparsetrain.data.tokens import token_dtype
from sparsetrain.errors import UserError, check_choice


@dataclass
class DataConfig(SourceConfig):
    """What a corpus is made of.

    Args:
        name: where the text comes from: ``medline`` (the embedded default), ``file``, ``hub``, or a registered
            source.
        path: a ``.txt``, ``.jsonl`` or ``.parquet`` file, a directory or a glob of those; implies ``name=file``,
            but for a registered source that takes a path.
        hub_name: the data set on the Hugging Face hub, with ``hub_config`` and ``hub_split``.
        text_field: the field of ``.jsonl``, ``.parquet`` and hub rows that holds the text.
        tokenizer: ``bpe``, trained on the training documents, or ``bytes``.
        tokenizer_path: a ``tokenizer.json`` to use instead.
        vocab_size: tokens of the trained tokenizer at most.
        max_documents: train and validate on at most so many documents, a random subset; a larger number adds to it.
        context: tokens a sample has; does not change the corpus.
        validation_fraction: share of the documents held out for validation.
        test_fraction: share held out for the tasks' tests; None means what the source says: 0.1 for ``medline``, 0 for
            ``file`` and ``hub``.
        token_dtype: ``auto``, ``uint16`` or ``uint32``.
    """

    tokenizer: str = "bpe"
    tokenizer_path: str | None = None
    vocab_size: int = 4096
    max_documents: int | None = None
    context: int = 128
    validation_fraction: float = VALIDATION_FRACTION
    test_fraction: float | None = None
    token_dtype: str = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("data.tokenizer", self.tokenizer, ("bpe", "bytes"))
        check_fractions(self.validation_fraction, self.resolved_test_fraction)
        if self.context < 1:
            raise UserError(f"data.context={self.context} is too small; the least is 1")
        if self.max_documents is not None and self.max_documents < 2:
            raise UserError(f"data.max_documents={self.max_documents} is too small; the least is 2")
        trained = self.tokenizer == "bpe" and self.tokenizer_path is None
        if trained and self.vocab_size < SMALLEST_VOCABULARY:
            raise UserError(
                f"data.vocab_size={self.vocab_size} is too small for byte-level BPE; the least is {SMALLEST_VOCABULARY}"
            )
        token_dtype(self.token_dtype, self.vocab_size if trained else 1)

    @property
    def resolved_test_fraction(self) -> float:
        """The share of documents held out for tests."""
        return SOURCES[self.kind].test_fraction if self.test_fraction is None else self.test_fraction
