"""Tokenizers: byte-level BPE trained by the `tokenizers` library, plain bytes, or a tokenizer of the user's.

With a lossless one, every string encodes to ids that decode to the same string, and every id stands for a known number
of UTF-8 bytes. A loss in nats per token therefore converts to bits per byte without decoding. Other tokenizers of the
user's are used with a warning, and the bytes of their tokens come from the text that is encoded.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import tokenizers
import torch
from tokenizers import models

from sparsetrain.data import bpe_training
from sparsetrain.data.token_sizes import token_sizes
from sparsetrain.data.tokenizer_end import END_OF_TEXT, end_of, no_end, specials, with_end
from sparsetrain.data.tokenizer_file import (
    byte_symbols,
    changed_text,
    check_ids,
    check_layout,
    decoded,
    library_errors,
    parsed,
)
from sparsetrain.data.tokenizer_formats import read_tokenizer
from sparsetrain.errors import UserError

# Names that common tokenizers give to the sentinels of fill-in-the-middle: before the prefix, the middle, the suffix.
SENTINELS = ("<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>")
_SENTINEL_NAMES = (
    SENTINELS,
    ("<fim_prefix>", "<fim_middle>", "<fim_suffix>"),
    ("<fim-prefix>", "<fim-middle>", "<fim-suffix>"),
)
_NOTES: dict[str, str] = {}  # the notes of the files that were checked, by checksum
# A text that continues another one is encoded behind this one, which no tokenizer joins with it.
_BEFORE = "\n"
SMALLEST_VOCABULARY = 257  # 256 bytes and the end of a document

# `Tokenizer` has a method ``bytes``, so its other methods need another name for the type.
Bytes: TypeAlias = bytes
Spelling: TypeAlias = bytes | str
"""What a token stands for: the bytes of a text or, as a string, the name of a special token."""


class Tokenizer:
    """A tokenizer, made from the bytes of a ``tokenizer.json``.

    ``sha256`` is the hash of the bytes in `content`. The manifest of a corpus records it, so that its tokens are never
    read with another tokenizer.

    Args:
        content: the bytes of the file.
        origin: the name of the file in messages.
        eos_token: the token that ends a document. It is marked in `content`, which otherwise keeps the bytes of the
            file. None takes the marked token, or a special token with a usual name.

    Attributes:
        lossless: whether every text comes back as it was, and `token_bytes` are known. Byte-level BPE is.
        note: why not, in one sentence that is also a warning when the file is first read; empty if it is lossless.
        vocab_size: the rows that a model needs, which is the largest id and one.

    Raises:
        UserError: the bytes are no tokenizer, its tokens are random or ambiguous, a byte-level vocabulary lacks a byte
            (see `tokenizer_file`), no token ends a document, or ``eos_token`` is no token that can.
    """

    def __init__(self, content: bytes, origin: str = "tokenizer.json", eos_token: str | None = None) -> None:
        where = f"data.tokenizer_path={origin}"
        inner = _library(content, where)
        layout = parsed(content, where)
        marked = None if eos_token is None else with_end(layout, eos_token, inner.get_vocab(True), origin)
        if eos_token is not None and marked is not None:
            ordinary = eos_token not in specials(layout)
            content, layout, inner = marked, parsed(marked, where), _library(marked, where)
            if ordinary and inner.token_to_id(eos_token) in _ids_of_name(inner, eos_token, where):
                raise UserError(f"data.eos_token={eos_token!r}: ordinary text gives this token of {origin} too")
        kind = check_layout(layout, where)
        self._inner, self._content, self._where = inner, content, where
        vocabulary = inner.get_vocab(with_added_tokens=True)
        check_ids(vocabulary, where)
        end = end_of(layout)
        if end is None:
            raise no_end(layout, where)
        self.eos_token: str = end
        self.eos_id: int = vocabulary[end]
        self.vocab_size: int = max(vocabulary.values()) + 1
        self.sha256: str = hashlib.sha256(content).hexdigest()
        self._unknown = None if kind.byte_level else _unknown_id(layout["model"], vocabulary)
        self._named = self._special_ids_of_text(where)
        if self.sha256 not in _NOTES:  # each file is checked once per process
            changed = changed_text(inner, None if kind.losses else self._token_bytes.numpy(), where)
            _NOTES[self.sha256] = _note(origin, kind.losses, changed)
            if _NOTES[self.sha256]:
                warnings.warn(_NOTES[self.sha256], stacklevel=2)
        self.note: str = _NOTES[self.sha256]
        self.lossless: bool = not self.note

    def _special_ids_of_text(self, where: str) -> frozenset[int]:
        """Return the ids of special tokens that their names in a text give, which `encode` replaces by the unknown one.

        Raises:
            UserError: there is no unknown token, or the end of a document is one that text gives.
        """
        special = {
            index: token.content for index, token in self._inner.get_added_tokens_decoder().items() if token.special
        }
        found: set[int] = set()
        for name in special.values():
            found |= (_ids_of_name(self._inner, name, where) & special.keys()) - {self._unknown}
        if self.eos_id == self._unknown:
            raise UserError(
                f"{where}: the token {self.eos_token!r} stands for unknown text, so it cannot end a document; name "
                "another one with data.eos_token"
            )
        if found and self._unknown is None:
            name = special[min(found)]
            raise UserError(
                f"{where}: the special token {name!r:.60} is one that ordinary text gives; rename it, or set its "
                "special to false"
            )
        return frozenset(found)

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
    def load(cls, path: str | Path, eos_token: str | None = None) -> Tokenizer:
        """Read the tokenizer of a file, a directory or a name; see `tokenizer_formats.read_tokenizer`.

        Args:
            path: such as a ``tokenizer.json``.
            eos_token: the token that ends a document; None takes the one that the files name.

        Raises:
            UserError: nothing can be read there, or as the constructor does.
        """
        found = read_tokenizer(path, eos_token)
        return cls(found.content, str(path), found.eos_token)

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
        # The library does not write the mark of the end.
        return Tokenizer(inner.to_str(pretty=True).encode(), self._where.partition("=")[2], self.eos_token)

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
            return self._as_text(self._inner.encode(text, add_special_tokens=False).ids)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of each text, computed on all cores."""
        with library_errors(f"{self._where}: the tokenizers library cannot encode a text"):
            if self._is_bytes:
                return [list(text.encode()) for text in texts]
            # The fast form leaves out the character offsets.
            encodings = self._inner.encode_batch_fast(list(texts), add_special_tokens=False)
            return [self._as_text(encoding.ids) for encoding in encodings]

    def encode_continuation(self, text: str) -> list[int]:
        """Return the ids of a text that continues another one, such as the answer ``" yes"`` to a question.

        A lossless tokenizer gives those of `encode`. Others may begin each text with a space that is not there, which
        a continuation must not have twice: SentencePiece gives ``▁yes`` for ``"yes"`` and for the continuation
        ``" yes"``.
        """
        return self.encode_continuations([text])[0]

    def encode_continuations(self, texts: Sequence[str]) -> list[list[int]]:
        """Return `encode_continuation` of each text."""
        if self.lossless:
            return self.encode_batch(texts)
        return [ids for ids, _ in self.encode_sized(texts, [True] * len(texts))]

    def encode_sized(self, texts: Sequence[str], continued: Sequence[bool]) -> list[tuple[list[int], list[int]]]:
        """Return the ids of each text and, one more, the UTF-8 bytes that each id stands for; see `token_sizes`.

        Args:
            texts: the texts.
            continued: whether each is a continuation, see `encode_continuation`.
        """
        given = [_BEFORE + text if later else text for text, later in zip(texts, continued, strict=True)]
        found = []
        with library_errors(f"{self._where}: the tokenizers library cannot encode a text"):
            encodings = self._inner.encode_batch(given, add_special_tokens=False)
        for text, later, encoding in zip(texts, continued, encodings, strict=True):
            ids, ends = self._as_text(encoding.ids), [end for _, end in encoding.offsets]
            if later:  # without the tokens of what stands before
                kept = [place for place, end in enumerate(ends) if end > len(_BEFORE)]
                ids, ends = [ids[place] for place in kept], [ends[place] - len(_BEFORE) for place in kept]
            found.append((ids, token_sizes(text, ends).tolist()))
        return found

    def _as_text(self, ids: Sequence[int]) -> list[int]:
        """Return ids without those of special tokens, which the name of one in a text may give."""
        if not self._named or self._named.isdisjoint(ids):
            return list(ids)
        assert self._unknown is not None
        return [self._unknown if index in self._named else index for index in ids]

    def count_unknown(self, ids: Sequence[int]) -> int:
        """Return how many ids are the token for text that the tokenizer does not know."""
        return 0 if self._unknown is None else list(ids).count(self._unknown)

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Return the text of ``ids``; invalid UTF-8, such as a character cut in two, becomes U+FFFD."""
        return str(self._inner.decode(list(ids), skip_special_tokens=skip_special_tokens))

    def decode_batch(self, rows: Sequence[Sequence[int]]) -> list[str]:
        """Return the text of each row of ids, without special tokens, computed on all cores."""
        return list(self._inner.decode_batch([list(ids) for ids in rows], skip_special_tokens=True))

    @property
    def token_bytes(self) -> torch.Tensor:
        """LongTensor [vocab_size]: the number of UTF-8 bytes of each token, 0 for special tokens and unused ids.

        The numbers are exact: those of a text's tokens add up to its bytes.

        Raises:
            UserError: the tokenizer is not `lossless`, so that they depend on the text.
        """
        self.need_bytes("the bytes of each token")
        return self._token_bytes

    def need_bytes(self, what: str) -> None:
        """Raise `UserError` if the tokenizer is not `lossless`; the line says that ``what`` needs it."""
        if not self.lossless:
            raise UserError(f"{what} needs a byte-level tokenizer that gives every text back, and {self.note}")

    @cached_property
    def _token_bytes(self) -> torch.Tensor:
        lengths = np.zeros(self.vocab_size, dtype=np.int64)
        for token, index in self._inner.get_vocab(with_added_tokens=True).items():
            lengths[index] = len(token)  # one character of the byte-level alphabet per byte
        for index, added in self._inner.get_added_tokens_decoder().items():
            lengths[index] = 0 if added.special else len(added.content.encode())
        return torch.from_numpy(lengths)

    @cached_property
    def spellings(self) -> tuple[Spelling, ...]:
        """What each token of a byte-level tokenizer stands for, by id; nothing for an unused id.

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


