"""Corpora made from files: their content, their place in the cache, and errors."""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from sparsetrain.data import Corpus, DataConfig, checksums, open_corpus, prepare
from sparsetrain.data.tokenizer import Tokenizer
from sparsetrain.data.tokens import TokenFile
from sparsetrain.errors import UserError
from sparsetrain.files import sha256_of

PARAGRAPHS = [f"Paragraph {number} tells of {number * number} things, at some length." for number in range(400)]


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("\n\n".join(PARAGRAPHS))
    return path


def config(path: Path, **fields: Any) -> DataConfig:
    return DataConfig(path=str(path), **{"vocab_size": 300, "separator": "blank_line", **fields})


def documents(corpus: Corpus, file: TokenFile) -> list[str]:
    """Decode a token file and cut it at the ends of documents."""
    text = corpus.tokenizer.decode(file.window(0, len(file)).tolist(), skip_special_tokens=False)
    assert text.endswith(corpus.tokenizer.eos_token)
    return text.split(corpus.tokenizer.eos_token)[:-1]


@pytest.mark.parametrize("tokenizer", ["bpe", "bytes"])
def test_token_files_decode_to_the_documents(text: Path, tokenizer: str) -> None:
    corpus = prepare(config(text, tokenizer=tokenizer), progress=False)
    train, validation = documents(corpus, corpus.train), documents(corpus, corpus.validation)
    assert sorted(train + validation) == sorted(PARAGRAPHS)
    assert train == [paragraph for paragraph in PARAGRAPHS if paragraph in set(train)]  # in the order of the file
    assert corpus.tokenizer.vocab_size == {"bpe": 300, "bytes": 257}[tokenizer]


def test_manifest_matches_the_files(text: Path) -> None:
    corpus = prepare(config(text), progress=False)
    names = sorted(file.name for file in corpus.directory.iterdir())
    assert names == ["manifest.json", "tokenizer.json", "train.bin", "train_ids.txt", "validation.bin"]
    for split, file in (("train", corpus.train), ("validation", corpus.validation)):
        held = documents(corpus, file)
        assert corpus.manifest["splits"][split] == {
            "documents": len(held),
            "tokens": len(file),
            "bytes": sum(len(document.encode()) for document in held),
            "sha256": sha256_of(file.path),
        }
    assert corpus.manifest["tokenizer_sha256"] == sha256_of(corpus.directory / "tokenizer.json")
    assert len(corpus.train_ids()) == corpus.manifest["splits"]["train"]["documents"]


def test_the_second_time_is_found_and_says_so(text: Path) -> None:
    first = prepare(config(text), progress=False)
    stamp = (first.directory / "train.bin").stat().st_mtime_ns
    screen = io.StringIO()
    second = prepare(config(text, context=64), console=Console(file=screen))
    assert not first.cached
    assert second.cached
    assert second.directory == first.directory
    assert (second.directory / "train.bin").stat().st_mtime_ns == stamp
    assert screen.getvalue() == second.describe() + "\n"
    assert second.describe().startswith(f"corpus: found in cache {first.directory} (400 documents, ")


@pytest.mark.parametrize(
    "change",
    [
        {"vocab_size": 301},
        {"tokenizer": "bytes"},
        {"max_documents": 100},
        {"validation_fraction": 0.3},
        {"test_fraction": 0.2},
        {"token_dtype": "uint32"},
    ],
)
def test_what_changes_the_corpus_changes_its_directory(text: Path, change: dict[str, Any]) -> None:
    assert prepare(config(text), progress=False).directory != prepare(config(text, **change), progress=False).directory


def test_a_changed_file_is_another_corpus_and_a_moved_one_is_not(text: Path, tmp_path: Path) -> None:
    first = prepare(config(text), progress=False)
    moved = text.rename(tmp_path / "elsewhere.txt")
    assert prepare(config(moved), progress=False).directory == first.directory
    moved.write_text(moved.read_text() + "\n\nOne more.")
    assert prepare(config(moved), progress=False).directory != first.directory


