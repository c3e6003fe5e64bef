"""The corpora of a run, by name, all encoded by one tokenizer."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from sparsetrain.cache import clear_leftovers
from sparsetrain.data.config import DataConfig
from sparsetrain.data.corpus import Corpus, find_prepared, prepare
from sparsetrain.data.shared_tokenizer import is_needed, naming, place_of, train_shared
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
        return key_of({name: corpus.directory.name for name, corpus in self.items()})

    @property
    def only(self) -> Corpus:
        """The corpus of a set of one; raises `ValueError` for a larger set, where the caller must name one."""
        if len(self) > 1:
            raise ValueError(f"there are {len(self)} corpora: {', '.join(self)}")
        return next(iter(self.values()))

    @property
    def train_tokens(self) -> dict[str, int]:
        """The training tokens of each corpus."""
        return {name: len(corpus.train) for name, corpus in self.items()}

    @property
    def validation_tokens(self) -> int:
        """The validation tokens of all corpora."""
        return sum(len(corpus.validation) for corpus in self.values())

    def train_ids(self) -> set[str]:
        """Return the ids of the documents in the training text of any corpus."""
        return set().union(*(corpus.train_ids() for corpus in self.values()))


def key_of(directories: Mapping[str, str]) -> str:
    """Return `Corpora.key` from the names of the corpora's directories."""
    if len(directories) == 1:
        return next(iter(directories.values()))
    digest = hashlib.blake2b(json.dumps(dict(directories), sort_keys=True).encode(), digest_size=8).hexdigest()
    return f"{'+'.join(sorted(directories))}-{digest}"


def prepare_corpora(config: DataConfig, progress: bool = True, console: Console | None = None) -> Corpora:
    """Return the corpora that ``config`` describes, each made by `prepare`.

    A single corpus is named by its source. Several share a tokenizer, which is trained first unless one is given.

    Raises:
        UserError: an input cannot be read or used, or the disk is full. No partial corpus is left behind.
    """
    from rich.console import Console  # slow to import

    screen = console or Console()
    members = config.members()
    if is_needed(members):
        clear_leftovers()
        members = _encoded_by(train_shared(members, progress, screen), members)
    found = {}
    for name, member in members.items():
        with naming(name, bool(config.sources)):
            found[name] = prepare(member, progress, screen)
    return Corpora(found)


def find_corpora(config: DataConfig) -> tuple[str, Corpora | None]:
    """Return the `Corpora.key` of ``config``, and the corpora if the cache has them; nothing is written.

    While a tokenizer that several corpora share is not trained yet, the key names no text.

    Raises:
        UserError: a text cannot be read, as in `prepare`.
    """
    members = config.members()
    if is_needed(members):
        place = place_of(members)
        if not place.is_file():
            return f"{'+'.join(sorted(members))}-not-prepared", None
        members = _encoded_by(place, members)
    found = {}
    for name, member in members.items():
        with naming(name, bool(config.sources)):
            found[name] = find_prepared(member)
    corpora = {name: corpus for name, (_, corpus) in found.items() if corpus is not None}
    key = key_of({name: directory for name, (directory, _) in found.items()})
    return key, Corpora(corpora) if len(corpora) == len(found) else None


def _encoded_by(tokenizer: Path, members: Mapping[str, DataConfig]) -> dict[str, DataConfig]:
    return {name: replace(member, tokenizer_path=str(tokenizer)) for name, member in members.items()}
