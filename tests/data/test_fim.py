"""Fill in the middle, against an inversion written here: the parts, put together again, are the document."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as h

import sparsetrain as st
from sparsetrain.data import DataConfig, Tokenizer, prepare
from sparsetrain.errors import UserError

MARKS = (1000, 1001, 1002)


def inverted(ids: list[int], marks: tuple[int, int, int]) -> tuple[str, list[int]]:
    """Return the order and the document, from the definition of the two orders in arXiv 2207.14255."""
    before, inner, after = marks
    if before not in ids:
        assert inner not in ids
        assert after not in ids
        return "none", ids
    assert ids[0] == before
    assert [ids.count(mark) for mark in marks] == [1, 1, 1]
    start, end = ids.index(after), ids.index(inner)
    assert 0 < start < end
    prefix, suffix, rest = ids[1:start], ids[start + 1 : end], ids[end + 1 :]
    return ("spm" if start == 1 else "psm"), prefix + rest + suffix


@given(h.lists(h.integers(0, 999), max_size=40), h.floats(0, 1), h.floats(0, 1), h.integers(-(2**40), 2**40))
def test_the_parts_make_the_document_again(ids: list[int], rate: float, spm_rate: float, seed: int) -> None:
    found = st.fill_in_the_middle(ids, rate, spm_rate, seed, sentinels=MARKS)
    order, document = inverted(found, MARKS)
    assert document == ids
    assert len(found) == len(ids) + 3 * (order != "none")
    assert found == st.fill_in_the_middle(list(ids), rate, spm_rate, seed, sentinels=MARKS)
    if rate in (0.0, 1.0):
        assert (order == "none") == (rate == 0.0 or not ids)
    # The type of the ids does not matter, and placeholders stand where the sentinels would.
    state = random.getstate()
    array = st.fill_in_the_middle(np.array(ids, dtype=np.uint16), rate, spm_rate, seed, sentinels=MARKS)
    tensor = st.fill_in_the_middle(torch.tensor(ids, dtype=torch.int64), rate, spm_rate, seed, sentinels=MARKS)
    assert (array.dtype, array.tolist(), tensor.dtype, tensor.tolist()) == (np.uint16, found, torch.int64, found)
    plain = st.fill_in_the_middle(ids, rate, spm_rate, seed)
    assert plain == [{1000: -1, 1001: -2, 1002: -3}.get(token, token) for token in found]
    assert random.getstate() == state


def test_shares_match_the_binomial_distribution_and_cuts_the_uniform_one() -> None:
    count, rate, spm_rate = 3000, 0.6, 0.3
    ids = list(range(10))
    found = [st.fill_in_the_middle(ids, rate, spm_rate, seed, sentinels=MARKS) for seed in range(count)]
    orders = [inverted(each, MARKS)[0] for each in found]
    made = count - orders.count("none")
    # Five standard deviations of a binomial count. An empty prefix makes a PSM look like an SPM: 21 of 121 cuts have.
    assert abs(made - rate * count) < 5 * (count * rate * (1 - rate)) ** 0.5
    share = spm_rate + (1 - spm_rate) * 21 / 121
    assert abs(orders.count("spm") - share * made) < 5 * (made * share * (1 - share)) ** 0.5
    # The cuts of the documents that keep their prefix first; of 121 equally likely pairs, 100 begin behind the start.
    lengths = [each.index(MARKS[2]) - 1 for each, order in zip(found, orders, strict=True) if order == "psm"]
    for length in range(1, 11):
        share = (2 * (10 - length) + 1) / 100
        deviation = (len(lengths) * share * (1 - share)) ** 0.5
        assert abs(lengths.count(length) - share * len(lengths)) < 5 * deviation + 1


def test_a_higher_rate_adds_documents_and_keeps_the_cuts() -> None:
    ids = list(range(50))
    for seed in range(200):
        low, high = (st.fill_in_the_middle(ids, rate, 0.5, seed, sentinels=MARKS) for rate in (0.3, 0.8))
        assert low in (ids, high)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (([1, 2], 1.5, 0.0, 0), r"^rate=1\.5 is outside \[0, 1\]"),
        (([1, 2], 1.0, -0.5, 0), r"^spm_rate=-0\.5 is outside"),
        (([1, 2], float("nan"), 0.0, 0), "^rate=nan is outside"),
        (([[1, 2]], 1.0, 0.0, 0), r"^ids has the shape \[1, 2\]"),
        (([1.5, 2.0], 1.0, 0.0, 0), "^ids holds float64"),
        (([1, 1001], 1.0, 0.0, 0), "contains the sentinel 1001"),
    ],
)
def test_bad_arguments_are_one_line(arguments: Any, said: str) -> None:
    with pytest.raises(UserError, match=said):
        st.fill_in_the_middle(*arguments, sentinels=MARKS)
    with pytest.raises(UserError, match=r"sentinels=\(1, 1, 2\) must be the three different ids"):
        st.fill_in_the_middle([5], 1.0, 0.0, 0, sentinels=(1, 1, 2))


PARAGRAPHS = [f"Paragraph {number} tells of {number * number} things, at some length." for number in range(300)]


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("\n\n".join(PARAGRAPHS))
    return path


@pytest.mark.parametrize("tokenizer", ["bpe", "bytes"])
def test_a_corpus_is_transformed_within_its_training_documents(text: Path, tokenizer: str) -> None:
    settings = {"path": str(text), "tokenizer": tokenizer, "vocab_size": 303, "validation_fraction": 0.2}
    plain = prepare(DataConfig(**settings), progress=False)
    found = prepare(DataConfig(**settings, fim_rate=0.5, fim_spm_rate=0.5), progress=False)
    assert found.directory != plain.directory
    assert found.tokenizer.vocab_size == {"bpe": 303, "bytes": 260}[tokenizer]
    marks = found.tokenizer.sentinels
    assert marks == tuple(range(found.tokenizer.vocab_size - 3, found.tokenizer.vocab_size))
    assert found.tokenizer.token_bytes[list(marks)].tolist() == [0, 0, 0]
    for name in ("train", "validation"):
        tokens = getattr(found, name)
        parts: list[list[int]] = [[]]
        for token in tokens.window(0, len(tokens)).tolist():
            parts.append([]) if token == found.tokenizer.eos_id else parts[-1].append(token)
        orders, documents = zip(*(inverted(part, marks) for part in parts[:-1]), strict=True)
        texts = [found.tokenizer.decode(ids) for ids in documents]
        before = getattr(plain, name)
        assert (
            texts == plain.tokenizer.decode(before.window(0, len(before)).tolist(), False).split("<|endoftext|>")[:-1]
        )
        moved = len(orders) - orders.count("none")
        if name == "validation":
            assert moved == 0
        else:
            assert abs(moved - len(orders) / 2) < 5 * (len(orders) / 4) ** 0.5


def test_rates_of_zero_leave_the_corpus_and_its_place_as_they_were(text: Path) -> None:
    """The names are those of the version before fill-in-the-middle, so that prepared corpora are found."""
    config = DataConfig(path=str(text), separator="blank_line", vocab_size=300, fim_spm_rate=0.5)
    corpus = prepare(config, progress=False)
    assert corpus.directory.name == "file-50469be9057e9618"
    assert corpus.tokenizer.sentinels is None
    assert "fill_in_the_middle" not in corpus.manifest["built_from"]


def test_each_rate_is_a_corpus_of_its_own(text: Path) -> None:
    rates = [(0.0, 0.0), (0.5, 0.0), (0.5, 0.5), (1.0, 0.0)]
    places = {
        prepare(
            DataConfig(path=str(text), tokenizer="bytes", fim_rate=rate, fim_spm_rate=spm), progress=False
        ).directory
        for rate, spm in rates
    }
    assert len(places) == len(rates)
    with pytest.raises(UserError, match=r"^data\.fim_rate=2\.0 is outside \[0, 1\]"):
        DataConfig(path=str(text), fim_rate=2.0)
    with pytest.raises(UserError, match=r"^data\.vocab_size=258 is too small for byte-level BPE; the least is 260"):
        DataConfig(path=str(text), fim_rate=0.5, vocab_size=258)


def test_a_given_tokenizer_gets_the_sentinels_that_it_lacks(text: Path, tmp_path: Path) -> None:
    given = Tokenizer.train(["other words for other texts"] * 3, 262)
    given.save(tmp_path / "own.json")
    config = DataConfig(path=str(text), tokenizer_path=str(tmp_path / "own.json"), fim_rate=1.0)
    found = prepare(config, progress=False).tokenizer
    assert found.sentinels == (given.vocab_size, given.vocab_size + 1, given.vocab_size + 2)
    assert found.encode("<|fim_prefix|> is text") == given.encode("<|fim_prefix|> is text")
    found.save(tmp_path / "with.json")
    again = Tokenizer.load(tmp_path / "with.json")
    assert again.with_sentinels() is again


@pytest.mark.parametrize("special", [True, False])
def test_sentinels_of_a_file_keep_their_ids(special: bool) -> None:
    """Some files name the sentinels without declaring them special; text that names them stays text here."""
    import tokenizers

    names = ["<fim_suffix>", "<fim_prefix>", "<fim_middle>"]
    inner = tokenizers.Tokenizer.from_str(Tokenizer.bytes()._content.decode())
    inner.add_tokens([tokenizers.AddedToken(name, special=special, normalized=False) for name in names])
    found = Tokenizer(inner.to_str().encode()).with_sentinels()
    assert found.sentinels == (258, 259, 257)
    assert found.vocab_size == 260
    assert found.encode("<fim_prefix>") == list(b"<fim_prefix>")
