"""Vocabularies in files of their own: ``vocab.txt`` of WordPiece, and ``vocab.json`` with ``merges.txt`` of GPT-2."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers

from sparsetrain.data.tokenizer_end import END_NAMES
from sparsetrain.data.tokenizer_file import library_errors
from sparsetrain.errors import UserError
from sparsetrain.reading import read_json, read_text

_SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
_ROLES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


def from_word_pieces(vocabulary: str, config: Mapping[str, Any], where: str) -> bytes:
    """Return the content of a ``tokenizer.json`` for a ``vocab.txt``, which has a token in each line, as BERT has it.

    Args:
        vocabulary: the text of the file.
        config: of ``tokenizer_config.json``: ``do_lower_case``, by default true, ``strip_accents`` and
            ``tokenize_chinese_chars``.
        where: begins the line of an error.

    Raises:
        UserError: a token is repeated, or there is none for unknown words.
    """
    tokens = vocabulary.split("\n")
    tokens = [token.rstrip("\r") for token in (tokens[:-1] if tokens[-1] == "" else tokens)]
    found = {token: number for number, token in enumerate(tokens)}
    if len(found) < len(tokens):
        raise UserError(
            f"{where}: vocab.txt has {len(tokens) - len(found)} tokens twice; each line must be another one"
        )
    if "[UNK]" not in found:
        raise UserError(f"{where}: vocab.txt has no [UNK] for unknown words, so it is no vocabulary of WordPiece")
    with library_errors(f"{where}: no vocabulary of WordPiece"):
        inner = tokenizers.Tokenizer(models.WordPiece(found, unk_token="[UNK]", max_input_chars_per_word=100))
        inner.normalizer = normalizers.BertNormalizer(
            handle_chinese_chars=bool(config.get("tokenize_chinese_chars", True)),
            strip_accents=config.get("strip_accents"),
            lowercase=bool(config.get("do_lower_case", True)),
        )
        inner.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        inner.decoder = decoders.WordPiece()
        inner.add_special_tokens([token for token in _SPECIAL if token in found])
        return str(inner.to_str(pretty=True)).encode()


def from_bpe_files(vocabulary: Path, merges: Path, config: Mapping[str, Any], where: str) -> bytes:
    """Return the content of a ``tokenizer.json`` for the two files of a byte-level BPE, as GPT-2 has it.

    Args:
        vocabulary: a JSON object of tokens and their ids.
        merges: a line of two tokens for each merge; a first line that begins with ``#version`` is none.
        config: of ``tokenizer_config.json``: the special tokens, and ``add_prefix_space``.
        where: begins the line of an error.

    Raises:
        UserError: a file cannot be read.
    """
    found = read_json(vocabulary, dict[str, int])
    lines = [line for line in read_text(merges).split("\n") if line.strip()]
    lines = [line.rstrip("\r") for line in lines if not line.startswith("#version")]
    if wrong := next((line for line in lines if line.count(" ") != 1), None):
        raise UserError(f"{where}: {merges.name} has the line {wrong!r:.60}, which is not two tokens")
    named = [token["content"] if isinstance(token, dict) else token for token in (config.get(role) for role in _ROLES)]
    with library_errors(f"{where}: no vocabulary of byte-level BPE"):
        inner = tokenizers.Tokenizer(
            models.BPE(vocab=found, merges=[(one, other) for one, other in (line.split(" ") for line in lines)])
        )
        inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=bool(config.get("add_prefix_space", False)))
        inner.decoder = decoders.ByteLevel()
        inner.add_special_tokens([name for name in dict.fromkeys([*named, *END_NAMES]) if name in found])
        return str(inner.to_str(pretty=True)).encode()
