"""A user's own source: a registered class, and a file of the group ``data``."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import sparsetrain as st
from sparsetrain.data import SOURCES, DataConfig, Document, Source, SourceConfig, prepare
from sparsetrain.errors import UserError


class Letters(Source):
    """Ten documents, each of one letter."""

    def __init__(self, length: int = 400) -> None:
        self.length = length

    def identity(self) -> dict[str, object]:
        return {"length": self.length}

    def documents(self) -> Iterator[Document]:
        for letter in "abcdefghij":
            yield Document(letter, letter * self.length)


@pytest.fixture
def letters() -> Iterator[None]:
    st.register_source("letters", lambda config: Letters(), test_fraction=0.25)
    yield
    SOURCES.unregister("letters")


def test_a_corpus_is_prepared_from_it(letters: None) -> None:
    config = DataConfig(name="letters", tokenizer="bytes")
    assert config.resolved_test_fraction == 0.25
    corpus = prepare(config, progress=False)
    assert corpus.directory.name.startswith("letters-")
    assert corpus.manifest["source"] == "letters"
    assert corpus.manifest["licence"] == "not given"
    counts = [corpus.manifest["splits"][split]["documents"] for split in ("train", "validation")]
    assert sum(counts) + corpus.manifest["left_out"]["test_documents"] == 10
    texts = corpus.tokenizer.decode(corpus.train.window(0, len(corpus.train)).tolist())
    assert {letter * 400 for letter in corpus.train_ids()} == {text * 400 for text in set(texts)}
    assert prepare(config, progress=False).cached


def test_it_is_a_file_of_the_group_data(shell: Any, letters: None, tmp_path: Path) -> None:
    folder = tmp_path / "mine" / "data"
    folder.mkdir(parents=True)
    (folder / "letters.yaml").write_text("name: letters\n")
    words = [word for word in shell.tiny if not word.startswith("data.path=")]
    words += ["--config-dir", str(folder.parent)]
    status, _, err = shell.run("pretrain", *words, "data=letters", "run_dir=run")
    assert status == 0, err
    result = json.loads(Path("run/result.json").read_text())
    assert result["steps"] == 3
    assert result["corpus"].startswith("letters-")
    line = shell.refused("pretrain", *words, "data=letters", "data.name=leters", "run_dir=other")
    assert (
        "data.name='leters' is not one of medline, file, hadith, hub, key_values, python, letters "
        "(did you mean 'letters'?)" in line
    )


def test_a_path_is_for_the_source_that_takes_one(tmp_path: Path) -> None:
    @st.register_source("lengths", needs={"path": "a file with the length of a document"})
    def lengths(config: SourceConfig) -> Letters:
        assert config.path is not None
        return Letters(int(Path(config.path).read_text()))

    try:
        (tmp_path / "length.txt").write_text("77\n")
        config = DataConfig(name="lengths", path=str(tmp_path / "length.txt"), tokenizer="bytes")
        assert config.kind == "lengths"
        assert prepare(config, progress=False).manifest["built_from"]["length"] == 77
        with pytest.raises(UserError, match=r"^data\.name=lengths needs data\.path: a file with the length"):
            DataConfig(name="lengths")
    finally:
        SOURCES.unregister("lengths")
    for name in ("medline", "hub", "file"):
        assert DataConfig(name=name, path="notes.txt").kind == "file"


@pytest.mark.parametrize(
    ("documents", "said"),
    [
        ([], "source bad: no text in it"),
        ([Document("a\nb", "text"), Document("c", "text")], r"source bad: document id 'a\nb' must be text on one line"),
        ([Document(1, "text")], "source bad: document id 1"),  # type: ignore[arg-type]
        ([Document("a", "\ud800")], "source bad, document 'a': lone surrogate"),
    ],
)
def test_documents_that_cannot_be_used_are_one_line(
    documents: list[Document], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    st.register_source("bad", lambda config: Letters())
    try:
        monkeypatch.setattr(Letters, "documents", lambda self: iter(documents))
        with pytest.raises(UserError) as caught:
            prepare(DataConfig(name="bad", tokenizer="bytes"), progress=False)
        assert said in str(caught.value)
        assert "\n" not in str(caught.value)
    finally:
        SOURCES.unregister("bad")


def test_a_taken_name_is_refused_and_the_same_source_again_is_not(letters: None) -> None:
    kind = SOURCES["medline"]
    st.register_source("medline", kind.make, test_fraction=kind.test_fraction, ids=kind.ids)
    with pytest.raises(
        UserError,
        match=r"^source name 'medline' is taken; registered are medline, .*hub, key_values, python, letters$",
    ):
        st.register_source("medline", lambda config: Letters())
    assert SOURCES["medline"] == kind
