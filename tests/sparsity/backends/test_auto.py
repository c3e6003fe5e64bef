"""What the backend ``auto`` stands for: interpolation of the table, its file, and measuring a new one."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import re
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fresh import Fresh
from hypothesis import given
from hypothesis import strategies as st
from scipy.interpolate import RegularGridInterpolator

from sparsetrain.bench import crossover as tuning
from sparsetrain.errors import UserError
from sparsetrain.machine import Processor
from sparsetrain.sparsity import SparseLinear, SparsityPattern
from sparsetrain.sparsity.backends import auto
from sparsetrain.sparsity.backends.auto import Crossover, from_plain
from sparsetrain.sparsity.backends.base import resolve_backend
from sparsetrain.sparsity.patterns.draw import random_pattern

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


def test_bfloat16_goes_by_its_own_table_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("csr", "bsr", "csr bfloat16", "bsr bfloat16"):
        monkeypatch.delitem(auto._tables, name, raising=False)
    never, always = (Crossover([64], [64], [1], [[[density]]]) for density in (0.0, 1.0))
    blocks = SparsityPattern.from_mask(torch.ones(8, 8, dtype=torch.bool), (4, 4))

    def chosen() -> list[str]:
        types = (torch.float32, torch.bfloat16)
        return [auto.choose(p, 64, dtype, p.device) for p in (pattern(0.5, 64), blocks) for dtype in types]

    monkeypatch.setitem(auto._tables, "csr", always)
    assert chosen() == ["csr", "csr", "bsr", "bsr"]
    monkeypatch.setitem(auto._tables, "csr bfloat16", never)
    assert chosen() == ["csr", "masked", "bsr", "masked"]
    monkeypatch.setitem(auto._tables, "bsr bfloat16", always)
    assert chosen() == ["csr", "masked", "bsr", "bsr"]


_ZEN4 = {"vendor": "AuthenticAMD", "family": "25"}
_ZEN5 = {"vendor": "AuthenticAMD", "family": "26"}


@pytest.mark.parametrize(
    ("about", "flags", "counts"),
    [
        ({}, "fma amx_bf16 amx_tile", True),
        ({}, "fma amx_bf16x", False),
        ({}, "", False),
        (_ZEN4, "avx512_bf16 fma", True),
        (_ZEN4, "amx_bf16", False),
        (_ZEN5, "avx512_bf16", False),
    ],
)
def test_a_shipped_table_for_bfloat16_counts_where_there_are_the_instructions_of_its_processor(
    about: dict[str, str], flags: str, counts: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    monkeypatch.setattr(auto, "processor", lambda: Processor(**about, flags=frozenset(flags.split())))
    names = set(auto._shipped())
    assert {"csr", "bsr"} <= names
    assert ({"csr bfloat16", "bsr bfloat16"} <= names) == counts


def test_what_takes_dense_ages_is_not_timed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    steps = {"csr": 0, "masked": 0}

    def seconds(layer: SparseLinear, x: torch.Tensor, g: torch.Tensor, count: int) -> float:
        steps[layer.backend] += count
        return {"csr": 1.0, "masked": 4.5}[layer.backend]

    monkeypatch.setattr(tuning, "_seconds", seconds)
    assert tuning.measure("csr", [1], torch.bfloat16, [64], [16]).density == [[[1.0]]]
    assert steps == {"csr": 2, "masked": 2}


@pytest.mark.parametrize(("backend", "side"), [("csr", 64), ("bsr", 64), ("bsr", 32)])
@pytest.mark.parametrize("dtype", tuning.DTYPES)
def test_a_cell_is_the_crossing_of_what_its_layers_take(
    backend: str, side: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    def seconds(layer: SparseLinear, x: torch.Tensor, g: torch.Tensor, count: int) -> float:
        assert layer.values.dtype == x.dtype == g.dtype == dtype
        density = layer.pattern.density
        return 0.5 + density if layer.backend == "masked" else 2 * density

    monkeypatch.setattr(tuning, "_seconds", seconds)
    assert tuning.measure(backend, [1], dtype, [side], [16]).density == [[[0.5]]]


def test_a_disturbed_timing_of_a_slow_layer_hardly_moves_a_crossing() -> None:
    # Errors grow with times, and weights fall with them; all alike would put it at 0.35.
    sparse = [0.1, 0.4, 1.0, 1.8 * 2.0]
    assert tuning.crossing(tuning.DENSITIES, sparse, [1.0] * 4) == pytest.approx(0.5, abs=0.08)


def test_without_a_table_everything_is_computed_densely(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(auto._tables, "csr")
    assert resolve_backend("auto", pattern(0.1, 64), 2048) == "masked"


@pytest.mark.parametrize("name", sorted({training for training, _ in auto.SHIPPED.values()}))
def test_a_shipped_table_is_one_and_prefers_dense_for_tiny_layers(name: str) -> None:
    text = (Path(auto.__file__).parent / "tables" / name).read_text()
    table = from_plain(json.loads(text), name)["csr"]
    assert table.at(16, 8, 1) == 0.0
    assert table.at(1024, 2048, 1) > 0.4


@pytest.mark.parametrize(
    ("capability", "about", "names"),
    [
        ("AVX2", {}, ["crossover", "decoding_avx2"]),
        ("AVX2", _ZEN4, ["crossover", "decoding_avx2"]),  # where torch was told to leave AVX-512 alone
        ("AVX512", {}, ["crossover_avx512", "decoding_avx512"]),
        ("AVX512", {"vendor": "GenuineIntel", "family": "6"}, ["crossover_avx512", "decoding_avx512"]),
        ("AVX512", _ZEN5, ["crossover_avx512", "decoding_avx512_columns"]),
        ("AVX512", _ZEN4, ["crossover_zen4", "decoding_avx512_columns"]),
    ],
)
def test_the_shipped_table_is_that_of_such_a_processor(
    capability: str, about: dict[str, str], names: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(auto, "processor", lambda: Processor(**about))
    tables = {}
    for name in names:
        tables |= json.loads((Path(auto.__file__).parent / "tables" / f"{name}.json").read_text())["backends"]
    loaded = {name: vars(table) for name, table in auto._load().items()}
    assert loaded == {name: tables[name] for name in loaded}
    assert {"csr", "csr decoding"} <= loaded.keys()


def test_a_table_with_a_side_of_zero_is_none() -> None:
    entry = {**vars(TABLE), "sides": [0, *TABLE.sides[1:]]}
    with pytest.raises(UserError, match=r"backends.csr.sides\[0\]=0 must be a whole number of at least 1"):
        from_plain({"backends": {"csr": entry}}, "somewhere.json")


def test_a_saved_table_is_used_and_read_again() -> None:
    before = dict(auto._tables)
    try:
        path = auto.save({"csr": TABLE}, {"machine": "a test"})
        assert path.parent == auto.cache_directory()
        assert auto._tables == {"csr": TABLE}
        again = auto._load()
        assert vars(again.pop("csr")) == vars(TABLE)
        # What the file lacks of bfloat16 and of decoding is the library's.
        assert set(again) == {name for name in auto._shipped() if name.endswith(("bfloat16", "decoding"))}
        path.write_text("{}")
        with pytest.raises(UserError, match=r"is no crossover table .*; delete it or run: sparsetrain tune"):
            auto._load()
    finally:
        auto._tables.clear()
        auto._tables.update(before)


@pytest.fixture
def again(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Another copy of the module, as after an import: the one in use keeps its classes and its tables."""
    spec = importlib.util.spec_from_file_location("imported_again", auto.__file__)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)  # where dataclasses look
    spec.loader.exec_module(module)
    return module


