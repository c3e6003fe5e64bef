"""The readers of JSON, JSON lines, YAML and CSV, against the parsers of the standard library and PyYAML."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from fuzzing import Reader, fuzz, strict_csv, strict_json
from mutations import CSV, JSON, JSON_LINES, YAML

from sparsetrain.reading import read_csv, read_json, read_json_lines, read_yaml

VALUE = {
    "a": [1, 2.5, -3e-7],
    "b": {"c": None, "d": True, "é": "x\ny"},
    "e": [{"f": "日本"}, []],
    "n": 12345678901234567890,
}
TABLE = 'name,width,loss\nsp,32,2.5\n"a, ""b""",64,2.25\nmup,128,\n'


def written(name: str, text: str) -> Any:
    """A maker of one file."""

    def make(directory: Path) -> Path:
        (directory / name).write_text(text, encoding="utf-8")
        return directory / name

    return make


def plain_yaml(content: bytes) -> Any:
    """What PyYAML reads."""
    return yaml.safe_load(content.decode("utf-8-sig"))


def json_of_lines(content: bytes) -> list[Any]:
    """Each line by itself."""
    return [strict_json(line) for line in content.split(b"\n") if line.removeprefix(b"\xef\xbb\xbf").strip()]


READERS = [
    Reader("json", written("x.json", json.dumps(VALUE)), lambda place: read_json(place / "x.json"), JSON, strict_json),
    Reader(
        "json lines",
        written("x.jsonl", "".join(json.dumps({"step": n, **VALUE}) + "\n" for n in range(3))),
        lambda place: read_json_lines(place / "x.jsonl"),
        JSON_LINES,
        json_of_lines,
    ),
    Reader(
        "yaml",
        written("x.yaml", yaml.safe_dump(VALUE) + "base: &a {x: 1}\nother: {<<: *a, y: [*a]}\n"),
        lambda place: read_yaml(place / "x.yaml"),
        YAML,
        plain_yaml,
    ),
    Reader("csv", written("x.csv", TABLE), lambda place: read_csv(place / "x.csv", ["loss"]), CSV, strict_csv),
]


@pytest.mark.parametrize("reader", READERS, ids=[reader.name for reader in READERS])
def test_mutated_files_are_read_as_they_are_or_refused(reader: Reader, tmp_path: Path) -> None:
    """No other exception, nothing that another parser reads otherwise, no hang."""
    fuzz(reader, tmp_path)
