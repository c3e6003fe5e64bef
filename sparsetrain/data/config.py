"""The settings of a corpus."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, ClassVar

from sparsetrain.data.fim import check_rate
from sparsetrain.data.mixture import normalised
from sparsetrain.data.sources.registry import SOURCES, SourceConfig
from sparsetrain.data.split import VALIDATION_FRACTION, check_fractions
from sparsetrain.data.tokenizer import SENTINELS, SMALLEST_VOCABULARY, Tokenizer
from sparsetrain.data.tokens import token_dtype
from sparsetrain.errors import UserError, check_choice
from sparsetrain.settings import build

_NAME = re.compile(r"[a-z][a-z0-9_]*")


@dataclass
class CorpusConfig(SourceConfig):
    """One of several named corpora.

    Args:
        max_documents: as `DataConfig` has it; null takes that one.
        max_epochs: a run that would read this corpus more often is refused; null is no limit.
        fim_rate, fim_spm_rate: as `DataConfig` has them; null takes those.

    Raises:
        UserError: a setting is unknown, missing or out of range.
    """

    SECTION: ClassVar[str] = "data"  # in messages

    max_documents: int | None = None
    max_epochs: float | None = None
    fim_rate: float | None = None
    fim_spm_rate: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_documents(self.max_documents)
        if self.max_epochs is not None and not 0.0 < self.max_epochs < math.inf:
            raise UserError(f"data.max_epochs={self.max_epochs} must be above 0 and finite")
        for name in ("fim_rate", "fim_spm_rate"):
            if getattr(self, name) is not None:
                check_rate(f"data.{name}", getattr(self, name))


@dataclass
class DataConfig(SourceConfig):
    """The text of a run, its tokenizer and its splits.

    The text is one source, or several named ``sources``, which share the tokenizer.

    Args:
        name: the source of the text: ``medline`` (the embedded default), ``file``, ``hub``, ``python``, ``hadith``,
            ``key_values``, or a registered source.
        path: a ``.txt``, ``.jsonl`` or ``.parquet`` file, or a directory of such files; or a file or a glob of plain
            text of any suffix, such as ``'src/**/*.py'``. It implies ``name=file``, unless the named source takes a
            path itself.
        separator: how plain text is cut into documents. Null makes each file one document, byte for byte. Any other
            text, such as ``'\\n\\n'`` or ``'<|endoftext|>'``, stands between documents and belongs to none.
            ``blank_line`` is the cut of earlier versions: at blank lines, without the white space around a document.
            Sources that have none of their own take this one.
        hub_name: the data set on the Hugging Face hub, with ``hub_config`` and ``hub_split``.
        text_field: the field of ``.jsonl``, ``.parquet`` and hub rows that holds the text.
        group_field: the field of such rows that holds the group of a document; documents of one group share a split.
        packages: installed packages whose files ``name=python`` reads beside the standard library, by the name under
            which they are imported.
        key_values: the documents that ``name=key_values`` generates.
        tokenizer: ``bpe``, trained on the training documents, or ``bytes``.
        tokenizer_path: a tokenizer that is used instead: a ``tokenizer.json``, a SentencePiece ``.model``, a
            ``.tiktoken``, a Hugging Face directory, or a name on the Hugging Face hub.
        eos_token: the token of ``tokenizer_path`` that ends a document; null takes the one that its files name.
        vocab_size: largest vocabulary of the trained tokenizer.
        max_documents: largest number of documents for training and validation, a random subset. The subset of a
            smaller number is part of the subset of a larger one.
        context: tokens per sample; does not change the corpus.
        validation_fraction: share of the documents held out for validation. Documents of plain text are held out whole;
            of a single long one, or if the others are too small, the end of the longest is.
        test_fraction: share held out for tests of tasks. None takes the source's own: 0.1 for ``medline``, 0 for
            the other sources here.
        token_dtype: ``auto``, ``uint16`` or ``uint32``.
        fim_rate: share of the training documents whose middle moves to their end, see `fill_in_the_middle`. Above 0,
            the tokenizer gets three sentinel tokens if it has none; a trained one has them within ``vocab_size``.
        fim_spm_rate: share of these documents in the order suffix, prefix, middle; the others keep the prefix first.
        sources: several corpora by name, each a section with the settings of `CorpusConfig`, instead of ``name``,
            ``path`` and ``hub_name``. A tokenizer that is trained reads as much of the training text of each.
        mixture: the weights of the sources by tokens; null weights them by the tokens that they have. A phase of the
            budget may have its own.

    Raises:
        UserError: a setting is unknown, missing or out of range.
    """

    tokenizer: str = "bpe"
    tokenizer_path: str | None = None
    eos_token: str | None = None
    vocab_size: int = 4096
    max_documents: int | None = None
    context: int = 128
    validation_fraction: float = VALIDATION_FRACTION
    test_fraction: float | None = None
    token_dtype: str = "auto"
    fim_rate: float = 0.0
    fim_spm_rate: float = 0.0
    sources: Any = field(default=None, metadata={"type": "section, or null"})
    mixture: Any = field(default=None, metadata={"type": "section of numbers, or null"})

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("data.tokenizer", self.tokenizer, ("bpe", "bytes"))
        if self.eos_token is not None and (self.tokenizer_path is None or not self.eos_token):
            raise UserError(f"data.eos_token={self.eos_token!r:.60} must be a token of data.tokenizer_path")
        check_fractions(self.validation_fraction, self.resolved_test_fraction)
        if self.context < 1:
            raise UserError(f"data.context={self.context} is too small; the least is 1")
        _check_documents(self.max_documents)
        check_rate("data.fim_rate", self.fim_rate)
        check_rate("data.fim_spm_rate", self.fim_spm_rate)
        trained = self.tokenizer == "bpe" and self.tokenizer_path is None
        least = SMALLEST_VOCABULARY + (len(SENTINELS) if self.fim_rate > 0 else 0)
        if trained and self.vocab_size < least:
            raise UserError(f"data.vocab_size={self.vocab_size} is too small for byte-level BPE; the least is {least}")
        token_dtype(self.token_dtype, self.vocab_size if trained else 1)
        self._check_sources()

    def _check_sources(self) -> None:
        given = {} if self.sources is None else self.sources
        if not isinstance(given, Mapping):
            raise UserError(f"data.sources={given!r:.60} must be sections of settings by name")
        for name in given:
            if not isinstance(name, str) or not _NAME.fullmatch(name):
                raise UserError(f"data.sources: the name {name!r:.60} must be small letters, digits and underscores")
            if not isinstance(given[name], Mapping | CorpusConfig):
                raise UserError(f"data.sources.{name}={given[name]!r:.60} must be a section of settings")
        if given:
            self.sources = {
                name: each if isinstance(each, CorpusConfig) else build(CorpusConfig, each, f"data.sources.{name}.")
                for name, each in given.items()
            }
            for setting in ("path", "hub_name"):
                if getattr(self, setting) is not None:
                    raise UserError(f"data.{setting}={getattr(self, setting)} cannot be combined with data.sources")
        self.check_mixture("data.mixture", self.mixture)

    def check_mixture(self, key: str, weights: Mapping[str, float] | None) -> None:
        """Raise `UserError` for weights that do not fit the sources; ``key`` is the setting that has them."""
        if weights is None:
            return
        if not self.sources:
            raise UserError(f"{key}={weights} needs data.sources, the corpora to be mixed")
        normalised(weights, list(self.sources), key)

    def _has_text(self) -> bool:
        return self.path is not None or bool(self.sources)

    def members(self) -> dict[str, DataConfig]:
        """Return the settings of each corpus by its name; a run with one source has one, named by its source."""
        if not self.sources:
            return {self.kind: self}
        single = replace(self, sources=None, mixture=None, separator=None)
        found = {}
        for name, corpus in self.sources.items():
            own = {each.name: getattr(corpus, each.name) for each in fields(SourceConfig)}
            for setting in ("max_documents", "fim_rate", "fim_spm_rate"):
                given = getattr(corpus, setting)
                own[setting] = getattr(self, setting) if given is None else given
            if corpus.separator is None and corpus.path is not None:
                own["separator"] = self.separator
            found[name] = replace(single, **own)
        return found

    def fixed_tokenizer(self) -> Tokenizer | None:
        """Return the tokenizer, or None if it is trained on the text; raises `UserError` as `Tokenizer.load` does."""
        if self.tokenizer_path is None and self.tokenizer == "bpe":
            return None
        if self.tokenizer_path is None:
            found = Tokenizer.bytes()
        else:
            found = Tokenizer.load(self.tokenizer_path, self.eos_token)
        return found.with_sentinels() if self.fim_rate > 0 else found

    @property
    def resolved_test_fraction(self) -> float:
        """The share of documents held out for tests."""
        return SOURCES[self.kind].test_fraction if self.test_fraction is None else self.test_fraction


def _check_documents(most: int | None) -> None:
    if most is not None and most < 2:
        raise UserError(f"data.max_documents={most} is too small; the least is 2")
