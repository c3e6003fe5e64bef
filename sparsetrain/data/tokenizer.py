"""Byte-level tokenizers: BPE trained by the `tokenizers` library, plain bytes, or a `tokenizer.json` of one's own.

Whatever the kind, every string encodes to ids that decode to it again, and each id stands for a known number of
UTF-8 bytes, so that a loss in nats per token becomes bits per byte without decoding.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import tokenizers
import torch
from tokenizers import decoders, models, pre_tokenizers, trainers

from sparsetrain.errors import UserError
from sparsetrain.files import typed_path

END_OF_TEXT = "<|endoftext|>"
# How tokenizers in use call the token that ends a document.
_END_NAMES = (END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>")
SMALLEST_VOCABULARY = 257  # 256 bytes and the end of a document


def _alphabet() -> list[str]:
    """Return the character that byte-level BPE writes for each byte, indexed by the byte.

    Printable bytes of Latin-1 stand for themselves; the others, in order, for the characters from U+0100 on.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) if byte in printable else chr(0x100 + others.index(byte)) for byte in range(256)]


class Tokenizer:
    """A byte-level tokenizer, made from the bytes of a ``tokenizer.json``.

    ``sha256`` is the hash of those bytes; token files carry it so that they are never read with another tokenizer.
    Raises `UserError` if the bytes are no byte-level tokenizer, or if it has no token for the end of a document.
    """

    def __init__(self, content: bytes, origin: str = "tokenizer.json") -> None:
        try:
            self._inner = tokenizers.Tokenizer.from_str(content.decode())
            layout = json.loads(content)
        except Exception as error:  # the library raises bare Exception
            reason = (str(error).splitlines() or ["?"])[0]
            raise UserError(f"tokenizer_path={origin}: not a tokenizer.json ({reason})") from error
        if "ByteLevel" not in json.dumps([layout.get("pre_tokenizer"), layout.get("decoder")]):
            raise UserError(f"tokenizer_path={origin}: not a byte-level tokenizer; bits per byte need one")
        self._content = content
        self._inner.no_padding()
        self._inner.no_truncation()
        # A document that spells a special token out must not be able to end itself.
        self._inner.encode_special_tokens = True
        vocabulary = self._inner.get_vocab(with_added_tokens=True)
        known = [name for name in _END_NAMES if name in vocabulary]
        if not known:
            names = ", ".join(_END_NAMES)
            raise UserError(f"tokenizer_path={origin}: no token that ends a document; looked for {names}")
        self.eos_token: str = known[0]
        self.eos_id: int = vocabulary[self.eos_token]
        self.vocab_size: int = 1 + max(vocabulary.values())
        self.sha256: str = hashlib.sha256(content).hexdigest()

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> Tokenizer:
        """Train byte-level BPE with at most ``vocab_size`` tokens; a small text may yield fewer.

        Deterministic: the same texts give the same bytes. Raises `UserError` below 257 tokens.
        """
        if vocab_size < SMALLEST_VOCABULARY:
            raise UserError(
                f"vocab_size={vocab_size} is too small for byte-level BPE; the least is {SMALLEST_VOCABULARY}"
            )
        inner = _byte_level(models.BPE())
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            min_frequency=2,
            special_tokens=[END_OF_TEXT],
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        )
        inner.train_from_iterator(texts, trainer=trainer)
        return cls(inner.to_str(pretty=True).encode())

    @classmethod
    def bytes(cls) -> Tokenizer:
        """Return the tokenizer whose ids 0 to 255 are the bytes and whose id 256 ends a document."""
        vocabulary = {character: byte for byte, character in enumerate(_alphabet())}
        inner = _byte_level(models.BPE(vocab=vocabulary, merges=[]))
        inner.add_special_tokens([END_OF_TEXT])
        return cls(inner.to_str(pretty=True).encode())

    @classmethod
    def load(cls, path: str | Path) -> Tokenizer:
        """Read a ``tokenizer.json``."""
        place = typed_path(path, "data.tokenizer_path")
        if place.is_dir():
            place = place / "tokenizer.json"
        if not place.is_file():
            raise UserError(f"tokenizer_path={path}: no such file")
        return cls(place.read_bytes(), origin=str(path))

    def save(self, path: Path) -> None:
        """Write the ``tokenizer.json`` this was made from, byte for byte."""
        path.write_bytes(self._content)

    def encode(self, text: str) -> list[int]:
        """Return the ids of ``text``, without a token for its end."""
        return list(self._inner.encode(text, add_special_tokens=False).ids)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of each text, computed on all cores."""
        # The fast form leaves out the character offsets.
        return [encoding.ids for encoding in self._inner.encode_batch_fast(list(texts), add_special_tokens=False)]

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Return the text of ``ids``; bytes that are no UTF-8, as at a cut inside a character, become U+FFFD."""
        return str(self._inner.decode(list(ids), skip_special_tokens=skip_special_tokens))

    @cached_property
    def token_bytes(self) -> torch.Tensor:
        """LongTensor [vocab_size]: how many UTF-8 bytes each token stands for; 0 for special tokens.

        Exact for a tokenizer without a normaliser, which those made here are.
        """
        lengths = np.zeros(self.vocab_size, dtype=np.int64)
        for token, index in self._inner.get_vocab(with_added_tokens=True).items():
            lengths[index] = len(token)  # one character of the byte-level alphabet per byte
        for index, added in self._inner.get_added_tokens_decoder().items():
            lengths[index] = 0 if added.special else len(added.content.encode())
        return torch.from_numpy(lengths)

    def __repr__(self) -> str:
        return f"Tokenizer(vocab_size={self.vocab_size}, sha256={self.sha256[:12]})"


def _byte_level(model: models.BPE) -> tokenizers.Tokenizer:
    inner = tokenizers.Tokenizer(model)
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    return inner
