"""A tokenizer of ours as the files that AutoTokenizer reads; its ids stay the same."""

from __future__ import annotations

import json
from pathlib import Path

import tokenizers

from sparsetrain.data import Tokenizer


def tokenizer_files(tokenizer: Tokenizer, directory: Path, max_context: int) -> None:
    """Write ``tokenizer.json`` and ``tokenizer_config.json``.

    Our runs add no token to a text, so neither does what AutoTokenizer loads. Names of special tokens inside a text are
    text, as in our runs.

    Args:
        max_context: tokens in the longest training sequence.
    """
    tokenizer.save(directory / "tokenizer.json")
    _drop_added_tokens(directory / "tokenizer.json")
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


def _drop_added_tokens(path: Path) -> None:
    """Remove the step of a ``tokenizer.json`` that puts tokens before and behind a text, if it has one."""
    text = path.read_text(encoding="utf-8")
    inner = tokenizers.Tokenizer.from_str(text)
    if inner.num_special_tokens_to_add(is_pair=False):
        content = json.loads(text)
        content["post_processor"] = None
        path.write_text(json.dumps(content, indent=2, ensure_ascii=False), encoding="utf-8")
