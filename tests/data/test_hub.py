"""The hub source, with a fake of `datasets` that returns rows or raises an error."""

from __future__ import annotations

import sys
import types
from typing import Any

import pytest

from sparsetrain.data import DataConfig, prepare
from sparsetrain.data.sources.hub import HubDataset
from sparsetrain.errors import UserError


def stand_in(monkeypatch: pytest.MonkeyPatch, rows: Any) -> list[tuple[Any, ...]]:
    calls = []

    def load_dataset(name: str, config: str | None, split: str) -> Any:
        calls.append((name, config, split))
        if isinstance(rows, Exception):
            raise rows
        return rows

    module = types.ModuleType("datasets")
    module.load_dataset = load_dataset  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", module)
    return calls


def test_rows_become_documents(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = stand_in(monkeypatch, [{"text": "one", "id": "a"}, {"text": ""}, {"text": "two"}])
    source = HubDataset("owner/data", "plain", "train[:1%]")
    assert [document.text for document in source.documents()] == ["one", "two"]
    assert [document.text for document in source.documents()] == ["one", "two"]
    assert calls == [("owner/data", "plain", "train[:1%]")]


def test_prepare_from_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch, [{"body": f"row {number} of many"} for number in range(50)])
    config = DataConfig(name="hub", hub_name="owner/data", text_field="body", tokenizer="bytes")
    corpus = prepare(config, progress=False)
    assert corpus.manifest["source"] == "hub"
    assert len(corpus.train_ids()) + corpus.manifest["splits"]["validation"]["documents"] == 50


def test_offline_is_one_line_and_leaves_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    stand_in(monkeypatch, ConnectionError("Couldn't reach the hub.\nMore of it"))
    with pytest.raises(UserError, match=r"owner/data .*Couldn't reach the hub; .*local file as data\.path") as caught:
        prepare(DataConfig(name="hub", hub_name="owner/data"), progress=False)
    assert "\n" not in str(caught.value)
    assert list((tmp_path / "cache").rglob("*")) == []


def test_without_datasets_the_command_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match=r"pip install 'sparsetrain\[hf\]'"):
        list(HubDataset("owner/data", None, "train").documents())


def test_wrong_field_names_the_ones_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch, [{"content": "one"}])
    with pytest.raises(UserError, match="row 1: no field text_field='text'; it has content"):
        list(HubDataset("owner/data", None, "train").documents())
