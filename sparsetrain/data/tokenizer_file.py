"""Whether a tokenizer is lossless: every text decodes to itself, and the bytes of its tokens add up.

Many settings of a ``tokenizer.json`` lose text: a space before each text, a normalizer, dropped white space between
words, words without a token. `check_layout` finds such settings in the file and refuses what cannot be used at all.
`changed_text` encodes and decodes texts that lossy tokenizers often change.
"""

from __future__ import annotations

import contextlib
import reprlib
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import tokenizers

from sparsetrain.errors import UserError
from sparsetrain.reading import parse_json

# Pre-tokenizers that lose no character. `Split` and `Punctuation` do with behavior Removed, which is checked too.
_LOSSLESS = ("ByteLevel", "Split", "Punctuation", "Digits")
_LARGEST_SHARE = 2  # a vocabulary of n tokens may have ids below twice n
# fmt: off
_TEXTS = (
    "a", " a", "a ", "\na", "a\n", "\ta", "  a  b  ", "a\u00a0b", "x\r\ny\r\n\r\n", " ", "   \n   ", "\u3000a\u200b",
    "It's we'LL don't", "1234567890 12 3.5e-7", "UPPER lower", "___--==!!!", "# a\n\n\n\tb", "a, b; c. d?",
    "Cafe\u0301 Café", "\ufb01 \u00bd \uff26 \u2460", "日本語のテキスト", "ทดสอบ", "الكتاب", "naïve",
    "😀👩\u200d👩\u200d👧", "\ufeffa\x00\x7f", "<s>a</s> <m> [MASK]", "Ġ Ċ ġ Ł é ▁a ##b a</w> <0x41> @@",
    # Regular expressions with catastrophic backtracking do not finish on these.
    "a" * 60 + "!", "ab" * 30 + "!", "7" * 60 + "!", " " * 60 + "!", "." * 60 + "a",
)
# fmt: on


