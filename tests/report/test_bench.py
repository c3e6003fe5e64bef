"""The numbers of a bench against values computed by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest
from rich.console import Console

from sparsetrain.report.bench import amdahl, bench_sheets, break_even, linear_fit, print_bench, rows_of, summarise
from sparsetrain.report.bench_plots import bench_figure


def cell(part: str, sparsity: float | None, times: dict[str, list[float]], **place: Any) -> dict[str, Any]:
    base = {"part": part, "threads": 1, "tokens": 64, "sparsity": sparsity, "in_features": 8, "out_features": 8}
    stored = {name: 64 if name == "dense" else round(64 * (1 - (sparsity or 0.0))) for name in times}
    results = {
        name: {
            "step_seconds": list(seconds),
            "forward_seconds": [s / 3 for s in seconds],
            "calls": 1,
            "note": "",
            "stored_weights": stored[name],
            "state_bytes_per_weight": 28.0,
            "peak_activation_bytes": 100,
        }
        for name, seconds in times.items()
    }
    return {**base, **place, "results": results, "skipped": {}}


@pytest.fixture
def values() -> dict[str, Any]:
    """The values of a bench with two shapes at one sparsity, a model, and both scaling series."""
    cells = [
        cell("layer", 0.75, {"dense": [4.0, 4.0, 9.0], "csr": [2.0, 1.0, 2.0]}),
        cell("layer", 0.75, {"dense": [16.0] * 3, "csr": [2.0] * 3}, in_features=16),
        cell("reference", None, {"dense": [2.0] * 3, "plain_torch": [2.2] * 3}),
        cell("model", 0.75, {"dense": [2.0] * 3, "csr": [1.0] * 3}),
        *(cell("nnz", s, {"dense": [1.0] * 3, "csr": [2 * (1 - s)] * 3}) for s in (0.25, 0.375, 0.625, 0.75)),
        *(cell("tokens", 0.75, {"dense": [n / 64] * 3, "csr": [n / 128 + 1] * 3}, tokens=n) for n in (64, 128, 256)),
    ]
    cells[2]["profile"] = {"linear_share": 0.7, "update_share": 0.1, "hidden_share": 0.5}
    named = {f"{number}": entry for number, entry in enumerate(cells)}
    machine: dict[str, Any] = {"processor": "a [bold]processor", "family": "", "cores": 2, "caches": {"L1 Data": "32K"}}
    machine |= {"vector_flags": ["avx2"], "native_bf16": False, "versions": {"torch": "2"}}
    found: dict[str, Any] = {"machine": machine, "commit": "0123456789abcdef+", "cells": named}
    found["summary"] = summarise(found)
    return found


def test_a_ratio_is_of_medians_inside_the_cell(values: dict[str, Any]) -> None:
    dense, csr = rows_of(values["cells"]["0"])
    assert (dense["speedup"], csr["speedup"]) == (1.0, 2.0)
    assert csr["speedup_low"] <= 4.0 <= csr["speedup_high"]  # round by round 2, 4 and 4.5
    assert (csr["step_min"], csr["step_max"], csr["limit"], csr["activation_ratio"]) == (1.0, 2.0, 4.0, 1.0)


def test_shapes_are_averaged_geometrically(values: dict[str, Any]) -> None:
    (entry,) = [entry for entry in values["summary"]["layers"] if entry["contender"] == "csr"]
    assert entry["speedup"] == pytest.approx(math.sqrt(2.0 * 8.0))
    assert (entry["speedup_min"], entry["speedup_max"], entry["shapes"]) == (2.0, 8.0, 2)


@pytest.mark.parametrize(("density", "limit"), [(1.0, 1.0), (0.25, 1 / (0.25 + 0.75 * 0.25)), (1e-12, 4.0)])
def test_amdahl_limit(density: float, limit: float) -> None:
    profile = {"linear_share": 0.7, "update_share": 0.1, "hidden_share": 0.5}
    assert amdahl(profile, density) == pytest.approx(limit)


def test_models_stand_beside_their_limit(values: dict[str, Any]) -> None:
    by_name = {(e["part"], e["contender"]): e for e in values["summary"]["models"]}
    assert by_name["model", "csr"]["amdahl_limit"] == pytest.approx(1 / (1 - 0.75 * 0.75))
    assert by_name["model", "csr"]["speedup"] == 2.0
    assert by_name["reference", "plain_torch"]["speedup"] == pytest.approx(2.0 / 2.2)


def test_straight_series_fit_exactly(values: dict[str, Any]) -> None:
    (csr,) = [entry for entry in values["summary"]["scaling"] if entry["contender"] == "csr"]
    assert csr["nnz"]["slope"] == pytest.approx(2 / 64)
    assert csr["nnz"]["r_squared"] == pytest.approx(1.0)
    assert csr["tokens"]["intercept"] == pytest.approx(1.0)
    assert csr["tokens"]["slope"] == pytest.approx(1 / 128)
    assert csr["break_even"]["sparsity"] == pytest.approx(0.5, abs=0.02)
    assert linear_fit([(1.0, 1.0), (2.0, 2.0)]) is None


@pytest.mark.parametrize(
    ("series", "expected"),
    [
        ([(0.2, 0.5), (0.4, 2.0)], {"sparsity": 0.3, "bound": "equal"}),
        ([(0.4, 2.0), (0.2, 1.1)], {"sparsity": 0.2, "bound": "at most"}),
        ([(0.2, 0.5), (0.4, 0.9)], None),
        ([(0.1, 1.1), (0.2, 0.5), (0.4, 2.0)], {"sparsity": 0.3, "bound": "equal"}),
        ([], None),
    ],
)
def test_break_even(series: list[tuple[float, float]], expected: dict[str, Any] | None) -> None:
    found = break_even(series)
    assert (found is None) == (expected is None)
    if found is not None and expected is not None:
        assert found["sparsity"] == pytest.approx(expected["sparsity"])
        assert found["bound"] == expected["bound"]


def test_the_tables_show_ratio_and_limit(values: dict[str, Any], screen: Console) -> None:
    titles = [sheet.title for sheet in bench_sheets(values)]
    assert len(titles) == len(set(titles)) == 5
    print_bench(values, screen)
    text = screen.file.getvalue()  # type: ignore[attr-defined]
    for part in ("4.00x (2.00-8.00)", "a [bold]processor", "0123456789ab+", "plain torch GPT", "0.91x", "28.0"):
        assert part in text


def test_the_figure_is_the_same_twice(values: dict[str, Any]) -> None:
    first = bench_figure(values)
    assert first.startswith(b"\x89PNG")
    assert bench_figure(values) == first


def test_an_empty_bench_has_a_figure_and_no_tables(values: dict[str, Any]) -> None:
    empty = {**values, "cells": {}}
    empty["summary"] = summarise(empty)
    assert bench_sheets(empty) == []
    assert bench_figure(empty).startswith(b"\x89PNG")