def test_building_twice_gives_the_same_bytes(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = prepare(config(text), progress=False)
    monkeypatch.setenv("SPARSETRAIN_CACHE", str(tmp_path / "other"))
    second = prepare(config(text), progress=False)
    for name in ("train.bin", "validation.bin", "tokenizer.json", "train_ids.txt", "manifest.json"):
        assert (first.directory / name).read_bytes() == (second.directory / name).read_bytes()


def test_more_documents_add_to_fewer(text: Path) -> None:
    few = prepare(config(text, max_documents=50), progress=False)
    more = prepare(config(text, max_documents=100), progress=False)
    held = [set(documents(corpus, corpus.train) + documents(corpus, corpus.validation)) for corpus in (few, more)]
    assert [len(own) for own in held] == [50, 100]
    assert held[0] < held[1]
    assert few.manifest["left_out"] == {"test_documents": 0, "beyond_max_documents": 350}


def test_test_documents_stay_out(text: Path) -> None:
    corpus = prepare(config(text, test_fraction=0.3), progress=False)
    left_out = corpus.manifest["left_out"]["test_documents"]
    assert 80 < left_out < 160
    assert len(documents(corpus, corpus.train)) + len(documents(corpus, corpus.validation)) == 400 - left_out


def test_a_single_document_is_cut_at_nine_tenths(tmp_path: Path) -> None:
    path = tmp_path / "one.txt"
    path.write_text("word " * 150)
    corpus = prepare(config(path), progress=False)
    (train,), (validation,) = documents(corpus, corpus.train), documents(corpus, corpus.validation)
    assert train + validation == ("word " * 150).strip()
    assert 0.88 < len(train) / (len(train) + len(validation)) < 0.91


def test_given_tokenizer_is_kept_byte_for_byte(text: Path, tmp_path: Path) -> None:
    given = Tokenizer.train(["other words for other texts"] * 3, 262)
    given.save(tmp_path / "own.json")
    corpus = prepare(config(text, tokenizer_path=str(tmp_path / "own.json")), progress=False)
    assert corpus.tokenizer.sha256 == given.sha256
    assert set(documents(corpus, corpus.validation)) < set(PARAGRAPHS)


def test_tokens_of_another_tokenizer_are_refused(text: Path) -> None:
    corpus = prepare(config(text), progress=False)
    other = Tokenizer.bytes()
    other.save(corpus.directory / "tokenizer.json")
    with pytest.raises(UserError, match="token file of another tokenizer") as caught:
        prepare(config(text), progress=False)
    assert corpus.tokenizer.sha256 in str(caught.value)
    assert other.sha256 in str(caught.value)


def test_a_cut_token_file_is_refused(text: Path) -> None:
    corpus = prepare(config(text), progress=False)
    with (corpus.directory / "train.bin").open("r+b") as file:
        file.truncate(10)
    with pytest.raises(UserError, match=r"train\.bin has 10 bytes, its manifest says"):
        open_corpus(corpus.directory)


@pytest.mark.parametrize("name", ["train.bin", "validation.bin", "train_ids.txt", "tokenizer.json", "manifest.json"])
def test_a_changed_bit_does_not_pass_for_data(text: Path, name: str) -> None:
    """Every file of a corpus has a checksum, also the manifest; the error says that the directory can be deleted."""
    path = prepare(config(text), progress=False).directory / name
    content = path.read_bytes()
    path.write_bytes(content[:20] + bytes([content[20] ^ 4]) + content[21:])
    with pytest.raises(UserError, match="delete the directory to build it again") as caught:
        prepare(config(text), progress=False)
    assert "\n" not in str(caught.value)
    path.write_bytes(content)
    assert prepare(config(text), progress=False).cached


@pytest.mark.parametrize(
    "content",
    ["[1]", "[" * 100_000, "{}", '{"splits": 1, "dtype": "uint16", "tokenizer_sha256": ""}', "\x00", '{"a": NaN}'],
)
def test_a_manifest_of_another_kind_is_one_line(text: Path, content: str) -> None:
    """The error names the directory, which can be deleted."""
    directory = prepare(config(text), progress=False).directory
    (directory / "manifest.json").write_text(content)
    with pytest.raises(
        UserError, match=rf"{directory} has no readable manifest\.json .*delete the directory"
    ) as caught:
        open_corpus(directory)
    assert "\n" not in str(caught.value)


def test_a_corpus_of_the_first_version_is_found_and_checked_by_what_it_has(text: Path) -> None:
    """Its manifest has no checksum of the ids and none of itself; runs that were made from it can continue."""
    directory = prepare(config(text), progress=False).directory
    manifest = json.loads((directory / "manifest.json").read_text())
    del manifest["digest"], manifest["train_ids_sha256"]
    (directory / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n")
    found = prepare(config(text), progress=False)
    assert found.cached
    assert len(found.train_ids()) == manifest["splits"]["train"]["documents"]
    (directory / "train_ids.txt").write_text("one\n")
    with pytest.raises(UserError, match=r"train_ids\.txt is damaged"):
        found.train_ids()
    content = (directory / "train.bin").read_bytes()
    (directory / "train.bin").write_bytes(bytes([content[0] ^ 1]) + content[1:])
    with pytest.raises(UserError, match=r"train\.bin is damaged"):
        prepare(config(text), progress=False)


def test_a_text_that_changes_while_it_is_read_gives_no_corpus(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise a corpus with tokens of the new text would be named by the checksum of the old text."""
    train = Tokenizer.train

    def change(*arguments: Any) -> Tokenizer:
        text.write_text(text.read_text().upper())
        return train(*arguments)

    monkeypatch.setattr(Tokenizer, "train", change)
    with pytest.raises(UserError, match="the text changed while it was read"):
        prepare(config(text), progress=False)
    assert list((tmp_path / "cache" / "corpora").iterdir()) == []


def test_a_settled_file_is_hashed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A sweep opens its corpus for every run. A file that was written just now is hashed again."""
    path = tmp_path / "a.bin"
    path.write_bytes(b"one")
    assert checksums.sha256_once(path) == hashlib.sha256(b"one").hexdigest()
    path.write_bytes(b"two")
    assert checksums.sha256_once(path) == hashlib.sha256(b"two").hexdigest()
    later = time.time_ns() + 10**10
    monkeypatch.setattr(time, "time_ns", lambda: later)
    expected = checksums.sha256_once(path)
    monkeypatch.setattr(checksums, "sha256_of", lambda path: "hashed again")
    assert checksums.sha256_once(path) == expected
    os.utime(path)
    assert checksums.sha256_once(path) == "hashed again"


def test_a_directory_without_manifest_is_refused(text: Path) -> None:
    corpus = prepare(config(text), progress=False)
    (corpus.directory / "manifest.json").unlink()
    with pytest.raises(UserError, match=r"no readable manifest\.json"):
        prepare(config(text), progress=False)


def test_a_full_disk_leaves_no_corpus(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match=r"no space left on .*corpora: needs about 1 MB"):
        prepare(config(text), progress=False)
    assert list((tmp_path / "cache" / "corpora").iterdir()) == []


def test_two_builders_at_once_make_one_corpus(text: Path, tmp_path: Path) -> None:
    start = threading.Barrier(2)

    def build(_: int) -> Corpus:
        start.wait()
        return prepare(config(text), progress=False)

    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(build, range(2))
    assert first.directory == second.directory
    assert first.manifest == second.manifest
    assert list((tmp_path / "cache" / "corpora").iterdir()) == [first.directory]


def test_a_file_of_white_space_has_no_text(tmp_path: Path) -> None:
    path = tmp_path / "blank.txt"
    path.write_text(" \n\n \n")
    with pytest.raises(UserError, match=r"path=.*blank\.txt: no text in it"):
        prepare(config(path), progress=False)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"name": "medlin"}, r"data\.name='medlin' .*did you mean 'medline'"),
        ({"tokenizer": "byte"}, r"data\.tokenizer='byte' .*did you mean 'bytes'"),
        ({"name": "file"}, r"data\.name=file needs data\.path"),
        ({"name": "hub"}, r"data\.name=hub needs data\.hub_name"),
        ({"vocab_size": 100}, r"data\.vocab_size=100 .* 257"),
        ({"context": 0}, r"data\.context=0"),
        ({"max_documents": 1}, r"data\.max_documents=1"),
        ({"validation_fraction": 1.5}, r"validation_fraction=1\.5"),
        ({"vocab_size": 70_000, "token_dtype": "uint16"}, r"token_dtype=uint16 holds 65536 .*70000"),
    ],
)
def test_wrong_fields_are_named(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        DataConfig(**fields)


def test_a_path_stands_for_a_file_whatever_the_name(text: Path) -> None:
    assert DataConfig(name="medline", path=str(text)).kind == "file"
    assert DataConfig(path=str(text)).resolved_test_fraction == 0.0
    assert DataConfig().resolved_test_fraction == 0.10
