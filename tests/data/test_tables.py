"""Tables of the user's: what is read is what csv, json and pyarrow read, and what cannot be read gets one line."""

from __future__ import annotations

import csv
import json
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparsetrain.data.tables import Table, open_table
from sparsetrain.errors import UserError

# Every kind of character that a format must protect, without NUL and half characters, which are no text.
CELLS = st.text(st.sampled_from("a é\"',;\t\n\r|\\\ufeff\U0001f600"), max_size=6)


def rows(table: Table) -> list[dict[str, Any]]:
    return [row for _, row in table.rows()]


@given(st.lists(st.tuples(CELLS, CELLS), min_size=1, max_size=5), st.sampled_from(["\n", "\r\n"]), st.booleans())
def test_cells_are_what_the_csv_module_wrote(
    tmp_path_factory: pytest.TempPathFactory, cells: list[tuple[str, str]], end: str, mark: bool
) -> None:
    path = tmp_path_factory.getbasetemp() / "cells.csv"
    with path.open("w", newline="", encoding="utf-8-sig" if mark else "utf-8") as stream:
        writer = csv.writer(stream, lineterminator=end, quoting=csv.QUOTE_ALL)
        writer.writerows([("one", "two, more"), *cells])
    table = open_table(path)
    assert table.columns == ("one", "two, more")
    assert rows(table) == [dict(zip(table.columns, pair, strict=True)) for pair in cells]
    assert table.count == len(cells)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tabs.tsv", "a,b\tc;d\n1,2\t3\n"),
        ("tabs.csv", "ab\tc;d\n1,2\t3\n"),
        ("semicolons.csv", '"a,b";c\n1,2;"3"\n'),
        ("old_mac.csv", "a,b\r1,2\r"),
        ("blank_lines.csv", "\n\na,b\n\n1,2\n\n"),
    ],
)
def test_the_mark_between_cells_is_found(tmp_path: Path, name: str, content: str) -> None:
    (tmp_path / name).write_bytes(content.encode())
    table = open_table(tmp_path / name)
    assert len(table.columns) == 2
    assert [len(row) for row in rows(table)] == [2]


def test_rows_of_json_lines_may_have_different_keys(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    written = [{"text": "a\nb", "n": 1}, {"n": None, "deep": {"x": [1, {"y": 2.5}]}}, {"text": "é"}]
    path.write_text("\n".join(json.dumps(row) for row in written) + "\n\n")
    table = open_table(path)
    assert rows(table) == written
    assert table.columns == ("text", "n", "deep")
    assert [number for number, _ in table.rows()] == [1, 2, 3]


def test_values_of_a_parquet_file_keep_their_types(tmp_path: Path) -> None:
    written = {"text": ["a", None], "price": [Decimal("1.50"), None], "tags": [["x"], []], "n": [1, 2]}
    pq.write_table(pa.table(written), tmp_path / "rows.parquet")
    table = open_table(tmp_path / "rows.parquet")
    assert table.columns == tuple(written)
    assert rows(table) == pa.table(written).to_pylist()
    assert [row for _, row in table.rows(["n", "absent"])] == [{"n": 1}, {"n": 2}]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("rows.csv", b"", "input={path}: the file is empty"),
        ("rows.csv", b"\xef\xbb\xbf\n\n", "the file is empty"),
        ("rows.csv", b"text,label\n", "the file has no rows"),
        ("rows.csv", b"text,text\na,b\n", "the column 'text' occurs twice"),
        ("rows.csv", b"a,b\n1,2\n\n3\n", "line 4: 1 cells, but the header has 2 columns"),
        ("rows.csv", b'a,b\n"1\n2",3,4\n', "line 2: 3 cells"),
        ("rows.csv", b'a,b\n1,"2\n3,4\n', "line 2 to 3: not valid CSV: unexpected end of data"),
        ("rows.csv", b'a,b\n1,2\n"3"x,4\n', "line 3: not valid CSV"),
        ("rows.csv", b"a,b\n1,2\n3,\xff\n", "line 3 is not UTF-8: byte 0xff at offset 10"),
        ("rows.csv", "a,b\n1,2\n".encode("utf-16-le"), "line 1 has a NUL byte"),
        ("rows.csv", b"a\n" + b"x" * 140_000 + b"\n", "line 2: a cell has more than 131,072 characters"),
        ("rows.jsonl", b"\n\n", "the file has no rows"),
        ("rows.jsonl", b'{"a": 1}\n[1]\n', "line 2: [1] is not a JSON object"),
        ("rows.jsonl", b'{"a": 1}\n{"a": NaN}\n', "line 2: 'NaN' is not a finite number"),
        ("rows.jsonl", b'{"a": 1}\n{"a"\n', "line 2 is not valid JSON"),
        ("rows.jsonl", b'{"a": 1, "a": 2}\n', "line 1: 'a' occurs twice"),
        ("rows.parquet", b"PAR1", "is not a Parquet file"),
        ("rows.xlsx", b"PK", "input={path}: .xlsx is no table; allowed are .csv, .tsv, .jsonl and .parquet"),
        ("rows", b"a\n", "a file without suffix is no table"),
    ],
)
def test_what_cannot_be_read_gets_one_line(tmp_path: Path, name: str, content: bytes, said: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        _ = open_table(path).count, open_table(path).columns
    assert said.format(path=path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_parquet_without_rows_and_with_a_column_twice(tmp_path: Path) -> None:
    pq.write_table(pa.table({"a": pa.array([], pa.string())}), tmp_path / "none.parquet")
    with pytest.raises(UserError, match="has no rows"):
        rows(open_table(tmp_path / "none.parquet"))
    pq.write_table(pa.Table.from_arrays([pa.array([1]), pa.array([2])], ["a", "a"]), tmp_path / "twice.parquet")
    with pytest.raises(UserError, match="the column 'a' occurs twice"):
        rows(open_table(tmp_path / "twice.parquet"))


def test_a_missing_file_or_column_names_what_there_is(tmp_path: Path) -> None:
    (tmp_path / "labels.csv").write_text("text,label\na,b\n")
    with pytest.raises(UserError, match=r"input=.*label\.csv: no such file \(did you mean 'labels.csv'\?\)"):
        open_table(tmp_path / "label.csv")
    (tmp_path / "folder.csv").mkdir()
    with pytest.raises(UserError, match="is a directory"):
        open_table(tmp_path / "folder.csv")
    table = open_table(tmp_path / "labels.csv")
    table.need("text")
    with pytest.raises(UserError, match=r"^task.text_field=texts: .* has no column 'texts' \(did you mean 'text'\?\);"):
        table.need("texts", "task.text_field")
