"""One tokenizer for several corpora, kept in the cache: trained on as much text of each, or with sentinels for some.

Its file is named by a hash of everything that it depends on, so the corpora that it encodes are found again.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from sparsetrain.cache import cache_directory, whole_file
from sparsetrain.data.config import DataConfig
from sparsetrain.data.corpus import TOKENIZER_BYTES, division_of, text_key, trained
from sparsetrain.data.display import Display
from sparsetrain.data.tokenizer import Tokenizer
from sparsetrain.errors import UserError, within
from sparsetrain.screen import say

if TYPE_CHECKING:
    from rich.console import Console

_FORMAT = 1  # a new number trains every shared tokenizer again


@contextlib.contextmanager
def naming(name: str, several: bool = True) -> Iterator[None]:
    """Name a corpus in the errors about it, if it is one of several."""
    try:
        yield
    except UserError as error:
        raise (within(f"data.sources.{name}", "data", error) if several else error) from None


def place_of(members: Mapping[str, DataConfig]) -> Path:
    """Return the file of the tokenizer that corpora share; it need not exist.

    Raises:
        UserError: a text cannot be read.
    """
    corpora = []
    for name, member in members.items():
        with naming(name):
            corpora.append(text_key(member, member.source()))
    # Neither the names of the corpora nor their order matters.
    corpora.sort(key=lambda corpus: json.dumps(corpus, sort_keys=True))
    first, fixed = next(iter(members.values())), _fixed(members)
    key = {"format": _FORMAT, "vocab_size": first.vocab_size, "sentinels": _with_sentinels(members), "corpora": corpora}
    if fixed is not None:
        key = {"format": _FORMAT, "sha256": fixed.sha256}
    digest = hashlib.blake2b(json.dumps(key, sort_keys=True).encode(), digest_size=8).hexdigest()
    return cache_directory() / "tokenizers" / f"{digest}.json"


def is_needed(members: Mapping[str, DataConfig]) -> bool:
    """Whether the corpora share a tokenizer that their settings alone do not give."""
    return len(members) > 1 and (_fixed(members) is None or _with_sentinels(members))


def _with_sentinels(members: Mapping[str, DataConfig]) -> bool:
    """Whether a corpus has documents whose middle is moved, which takes three sentinel tokens."""
    return any(member.fim_rate > 0 for member in members.values())


def _fixed(members: Mapping[str, DataConfig]) -> Tokenizer | None:
    """Return the tokenizer of all corpora, or None if it is trained."""
    found = next(iter(members.values())).fixed_tokenizer()
    return found.with_sentinels() if found is not None and _with_sentinels(members) else found


def train_shared(members: Mapping[str, DataConfig], progress: bool, console: Console) -> Path:
    """Return the file of the tokenizer that corpora share; train it if the cache does not have it.

    Raises:
        UserError: a text cannot be read or used, or the disk is full. No partial file is left behind.
    """
    place = place_of(members)
    if place.is_file():
        return place
    with Display(console, progress) as display:

        def texts() -> Iterator[str]:
            for name, member in members.items():
                with naming(name):
                    source = member.source()
                    source.open(display.task(f"read {name}"))
                    division, report = division_of(member, source), display.task(f"sample {name}")
                    for share, text in division.sampled(source.documents(), TOKENIZER_BYTES // len(members)):
                        report(share)
                        yield text
                report(1.0)

        tokenizer = _fixed(members)
        if tokenizer is None:
            size = next(iter(members.values())).vocab_size
            tokenizer = trained(texts(), size, _with_sentinels(members))
        with whole_file(place) as temporary:
            tokenizer.save(temporary)
    if progress:
        say(console, f"tokenizer: of {len(members)} corpora, {tokenizer.vocab_size:,} tokens, kept in {place}")
    return place
