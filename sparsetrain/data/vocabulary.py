"""A tokenizer's vocabulary for a second language: further tokens that leave the text of the first as it was."""

from __future__ import annotations

import itertools
import json
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import tokenizers

from sparsetrain.data.bpe_extension import Merges, Pair, Word, blocks, learn_merges, neighbours
from sparsetrain.data.bpe_training import LONGEST_WORD
from sparsetrain.data.sources.base import check_text
from sparsetrain.data.tokenizer import Tokenizer
from sparsetrain.data.tokenizer_file import library_errors
from sparsetrain.errors import UserError

_BATCH = 256  # texts per call of the library
# GPT-2's pattern of words, with further characters beside the letters. Without them it is the pattern of ByteLevel.
_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d| ?[\p{{L}}{marks}]+| ?\p{{N}}+| ?[^\s\p{{L}}\p{{N}}{marks}]+|\s+(?!\S)|\s+"

_ESCAPED = re.compile(r"\\x\{([0-9A-F]{1,5})\}")


def extend_tokenizer(
    tokenizer: Tokenizer | str | Path,
    texts: Iterable[str],
    n_tokens: int,
    *,
    keep: Iterable[str] | None = None,
    shared: bool = False,
) -> Tokenizer:
    """Return a tokenizer with up to ``n_tokens`` further tokens learned on ``texts``; the old tokens keep their ids.

    The new merges follow the old ones. A text without a character of the new blocks (64 characters each, such as U+0600
    to U+063F) is split exactly as before: a merge of two old tokens is only learned if its bytes have a character of a
    new block, or the first bytes that only its characters have; all other new merges need a token that such a merge
    gives. New blocks are those of which ``texts`` has a letter and the old tokens have no character. So Arabic extends
    a tokenizer of English as arXiv 2407.12869 does, and no sentence of English changes.

    If the tokenizer cuts words by GPT-2's pattern, the combining marks of the new blocks become parts of words (and
    with ``shared`` those of ``texts``), unless they are in ``keep``. The pattern alone would end a word at each vowel
    sign. It treats all other characters as before.

    Args:
        tokenizer: a tokenizer, or the path of a ``tokenizer.json``.
        texts: text of the second language; held in memory.
        n_tokens: the largest number of new tokens. A small text may yield fewer.
        keep: texts that must be split as before whatever they contain. A merge of two old tokens that are neighbours in
            one of them is not learned. A few documents in the new script can cost many merges, so leave such out.
        shared: whether merges of characters outside the new blocks may be learned too, for a language of the same
            script. Only ``keep``, which it needs, is then sure to be split as before.

    Raises:
        UserError: the tokenizer loses text, an argument is not of its kind, the texts have no letter in a new block and
            ``shared`` is off, or no token could be learned.
    """
    old = tokenizer if isinstance(tokenizer, Tokenizer) else Tokenizer.load(tokenizer)
    old.need_bytes("extend_tokenizer")
    if isinstance(n_tokens, bool) or not isinstance(n_tokens, int) or n_tokens < 1:
        raise UserError(f"n_tokens={n_tokens!r} is not a positive integer")
    if shared and keep is None:
        raise UserError("shared=True needs keep=, texts of the first language that must be split as before")
    learned_from = _checked(texts, "texts")
    kept = [] if keep is None else _checked(keep, "keep")
    new_blocks = new_blocks_of(old, learned_from)
    if not new_blocks and not shared:
        raise UserError(
            "texts: no letter of a script that the tokenizer has no tokens of yet; give keep= texts of the first "
            "language and shared=True to learn more tokens of a script that it has"
        )
    layout: dict[str, Any] = json.loads(old.content)
    marks = _marks(new_blocks) | (_of_kind(learned_from, "M") if shared else set())
    _join_marks(layout, marks - set().union(*kept))
    with library_errors("extend_tokenizer: the tokenizers library cannot split the texts"):
        kept_pairs = _kept_pairs(old, kept)
        words = _split_words(layout, learned_from)
    names = _names(old)

    def allowed(left: int, right: int) -> bool:
        if (left, right) in kept_pairs:
            return False
        one, other = old.spellings[left], old.spellings[right]
        assert isinstance(one, bytes)  # a special token is no part of a word
        assert isinstance(other, bytes)
        return shared or not new_blocks.isdisjoint(blocks(one + other))

    merges = learn_merges(words, names, n_tokens, allowed)
    if not merges.tokens:
        raise UserError("texts: no pair of tokens that may be merged occurs twice; give more text")
    return Tokenizer(_written(layout, names, merges), origin="the extended tokenizer")


def fertility(tokenizer: Tokenizer, texts: Iterable[str]) -> tuple[float, float]:
    """Return the tokens per UTF-8 byte and per word of ``texts``, where white space separates words.

    Raises:
        UserError: the texts have no word.
    """
    tokens = size = words = 0
    for batch in _batches(texts):
        tokens += sum(map(len, tokenizer.encode_batch(batch)))
        size += sum(len(text.encode()) for text in batch)
        words += sum(len(text.split()) for text in batch)
    if not words:
        raise UserError("texts: no word to count the tokens of")
    return tokens / size, tokens / words


# -------------------------------------------------------------------------------------------------------- characters


