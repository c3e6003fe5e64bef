"""The settings of a corpus."""

from __future__ import annotations

from dataclasses import dataclass

from sparsetrain.data.fim import check_rate
from sparsetrain.data.sources.registry import SOURCES, SourceConfig
from sparsetrain.data.split import VALIDATION_FRACTION, check_fractions
from sparsetrain.data.tokenizer import SENTINELS, SMALLEST_VOCABULARY, Tokenizer
from sparsetrain.data.tokens import token_dtype
from sparsetrain.errors import UserError, check_choice


@dataclass
class DataConfig(SourceConfig):
    """The text of a corpus, its tokenizer and its splits.

    Args:
        name: the source of the text: ``medline`` (the embedded default), ``file``, ``hub``, ``python``, or a registered
            source.
        path: a ``.txt``, ``.jsonl`` or ``.parquet`` file, or a directory or glob of such files. It implies
            ``name=file``, unless the named source takes a path itself.
        hub_name: the data set on the Hugging Face hub, with ``hub_config`` and ``hub_split``.
        text_field: the field of ``.jsonl``, ``.parquet`` and hub rows that holds the text.
        packages: installed packages whose files ``name=python`` reads beside the standard library, by the name under
            which they are imported.
        tokenizer: ``bpe``, trained on the training documents, or ``bytes``.
        tokenizer_path: a ``tokenizer.json`` that is used instead.
        vocab_size: largest vocabulary of the trained tokenizer.
        max_documents: largest number of documents for training and validation, a random subset. The subset of a
            smaller number is part of the subset of a larger one.
        context: tokens per sample; does not change the corpus.
        validation_fraction: share of the documents held out for validation.
        test_fraction: share held out for tests of tasks. None takes the source's own: 0.1 for ``medline``, 0 for
            the other sources here.
        token_dtype: ``auto``, ``uint16`` or ``uint32``.
        fim_rate: share of the training documents whose middle moves to their end, see `fill_in_the_middle`. Above 0,
            the tokenizer gets three sentinel tokens if it has none; a trained one has them within ``vocab_size``.
        fim_spm_rate: share of these documents in the order suffix, prefix, middle; the others keep the prefix first.

    Raises:
        UserError: a setting is unknown, missing or out of range.
    """

    tokenizer: str = "bpe"
    tokenizer_path: str | None = None
    vocab_size: int = 4096
    max_documents: int | None = None
    context: int = 128
    validation_fraction: float = VALIDATION_FRACTION
    test_fraction: float | None = None
    token_dtype: str = "auto"
    fim_rate: float = 0.0
    fim_spm_rate: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("data.tokenizer", self.tokenizer, ("bpe", "bytes"))
        check_fractions(self.validation_fraction, self.resolved_test_fraction)
        if self.context < 1:
            raise UserError(f"data.context={self.context} is too small; the least is 1")
        if self.max_documents is not None and self.max_documents < 2:
            raise UserError(f"data.max_documents={self.max_documents} is too small; the least is 2")
        check_rate("data.fim_rate", self.fim_rate)
        check_rate("data.fim_spm_rate", self.fim_spm_rate)
        trained = self.tokenizer == "bpe" and self.tokenizer_path is None
        least = SMALLEST_VOCABULARY + (len(SENTINELS) if self.fim_rate > 0 else 0)
        if trained and self.vocab_size < least:
            raise UserError(f"data.vocab_size={self.vocab_size} is too small for byte-level BPE; the least is {least}")
        token_dtype(self.token_dtype, self.vocab_size if trained else 1)

    def fixed_tokenizer(self) -> Tokenizer | None:
        """Return the tokenizer, or None if it is trained on the text; raises `UserError` as `Tokenizer.load` does."""
        if self.tokenizer_path is None and self.tokenizer == "bpe":
            return None
        found = Tokenizer.bytes() if self.tokenizer_path is None else Tokenizer.load(self.tokenizer_path)
        return found.with_sentinels() if self.fim_rate > 0 else found

    @property
    def resolved_test_fraction(self) -> float:
        """The share of documents held out for tests."""
        return SOURCES[self.kind].test_fraction if self.test_fraction is None else self.test_fraction