def plain(entry: dict[str, Any]) -> str:
    """A file with a table that is right but for ``entry``."""
    whole = {"sides": [64, 128], "tokens": [16], "threads": [1], "density": [[[0.5], [0.25]]]}
    return json.dumps({"backends": {"csr": {**whole, **entry}}})


@pytest.mark.parametrize(
    "content",
    [
        *("", "[]", "{}", '{"backends": {"csr": {"sides": []}}}', '{"backends": [1]}', "[" * 100_000),
        *(plain({"density": value}) for value in ([[[256.0], [0.5]]], [[[-0.1], [0.5]]], [[["x"], [0.5]]], [[[None]]])),
        *(plain({"density": value}) for value in ([[[math.nan], [0.5]]], [[[0.5]]], [[[0.5, 0.5], [0.5]]], [], 0.5)),
        *(plain({"sides": value}) for value in ([], [128, 64], [0, 64], [64, 64], [64.5, 128], [64, 2**70], 64)),
        *(plain({"threads": value}) for value in ([0], [-1], [True], [1, 2], ["1"])),
    ],
)
def test_a_bad_table_is_told_of_at_its_first_use_and_the_shipped_one_is_used(
    content: str, again: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """Densities lie in [0, 1], axes increase, shapes agree; an import reads no user's file."""
    path = auto.tuned_path()
    path.parent.mkdir(parents=True)
    path.write_text(content)
    assert again._tables == {}
    tables = again.tables()
    (line,) = caplog.messages
    assert re.fullmatch(rf".*{re.escape(path.name)}.*; the table of the library is used", line)
    assert {name: vars(table) for name, table in tables.items()} == {
        name: vars(table) for name, table in auto._shipped().items()
    }
    assert tables
    assert again.tables() is tables  # and says it once


def test_the_tables_are_read_once_by_many_threads(again: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each thread sees whole tables, whoever reads them."""
    path = auto.tuned_path()
    path.parent.mkdir(parents=True)
    path.write_text(plain({}))
    reads, seen = [], []
    load = again._load
    monkeypatch.setattr(again, "_load", lambda: reads.append(time.sleep(0.05)) or load())
    threads = [threading.Thread(target=lambda: seen.append(vars(again.tables()["csr"]))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(reads) == 1
    assert [table["density"] for table in seen] == [[[[0.5], [0.25]]]] * 8


def test_a_table_that_cannot_be_reached_is_none(again: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file in the place of the cache is no reason to fail."""
    Path(os.environ["SPARSETRAIN_CACHE"]).write_text("")
    assert again.tables().keys() == auto._shipped().keys()


def test_a_compiler_that_asks_first_reads_the_tables_without_tracing_it(fresh: Fresh) -> None:
    """The first forward pass of a process may be a compiled one: the whole of it is one graph."""
    code = (
        "import torch, sparsetrain\n"
        "from sparsetrain.sparsity.backends import auto\n"
        "assert auto._tables == {}\n"
        "layer = sparsetrain.SparseLinear(64, 64, density=0.5, bias=False, seed=0)\n"
        "x = torch.randn(8, 64)\n"
        "compiled = torch.compile(layer, backend='eager', fullgraph=True)(x)\n"
        "assert auto._tables\n"
        "torch.testing.assert_close(compiled, x @ layer.dense_weight().t())\n"
    )
    run = fresh.run(code)
    assert run.returncode == 0, run.stderr


@pytest.mark.parametrize(
    ("sparse", "dense", "expected"),
    [
        ([2.0, 3.0, 5.0], [1.0, 1.0, 1.0], 0.0),  # never faster
        ([0.1, 0.2, 0.3], [1.0, 1.0, 1.0], 1.0),  # always
        ([0.3, 1.5, 3.0], [1.0, 1.0, 1.0], 1 / 3),  # 3 d against 1
        ([0.2, 1.0, 2.0], [0.6, 1.0, 1.5], 0.5),  # 2 d against 0.5 + d
        ([1.0, 1.0, 1.0], [1.5, 1.9, 2.4], 1.0),
        ([1.0, 1.0, 1.0], [0.5, 0.5, 0.5], 0.0),
    ],
)
def test_the_crossing_is_that_of_two_lines(sparse: list[float], dense: list[float], expected: float) -> None:
    assert tuning.crossing([0.1, 0.5, 1.0], sparse, dense) == pytest.approx(expected, abs=1e-6)


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
    first, second = tuning.step_seconds([layer, torch.nn.Linear(32, 32)], x, torch.randn(8, 32), 2)
    assert 0.0 < first < 1.0
    assert 0.0 < second < 1.0
    assert x.grad is not None
    assert layer.values.grad is not None