def _checked(texts: Iterable[str], name: str) -> list[str]:
    if isinstance(texts, str):
        raise UserError(f"{name} is a single string; give a list of texts")
    if not isinstance(texts, Iterable):
        raise UserError(f"{name}={texts!r:.60} is no list of texts")
    found = [check_text(text, f"{name}, text {number}") for number, text in enumerate(texts, start=1)]
    if not any(found):
        raise UserError(f"{name} has no text")
    return found


def new_blocks_of(old: Tokenizer, texts: Iterable[str]) -> set[bytes]:
    """Return the blocks of which the texts have a letter and the old tokens no character; see `blocks`."""
    letters = _of_kind(texts, "LM")
    # Every byte is a token, whether the first language had it or not.
    longer = [spelling for spelling in old.spellings if isinstance(spelling, bytes) and len(spelling) > 1]
    used = {block for spelling in longer for block in blocks(spelling)}
    return {block for character in letters for block in blocks(character.encode())} - used


def _of_kind(texts: Iterable[str], kinds: str) -> set[str]:
    """Return the characters of texts whose Unicode category begins with one of ``kinds``."""
    return {character for character in set().union(*texts) if unicodedata.category(character)[0] in kinds}


def _marks(new_blocks: Iterable[bytes]) -> set[str]:
    """Return the combining marks of some blocks."""
    members = {(block + bytes([last])).decode(errors="ignore") for block in new_blocks for last in range(0x80, 0xC0)}
    return {character for character in members if character and unicodedata.category(character)[0] == "M"}


def _join_marks(layout: dict[str, Any], marks: set[str]) -> None:
    """Make marks parts of words, if the tokenizer has GPT-2's pattern of words, or has it with other marks already."""
    step = layout["pre_tokenizer"]
    if step["type"] == "ByteLevel" and step.get("use_regex", True):
        present, last = set(), {**step, "use_regex": False}
    elif step["type"] == "Sequence" and len(step["pretokenizers"]) == 2:
        first, last = step["pretokenizers"]
        given = first.get("pattern")
        regex = given.get("Regex", "") if isinstance(given, dict) else ""
        present = {chr(int(point, 16)) for point in _ESCAPED.findall(regex)}
        if first != _split_at(present):
            return
    else:
        return
    if marks - present:
        layout["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [_split_at(present | marks), last]}


def _split_at(marks: set[str]) -> dict[str, Any]:
    """Return the step that cuts words by GPT-2's pattern, with marks as parts of words."""
    escaped = "".join(rf"\x{{{ord(mark):X}}}" for mark in sorted(marks))
    pattern = {"Regex": _WORDS.format(marks=escaped)}
    return {"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": False}


# -------------------------------------------------------------------------------------------------------- words


def _kept_pairs(tokenizer: Tokenizer, texts: Sequence[str]) -> set[Pair]:
    """Return the pairs of tokens that are neighbours in a word of one of the texts.

    They are enough also for a tokenizer that looks whole words up before it merges (``ignore_merges``): a new token
    that is a word of the texts would consist of the same old tokens as the word, so its first merge would be a pair.
    """
    inner = _library(tokenizer.content.decode())
    return {
        pair
        for batch in _batches(texts)
        for encoding in inner.encode_batch(batch, add_special_tokens=False)
        for pair in neighbours(encoding.ids, encoding.word_ids)
    }


def _split_words(layout: dict[str, Any], texts: Sequence[str]) -> Counter[Word]:
    """Return the words of the texts as the tokenizer of ``layout`` splits them, with their numbers of occurrences."""
    inner = _library(json.dumps(layout))
    words: Counter[str] = Counter()
    for text in texts:
        words.update(word for word, _ in inner.pre_tokenizer.pre_tokenize_str(text))
    found: Counter[Word] = Counter()
    for word, count in words.items():
        # The time for a word grows with the square of its length, so a longer one is read in pieces.
        for start in range(0, len(word), LONGEST_WORD):
            found[tuple(token.id for token in inner.model.tokenize(word[start : start + LONGEST_WORD]))] += count
    return found


def _library(content: str) -> tokenizers.Tokenizer:
    inner = tokenizers.Tokenizer.from_str(content)
    inner.no_padding()
    inner.no_truncation()
    inner.encode_special_tokens = True  # as in `Tokenizer`: the name of a special token is text
    return inner


def _batches(texts: Iterable[str]) -> Iterable[list[str]]:
    iterator = iter(texts)
    while batch := list(itertools.islice(iterator, _BATCH)):
        yield batch


# -------------------------------------------------------------------------------------------------------- the file


def _names(tokenizer: Tokenizer) -> list[str]:
    """Return the names of the tokens in the file, by id."""
    vocabulary = _library(tokenizer.content.decode()).get_vocab(with_added_tokens=True)
    return sorted(vocabulary, key=vocabulary.__getitem__)


def _written(layout: dict[str, Any], names: Sequence[str], merges: Merges) -> bytes:
    """Return the file with further merges and tokens."""
    model = layout["model"]
    # The library numbers an added token that is not in the vocabulary by the size of the vocabulary, which has changed.
    model["vocab"] = {name: index for index, name in enumerate([*names, *merges.tokens])}
    as_text = bool(model["merges"]) and isinstance(model["merges"][0], str)
    model["merges"] += [" ".join(pair) if as_text else list(pair) for pair in merges.pairs]
    return json.dumps(layout, ensure_ascii=False, indent=2).encode()