def _library(content: bytes, where: str) -> tokenizers.Tokenizer:
    """Return the tokenizer of the library, which pads and cuts nothing."""
    with library_errors(f"{where}: not a tokenizer.json"):
        inner = tokenizers.Tokenizer.from_str(content.decode())
    inner.no_padding()
    inner.no_truncation()
    # The name of a special token inside a document is text: it must not end the document.
    inner.encode_special_tokens = True
    return inner


def _ids_of_name(inner: tokenizers.Tokenizer, name: str, where: str) -> set[int]:
    """Return the ids of a text that is or holds the name of a special token."""
    with library_errors(f"{where}: the tokenizers library cannot encode {name!r:.60}"):
        return {index for text in (name, f"a {name}") for index in inner.encode(text, add_special_tokens=False).ids}


def _unknown_id(model: Mapping[str, Any], vocabulary: Mapping[str, int]) -> int | None:
    """Return the id of the token for text that the model does not know."""
    if model.get("type") == "Unigram":
        return model.get("unk_id")
    name = model.get("unk_token")
    return vocabulary.get(name) if name is not None else None


def _note(origin: str, reasons: Sequence[str], changed: str | None) -> str:
    """Return the note of a tokenizer; empty if nothing is known that it loses."""
    if not reasons and changed is None:
        return ""
    causes = [*reasons[:1], *([f"for example {changed}"] if changed is not None else [])]
    return f"the tokenizer {origin} may not give a text back as it was: {'; '.join(causes)}"
