"""Extended tokenizers: the first language is split as before, the second as by a BPE of its own."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from bpe import trained_by_the_library
from hypothesis import example, given, settings
from hypothesis import strategies as st
from languages import ARABIC, ENGLISH, LATIN, VOWELS, WRITTEN_ARABIC, documents, words
from tokenizers import AddedToken, models, pre_tokenizers

from sparsetrain.data.bpe_extension import learn_merges
from sparsetrain.data.tokenizer import END_OF_TEXT, Tokenizer
from sparsetrain.data.vocabulary import extend_tokenizer, fertility
from sparsetrain.errors import UserError

N = 150
OLD = Tokenizer.train(ENGLISH, 400)
NEW = extend_tokenizer(OLD, WRITTEN_ARABIC, N)
UNSEEN = documents(words(ARABIC, VOWELS), 60, seed=2)
LLAMA_3 = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"

any_text = st.text(alphabet=st.characters(exclude_categories=["Cs"]))
# The blocks of 64 that Arabic letters and marks are in.
other_text = st.text(
    alphabet=st.characters(exclude_categories=["Cs"], exclude_characters=[chr(point) for point in range(0x600, 0x680)])
)


def by_the_library(texts: list[str], vocab_size: int, pre_tokenizer: Any) -> tokenizers.Tokenizer:
    """Return a BPE that the library learns on the texts alone, with the words of a pre-tokenizer."""
    inner = tokenizers.Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizer
    return trained_by_the_library(inner, texts, vocab_size)


def file(tokenizer: Tokenizer, **model: Any) -> dict[str, Any]:
    layout: dict[str, Any] = json.loads(tokenizer.content)
    layout["model"].update(model)
    return layout


def read(layout: dict[str, Any]) -> Tokenizer:
    return Tokenizer(json.dumps(layout).encode())


def test_old_tokens_keep_their_ids_and_new_ones_follow() -> None:
    assert NEW.vocab_size == OLD.vocab_size + N
    assert NEW.spellings[: OLD.vocab_size] == OLD.spellings
    assert (NEW.eos_id, NEW.eos_token) == (OLD.eos_id, OLD.eos_token)
    assert len(set(NEW.spellings)) == NEW.vocab_size


@given(other_text)
@example("It's 12 naïve Ωmega-3 tests; e\u0301, 日本語 and 😀.\n\n  x")
@example(" ".join(ENGLISH[:20]))
def test_any_text_without_the_new_script_is_split_as_before(text: str) -> None:
    assert NEW.encode(text) == OLD.encode(text)


def test_documents_of_the_first_language_are_split_as_before() -> None:
    unseen = documents(words(LATIN, count=900, seed=7), 400, seed=3)
    assert NEW.encode_batch(unseen) == OLD.encode_batch(unseen)
    assert NEW.encode_batch(UNSEEN) != OLD.encode_batch(UNSEEN)


@given(any_text)
@example(UNSEEN[0])
def test_every_text_comes_back(text: str) -> None:
    ids = NEW.encode(text)
    assert NEW.decode(ids) == text
    spelled = [NEW.spellings[token] for token in ids]
    assert b"".join(part for part in spelled if isinstance(part, bytes)) == text.encode()


def test_the_second_language_takes_about_as_few_tokens_as_under_a_bpe_of_its_own() -> None:
    """The oracle has as many tokens of its own, and the same words."""
    pattern = json.loads(NEW.content)["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"]
    split = pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated")
    own_words = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    own = by_the_library(WRITTEN_ARABIC, 257 + N, own_words)
    size = sum(len(text.encode()) for text in UNSEEN)
    best = sum(len(own.encode(text).ids) for text in UNSEEN) / size
    before, after = fertility(OLD, UNSEEN)[0], fertility(NEW, UNSEEN)[0]
    assert after <= 1.1 * best
    assert after < before / 2
    # GPT-2's words end at each vowel sign, so that a BPE in them needs more tokens however large it is.
    assert after < 0.5 * fertility(Tokenizer.train(WRITTEN_ARABIC, 257 + 4 * N), UNSEEN)[0]


def test_fertility_by_hand() -> None:
    assert fertility(Tokenizer.bytes(), ["ab c", "é"]) == (1.0, 6 / 3)
    with pytest.raises(UserError, match="texts: no word"):
        fertility(OLD, [" \n"])


def test_learned_merges_are_those_of_the_library() -> None:
    """From single bytes on, every merge is the library's, in the same order; it also breaks ties by ids."""
    bytelevel = pre_tokenizers.ByteLevel(add_prefix_space=False)
    texts = ENGLISH[:80] + WRITTEN_ARABIC[:80]
    alphabet = by_the_library(texts, 257, bytelevel)
    names = sorted(alphabet.get_vocab(), key=alphabet.get_vocab().__getitem__)
    count = Counter(word for text in texts for word, _ in bytelevel.pre_tokenize_str(text))
    split = {tuple(alphabet.token_to_id(symbol) for symbol in word): times for word, times in count.items()}
    found = learn_merges(split, names, 120, lambda left, right: True)
    expected = json.loads(by_the_library(texts, 257 + 120, bytelevel).to_str())["model"]["merges"]
    assert found.pairs == [tuple(pair) for pair in expected]
    assert found.tokens == ["".join(pair) for pair in expected]


pieces = st.lists(st.sampled_from(["et", "ao", "a", "e", " ", "x", "1"]), max_size=12).map("".join)


