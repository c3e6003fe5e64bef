"""Tokenizers against the `tokenizers` library and against UTF-8."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tokenizers
import torch
from fresh import Fresh
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import models, pre_tokenizers

from sparsetrain.data.tokenizer import END_OF_TEXT, Tokenizer
from sparsetrain.errors import UserError

TEXTS = [f"The {word} sat on the mat, and the naïve {word} slept." for word in ("cat", "dog", "owl", "fox")] * 5
BPE = Tokenizer.train(TEXTS, 280)
BYTES = Tokenizer.bytes()
MARKED = BYTES.with_sentinels()

any_text = st.text(alphabet=st.characters(exclude_categories=["Cs"]))


@pytest.mark.parametrize("tokenizer", [BPE, BYTES], ids=["bpe", "bytes"])
@given(text=any_text)
@example(text=f"a{END_OF_TEXT}b")
@example(text=" \n\t  \r\n ")
@example(text="😀 naïve الكتاب 汉字 \x00")
def test_round_trip_and_bytes_of_any_text(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.eos_id not in ids
    assert int(tokenizer.token_bytes[torch.tensor(ids, dtype=torch.long)].sum()) == len(text.encode())


@given(any_text)
def test_byte_tokenizer_matches_utf8(text: str) -> None:
    assert BYTES.encode(text) == list(text.encode())
    assert (BYTES.vocab_size, BYTES.eos_id) == (257, 256)


@given(any_text)
def test_bytes_are_not_sent_to_the_library_which_gives_the_same(text: str) -> None:
    for tokenizer in (BYTES, MARKED):
        expected = tokenizer._inner.encode(text, add_special_tokens=False).ids
        assert tokenizer.encode(text) == tokenizer.encode_batch([text])[0] == expected
    assert not BPE._is_bytes


@given(st.lists(any_text, max_size=5))
def test_batch_matches_single(texts: list[str]) -> None:
    assert BPE.encode_batch(texts) == [BPE.encode(text) for text in texts]


def test_ids_match_the_tokenizers_library(tmp_path: Path) -> None:
    BPE.save(tmp_path / "tokenizer.json")
    inner = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    for text in TEXTS:
        assert BPE.encode(text) == inner.encode(text).ids
    assert inner.token_to_id(END_OF_TEXT) == BPE.eos_id
    assert inner.get_vocab_size() == BPE.vocab_size == 280


def test_token_bytes_is_zero_for_the_end_only() -> None:
    for tokenizer in (BPE, BYTES):
        assert tokenizer.token_bytes.shape == (tokenizer.vocab_size,)
        assert (tokenizer.token_bytes == 0).nonzero().flatten().tolist() == [tokenizer.eos_id]


def test_a_small_text_gives_a_small_vocabulary() -> None:
    small = Tokenizer.train(["ab ab"], 4096)
    assert small.vocab_size == 257 + len(["ab"])  # " ab" occurs once only
    assert small.decode(small.encode("cd")) == "cd"


def test_training_is_deterministic_across_processes(fresh: Fresh) -> None:
    code = (
        "import sys, json; from sparsetrain.data.tokenizer import Tokenizer;"
        "print(Tokenizer.train(json.load(sys.stdin), 280).sha256)"
    )
    done = fresh.run(code, text=json.dumps(TEXTS))
    assert done.stdout.strip() == BPE.sha256


def test_load_keeps_the_hash(tmp_path: Path) -> None:
    BPE.save(tmp_path / "tokenizer.json")
    for path in (tmp_path, tmp_path / "tokenizer.json"):
        loaded = Tokenizer.load(path)
        assert (loaded.sha256, loaded.vocab_size, loaded.eos_id) == (BPE.sha256, BPE.vocab_size, BPE.eos_id)


def test_end_token_goes_by_its_other_names(tmp_path: Path) -> None:
    content = json.dumps(json.loads(_content(tmp_path, BPE)), ensure_ascii=False).replace(END_OF_TEXT, "</s>")
    assert Tokenizer(content.encode()).eos_token == "</s>"


def _content(tmp_path: Path, tokenizer: Tokenizer) -> str:
    tokenizer.save(tmp_path / "content.json")
    return (tmp_path / "content.json").read_text(encoding="utf-8")


def test_unusable_tokenizers_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file"):
        Tokenizer.load(tmp_path / "none.json")
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match=r"tokenizer_path=.*not a tokenizer\.json"):
        Tokenizer.load(tmp_path)
    words = tokenizers.Tokenizer(models.WordLevel({"a": 0, END_OF_TEXT: 1}, unk_token="a"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    with pytest.raises(UserError, match=r"no token that ends a document; .* with data\.eos_token"):
        Tokenizer(words.to_str().encode())
    with pytest.raises(UserError, match="no token that ends a document"):
        Tokenizer(_content(tmp_path, BPE).replace(END_OF_TEXT, "<|other|>").encode())
    with pytest.raises(UserError, match=r"vocab_size=256 .* the least is 257"):
        Tokenizer.train(["a"], 256)
