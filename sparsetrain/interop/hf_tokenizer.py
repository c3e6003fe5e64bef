"""A tokenizer of ours as the files that AutoTokenizer reads; its ids stay the same."""

from __future__ import annotations

import json
from pathlib import Path

import tokenizers

from sparsetrain.data import Tokenizer
from sparsetrain.data.tokenizer_end import MARK


def tokenizer_files(tokenizer: Tokenizer, directory: Path, max_context: int) -> None:
    """Write ``tokenizer.json`` and ``tokenizer_config.json``.

    Our runs add no token to a text, so neither does what AutoTokenizer loads. Names of special tokens inside a text are
    text, as in our runs.

    Args:
        max_context: tokens in the longest training sequence.
    """
    (directory / "tokenizer.json").write_text(_plain(tokenizer.content.decode()), encoding="utf-8")
    content = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": max_context,
        "eos_token": tokenizer.eos_token,
        "pad_token": tokenizer.eos_token,
        "add_bos_token": False,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "split_special_tokens": True,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _plain(text: str) -> str:
    """Return a ``tokenizer.json`` that puts no tokens before or behind a text, and without our mark of the end.

    A file that does and has neither is returned as it is.
    """
    content = json.loads(text)
    marked = [token for token in content.get("added_tokens") or [] if token.pop(MARK, None) is not None]
    adds = tokenizers.Tokenizer.from_str(text).num_special_tokens_to_add(is_pair=False) > 0
    if adds:
        content["post_processor"] = None
    return json.dumps(content, indent=2, ensure_ascii=False) if marked or adds else text
