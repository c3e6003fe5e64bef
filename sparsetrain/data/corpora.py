"""The corpora of a run, by name, all encoded by one tokenizer."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from sparsetrain.data.config import DataConfig
from sparsetrain.data.corpus import Corpus, find_prepared, prepare
from sparsetrain.data.tokenizer import Tokenizer
from sparsetrain.errors import UserError

if TYPE_CHECKING:
    from rich.console import Console


class Corpora(Mapping[str, Corpus]):
    """Prepared corpora by name, in the order of the configuration.

    Args:
        members: the corpora, at least one.

    Raises:
        UserError: two corpora have different tokenizers.
        ValueError: ``members`` is empty.
    """

    def __init__(self, members: Mapping[str, Corpus]) -> None:
        if not members:
            raise ValueError("a run has at least one corpus")
        self._members = dict(members)
        first, *others = self._members
        for name in others:
            if self[name].tokenizer.sha256 != self.tokenizer.sha256:
                raise UserError(f"the corpora {first} and {name} have different tokenizers; a run has one")

    def __getitem__(self, name: str) -> Corpus:
        return self._members[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._members)

    def __len__(self) -> int:
        return len(self._members)

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer that the corpora share."""
        return next(iter(self.values())).tokenizer

    @property
    def key(self) -> str:
        """The identity of the text that a run records: a single corpus's directory name, or a hash over several."""
        directories = {name: corpus.directory.name for name, corpus in self.items()}
        if len(directories) == 1:
            return next(iter(directories.values()))
        digest = hashlib.blake2b(json.dumps(directories, sort_keys=True).encode(), digest_size=8).hexdigest()
        return f"{'+'.join(sorted(directories))}-{digest}"

    @property
    def only(self) -> Corpus:
        """The corpus of a set of one; raises `ValueError` for a larger set, where the caller must name one."""
        if len(self) > 1:
            raise ValueError(f"there are {len(self)} corpora: {', '.join(self)}")
        return next(iter(self.values()))

    def train_ids(self) -> set[str]:
        """Return the ids of the documents in the training text of any corpus."""
        return set().union(*(corpus.train_ids() for corpus in self.values()))


def prepare_corpora(config: DataConfig, progress: bool = True, console: Console | None = None) -> Corpora:
    """Return the corpora that ``config`` describes, each made by `prepare`: today one corpus, named by its source."""
    return Corpora({config.kind: prepare(config, progress, console)})


def find_corpora(config: DataConfig) -> tuple[str, Corpora | None]:
    """Return the `Corpora.key` of ``config``, and the corpora if the cache has them; nothing is written.

    Raises:
        UserError: the text cannot be read, as in `prepare`.
    """
    key, corpus = find_prepared(config)
    return key, None if corpus is None else Corpora({config.kind: corpus})
