"""Encodings of `tiktoken`: a file with a token and its rank in each line, or the name of an encoding."""

from __future__ import annotations

import base64
import binascii
import functools
import warnings
from collections.abc import Mapping
from typing import NamedTuple

import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from sparsetrain.data.tokenizer_end import END_OF_TEXT
from sparsetrain.data.tokenizer_file import byte_symbols, library_errors
from sparsetrain.data.tokenizer_formats.sentencepiece import merges_of
from sparsetrain.errors import UserError

# The patterns by which the encodings cut words; a file of ranks does not say its own.
_END = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_R50K = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_CL100K = _END + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_O200K = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_END}?|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_END}?|"
    r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


class _Encoding(NamedTuple):
    pattern: str
    specials: Mapping[str, int]


_FIM = {"<|fim_prefix|>": 100258, "<|fim_middle|>": 100259, "<|fim_suffix|>": 100260}
_ENCODINGS = {
    "gpt2": _Encoding(_R50K, {END_OF_TEXT: 50256}),
    "r50k_base": _Encoding(_R50K, {END_OF_TEXT: 50256}),
    "p50k_base": _Encoding(_R50K, {END_OF_TEXT: 50256}),
    "cl100k_base": _Encoding(_CL100K, {END_OF_TEXT: 100257, **_FIM}),
    "o200k_base": _Encoding(_O200K, {END_OF_TEXT: 199999}),
}
TIKTOKEN_NAMES = tuple(_ENCODINGS)


def from_tiktoken(content: bytes, name: str, where: str) -> bytes:
    """Return the content of a ``tokenizer.json`` for a file of tokens in base64 with their ranks.

    Args:
        content: the bytes of the file.
        name: its name without the suffix. If it is not in `TIKTOKEN_NAMES`, words are cut as ``cl100k_base`` does, with
            a warning, and ``<|endoftext|>`` follows the last rank.
        where: begins the line of an error.

    Raises:
        UserError: a line is none, or a byte has no token.
    """
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(content.splitlines(), start=1):
        if not line.strip():
            continue
        token, _, rank = line.partition(b" ")
        try:
            spelling, place = base64.b64decode(token, validate=True), int(rank)
        except (binascii.Error, ValueError):
            raise UserError(f"{where}: line {number} is not a token in base64 and its rank") from None
        if not spelling or place < 0 or spelling in ranks:
            raise UserError(f"{where}: line {number} has an empty or a repeated token, or a negative rank")
        ranks[spelling] = place
    encoding = _ENCODINGS.get(name)
    if encoding is None:
        warnings.warn(
            f"{where}: the file does not say how words are cut, and its name is none of {', '.join(_ENCODINGS)}; they "
            "are cut as cl100k_base does",
            stacklevel=2,
        )
        encoding = _Encoding(_CL100K, {END_OF_TEXT: max(ranks.values(), default=-1) + 1})
    return _written(ranks, encoding, where)


@functools.lru_cache(maxsize=2)
def from_tiktoken_name(name: str, where: str) -> bytes:
    """Return the content of a ``tokenizer.json`` for an encoding that the package `tiktoken` has or downloads.

    Raises:
        UserError: the package is missing, or it cannot download the encoding.
    """
    try:
        import tiktoken
    except ImportError:
        raise UserError(
            f"{where}: an encoding of tiktoken needs that package: pip install 'sparsetrain[tiktoken]'"
        ) from None
    try:
        ranks = tiktoken.get_encoding(name)._mergeable_ranks
    except Exception as error:  # those of its HTTP client among them
        raise UserError(f"{where}: tiktoken does not give this encoding ({type(error).__name__})") from None
    return _written(ranks, _ENCODINGS[name], where)


def _written(ranks: Mapping[bytes, int], encoding: _Encoding, where: str) -> bytes:
    symbols = byte_symbols()
    missing = [byte for byte in range(256) if bytes([byte]) not in ranks]
    if missing:
        raise UserError(f"{where}: {len(missing)} of the 256 bytes have no token, such as 0x{missing[0]:02x}")
    names = {"".join(symbols[byte] for byte in token): rank for token, rank in ranks.items()}
    merges = merges_of(sorted(names, key=names.__getitem__), names)
    with library_errors(f"{where}: no encoding of tiktoken"):
        # A word that is a token is taken whole, as tiktoken does it.
        model = models.BPE(vocab={**names, **encoding.specials}, merges=merges, ignore_merges=True)
        inner = tokenizers.Tokenizer(model)
        inner.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(tokenizers.Regex(encoding.pattern), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
        inner.decoder = decoders.ByteLevel()
        inner.add_special_tokens(list(encoding.specials))
        return str(inner.to_str(pretty=True)).encode()
