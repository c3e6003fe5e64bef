"""What the backend ``auto`` stands for: interpolation of the table, its file, and measuring a new one."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.interpolate import RegularGridInterpolator

from sparsetrain.errors import UserError
from sparsetrain.sparsity import SparseLinear, SparsityPattern, auto, tuning
from sparsetrain.sparsity.auto import Crossover, from_plain
from sparsetrain.sparsity.init import random_pattern
from sparsetrain.sparsity.ops import resolve_backend

TABLE = Crossover([64, 256, 1024], [16, 256], [1, 4], [[[0.0, 0.1], [0.2, 0.4], [0.5, 0.9]], [[0.0] * 2] * 3])


@given(side=st.floats(64, 1024), tokens=st.integers(16, 256))
def test_sizes_in_between_match_scipys_interpolation_in_logarithms(side: float, tokens: int) -> None:
    grid = (np.log(TABLE.sides), np.log(TABLE.tokens))
    theirs = RegularGridInterpolator(grid, np.array(TABLE.density[0]))([[np.log(side), np.log(tokens)]])[0]
    assert TABLE.at(side, tokens, 1) == pytest.approx(theirs, abs=1e-9)


@pytest.mark.parametrize(
    ("side", "tokens", "threads", "expected"),
    [(1, 1, 1, 0.0), (10**5, 10**6, 1, 0.9), (10**5, 1, 2, 0.5), (256, 256, 1, 0.4), (1024, 256, 3, 0.0)],
)
def test_beyond_the_table_its_edge_counts(side: float, tokens: int, threads: int, expected: float) -> None:
    assert TABLE.at(side, tokens, threads) == pytest.approx(expected)


def pattern(density: float, side: int = 1024) -> SparsityPattern:
    return random_pattern((side, side), density, torch.Generator().manual_seed(0))


def test_auto_takes_the_sparse_backend_below_the_crossover_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(auto._tables, "csr", TABLE)
    assert resolve_backend("auto", pattern(0.4), 16) == "csr"
    assert resolve_backend("auto", pattern(0.6), 16) == "masked"
    assert resolve_backend("auto", pattern(0.6), 256) == "csr"
    assert resolve_backend("auto", pattern(0.6), 256, torch.float64) == "masked"
    blocks = SparsityPattern.from_mask(torch.ones(8, 8, dtype=torch.bool), (4, 4))
    assert resolve_backend("auto", blocks, 256) != "csr"


def test_without_a_table_everything_is_computed_densely(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(auto._tables, "csr")
    assert resolve_backend("auto", pattern(0.1, 64), 2048) == "masked"


@pytest.mark.parametrize("name", auto.SHIPPED.values())
def test_a_shipped_table_is_one_and_prefers_dense_for_tiny_layers(name: str) -> None:
    text = (Path(auto.__file__).parent / name).read_text()
    table = from_plain(json.loads(text), name)["csr"]
    assert table.at(16, 8, 1) == 0.0
    assert table.at(1024, 2048, 1) > 0.4


@pytest.mark.parametrize(("capability", "name"), [("AVX2", "crossover.json"), ("AVX512", "crossover_avx512.json")])
def test_the_shipped_table_is_that_of_such_a_processor(
    capability: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    text = (Path(auto.__file__).parent / name).read_text()
    assert auto._load() == from_plain(json.loads(text), name)


def test_a_table_with_a_side_of_zero_is_none() -> None:
    entry = {**vars(TABLE), "sides": [0, *TABLE.sides[1:]]}
    with pytest.raises(UserError, match="logarithmic scales: positive"):
        from_plain({"backends": {"csr": entry}}, "somewhere.json")


def test_a_saved_table_is_used_and_read_again() -> None:
    before = dict(auto._tables)
    try:
        path = auto.save({"csr": TABLE}, {"machine": "a test"})
        assert path.parent == auto.cache_directory()
        assert auto._tables == {"csr": TABLE}
        assert auto._load() == {"csr": TABLE}
        path.write_text("{}")
        with pytest.raises(UserError, match=r"is no crossover table .*; delete it or run: sparsetrain tune"):
            auto._load()
    finally:
        auto._tables.clear()
        auto._tables.update(before)


@pytest.mark.parametrize("content", ["", "[]", '{"backends": {"csr": {"sides": []}}}'])
def test_a_bad_table_is_told_of_at_import_and_the_shipped_one_is_used(
    content: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = auto.tuned_path()
    path.parent.mkdir(parents=True)
    path.write_text(content)
    # Another copy of the module: the one in use keeps its classes and its tables.
    spec = importlib.util.spec_from_file_location("imported_again", auto.__file__)
    assert spec is not None
    assert spec.loader is not None
    again = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, again)  # where dataclasses look
    with pytest.warns(UserWarning, match=rf"{re.escape(path.name)} is no .*; the table of the library is used$"):
        spec.loader.exec_module(again)
    tables = {name: vars(table) for name, table in again._tables.items()}
    assert tables == {name: vars(table) for name, table in auto._shipped().items()}
    assert tables


@pytest.mark.parametrize(
    ("ratios", "expected"),
    [([1.2, 1.5, 2.0], 0.0), ([0.5, 0.7, 0.9], 1.0), ([0.5, 0.75, 1.25], 0.75), ([1.0, 2.0, 3.0], 0.1)],
)
def test_the_crossing_is_where_the_line_through_the_ratios_passes_one(ratios: list[float], expected: float) -> None:
    assert tuning.crossing([0.1, 0.5, 1.0], ratios) == pytest.approx(expected)


def test_measuring_counts_its_cells_and_leaves_the_threads_as_they_were() -> None:
    seen: list[tuple[int, int]] = []
    torch.set_num_threads(1)
    table = tuning.measure("csr", [2], sides=[64], tokens=[16, 64], repeats=1, progress=lambda *c: seen.append(c))
    assert seen == [(1, 2), (2, 2)]
    assert torch.get_num_threads() == 1
    assert all(0.0 <= value <= 1.0 for row in table.density[0] for value in row)


def test_a_steps_time_is_that_of_forward_and_both_gradients() -> None:
    layer = SparseLinear(32, 32, density=0.5, seed=0, backend="masked")
    x = torch.randn(8, 32, requires_grad=True)
    assert 0.0 < tuning.step_seconds(layer, x, torch.randn(8, 32), 1) < 1.0
    assert x.grad is not None
    assert layer.values.grad is not None
