"""Readers of JSON, JSON lines, YAML and CSV return what standard parsers return, or one line that names the file."""

from __future__ import annotations

import csv
import io
import json
import os
import reprlib
import tracemalloc
from pathlib import Path
from typing import Annotated, Any, NotRequired, TypedDict

import pytest
import yaml
from msgspec import Meta

from sparsetrain.errors import UserError
from sparsetrain.reading import MAX_BYTES, MAX_DEPTH, json_lines, read_csv, read_json, read_json_lines, read_yaml
from sparsetrain.shapes import Count, Fraction, NonNegative, check


def refused(path: Path, content: bytes | str, read: Any, *words: str) -> None:
    """Assert that a file with this content is refused in one line that names it and contains ``words``."""
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError) as caught:
        read(path)
    line = str(caught.value)
    assert "\n" not in line
    assert str(path) in line
    assert len(line) < len(str(path)) + 250
    for word in words:
        assert word in line


@pytest.mark.parametrize(
    ("content", "word"),
    [
        (b"", "not valid JSON"),
        (b"{", "not valid JSON"),
        (b'{"a": 1} x', "Extra data"),
        (b'{"a": "\xff"}', "UTF-8"),
        ('{"a": 1}'.encode("utf-16"), "UTF-8"),
        (b'{"a": "\\ud800"}', "surrogate"),
        (b'{"\\udc00": 1}', "surrogate"),
        (b'{"a": 1, "b": 2, "a": 3}', "'a' occurs twice"),
        (b"[NaN]", "NaN"),
        (b"[-Infinity]", "-Infinity"),
        (b"[1e999]", "finite"),
        (b"[" + b"9" * 5000 + b"]", "5000 digits"),
        (b"[" + b"9" * 400 + b"]", "400 digits"),
        (b"[" * 100_000, "nests"),
        (b"[" * (MAX_DEPTH + 1) + b"]" * (MAX_DEPTH + 1), "nests"),
        (b'{"a":' * 100_000, "nests"),
    ],
)
def test_json_that_cannot_be_taken_as_it_is_is_one_line(content: bytes, word: str, tmp_path: Path) -> None:
    """Damage, other encodings, repeated names, numbers too large for a float, and deep nesting."""
    refused(tmp_path / "x.json", content, read_json, word)


@pytest.mark.parametrize(
    "content",
    [
        b'{"a": [1, 2.5, null, true, "\\ud83d\\ude00", "\xc3\xa9"]}',
        b'\xef\xbb\xbf{"a": 1}',
        b'"[[[[{{{{"',
        b"[" * MAX_DEPTH + b"]" * MAX_DEPTH,
        b"[" + b"9" * 300 + b"]",
    ],
)
def test_json_within_the_limits_equals_json_of_the_standard_library(content: bytes, tmp_path: Path) -> None:
    """Accepted files give the values of `json`, with or without a byte-order mark."""
    path = tmp_path / "x.json"
    path.write_bytes(content)
    assert read_json(path) == json.loads(content)


def test_numbers_that_are_not_finite_are_read_where_they_are_allowed(tmp_path: Path) -> None:
    """A diverged run may record them."""
    (tmp_path / "x.json").write_text("[NaN, Infinity, 1e999]")
    assert str(read_json(tmp_path / "x.json", finite=False)) == "[nan, inf, inf]"


def test_what_is_no_regular_file_is_refused_before_it_is_opened(tmp_path: Path) -> None:
    """A pipe without a writer would block forever, and a device has no end."""
    os.mkfifo(tmp_path / "pipe")
    for path, word in [
        (tmp_path / "pipe", "not a regular file"),
        (tmp_path, "a directory"),
        (Path("/dev/zero"), "not a regular file"),
        (tmp_path / "none", "No such file"),
        (tmp_path / ("n" * 300), "too long"),
    ]:
        with pytest.raises(UserError, match=word):
            read_json(path)


def test_a_file_larger_than_the_limit_is_not_read(tmp_path: Path) -> None:
    """A sparse file of one terabyte takes no disk space."""
    with (tmp_path / "x.json").open("wb") as stream:
        stream.truncate(1 << 40)
    with pytest.raises(UserError, match=f"at most {MAX_BYTES}"):
        read_json(tmp_path / "x.json")