@given(st.lists(pieces, min_size=1, max_size=5).filter(any), st.booleans())
@settings(max_examples=10)  # each makes a tokenizer and checks it
def test_kept_texts_are_split_as_before_in_a_common_script(keep: list[str], whole: bool) -> None:
    """Also if the tokenizer looks whole words up before it merges (``ignore_merges``)."""
    old = read(file(Tokenizer.bytes(), ignore_merges=whole))
    new = extend_tokenizer(old, ["aet xaet aetao aetao etx"] * 3 + ENGLISH[:5], 30, keep=keep, shared=True)
    assert new.encode_batch(keep) == old.encode_batch(keep)
    assert len(new.encode(ENGLISH[0])) < len(old.encode(ENGLISH[0]))


def test_a_merge_that_would_change_a_kept_text_is_dropped() -> None:
    texts = ["zq zq zq vw vw vw"]
    free = extend_tokenizer(OLD, texts, 2, keep=["other"], shared=True)
    kept = extend_tokenizer(OLD, texts, 2, keep=["a zq b"], shared=True)
    assert free.encode("a zq b") != OLD.encode("a zq b") == kept.encode("a zq b")


def test_a_mark_of_a_kept_text_stays_apart() -> None:
    text = "\u0628\u064e\u0628"
    assert extend_tokenizer(OLD, WRITTEN_ARABIC, 20, keep=[text]).encode(text) == OLD.encode(text)


def test_a_script_that_has_tokens_already_gets_more_of_them() -> None:
    """GPT-2 has some Arabic tokens; more are learned against kept texts, and vowel signs stay in words."""
    some = extend_tokenizer(OLD, ["\u0628\u062a \u0628\u062a"], 3)
    more = extend_tokenizer(some, WRITTEN_ARABIC, N, keep=ENGLISH, shared=True)
    assert more.encode_batch(ENGLISH) == OLD.encode_batch(ENGLISH)
    assert fertility(more, UNSEEN)[0] < 1.1 * fertility(NEW, UNSEEN)[0]


def test_a_third_language_follows_the_second() -> None:
    greek = documents(words("αβγδεζηθικλμ"), 50, seed=4)
    third = extend_tokenizer(NEW, greek, 30)
    assert third.encode_batch(ENGLISH + UNSEEN) == NEW.encode_batch(ENGLISH + UNSEEN)
    assert fertility(third, greek)[0] < 0.7 * fertility(NEW, greek)[0]


def test_added_tokens_outside_of_the_vocabulary_keep_their_ids() -> None:
    """In Llama 3's file special tokens stand behind the vocabulary, and words follow another pattern."""
    library = tokenizers.Tokenizer.from_str(OLD.content.decode())
    split = pre_tokenizers.Split(tokenizers.Regex(LLAMA_3), "isolated")
    library.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    library.add_special_tokens(["<|end_of_text|>"])
    library.add_tokens([AddedToken("<m>", normalized=False)])
    old = Tokenizer(library.to_str().encode())
    new = extend_tokenizer(old, WRITTEN_ARABIC[:60], 20)
    after = tokenizers.Tokenizer.from_str(new.content.decode())
    for token in (END_OF_TEXT, "<|end_of_text|>", "<m>"):
        assert after.token_to_id(token) == library.token_to_id(token)
    text = f"some <m> text{END_OF_TEXT} 12345"
    assert new.encode(text) == old.encode(text)
    assert new.spellings[: old.vocab_size] == old.spellings


def test_equal_texts_give_equal_files(tmp_path: Path) -> None:
    OLD.save(tmp_path / "tokenizer.json")
    assert extend_tokenizer(tmp_path, iter(WRITTEN_ARABIC), N).sha256 == NEW.sha256


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((OLD, WRITTEN_ARABIC, 0), "n_tokens=0 is not a positive integer"),
        ((OLD, WRITTEN_ARABIC, True), "n_tokens=True is not"),
        ((OLD, None, 5), "texts=None is no list of texts"),
        ((OLD, "text", 5), "texts is a single string; give a list of texts"),
        ((OLD, [], 5), "texts has no text"),
        ((OLD, ["a", 1], 5), "texts, text 2: the text is int, not a string"),
        ((OLD, ["\ud800"], 5), "texts, text 1: lone surrogate"),
        ((OLD, ENGLISH, 5), "texts: no letter of a script that the tokenizer has no tokens of yet"),
        ((OLD, ["\u0628"], 5), "texts: no pair of tokens that may be merged occurs twice"),
        (("none.json", WRITTEN_ARABIC, 5), "data.tokenizer_path=none.json: no such file"),
    ],
)
def test_bad_arguments_are_one_line(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        extend_tokenizer(*arguments)
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="shared=True needs keep="):
        extend_tokenizer(OLD, ENGLISH, 5, shared=True)


def test_a_tokenizer_that_loses_bytes_is_refused(tmp_path: Path) -> None:
    layout = file(OLD)
    layout["normalizer"] = {"type": "NFKC"}
    (tmp_path / "tokenizer.json").write_text(json.dumps(layout))
    with (
        pytest.warns(UserWarning, match="its normalizer 'NFKC' rewrites text"),
        pytest.raises(UserError, match=r"extend_tokenizer needs a byte-level tokenizer .*'NFKC'"),
    ):
        extend_tokenizer(tmp_path, WRITTEN_ARABIC, 5)
    assert [path.name for path in tmp_path.iterdir()] == ["tokenizer.json"]
