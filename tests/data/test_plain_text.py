"""Plain text: its bytes survive a corpus, and its validation text is whole documents or the end of a long one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as h

from sparsetrain.data import Corpus, DataConfig, TokenFile, prepare
from sparsetrain.data.parts import parts
from sparsetrain.data.sources.files import LocalFiles
from sparsetrain.errors import UserError

SOURCE = Path(__file__).read_bytes()
POEM = "  Über allen Gipfeln\n\tist Ruh,\n\n\n      in allen Wipfeln\n\x0cspürest du\n\n kaum einen Hauch".encode()
CRLF = b"\xef\xbb\xbfone\r\ntwo \r\n\r\n\tthree\r\rfour\n\r"


def decoded(corpus: Corpus, file: TokenFile) -> list[bytes]:
    """Return the bytes of each document of a token file of bytes."""
    ids = file.window(0, len(file)).tolist()
    found, held = [], bytearray()
    for token in ids:
        if token == corpus.tokenizer.eos_id:
            found.append(bytes(held))
            held.clear()
        else:
            held += corpus.tokenizer.spellings[token]  # type: ignore[arg-type]
    assert not held
    return found


def corpus_of(path: Path | str, **fields: Any) -> tuple[Corpus, list[bytes], list[bytes]]:
    corpus = prepare(DataConfig(path=str(path), **{"tokenizer": "bytes", **fields}), progress=False)
    return corpus, decoded(corpus, corpus.train), decoded(corpus, corpus.validation)


@pytest.mark.parametrize("content", [SOURCE, POEM, CRLF, b"\n \n x", "汉字没有空格".encode() * 9], ids=str)
@pytest.mark.parametrize("tokenizer", ["bytes", "bpe"])
def test_the_bytes_of_one_file_survive(tmp_path: Path, content: bytes, tokenizer: str) -> None:
    """Training text and validation text, one behind the other, are the file."""
    (tmp_path / "a.txt").write_bytes(content)
    corpus, (train,), (validation,) = corpus_of(tmp_path / "a.txt", tokenizer=tokenizer, vocab_size=257)
    assert train + validation == content
    assert sum(split["bytes"] for split in corpus.manifest["splits"].values()) == len(content)


def test_files_of_a_pattern_are_documents_and_empty_ones_are_counted(tmp_path: Path) -> None:
    contents = {"a.py": SOURCE[:200], "b.md": POEM, "sub/c.py": CRLF * 4, "d": b"README\n" * 20}
    for name, content in contents.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    (tmp_path / "empty.py").touch()
    corpus, train, validation = corpus_of(f"{tmp_path}/**/*", max_documents=None)
    assert sorted([*train, *validation]) == sorted(contents.values())
    assert corpus.notes()[1:] == ["left out: 1 empty files"]
    assert "of 4 documents" in corpus.notes()[0]


@pytest.mark.parametrize(
    ("separator", "expected"),
    [
        (r"\n\n", ["a\n<x>b ", "\tc", "\n"]),
        ("<x>", ["a\n", "b \n\n\tc\n\n\n\n"]),
        (r"b \n", ["a\n<x>", "\n\tc\n\n\n\n"]),
        ("absent", ["a\n<x>b \n\n\tc\n\n\n\n"]),
    ],
)
def test_a_separator_stands_between_documents(tmp_path: Path, separator: str, expected: list[str]) -> None:
    """It belongs to none of them, everything else does. Documents of white space alone are left out."""
    path = tmp_path / "a.txt"
    path.write_bytes(b"a\n<x>b \n\n\tc\n\n\n\n")
    found = [document.text for document in LocalFiles(str(path), separator=separator).documents()]
    assert found == [text for text in expected if text.strip()]


@given(h.text(alphabet="ab\n", max_size=60), h.integers(1, 7), h.sampled_from(["a", "ab", "\n\n", "aba"]))
def test_separators_across_blocks_are_found_as_in_the_whole(text: str, block: int, mark: str) -> None:
    from sparsetrain.data.sources import plain_text

    class Held:
        def open(self, _: str) -> Any:
            import io

            return io.BytesIO(text.encode())

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plain_text, "_BLOCK", block)
        found = list(plain_text._separated(Held(), mark.encode()))  # type: ignore[arg-type]
    assert [raw for _, raw in found] == text.encode().split(mark.encode())
    assert all(text.encode()[at : at + len(raw)] == raw for at, raw in found)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"separator": ""}, "data.separator='' must be blank_line, a text that stands between documents, or null"),
        ({"separator": r"a\q"}, r"data.separator=a\\q: \\q is no escape; allowed are \\n, .*"),
        ({"separator": "a\\"}, r"data.separator=a\\: \\ is no escape"),
        ({"separator": "x", "path": None}, "data.separator='x' needs data.path"),
        ({"eos_token": "x"}, "data.eos_token='x' must be a token of data.tokenizer_path"),
    ],
)
def test_bad_settings_are_one_line(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        DataConfig(**{"path": "a.txt", **fields})
    assert "\n" not in str(caught.value)


def test_a_separator_needs_plain_text(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a"}')
    with pytest.raises(UserError, match=r"data.separator='x' cuts plain text, and path=.* has none"):
        LocalFiles(str(tmp_path / "a.jsonl"), separator="x")
    assert LocalFiles(str(tmp_path / "a.jsonl"), separator="blank_line").identity() == (
        LocalFiles(str(tmp_path / "a.jsonl")).identity()
    )


def test_sources_take_the_separator_of_all_unless_they_have_their_own(tmp_path: Path) -> None:
    sources = {"one": {"path": "a.txt"}, "two": {"path": "b.txt", "separator": "<x>"}, "pairs": {"name": "key_values"}}
    members = DataConfig(sources=sources, separator="blank_line").members()
    assert {name: member.separator for name, member in members.items()} == {
        "one": "blank_line",
        "two": "<x>",
        "pairs": None,
    }


LINE = b"A line of some words that is not long.\n"


@pytest.mark.parametrize(
    ("sizes", "fraction", "share", "said"),
    [
        ([2000], 0.02, 0.053, "the end of the only document"),  # 4096 characters of 78,000
        ([20], 0.02, 0.1, "the end of the only document"),
        ([9000], 0.3, 0.3, "the end of the only document"),
        ([9000, 2], 0.05, 0.05, "1 of 2 documents and the end of the longest one"),
        ([9000, 2, 3, 4], 0.02, 0.02, "the end of the longest one"),
    ],
)
def test_the_end_of_a_long_document_is_held_out(
    tmp_path: Path, sizes: list[int], fraction: float, share: float, said: str
) -> None:
    """Its beginning is trained on, and it is cut at the end of a line. Nothing is in both or in none."""
    contents = [LINE * count + b"%d" % number for number, count in enumerate(sizes)]
    for number, content in enumerate(contents):
        (tmp_path / f"{number}.txt").write_bytes(content)
    corpus, train, validation = corpus_of(tmp_path, validation_fraction=fraction)
    head, tail = max(train, key=len), max(validation, key=len)
    assert head + tail == contents[0]
    assert head.endswith(b"\n")
    assert len(b"".join(validation)) / len(b"".join(contents)) == pytest.approx(share, rel=0.06, abs=0.002)
    assert said in corpus.notes()[0]
    assert sorted([head + tail, *(text for text in [*train, *validation] if text not in (head, tail))]) == sorted(
        contents
    )


def test_copies_of_the_longest_document_are_cut_alike(tmp_path: Path) -> None:
    """Else the end of one would be trained on in the other."""
    long = b"".join(b"This is the line of number %d.\n" % number for number in range(900))
    for name, content in {"a": long, "b": long, "c": b"short"}.items():
        (tmp_path / f"{name}.txt").write_bytes(content)
    _, train, validation = corpus_of(tmp_path)
    assert len(train) == 2
    assert sorted(validation, key=len)[0] == b"short"
    assert [head + tail for head, tail in zip(train, sorted(validation, key=len)[1:], strict=True)] == [long, long]


def test_whole_documents_are_held_out_if_they_are_enough(tmp_path: Path) -> None:
    for number in range(40):
        (tmp_path / f"{number}.txt").write_bytes(LINE * 30 + b"%d" % number)
    corpus, train, validation = corpus_of(tmp_path)
    assert (len(train), len(validation)) == (36, 4)  # 4096 characters of 47,000
    assert corpus.notes() == ["validation: 4 of 40 documents, 10.0 % of the text"]


@given(h.text(alphabet="ab .\n汉", max_size=300), h.integers(1, 40))
def test_parts_are_the_text_and_end_before_a_word(text: str, most: int) -> None:
    found = list(parts(text, most))
    assert "".join(found) == text
    assert all(0 < len(part) <= most for part in found[:-1])
    long = "some words and more " * 9
    assert all(part.startswith(" ") for part in list(parts(long, 40))[1:])


def test_a_document_is_encoded_in_parts_as_it_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither the tokens nor, with a tokenizer that puts a space before each text, their bytes tell of the parts."""
    from sparsetrain.data import encoding

    words = " ".join(f"the {name} model learns" for name in ("small", "large", "naïve")) * 40
    (tmp_path / "a.txt").write_text(words)
    found = []
    for number, most in enumerate((1 << 22, 50)):
        monkeypatch.setattr(encoding, "_PART_CHARACTERS", most)
        monkeypatch.setenv("SPARSETRAIN_CACHE", str(tmp_path / str(number)))
        corpus = prepare(DataConfig(path=str(tmp_path / "a.txt"), vocab_size=300), progress=False)
        found.append([(corpus.directory / f"{split}.bin").read_bytes() for split in ("train", "validation")])
    assert found[0] == found[1]