def test_reading_takes_memory_for_the_file_and_not_for_the_largest_one_allowed(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text("{}")
    tracemalloc.start()
    try:
        assert read_json(path, max_bytes=1 << 30) == {}
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 1 << 20


def test_a_line_of_json_lines_is_named_by_its_number(tmp_path: Path) -> None:
    """Unicode line separators do not end a line, blank lines count, and a truncated last line may be ignored."""
    path = tmp_path / "x.jsonl"
    path.write_bytes('\ufeff{"a": "\u2028"}\n\r\n{"b": 2}\n'.encode())
    with path.open("rb") as stream:
        assert list(json_lines(stream, "x")) == [(1, {"a": "\u2028"}), (3, {"b": 2})]
    refused(path, '{"a": 1}\n{"b"\n{"c": 1}', read_json_lines, "line 2")
    refused(path, '{"a": 1}\n\n[1]\n', lambda path: read_json_lines(path, dict, cut=True), "line 3", "[1]")
    refused(path, '{"a": 1}\n{"b"', read_json_lines, "line 2")
    assert read_json_lines(path, cut=True) == [{"a": 1}]
    refused(path, '{"a": 1}\n{"b"\n', lambda path: read_json_lines(path, cut=True), "line 2")


_LEVELS = ["a: &a [" + ", ".join("x" * 10) + "]"] + [
    f"{name}: &{name} [" + ", ".join([f"*{chr(ord(name) - 1)}"] * 10) + "]" for name in "bcdefghi"
]


@pytest.mark.parametrize(
    ("content", "word"),
    [
        ("\n".join(_LEVELS), "aliases"),
        ("a: &a {x: 1}\n" + "".join(f"b{n}: &b{n} {{<<: [*a{', *a' * 40}]}}\n" for n in range(1_300)), "values"),
        ("x: &s {s: *s}", "contains it"),
        ("x: &s [*s]", "contains it"),
        ("x: *nothing", "line 1"),
        ("x: " + "[" * 5000 + "]" * 5000, "nests"),
        ("- " * 5000, "nests"),
        ("a: 1\nb: 2\na: 3", "line 3: 'a' occurs twice"),
        ("a: !!python/object/apply:os.system [ls]", "tag"),
        ("a: !!bool x", "tag"),
        ("a: 2001-01-01", "datetime.date"),
        ("a: 2001-99-99", "not valid YAML"),
        ("1: a", "must be text"),
        ("a: " + "9" * 5000, "not valid YAML"),
        ("a: 0x" + "f" * 5000, "digits"),
        ("a: " + "1:" * 300 + "1.5", "not valid YAML"),
        ('a: "\\ud800"', "surrogate"),
        ('a: "\\UFFFFFFFF"', "not valid YAML"),
        ("a: [1, 2", "line 1"),
        ("a: 1\n---\nb: 2", "line"),
        ("a: \x00", "not valid YAML"),
        (b"a: \xff", "UTF-8"),
        ("? [1]\n: 2", "line 1"),
        ("x" * 300_000, "at most"),
    ],
    ids=range(24),
)
def test_yaml_that_cannot_be_taken_as_it_is_is_one_line(content: str | bytes, word: str, tmp_path: Path) -> None:
    """Aliases that expand without end, tags, repeated names, and values that JSON does not have."""
    refused(tmp_path / "x.yaml", content, read_yaml, word)


def test_yaml_within_the_limits_equals_pyyaml(tmp_path: Path) -> None:
    """Aliases, merge keys and special floats are read as PyYAML reads them."""
    content = "a: &a {x: 1, y: .inf}\nb: [*a, *a]\nc: {<<: *a, x: 2}\nd: [1e3, 1.5, yes, ~, 'no', \"é\"]\n"
    (tmp_path / "x.yaml").write_text("\ufeff" + content)
    assert read_yaml(tmp_path / "x.yaml") == yaml.safe_load(content)


@pytest.mark.parametrize(
    ("content", "word"),
    [
        (b"a,b\n1,\xff\n", "UTF-8"),
        (b"a,b\n1,2,3\n", "line 2 has 3 cells, but the table has 2 columns"),
        (b"a,b\n1,2\n\n1\n", "line 4 has 1 cell"),
        (b"a,b\n1," + b"x" * 200_000 + b"\n", "field larger"),
        (b'a,b\n1,"2\n', "line 2"),
        (b'a,b\n1,"2"3\n', "line 2"),
        (b"a,a\n1,2\n", "twice"),
        (b"b,c\n1,2\n", "no column a"),
        (b"", "no column a"),
    ],
)
def test_csv_that_cannot_be_taken_as_it_is_is_one_line(content: bytes, word: str, tmp_path: Path) -> None:
    """Other bytes, rows of another length, unterminated cells and broken quotes; the message gives the line."""
    refused(tmp_path / "x.csv", content, lambda path: read_csv(path, ["a"]), word)


def test_csv_equals_csv_of_the_standard_library(tmp_path: Path) -> None:
    """Quoted line ends, commas and blank lines are read as `csv.DictReader` reads them."""
    content = 'a,b\n1,"x\r\ny, ""z"""\n\n"",é\r\n'
    (tmp_path / "x.csv").write_bytes(("\ufeff" + content).encode())
    assert read_csv(tmp_path / "x.csv", ["b"]) == list(csv.DictReader(io.StringIO(content, newline="")))


class Part(TypedDict):
    """A shape with required and optional fields."""

    name: str
    share: Fraction
    kind: NotRequired[Annotated[str, Meta(pattern=r"^(one|two)\Z")]]
    loss: NotRequired[float | None]
    seconds: NotRequired[NonNegative | None]


NESTED, LISTS = dict[str, dict[str, int]], dict[str, dict[str, list[int]]]
PAIRS = dict[str, dict[str, tuple[int, float]]]


@pytest.mark.parametrize(
    ("value", "shape", "line"),
    [
        ([1], dict, "f holds [1], which must be a mapping"),
        (None, dict[str, int], "f holds None, which must be a mapping"),
        ({"a": {"b": True}}, dict[str, dict[str, int]], "f: a.b=True must be a whole number"),
        ({"a": 2**63}, dict[str, Count], f"f: a={2**63} must be a whole number of at most {2**63 - 1}"),
        ({"a": -1}, dict[str, Count], "f: a=-1 must be a whole number of at least 0"),
        ([1.5, float("nan")], list[Fraction | None], "f: [0]=1.5 must be a number of at most 1"),
        ([0.5, float("nan")], list[Fraction], "f: [1]=nan must be a number of at least 0"),
        ({"a": 1, "b": float("inf")}, dict[str, NonNegative], "f: b=inf must be a finite number"),
        ([0, "x"], tuple[int, int], "f: [1]='x' must be a whole number"),
        ([0], tuple[int, int], "f holds [0], which must be a list of length 2"),
        ([0], Annotated[list[int], Meta(min_length=2)], "f holds [0], which must be a list of length at least 2"),
        (0.0, Annotated[float, Meta(gt=0.0)], "f holds 0.0, which must be a number above 0"),
        ("x", int | None, "f holds 'x', which must be a whole number or null"),
        ({"share": 0.5}, Part, "f: name is missing"),
        ([{"share": 0.5}], list[Part], "f: [0].name is missing"),
        ({"name": "x", "share": 2}, Part, "f: share=2 must be a number of at most 1"),
        ([{"name": "x", "share": 1, "kind": "no"}], list[Part], "f: [0].kind='no' must be text of the form (one|two)"),
        ({"name": "x", "share": 1, "seconds": -1}, Part, "f: seconds=-1 must be a number of at least 0"),
        ({"a": ["x"]}, dict[str, list[int] | None], "f: a[0]='x' must be a whole number"),
        ({1: 2}, dict[str, int], "f holds {1: 2}, which must be a mapping whose names are text"),
        ({"a": {1: 2}}, dict[str, dict[str, int]], "f: a={1: 2} must be a mapping whose names are text"),
        ({"good": {"a": 1}, "bad": {"b": "x", "c": "y"}, "z": {"b": 0}}, NESTED, "f: bad.b='x' must be a whole number"),
        ({"a": {"k.1": [0, "x"], "l": [""]}, "b": {"k.1": [""]}}, LISTS, "f: a.k.1[1]='x' must be a whole number"),
        ({"pairs": {"a": (1, 2), "b": (1, "x")}, "more": {"a": (1, 2)}}, PAIRS, "f: pairs.b[1]='x' must be a number"),
        (10**400, float, f"f holds {reprlib.repr(10**400)}, which must be a number of at most 1.79769e+308"),
    ],
)
def test_a_shape_names_the_field_and_what_is_allowed(value: Any, shape: Any, line: str) -> None:
    """The line starts with the path of the first wrong value."""
    with pytest.raises(UserError) as caught:
        check(value, shape, "f")
    assert str(caught.value) == line


def test_a_value_of_the_shape_is_returned_as_it_is() -> None:
    """Further keys are allowed, and an integer is accepted as a float."""
    value = {"name": "x", "share": 1, "kind": "two", "loss": float("nan"), "other": [1]}
    assert check(value, Part, "f") is value
    assert check([1, 2.5], list[float], "f") == [1, 2.5]
    assert check({"a": None}, dict[str, int | None], "f") == {"a": None}
