"""A tokenizer extended for one of several corpora, which leaves the text of the others split as before.

Its file is kept in the cache and named by a hash of everything that it depends on.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from sparsetrain.cache import cache_directory, clear_leftovers, whole_file
from sparsetrain.data.bpe_extension import blocks
from sparsetrain.data.config import DataConfig
from sparsetrain.data.corpus import TOKENIZER_BYTES, division_of, text_key
from sparsetrain.data.display import Display
from sparsetrain.data.shared_tokenizer import naming
from sparsetrain.data.tokenizer import Tokenizer
from sparsetrain.data.vocabulary import extend_tokenizer, new_blocks_of
from sparsetrain.errors import UserError
from sparsetrain.screen import say

if TYPE_CHECKING:
    from rich.console import Console

_FORMAT = 1  # a new number learns every extension again


def place_of_extension(old: Tokenizer, members: Mapping[str, DataConfig], corpus: str, n_tokens: int) -> Path:
    """Return the file of `extended`; it need not exist.

    Raises:
        UserError: a text cannot be read.
    """
    keys = {}
    for name, member in members.items():
        with naming(name, len(members) > 1):
            keys[name] = text_key(member, member.source())
    others = sorted((keys[name] for name in keys if name != corpus), key=lambda key: json.dumps(key, sort_keys=True))
    key = {"format": _FORMAT, "old": old.sha256, "n_tokens": n_tokens, "corpus": keys[corpus], "others": others}
    digest = hashlib.blake2b(json.dumps(key, sort_keys=True).encode(), digest_size=8).hexdigest()
    return cache_directory() / "tokenizers" / f"extended-{digest}.json"


def extended(
    old: Tokenizer, members: Mapping[str, DataConfig], corpus: str, n_tokens: int, progress: bool, console: Console
) -> Path:
    """Return the file of a tokenizer with ``n_tokens`` more tokens, learned on the training text of one corpus.

    The training text of the other corpora is split as before, and so is all text without a character of a new script.
    For a language of the same script, only their training text is sure to be. See `extend_tokenizer`.

    Args:
        members: the settings of each corpus by its name, as `DataConfig.members` returns them.

    Raises:
        UserError: a text cannot be read, the corpus gives fewer tokens, or it has no new script and is the only one.
    """
    place = place_of_extension(old, members, corpus, n_tokens)
    if place.is_file():
        return place
    clear_leftovers()
    with Display(console, progress) as display:

        def texts(name: str, most: int | None) -> Iterator[str]:
            member = members[name]
            with naming(name, len(members) > 1):
                source = member.source()
                source.open(display.task(f"read {name}"))
                division = division_of(member, source)
                if most is not None:
                    yield from (text for _, text in division.sampled(source.documents(), most))
                    return
                assigned = division.assigned(source.documents())
                yield from (document.text for split, document in assigned if split == "train")

        learned_from = list(texts(corpus, TOKENIZER_BYTES))
        new = new_blocks_of(old, learned_from)
        others = [name for name in members if name != corpus]
        if not new and not others:
            raise UserError(
                f"vocabulary.corpus={corpus} has no letter of a script that the tokenizer has no tokens of yet; name "
                "a corpus of the first language in data.sources too, whose text must be split as before"
            )
        # Other texts than these have none of the new merges.
        kept = [t for name in others for t in texts(name, None) if not new or not new.isdisjoint(blocks(t.encode()))]
        try:
            tokenizer = extend_tokenizer(old, learned_from, n_tokens, keep=kept or None, shared=not new)
        except UserError as error:
            raise UserError(f"vocabulary.corpus={corpus}: {error}") from None
        found = tokenizer.vocab_size - old.vocab_size
        if found < n_tokens:
            raise UserError(
                f"vocabulary.n_tokens={n_tokens} is more than the text of {corpus} gives: at most {found} tokens can "
                "be learned on it"
            )
        with whole_file(place) as temporary:
            tokenizer.save(temporary)
    if progress:
        size = tokenizer.vocab_size
        say(console, f"tokenizer: {n_tokens:,} tokens learned on {corpus}, {size:,} in all, kept in {place}")
    return place
