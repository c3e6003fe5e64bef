"""Texts are read a line at a time, by a thread that is ahead of the encoding; the documents are what they were."""

from __future__ import annotations

import re
import threading
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as h

from sparsetrain.data.ahead import read_ahead
from sparsetrain.data.sources.files import LocalFiles
from sparsetrain.data.sources.plain_text import split_text
from sparsetrain.errors import UserError


def at_once(text: str) -> list[str]:
    """The documents of a plain text, by regular expressions over all of it."""
    text = text.strip()
    blank = r"\n[^\S\n]*\n\s*"
    pieces = re.split(blank if re.search(blank, text) else "\n", text)
    return [piece.strip() for piece in pieces if piece.strip()]


@given(h.text(alphabet="a\n\n\r \t\x0b\x1c\u2028\u3000é", max_size=40))
def test_lines_give_the_documents_of_the_whole_text(text: str) -> None:
    assert split_text(text) == at_once(text)


@pytest.mark.parametrize(
    "text", ["a\r\n\r\nb\r\nc", "\ufeffa\nb", "\n \na\n", "a\r\r\n\nb", "one line", "\ufeff\ufeffa"]
)
def test_a_file_gives_the_documents_of_its_text(tmp_path: Path, text: str) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(text.encode())
    found = [document.text for document in LocalFiles(str(path), separator="blank_line").documents()]
    assert found == at_once(text.removeprefix("\ufeff").replace("\r\n", "\n"))


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_a_wrong_byte_is_named_with_its_place_in_the_file(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(b'\xef\xbb\xbf{"text": "a"}\n{"text": "\xff"}\n')
    with pytest.raises(UserError, match=r"is not UTF-8: byte 0xff at offset 27$"):
        list(LocalFiles(str(path)).documents())
    path.write_bytes(b'\xef\xbb\xbf{"text": "\xfe"}\n')
    with pytest.raises(UserError, match=r"is not UTF-8: byte 0xfe at offset 13$"):
        list(LocalFiles(str(path)).documents())


@pytest.mark.parametrize("separator", ["blank_line", r"\n\n"])
def test_a_large_text_is_never_in_memory(tmp_path: Path, separator: str) -> None:
    path = tmp_path / "large.txt"
    paragraph = ("some words of a line\n" * 40 + "\n").encode()
    path.write_bytes(paragraph * 2_000)
    tracemalloc.start()
    try:
        count = sum(1 for _ in LocalFiles(str(path), separator=separator).documents())
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert count == 2_000
    assert peak < len(paragraph) * 100 < path.stat().st_size / 10


def test_reading_ahead_keeps_the_order_and_reads_in_another_thread() -> None:
    threads = set()

    def items() -> Iterator[int]:
        for number in range(100):
            threads.add(threading.current_thread().name)
            yield number

    assert list(read_ahead(items())) == list(range(100))
    assert threads == {"read ahead"}


def test_reading_ahead_stops_with_its_caller_and_raises_the_error_of_the_reader() -> None:
    seen = []

    def endless() -> Iterator[int]:
        for number in range(10**9):
            seen.append(number)
            yield number

    reader = read_ahead(endless(), depth=3)
    assert [next(reader) for _ in range(5)] == [0, 1, 2, 3, 4]
    reader.close()
    assert not any(thread.name == "read ahead" for thread in threading.enumerate())
    assert len(seen) <= 5 + 3 + 1

    def broken() -> Iterator[int]:
        yield 1
        raise UserError("line 2 is wrong")

    reader = read_ahead(broken())
    assert next(reader) == 1
    with pytest.raises(UserError, match="line 2 is wrong"):
        next(reader)
