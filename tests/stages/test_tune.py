"""``sparsetrain tune``: a crossover table of this machine, which later runs use."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from rich.console import Console

from sparsetrain.bench.tune import TuneConfig, tune
from sparsetrain.errors import UserError
from sparsetrain.sparsity.backends import auto


@pytest.fixture(autouse=True)
def _tables() -> Iterator[None]:
    before = dict(auto._tables)
    yield
    auto._tables.clear()
    auto._tables.update(before)


def test_a_measured_table_is_saved_shown_and_used(screen: Console) -> None:
    path = tune(TuneConfig(threads=[1, 2], sides=[64], tokens=[16, 64], repeats=1), screen)
    content = json.loads(path.read_text())
    assert path == auto.tuned_path()
    names = {"csr", "bsr", "csr bfloat16", "bsr bfloat16", "csr decoding"}
    assert set(content["backends"]) == names
    for name in names:
        assert auto._tables[name].sides == [64]
        assert vars(auto._load()[name]) == content["backends"][name] == vars(auto._tables[name])
    assert content["machine"]["threads"] >= 1
    text = " ".join(screen.file.getvalue().split())  # type: ignore[attr-defined]
    assert "csr 1x1, threads: 2" in text
    assert "bsr 16x16, threads: 1" in text
    assert "csr 1x1, bfloat16, threads: 1" in text
    assert "csr 1x1, decoding, threads: 1" in text
    assert "faster from" in text
    assert f"saved in {path}" in text


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("threads", []),
        ("threads", [0]),
        ("sides", [64, 32]),
        ("sides", [24]),
        ("sides", [16]),
        ("tokens", [8, 8]),
        ("repeats", 0),
    ],
)
def test_what_cannot_be_measured_is_refused(field: str, value: Any) -> None:
    with pytest.raises(UserError, match=f"^{field}="):
        TuneConfig(**{field: value})
