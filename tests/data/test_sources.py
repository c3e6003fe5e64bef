"""Readers of local files."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparsetrain.data.sources.base import Fields, content_id
from sparsetrain.data.sources.files import LocalFiles
from sparsetrain.data.sources.plain_text import split_text
from sparsetrain.errors import UserError


def texts(path: Path | str, separator: str | None = None) -> list[str]:
    return [document.text for document in LocalFiles(str(path), separator=separator).documents()]


def test_blank_lines_separate_documents_of_text(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_bytes("\ufeffone\r\nstill one\r\n \t\r\n\r\ntwo\n\n\nthree\n".encode())
    assert texts(file, "blank_line") == ["one\nstill one", "two", "three"]


def test_without_blank_lines_each_line_is_a_document() -> None:
    assert split_text("one\ntwo\n") == ["one", "two"]


def test_a_single_long_line_is_cut_at_spaces() -> None:
    words = " ".join(f"word{number}" for number in range(2000))
    pieces = split_text(words)
    assert " ".join(pieces) == words
    assert all(500 <= len(piece) <= 1000 for piece in pieces[:-1])


def test_a_line_without_spaces_is_cut_at_the_length() -> None:
    assert split_text("x" * 2500) == ["x" * 1000, "x" * 1000, "x" * 500]


@given(st.text())
def test_cutting_text_loses_white_space_only(text: str) -> None:
    joined = "".join("".join(split_text(text)).split())
    assert joined == "".join(text.split())


def test_jsonl_takes_field_and_id(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    rows = [{"body": "one", "id": 7}, {"body": "two"}, {"body": " "}]
    file.write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    documents = list(LocalFiles(str(file), Fields("body")).documents())
    assert [(document.id, document.text) for document in documents] == [("7", "one"), (content_id("two"), "two")]


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_a_group_is_a_field_of_every_row(tmp_path: Path, suffix: str) -> None:
    file, rows = tmp_path / f"a.{suffix}", [{"text": "one", "package": "x  y"}, {"text": "two", "package": "z"}]
    if suffix == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    else:
        file.write_text("\n".join(map(json.dumps, rows)))
    plain, grouped = LocalFiles(str(file)), LocalFiles(str(file), Fields(group="package"))
    assert [document.group for document in plain.documents()] == [None, None]
    assert [document.group for document in grouped.documents()] == ["x y", "z"]
    assert "group_field" not in plain.identity()  # corpora that exist keep their identity
    assert grouped.identity() == {**plain.identity(), "group_field": "package"}
    with pytest.raises(UserError, match=r"no field group_field='packages'; it has package, text \(did you mean"):
        list(LocalFiles(str(file), Fields(group="packages")).documents())


def test_parquet_matches_pyarrow(tmp_path: Path) -> None:
    file = tmp_path / "a.parquet"
    columns = {"text": [f"text {number}" for number in range(3000)], "other": list(range(3000))}
    pyarrow.parquet.write_table(pyarrow.table(columns), file)
    assert texts(file) == columns["text"]


def test_parquet_skips_missing_text(tmp_path: Path) -> None:
    file = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": ["one", None, "two"], "id": ["a", "b", "c"]}), file)
    assert [document.id for document in LocalFiles(str(file)).documents()] == ["a", "c"]


def test_parquet_without_pyarrow_names_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(UserError, match=r"pip install 'sparsetrain\[parquet\]'"):
        texts(tmp_path / "a.parquet")


def test_directory_and_glob_read_all_files_in_order(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "b.txt").write_text("b")
    (tmp_path / "sub" / "a.jsonl").write_text('{"text": "a"}')
    (tmp_path / "notes.md").write_text("not read")
    assert texts(tmp_path) == ["b", "a"]
    assert texts(f"{tmp_path}/*.txt") == ["b"]
    assert texts(f"{tmp_path}/**/*.jsonl") == ["a"]
    assert texts(f"{tmp_path}/*.[tm]*") == ["b", "not read"]


def test_identity_depends_on_content_not_on_place(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("same")
    (tmp_path / "b.txt").write_text("same")
    (tmp_path / "c.txt").write_text("else")
    a, b, c = (LocalFiles(str(tmp_path / name)).identity() for name in ("a.txt", "b.txt", "c.txt"))
    assert a == b != c


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"good \xff bad", r"a\.txt is not UTF-8: byte 0xff at offset 5"),
        ("a.jsonl", b'{"text": "x"}\n{"text": "\xfe"}\n', r"a\.jsonl is not UTF-8: byte 0xfe at offset 24"),
        ("a.jsonl", b'{"text": "x"}\n{oops}\n', r"line 2: not JSON"),
        ("a.jsonl", b"[1]\n", r"line 1: a JSON list, not an object"),
        ("a.jsonl", b'{"texts": "x"}\n', r"no field text_field='text'; it has texts \(did you mean 'texts'\?\)"),
        ("a.jsonl", b'{"text": 3}\n', r"line 1: the text is int"),
        ("a.jsonl", b'{"text": "x"}\n\n{"id": "\\ud800", "text": "x"}\n', r"line 3: .*lone surrogate"),
        ("a.jsonl", b'{"text": "x", "id": ["a"]}\n', r"line 1: the id is list, neither text nor a whole number"),
        ("a.jsonl", b'{"text": "x", "id": 1.5}\n', r"line 1: the id is float"),
        ("a.jsonl", b'{"text": "x", "id": true}\n', r"line 1: the id is bool"),
        ("a.jsonl", b'{"text": "x"}\n' + b"[" * 100_000 + b"\n", r"line 2: .*nests values more than 100"),
        ("a.jsonl", b'{"text": "x"}\n{"text": "x", "n": ' + b"9" * 5000 + b"}\n", r"line 2: .*5000 digits"),
        ("a.jsonl", b'{"text": "x", "text": "y"}\n', r"line 1: .*'text' occurs twice"),
        ("a.jsonl", b'{"t\\n\\u0007": "x"}\n', r"no field text_field='text'; it has t\ufffd\ufffd$"),
        ("a.jsonl", b'{"text": "\\ud800"}\n', r"line 1: .*lone surrogate"),
        ("a.txt", b"", r"a\.txt: the file is empty"),
        ("a.csv", b"x", r"cannot read \.csv; allowed are \.txt, \.jsonl, \.parquet and other files of plain text"),
        ("a.py", b"x = '\xe9'\n", r"a\.py is not UTF-8: byte 0xe9 at offset 5"),
        ("a.bin", b"\x7fELF\x00\x01", r"a\.bin is no text: it has a NUL byte at offset 4"),
        ("a.parquet", b"no parquet at all", r"a\.parquet is not a Parquet file"),
    ],
)
def test_unusable_files_are_one_line(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        texts(tmp_path / name)
    assert "\n" not in str(caught.value)


def parquet(path: Path, columns: dict[str, Any], **options: Any) -> bytes:
    pyarrow.parquet.write_table(pyarrow.table(columns), path, compression="none", use_dictionary=False, **options)
    return path.read_bytes()


@pytest.mark.parametrize(
    ("mark", "damage", "message"),
    [
        (b"Note 7 ", b"\xff", "is damaged behind row 0: 'utf-8'"),
        (None, bytes(8), "is damaged behind row 0"),
        (None, b"\xff" * 40, "is damaged behind row 0"),
    ],
    ids=["no UTF-8", "zeros in a page header", "ones in a page header"],
)
def test_parquet_damaged_behind_its_footer_is_one_line(
    tmp_path: Path, mark: bytes | None, damage: bytes, message: str
) -> None:
    """The intact footer lets the file open, and the damaged pages fail later."""
    file = tmp_path / "a.parquet"
    content = parquet(file, {"text": [f"Note {n} is here." for n in range(50)]})
    at = 8 if mark is None else content.index(mark)
    file.write_bytes(content[:at] + damage + content[at + len(damage) :])
    with pytest.raises(UserError, match=message) as caught:
        texts(file)
    assert str(file) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_checksums_of_parquet_pages_are_compared(tmp_path: Path) -> None:
    """Without checksums, pyarrow would not notice a changed letter."""
    file = tmp_path / "a.parquet"
    content = parquet(file, {"text": [f"Note {n} is here." for n in range(50)]}, write_page_checksum=True)
    file.write_bytes(content.replace(b"Note 7 ", b"Vote 7 ", 1))
    with pytest.raises(UserError, match=r"is damaged behind row 0: .*CRC"):
        texts(file)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"text": [b"bytes"]}, "row 1: the text is bytes, not a string"),
        ({"text": [["a", "list"]]}, "row 1: the text is list, not a string"),
        ({"text": ["a"], "id": [0.5]}, "row 1: the id is float, neither text nor a whole number"),
    ],
)
def test_parquet_columns_of_other_types_are_refused(tmp_path: Path, columns: dict[str, Any], message: str) -> None:
    """A value that is not text is refused, not converted with `str`."""
    parquet(tmp_path / "a.parquet", columns)
    with pytest.raises(UserError, match=message):
        texts(tmp_path / "a.parquet")


@pytest.mark.parametrize("path", ["~nosuchuser/a.txt", "x" * 5000, "a\0b"])
def test_a_path_that_is_none_is_one_line(path: str) -> None:
    """The cases are an unknown user, a name that is too long, and a zero byte."""
    with pytest.raises(UserError, match=r"^data\.path="):
        LocalFiles(path)


def test_a_pipe_is_no_file_of_text(tmp_path: Path) -> None:
    """Reading a pipe would wait forever."""
    os.mkfifo(tmp_path / "a.txt")
    with pytest.raises(UserError, match="no regular file"):
        LocalFiles(str(tmp_path / "a.txt"))


def test_missing_file_suggests_its_neighbour(tmp_path: Path) -> None:
    (tmp_path / "corpus.txt").write_text("x")
    with pytest.raises(UserError, match=r"no such file \(did you mean 'corpus\.txt'\?\)"):
        texts(tmp_path / "corpsu.txt")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"no \.txt, \.jsonl, \.parquet file in this directory"):
        texts(tmp_path / "empty")
