"""Checks that a tokenizer is lossless: every text decodes to itself, and the bytes of its tokens add up.

Many settings of a ``tokenizer.json`` lose text: a space before each text, a normalizer, dropped white space between
words, bytes without a symbol. `check_layout` refuses such settings in the file. `check_round_trip` encodes and decodes
texts that lossy tokenizers often change.
"""

from __future__ import annotations

import contextlib
import reprlib
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import tokenizers

from sparsetrain.errors import UserError
from sparsetrain.reading import parse_json

# Pre-tokenizers that lose no character. `Split` and `Punctuation` do with behavior Removed, which is checked too.
_LOSSLESS = ("ByteLevel", "Split", "Punctuation", "Digits")
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


def check_layout(content: bytes, where: str) -> None:
    """Raise `UserError` if a setting of a ``tokenizer.json`` makes a byte-level tokenizer lose text.

    The line names the setting and what to do. The types of the values are not checked here, since the library must
    have read the file before.

    Args:
        content: the bytes of the file.
        where: begins the line.
    """
    try:
        layout: Mapping[str, Any] = parse_json(content, "the file", dict, finite=False)
    except UserError as error:
        raise UserError(f"{where}: not a tokenizer.json ({error})") from None
    _check_steps(layout, where)
    _check_model(layout["model"], where)
    _check_added(layout.get("added_tokens") or [], layout["model"], where)


def _steps(step: Mapping[str, Any] | None, inside: str) -> Iterator[Mapping[str, Any]]:
    """Yield ``step``, or the steps of a nested ``Sequence``, whose list has the key ``inside``."""
    if step is None:
        return
    if step.get("type") != "Sequence":
        yield step
        return
    for member in step[inside]:
        yield from _steps(member, inside)


def _check_steps(layout: Mapping[str, Any], where: str) -> None:
    before = list(_steps(layout.get("pre_tokenizer"), "pretokenizers"))
    after = list(_steps(layout.get("decoder"), "decoders"))
    no_bytes = f"{where}: not a byte-level tokenizer; bits per byte need one, such as GPT-2's or Llama 3's"
    names = [step.get("type") for step in before]
    kind = layout["model"].get("type", "BPE" if "merges" in layout["model"] else None)  # old files leave it out
    if kind != "BPE" or names.count("ByteLevel") != 1:
        raise UserError(f"{no_bytes} (model BPE, pre_tokenizer and decoder ByteLevel)")
    if [step.get("type") for step in after if step.get("type") != "Fuse"] != ["ByteLevel"]:
        raise UserError(f"{no_bytes} (its decoder is not ByteLevel)")
    for step in _steps(layout.get("normalizer"), "normalizers"):
        raise UserError(
            f"{where}: the normalizer {_short(step.get('type'))} rewrites text before it is encoded; "
            "set normalizer to null"
        )
    for step in before:
        name = step.get("type")
        if name not in _LOSSLESS or "removed" in str(step.get("behavior", "")).lower():
            raise UserError(
                f"{where}: the pre_tokenizer {_short(name)} leaves out characters; allowed are {', '.join(_LOSSLESS)}, "
                "and no behavior Removed"
            )
        if name == "ByteLevel" and step.get("add_prefix_space", True) is not False:
            raise UserError(
                f"{where}: the pre_tokenizer ByteLevel puts a space before each text; set its add_prefix_space to false"
            )


def _check_model(model: Mapping[str, Any], where: str) -> None:
    vocabulary: dict[str, int] = model["vocab"]
    if missing := [byte for byte, symbol in enumerate(byte_symbols()) if symbol not in vocabulary]:
        shown = ", ".join(f"0x{byte:02x}" for byte in missing[:3]) + (", …" if len(missing) > 3 else "")
        raise UserError(
            f"{where}: the vocabulary has no token for {len(missing)} of the 256 bytes ({shown}), which would be left "
            "out of texts; train it with the whole alphabet of ByteLevel"
        )
    if len(set(vocabulary.values())) < len(vocabulary):
        raise UserError(f"{where}: two tokens of the vocabulary have the same id; each needs its own")
    if model.get("dropout"):
        raise UserError(f"{where}: dropout={model['dropout']} makes the tokens of a text random; set it to null")
    for name in ("continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(name):
            raise UserError(f"{where}: {name}={_short(model[name])} is no byte of a text; set it to null")


def _check_added(added: Sequence[Mapping[str, Any]], model: Mapping[str, Any], where: str) -> None:
    merged = {
        "".join(pair) if isinstance(pair, list) else pair.replace(" ", "")
        for pair in (model["merges"] if any(token.get("special") for token in added) else ())
    }
    for token in added:
        content = token["content"]
        if token.get("special"):
            if content in merged or content in byte_symbols():
                raise UserError(
                    f"{where}: the special token {_short(content)} is one that ordinary text gives; rename it, or set "
                    "its special to false"
                )
            continue  # `Tokenizer` encodes special tokens as text, so this one is never searched for
        if token.get("lstrip") or token.get("rstrip"):
            raise UserError(
                f"{where}: the added token {_short(content)} swallows the white space beside it; set its lstrip and "
                "rstrip to false"
            )
        if decoded(content) != content.encode():
            raise UserError(f"{where}: the added token {_short(content)} decodes to another text; rename or remove it")


def check_ids(vocabulary: Mapping[str, int], where: str) -> None:
    """Raise `UserError` unless the ids are 0, 1, 2, ... without a gap, since an embedding has one row per id."""
    count, largest = len(vocabulary), max(vocabulary.values())
    if largest != count - 1 or len(set(vocabulary.values())) != count:
        raise UserError(
            f"{where}: {count} tokens have ids up to {largest}; ids must be 0 to {count - 1}, each used once, since a "
            "model has a row for every id"
        )


@lru_cache(maxsize=1)
def _probes() -> tuple[str, ...]:
    """Return the texts of the round trip: `_TEXTS`, and characters from all of Unicode."""
    points = [*range(0x500), *range(0x500, 0x3100, 7), *range(0x3100, 0x110000, 211)]
    characters = [chr(point) for point in points if not 0xD800 <= point < 0xE000]
    return (*_TEXTS, "".join(characters), " ".join(characters[::5]))


def check_round_trip(inner: tokenizers.Tokenizer, token_bytes: np.ndarray[Any, Any], where: str) -> None:
    """Raise `UserError` unless each test text decodes to itself and the bytes of its tokens add up to its own.

    Args:
        inner: the tokenizer of the library, set to encode special tokens as text.
        token_bytes: int64 [vocabulary], the number of bytes of each token.
        where: begins the error.
    """
    added = [token.content for token in inner.get_added_tokens_decoder().values()]
    marked = "".join(f"a{content} {content}{content}\n\t{content}a " for content in added)
    for text in (*_probes(), marked, *added):
        with library_errors(f"{where}: the tokenizers library cannot encode {_short(text)}"):
            ids = inner.encode(text, add_special_tokens=False).ids
            back = inner.decode(ids, skip_special_tokens=True)
        if back != text or int(token_bytes[ids].sum()) != len(text.encode()):
            place = next((n for n, pair in enumerate(zip(text, back, strict=False)) if pair[0] != pair[1]), 0)
            shown = _short(text[max(0, place - 8) : place + 16])
            raise UserError(f"{where}: a text does not come back as it was, at {shown}; bits per byte would be wrong")


def _short(value: object) -> str:
    return reprlib.repr(value)
