"""Commands in a directory of an earlier version keep its cut of plain text; other commands and a typed cut do not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from sparsetrain.data import DataConfig, find_corpora
from sparsetrain.runs.identity import digest
from sparsetrain.runs.recorded import FORMAT, Recorded, modernise, recorded_of
from sparsetrain.settings import build
from sparsetrain.stages import PretrainConfig
from sparsetrain.stages.former_cut import keep_former_cut

TEXT = "One paragraph of a few words.\n\nAnother one, a little longer than it.\n"


def config(place: Path, **top: Any) -> PretrainConfig:
    (place / "notes.txt").write_text(TEXT)
    data = DataConfig(path=str(place / "notes.txt"), tokenizer="bytes")
    shape = {"d_model": 8, "n_layers": 1, "n_heads": 1}
    return build(PretrainConfig, {"model": shape, "data": data, "budget": {"steps": 1}, **top})


def record(directory: Path, **content: Any) -> None:
    directory.mkdir(parents=True)
    (directory / "config.yaml").write_text(yaml.safe_dump(content, sort_keys=False))


@pytest.mark.parametrize("written", [1, 2, 3])
@pytest.mark.parametrize("same", [True, False])
def test_an_earlier_run_of_the_text_decides(
    tmp_path: Path, written: int, same: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    ours = config(tmp_path, runs_dir=str(tmp_path / "runs"))
    former = DataConfig(path=ours.data.path, tokenizer="bytes", separator="blank_line")
    corpus = find_corpora(former)[0] if same else "file-0000"
    head = {} if written == 1 else {"format": written, "kind": "pretrain"}
    record(tmp_path / "runs" / "a", **head, data={"path": "/gone/notes.txt"}, corpus=corpus, source=None)
    kept = keep_former_cut(ours, [])
    expected = "blank_line" if same and written < 3 else None
    assert kept.data.separator == expected
    assert ("blank lines cut its text" in " ".join(capsys.readouterr().out.split())) == (expected is not None)
    assert keep_former_cut(ours, ["data.separator"]) is ours
    named = config(tmp_path, run_dir=str(tmp_path / "runs" / "a"))
    assert (keep_former_cut(named, []).data.separator == "blank_line") == (written < 3)
    assert keep_former_cut(config(tmp_path, run_dir=str(tmp_path / "new")), []).data.separator is None


def test_without_a_fact_about_the_text_the_name_of_its_file_decides(tmp_path: Path) -> None:
    ours = config(tmp_path, runs_dir=str(tmp_path / "runs"))
    record(tmp_path / "runs" / "a", data={"path": "/gone/other.txt"})
    assert keep_former_cut(ours, []) is ours
    record(tmp_path / "runs" / "b", data={"path": "/gone/notes.txt"})
    assert keep_former_cut(ours, []).data.separator == "blank_line"


def test_the_former_cut_is_recorded_where_it_mattered() -> None:
    """Of plain text in each section; rows and other sources stay as they are, and so does what is newer."""
    data = {"path": None, "sources": {"a": {"path": "a.txt"}, "b": {"path": "b.jsonl"}, "c": {"name": "medline"}}}
    stages = [{"name": "pretrain", "data": {"path": "x.txt"}}, {"name": "finetune"}]
    found = modernise({"data": data, "pipeline": {"stages": stages}}, PretrainConfig, 2)
    cut = {name: each.get("separator") for name, each in found["data"]["sources"].items()}
    assert cut == {"a": "blank_line", "b": None, "c": None}
    assert "separator" not in found["data"]
    assert found["pipeline"]["stages"][0]["data"]["separator"] == "blank_line"
    plain = {"data": {"path": "a.txt"}}
    assert modernise(plain, PretrainConfig, 2)["data"]["separator"] == "blank_line"
    assert modernise(plain, PretrainConfig, FORMAT) == plain


def test_the_name_of_a_run_is_that_of_before(tmp_path: Path) -> None:
    """The digest is what the version with format 2 computed for these settings."""
    facts = {"corpus": "medline-0123456789abcdef", "source": None}
    ours = Recorded("pretrain", PretrainConfig, {"optimizer": {"lr": 0.5}, "seed": 3}, facts)
    there = recorded_of({"format": 2, "kind": "pretrain", **ours.values, **facts}, PretrainConfig, tmp_path)
    assert digest(ours) == digest(there) == "2284e43a"