@lru_cache(maxsize=1)
def byte_symbols() -> tuple[str, ...]:
    """Return the character that byte-level BPE writes for each byte, indexed by the byte.

    Printable bytes of Latin-1 are written as themselves. The other bytes, in order, are written as U+0100, U+0101 and
    so on.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    return tuple(chr(byte) if byte in printable else chr(0x100 + others.index(byte)) for byte in range(256))


def decoded(token: str) -> bytes:
    """Return the bytes to which a byte-level decoder maps a token; a token with other characters is plain UTF-8."""
    byte_of = _byte_of_symbol()
    if all(symbol in byte_of for symbol in token):
        return bytes(byte_of[symbol] for symbol in token)
    return token.encode()


@lru_cache(maxsize=1)
def _byte_of_symbol() -> dict[str, int]:
    return {symbol: byte for byte, symbol in enumerate(byte_symbols())}


@contextlib.contextmanager
def library_errors(where: str) -> Iterator[None]:
    """Turn the errors of the `tokenizers` library into one line that begins with ``where``.

    The library raises a plain `Exception`. A failure in its Rust code raises a `PanicException`, a `BaseException`
    without a public name.
    """
    try:
        yield
    except UserError:
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{where} ({reason[:200]})") from error


def parsed(content: bytes, where: str) -> dict[str, Any]:
    """Return the content of a ``tokenizer.json``; raises `UserError`, beginning with ``where``."""
    try:
        layout: dict[str, Any] = parse_json(content, "the file", dict, finite=False)
    except UserError as error:
        raise UserError(f"{where}: not a tokenizer.json ({error})") from None
    return layout


class Kind(NamedTuple):
    """What a ``tokenizer.json`` is.

    Args:
        byte_level: whether it is byte-level BPE with a token for each byte, so that no text is unknown to it.
        losses: what makes it lose or change text, as sentences without a full stop, the weightiest one first.
    """

    byte_level: bool
    losses: list[str]


def check_layout(layout: Mapping[str, Any], where: str) -> Kind:
    """Refuse a ``tokenizer.json`` that cannot be used; return what makes it lose or change text.

    Files with losses are used too, but their corpora take the bytes of each token from the text itself. The types of
    the values are not checked here, since the library must have read the file before.

    Args:
        layout: the content of the file.
        where: begins the line of an error.

    Raises:
        UserError: the tokens of a text would be random or ambiguous, or a byte-level vocabulary lacks a byte.
    """
    before = [step.get("type") for step in _steps(layout.get("pre_tokenizer"), "pretokenizers")]
    after = [step.get("type") for step in _steps(layout.get("decoder"), "decoders")]
    model = layout["model"]
    kind = model.get("type", "BPE" if "merges" in model else None)  # old files leave it out
    byte_level = kind == "BPE" and "ByteLevel" in before
    _check_model(model, byte_level, where)
    names = ", ".join(map(str, before)) or "none"
    reasons = [] if byte_level else [f"it is not byte-level BPE (its model is {kind}, its pre_tokenizer {names})"]
    if before.count("ByteLevel") > 1:
        reasons.append("it maps bytes to symbols twice")
    if byte_level and [step for step in after if step != "Fuse"] != ["ByteLevel"]:
        reasons.append("its decoder is not ByteLevel")
    rewriting = [step.get("type") for step in _steps(layout.get("normalizer"), "normalizers")]
    reasons += [f"its normalizer {_short(name)} rewrites text" for name in rewriting]
    for step in _steps(layout.get("pre_tokenizer"), "pretokenizers"):
        reasons += _loss_of_step(step)
    for name in ("continuing_subword_prefix", "end_of_word_suffix"):
        if byte_level and model.get(name):
            reasons.append(f"its {name}={_short(model[name])} is no byte of a text")
    reasons += _losses_of_added(layout.get("added_tokens") or [], model if byte_level else None, where)
    return Kind(byte_level, reasons)


def _steps(step: Mapping[str, Any] | None, inside: str) -> Iterator[Mapping[str, Any]]:
    """Yield ``step``, or the steps of a nested ``Sequence``, whose list has the key ``inside``."""
    if step is None:
        return
    if step.get("type") != "Sequence":
        yield step
        return
    for member in step[inside]:
        yield from _steps(member, inside)


def _loss_of_step(step: Mapping[str, Any]) -> list[str]:
    name = step.get("type")
    if name == "ByteLevel" and step.get("add_prefix_space", True) is not False:
        return ["its pre_tokenizer ByteLevel puts a space before each text"]
    if name not in _LOSSLESS or "removed" in str(step.get("behavior", "")).lower():
        return [f"its pre_tokenizer {_short(name)} may leave out characters"]
    return []


def _check_model(model: Mapping[str, Any], byte_level: bool, where: str) -> None:
    vocabulary: Any = model["vocab"]  # of Unigram a list of pieces with their scores
    missing = [byte for byte, symbol in enumerate(byte_symbols()) if symbol not in vocabulary] if byte_level else []
    if missing:
        shown = ", ".join(f"0x{byte:02x}" for byte in missing[:3]) + (", …" if len(missing) > 3 else "")
        raise UserError(
            f"{where}: the vocabulary has no token for {len(missing)} of the 256 bytes ({shown}), which would be left "
            "out of texts; train it with the whole alphabet of ByteLevel"
        )
    if isinstance(vocabulary, dict) and len(set(vocabulary.values())) < len(vocabulary):
        raise UserError(f"{where}: two tokens of the vocabulary have the same id; each needs its own")
    if model.get("dropout"):
        raise UserError(f"{where}: dropout={model['dropout']} makes the tokens of a text random; set it to null")


def _losses_of_added(
    added: Sequence[Mapping[str, Any]], byte_level: Mapping[str, Any] | None, where: str
) -> Iterator[str]:
    """Yield what added tokens lose; ``byte_level`` is the model if its tokens are written in symbols of bytes."""
    special = [token["content"] for token in added if token.get("special")]
    merged: set[str] = set(byte_symbols()) if byte_level is not None else set()
    if byte_level is not None and special:
        pairs = byte_level["merges"]
        merged |= {"".join(pair) if isinstance(pair, list) else pair.replace(" ", "") for pair in pairs}
    for content in special:  # `Tokenizer` encodes special tokens as text, so that they are never searched for
        if content in merged:
            raise UserError(
                f"{where}: the special token {_short(content)} is one that ordinary text gives; rename it, or set its "
                "special to false"
            )
    for token in added:
        content = token["content"]
        if token.get("special"):
            continue
        if token.get("lstrip") or token.get("rstrip"):
            yield f"its added token {_short(content)} swallows the white space beside it"
        elif byte_level is not None and decoded(content) != content.encode():
            yield f"its added token {_short(content)} decodes to another text"


def check_ids(vocabulary: Mapping[str, int], where: str) -> None:
    """Raise `UserError` unless each id is used once, and most ids up to the largest are used.

    A model has a row for every id. Files with some ids left out are common, and a damaged one could ask for terabytes.
    """
    count, largest = len(vocabulary), max(vocabulary.values())
    if largest >= _LARGEST_SHARE * count or min(vocabulary.values()) < 0:
        raise UserError(
            f"{where}: {count} tokens have ids up to {largest}; a model has a row for every id, so the largest may be "
            f"{_LARGEST_SHARE * count - 1}"
        )
    if len(set(vocabulary.values())) != count:
        raise UserError(f"{where}: two tokens have the same id; each needs its own")


@lru_cache(maxsize=1)
def _probes() -> tuple[str, ...]:
    """Return the texts of the round trip: `_TEXTS`, and characters from all of Unicode."""
    points = [*range(0x500), *range(0x500, 0x3100, 7), *range(0x3100, 0x110000, 211)]
    characters = [chr(point) for point in points if not 0xD800 <= point < 0xE000]
    return (*_TEXTS, "".join(characters), " ".join(characters[::5]))


def changed_text(inner: tokenizers.Tokenizer, token_bytes: np.ndarray[Any, Any] | None, where: str) -> str | None:
    """Encode and decode test texts; return the first difference, as a sentence, or None if all come back.

    Args:
        inner: the tokenizer of the library, set to encode special tokens as text.
        token_bytes: int64 [vocabulary], the bytes of each token, which must add up to the text's; None if unknown.
        where: begins an error.

    Raises:
        UserError: the library cannot encode a text.
    """
    added = [token.content for token in inner.get_added_tokens_decoder().values()]
    marked = "".join(f"a{content} {content}{content}\n\t{content}a " for content in added)
    found = None
    for text in (*_probes(), marked, *added):
        with library_errors(f"{where}: the tokenizers library cannot encode {_short(text)}"):
            ids = inner.encode(text, add_special_tokens=False).ids
            back = inner.decode(ids, skip_special_tokens=True)
        added_up = token_bytes is None or int(token_bytes[ids].sum()) == len(text.encode())
        if found is None and (back != text or not added_up):
            at = next((n for n, pair in enumerate(zip(text, back, strict=False)) if pair[0] != pair[1]), 0)
            shown = (_short(each[max(0, at - 4) : at + 12]) for each in (text, back))
            found = " comes back as ".join(shown)
    return found


def _short(value: object) -> str:
    return reprlib.repr(value)
