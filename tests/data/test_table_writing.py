"""A table with columns added, against the readers of csv, json and pyarrow."""

from __future__ import annotations

import csv
import datetime
import json
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparsetrain.data.table_writing import Added, write_table
from sparsetrain.data.tables import open_table
from sparsetrain.errors import UserError

ADDED = (Added("label"), Added("score_a", "number"), Added("tags", "texts", "; "))
CELLS = st.text(st.sampled_from("a é\"',;\t\n\r|\\\ufeff\U0001f600"), max_size=6)


def values(count: int) -> list[tuple[Any, ...]]:
    return [(f'l"{n},\n', None if n == 1 else n / 3, ["x", "y"][: n % 3]) for n in range(count)]


def cells(path: Path, mark: str = ",") -> list[list[str]]:
    with path.open(newline="", encoding="utf-8") as stream:
        return list(csv.reader(stream, delimiter=mark, strict=True))


@given(
    st.lists(st.tuples(CELLS, CELLS), min_size=1, max_size=4), st.sampled_from(["\n", "\r\n"]), st.sampled_from(",;")
)
def test_cells_of_csv_stay_as_they_are(
    tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[str, str]], end: str, mark: str
) -> None:
    path, out = tmp_path_factory.getbasetemp() / "in.csv", tmp_path_factory.getbasetemp() / "out.csv"
    with path.open("w", newline="", encoding="utf-8-sig") as stream:
        csv.writer(stream, delimiter=mark, lineterminator=end, quoting=csv.QUOTE_ALL).writerows([("b", "a"), *rows])
    write_table(out, open_table(path), ADDED, values(len(rows)))
    told = [[label, "" if score is None else str(score), "; ".join(tags)] for label, score, tags in values(len(rows))]
    assert cells(out, mark) == [
        ["b", "a", "label", "score_a", "tags"],
        *([*r, *t] for r, t in zip(rows, told, strict=True)),
    ]
    assert out.read_bytes().startswith(f"b{mark}a{mark}label{mark}score_a{mark}tags{end}".encode())


OBJECTS = [{"text": "é\n", "n": 1}, {"n": 2, "deep": {"x": [None, 1.5]}}, {"text": "", "yes": True, "big": 1 << 70}]


def test_objects_of_json_lines_get_keys_appended(tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text("\n".join(map(json.dumps, OBJECTS)))
    write_table(tmp_path / "out.jsonl", open_table(tmp_path / "in.jsonl"), ADDED, values(3))
    found = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text("utf-8").splitlines()]
    names = [column.name for column in ADDED]
    assert found == [
        {**row, **dict(zip(names, more, strict=True))} for row, more in zip(OBJECTS, values(3), strict=True)
    ]
    assert [list(row) for row in found] == [[*row, *names] for row in OBJECTS]


STORED = pa.table(
    {
        "when": pa.array([datetime.datetime(2024, 1, 1), None, datetime.datetime(2024, 1, 2)], pa.timestamp("ns")),
        "price": pa.array([Decimal("1.50"), None, Decimal("2.00")]),
        "kind": pa.array(["a", "b", "a"]).dictionary_encode(),
        "deep": pa.array([{"x": [1]}, None, {"x": []}]),
        "n": pa.array([1, 2, None], pa.int16()),
        "part": pa.array([1.5, float("nan"), None]),
        "raw": pa.array([b"\xff", b"a", None]),
    }
).replace_schema_metadata({"own": "note"})


def test_types_of_a_parquet_file_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sparsetrain.data.table_writing._GROUP", 2)
    pq.write_table(STORED, tmp_path / "in.parquet", row_group_size=1)
    write_table(tmp_path / "out.parquet", open_table(tmp_path / "in.parquet"), ADDED, iter(values(3)))
    found = pq.read_table(tmp_path / "out.parquet")
    assert found.schema.metadata[b"own"] == b"note"
    assert found.select(STORED.column_names).schema.equals(STORED.schema)
    assert repr(found.select(STORED.column_names).to_pylist()) == repr(STORED.to_pylist())  # nan is not nan
    assert found.column_names == [*STORED.column_names, "label", "score_a", "tags"]
    assert [tuple(row.values()) for row in found.select(["label", "score_a", "tags"]).to_pylist()] == values(3)


def test_between_formats_values_change_as_little_as_they_can(tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text("\n".join(map(json.dumps, OBJECTS)))
    (tmp_path / "in.csv").write_text('text,n\n"a\nb",1\n,2\nc,3\n')
    pq.write_table(STORED, tmp_path / "in.parquet")

    def written(source: str, target: str) -> Path:
        write_table(tmp_path / target, open_table(tmp_path / source), ADDED[:2], [row[:2] for row in values(3)])
        return tmp_path / target

    assert cells(written("in.jsonl", "a.csv"))[:3] == [
        ["text", "n", "deep", "yes", "big", "label", "score_a"],
        ["é\n", "1", "", "", "", 'l"0,\n', "0.0"],
        ["", "2", '{"x": [null, 1.5]}', "", "", 'l"1,\n', ""],
    ]
    found = pq.read_table(written("in.jsonl", "b.parquet"))
    assert found.schema.types == [
        pa.string(),
        pa.int64(),
        pa.string(),
        pa.bool_(),
        pa.string(),
        pa.string(),
        pa.float64(),
    ]
    assert found["big"].to_pylist() == [None, None, str(1 << 70)]
    found = pq.read_table(written("in.csv", "c.parquet"))
    assert found["text"].to_pylist() == ["a\nb", "", "c"]
    assert cells(written("in.csv", "d.tsv"), "\t")[1] == ["a\nb", "1", 'l"0,\n', "0.0"]
    rows = [json.loads(line) for line in written("in.csv", "e.jsonl").read_text("utf-8").splitlines()]
    assert rows[1] == {"text": "", "n": "2", "label": 'l"1,\n', "score_a": None}
    rows = [json.loads(line) for line in written("in.parquet", "f.jsonl").read_text("utf-8").splitlines()]
    assert [row["price"] for row in rows] == ["1.50", None, "2.00"]
    assert [row["part"] for row in rows] == [1.5, None, None]
    assert [row["raw"] for row in rows] == ["\\xff", "a", None]
    assert rows[0]["when"] == "2024-01-01 00:00:00"


def test_nothing_is_left_behind_by_what_fails(tmp_path: Path) -> None:
    (tmp_path / "in.csv").write_text("text,label\na,b\n")
    table = open_table(tmp_path / "in.csv")
    with pytest.raises(UserError, match="has a column 'label' already"):
        write_table(tmp_path / "out.csv", table, ADDED, values(1))
    for target in ("out.csv", "out.jsonl", "out.parquet"):
        for count in (0, 2):
            with pytest.raises(UserError, match=r"in\.csv changed while it was read"):
                write_table(tmp_path / target, table, [Added("more")], [("x",)] * count)
    with pytest.raises(UserError, match=r"output=.*out\.xls: \.xls is no table"):
        write_table(tmp_path / "out.xls", table, [], [])
    assert [path.name for path in tmp_path.iterdir()] == ["in.csv"]


def test_a_table_may_be_written_over_itself(tmp_path: Path) -> None:
    (tmp_path / "in.csv").write_text("text\na\n")
    write_table(tmp_path / "in.csv", open_table(tmp_path / "in.csv"), ADDED[:1], [("x",)])
    assert cells(tmp_path / "in.csv") == [["text", "label"], ["a", "x"]]
