"""Sets of corpora: the shared tokenizer, and the key that identifies a set."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from sparsetrain.data import Corpora, Corpus, DataConfig, find_corpora, prepare, prepare_corpora
from sparsetrain.errors import UserError


@pytest.fixture
def texts(tmp_path: Path) -> dict[str, DataConfig]:
    configs = {}
    for name in ("notes", "letters"):
        path = tmp_path / f"{name}.txt"
        path.write_text("\n\n".join(f"the {number}th of the {name}" * 3 for number in range(60)))
        configs[name] = DataConfig(path=str(path), tokenizer="bytes")
    return configs


def prepared(texts: dict[str, DataConfig]) -> dict[str, Corpus]:
    return {name: prepare(config, progress=False) for name, config in texts.items()}


def test_one_corpus_is_recorded_by_the_name_of_its_directory(texts: dict[str, DataConfig]) -> None:
    config = texts["notes"]
    key, found = find_corpora(config)
    assert found is None
    corpora = prepare_corpora(config, progress=False)
    assert list(corpora) == ["file"]
    assert corpora.key == key == corpora.only.directory.name == prepare(config, progress=False).directory.name
    assert corpora.train_ids() == corpora.only.train_ids()
    assert find_corpora(config)[1] is not None


def test_several_share_a_tokenizer_and_a_key_of_their_content(texts: dict[str, DataConfig]) -> None:
    members = prepared(texts)
    corpora = Corpora(members)
    assert dict(corpora) == members
    assert corpora.tokenizer.sha256 == members["letters"].tokenizer.sha256
    assert corpora.train_ids() == members["notes"].train_ids() | members["letters"].train_ids()
    swapped = {"notes": members["letters"], "letters": members["notes"]}
    assert Corpora(dict(reversed(members.items()))).key == corpora.key != Corpora(swapped).key
    with pytest.raises(ValueError, match="there are 2 corpora: notes, letters"):
        _ = corpora.only
    with pytest.raises(ValueError, match="at least one corpus"):
        Corpora({})


def test_two_tokenizers_in_a_set_are_refused(texts: dict[str, DataConfig]) -> None:
    texts["letters"] = DataConfig(path=texts["letters"].path, vocab_size=300)
    with pytest.raises(UserError, match=r"^the corpora notes and letters have different tokenizers; a run has one$"):
        Corpora(prepared(texts))


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe"])
def test_named_corpora_share_the_sentinels_that_one_of_them_needs(texts: dict[str, DataConfig], tokenizer: str) -> None:
    sources: dict[str, dict[str, Any]] = {name: {"path": config.path} for name, config in texts.items()}
    plain = DataConfig(sources=sources, tokenizer=tokenizer, vocab_size=300)
    assert find_corpora(plain)[1] is None
    before = prepare_corpora(plain, progress=False)
    sources["letters"]["fim_rate"] = 1.0
    moved = DataConfig(sources=sources, tokenizer=tokenizer, vocab_size=300)
    assert find_corpora(moved)[1] is None
    after = prepare_corpora(moved, progress=False)
    key, found = find_corpora(moved)
    assert found is not None
    assert found.key == key == after.key != before.key
    assert after.tokenizer.vocab_size <= (260 if tokenizer == "bytes" else 300)
    sentinels = after.tokenizer.sentinels
    assert sentinels is not None
    for name, corpus in after.items():
        counts = [corpus.train.count(sentinel, len(corpus.train)) for sentinel in sentinels]
        documents = corpus.manifest["splits"]["train"]["documents"]
        assert counts == ([documents] * 3 if name == "letters" else [0] * 3)
