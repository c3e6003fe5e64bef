"""Byte-level tokenizers: BPE trained by the `tokenizers` library, plain bytes, or a `tokenizer.json` of the user's.

With each of them, every string encodes to ids that decode to the same string, and every id stands for a known number
of UTF-8 bytes. A loss in nats per token therefore converts to bits per byte without decoding.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import TypeAlias

import numpy as np
import tokenizers
import torch
from tokenizers import models

from sparsetrain.data import bpe_training
from sparsetrain.data.tokenizer_file import (
    byte_symbols,
    check_ids,
    check_layout,
    check_round_trip,
    decoded,
    library_errors,
)
from sparsetrain.errors import UserError
from sparsetrain.files import typed_path
from sparsetrain.reading import read_bytes

END_OF_TEXT = "<|endoftext|>"
# Names that common tokenizers give to the token that ends a document.
_END_NAMES = (END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>")
# Names that common tokenizers give to the sentinels of fill-in-the-middle: before the prefix, the middle, the suffix.
SENTINELS = ("<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>")
_SENTINEL_NAMES = (
    SENTINELS,
    ("<fim_prefix>", "<fim_middle>", "<fim_suffix>"),
    ("<fim-prefix>", "<fim-middle>", "<fim-suffix>"),
)
_CHECKED: set[str] = set()  # checksums of files that passed the round trip
SMALLEST_VOCABULARY = 257  # 256 bytes and the end of a document

# `Tokenizer` has a method ``bytes``, so its other methods need another name for the type.
Bytes: TypeAlias = bytes
Spelling: TypeAlias = bytes | str
"""What a token stands for: the bytes of a text or, as a string, the name of a special token."""


class Tokenizer:
    """A byte-level tokenizer, made from the bytes of a ``tokenizer.json``.

    ``sha256`` is the hash of these bytes. The manifest of a corpus records it, so that its tokens are never read with
    another tokenizer.

    Args:
        content: the bytes of the file.
        origin: the name of the file in messages.

    Raises:
        UserError: the bytes are no byte-level tokenizer, the tokenizer loses or changes text (see `tokenizer_file`),
            or it has no special token for the end of a document.
    """

    def __init__(self, content: bytes, origin: str = "tokenizer.json") -> None:
        where = f"data.tokenizer_path={origin}"
        with library_errors(f"{where}: not a tokenizer.json"):
            self._inner = tokenizers.Tokenizer.from_str(content.decode())
        check_layout(content, where)
        self._content = content
        self._where = where
        self._inner.no_padding()
        self._inner.no_truncation()
        # The name of a special token inside a document is text: it must not end the document.
        self._inner.encode_special_tokens = True
        vocabulary = self._inner.get_vocab(with_added_tokens=True)
        check_ids(vocabulary, where)
        special = {token.content for token in self._inner.get_added_tokens_decoder().values() if token.special}
        known = [name for name in _END_NAMES if name in special]
        if not known:
            names = ", ".join(_END_NAMES)
            raise UserError(f"{where}: no token that ends a document; looked for the special tokens {names}")
        self.eos_token: str = known[0]
        self.eos_id: int = vocabulary[self.eos_token]
        self.vocab_size: int = len(vocabulary)
        self.sha256: str = hashlib.sha256(content).hexdigest()
        if self.sha256 not in _CHECKED:  # each file is checked once per process
            check_round_trip(self._inner, self.token_bytes.numpy(), where)
            _CHECKED.add(self.sha256)

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> Tokenizer:
        """Train byte-level BPE with at most ``vocab_size`` tokens; a small text may yield fewer.

        Training is deterministic: the same texts give the same bytes.

        Raises:
            UserError: ``vocab_size`` is below 257, or the training fails.
        """
        if vocab_size < SMALLEST_VOCABULARY:
            raise UserError(
                f"vocab_size={vocab_size} is too small for byte-level BPE; the least is {SMALLEST_VOCABULARY}"
            )
        try:
            return cls(bpe_training.train(texts, vocab_size, END_OF_TEXT))
        except bpe_training.TrainingFailedError as error:
            raise UserError(f"data.tokenizer=bpe: the training of the tokenizer failed: {error}") from error

    @classmethod
    def bytes(cls) -> Tokenizer:
        """Return the tokenizer of plain bytes: ids 0 to 255 are the bytes, and id 256 ends a document."""
        vocabulary = {character: byte for byte, character in enumerate(byte_symbols())}
        inner = bpe_training.byte_level(models.BPE(vocab=vocabulary, merges=[]))
        inner.add_special_tokens([END_OF_TEXT])
        return cls(inner.to_str(pretty=True).encode())

    @classmethod
    def load(cls, path: str | Path) -> Tokenizer:
        """Read a ``tokenizer.json``, or the one in a directory; raises `UserError` as the constructor does."""
        place = typed_path(path, "data.tokenizer_path")
        if place.is_dir():
            place = place / "tokenizer.json"
        if not place.is_file():
            raise UserError(f"data.tokenizer_path={path}: no such file")
        return cls(read_bytes(place), origin=str(path))

    @cached_property
    def _is_bytes(self) -> bool:
        """Whether the ids of a text are its bytes; then the library, which joins nothing, is not asked."""
        vocabulary = self._inner.get_vocab(with_added_tokens=False)
        added = self._inner.get_added_tokens_decoder().values()
        if len(vocabulary) != 256 or any(not token.special for token in added):
            return False
        same = all(vocabulary[symbol] == byte for byte, symbol in enumerate(byte_symbols()))
        return same and not json.loads(self._content)["model"]["merges"]

    @property
    def sentinels(self) -> tuple[int, int, int] | None:
        """The ids of the special tokens before prefix, middle and suffix, for `fill_in_the_middle`; None without."""
        special = {
            added.content: index for index, added in self._inner.get_added_tokens_decoder().items() if added.special
        }
        for names in _SENTINEL_NAMES:
            if all(name in special for name in names):
                return special[names[0]], special[names[1]], special[names[2]]
        return None

    def with_sentinels(self) -> Tokenizer:
        """Return this tokenizer if it has `sentinels`, else one that has, as special tokens.

        A file may name them without declaring them special. They keep their ids, and text no longer gives them. Other
        files get ``<|fim_prefix|>``, ``<|fim_middle|>`` and ``<|fim_suffix|>`` as the three ids after the vocabulary.
        """
        if self.sentinels is not None:
            return self
        vocabulary = self._inner.get_vocab(with_added_tokens=True)
        named = [names for names in _SENTINEL_NAMES if all(name in vocabulary for name in names)]
        inner = tokenizers.Tokenizer.from_str(self._content.decode())
        inner.add_special_tokens(list(named[0] if named else SENTINELS))
        return Tokenizer(inner.to_str(pretty=True).encode(), self._where.partition("=")[2])

    def save(self, path: Path) -> None:
        """Write the tokenizer's ``tokenizer.json``, with the bytes that it was made from."""
        path.write_bytes(self._content)

    @property
    def content(self) -> Bytes:
        """The bytes of the ``tokenizer.json`` that the tokenizer was made from."""
        return self._content

    def encode(self, text: str) -> list[int]:
        """Return the ids of ``text``, without a token for its end."""
        with library_errors(f"{self._where}: the tokenizers library cannot encode a text"):
            if self._is_bytes:
                return list(text.encode())
            return list(self._inner.encode(text, add_special_tokens=False).ids)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of each text, computed on all cores."""
        with library_errors(f"{self._where}: the tokenizers library cannot encode a text"):
            if self._is_bytes:
                return [list(text.encode()) for text in texts]
            # The fast form leaves out the character offsets.
            return [encoding.ids for encoding in self._inner.encode_batch_fast(list(texts), add_special_tokens=False)]

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Return the text of ``ids``; invalid UTF-8, such as a character cut in two, becomes U+FFFD."""
        return str(self._inner.decode(list(ids), skip_special_tokens=skip_special_tokens))

    @cached_property
    def token_bytes(self) -> torch.Tensor:
        """LongTensor [vocab_size]: the number of UTF-8 bytes of each token, 0 for special tokens.

        The numbers are exact: `Tokenizer` refuses a file for which they do not add up to the bytes of a text.
        """
        lengths = np.zeros(self.vocab_size, dtype=np.int64)
        for token, index in self._inner.get_vocab(with_added_tokens=True).items():
            lengths[index] = len(token)  # one character of the byte-level alphabet per byte
        for index, added in self._inner.get_added_tokens_decoder().items():
            lengths[index] = 0 if added.special else len(added.content.encode())
        return torch.from_numpy(lengths)

    @cached_property
    def spellings(self) -> tuple[Spelling, ...]:
        """What each token stands for, by id.

        The token that ends a document has the same name in every tokenizer, `END_OF_TEXT`.
        """
        found: list[Spelling] = [b""] * self.vocab_size
        for token, index in self._inner.get_vocab(with_added_tokens=True).items():
            found[index] = decoded(token)
        for index, added in self._inner.get_added_tokens_decoder().items():
            found[index] = added.content if added.special else added.content.encode()
        found[self.eos_id] = END_OF_TEXT
        return tuple(found)

    def cut(self, content: Bytes) -> list[int]:
        """Return the ids into which the merges alone cut bytes, which need not be whole characters."""
        symbols = byte_symbols()
        return [token.id for token in self._inner.model.tokenize("".join(symbols[byte] for byte in content))]

    def __repr__(self) -> str:
        return f"Tokenizer(vocab_size={self.vocab_size}, sha256={self.sha256[:12]})"
