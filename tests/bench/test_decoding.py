"""Decoding in a bench: its numbers against counts by hand, products against dense ones, its files and bad input."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import nn

import sparsetrain as st
from sparsetrain.bench import DecodingSection, decoding, machine, run
from sparsetrain.bench.contenders import LayerCase
from sparsetrain.bench.decoding import PeerLinear, bytes_of, bytes_of_generation
from sparsetrain.bench.gpt import dense_model, hidden_linears, sparse_model
from sparsetrain.bench.peers import PeerLayer, Skipped
from sparsetrain.cli import main
from sparsetrain.report.decoding import bound
from sparsetrain.runs.layout import BENCH, LOCK
from sparsetrain.sparsity import SparseLinear
from sparsetrain.sparsity.backends import few_tokens

WORDS = [
    *("bench", "preset=quick", "what=decoding", "sparsities=[0.75]", "peers=[torch_csr,scipy]"),
    *("decoding.shape=[32,48]", "decoding.token_counts=[3]", "decoding.backends=[csr,auto]"),
]
CASE = LayerCase(in_features=48, out_features=32, tokens=4, sparsity=0.75, block=(16, 16), seed=0)
SMALL = DecodingSection(d_model=32, n_layers=2, n_heads=2, vocab_size=64, prompt=4, new_tokens=3)


@pytest.fixture(scope="module", autouse=True)
def columns_of_16_bits() -> Iterator[None]:
    """Let each nonzero have a column of 16 bits, whatever is faster on this processor."""
    with mock.patch.object(few_tokens, "_by_bitmap", return_value=False):
        yield


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("decoding") / "run"
    torch.set_num_threads(1)
    assert main([*WORDS, f"run_dir={directory}"]) == 0
    return directory


def read(directory: Path) -> dict[str, Any]:
    return json.loads((directory / BENCH).read_text())


def test_each_contender_has_its_times_and_the_bytes_that_it_reads(measured: Path) -> None:
    values = read(measured)
    by_part = {cell["part"]: cell for cell in values["cells"].values()}
    assert set(by_part) == {"decoding", "generation"}
    layers, whole = by_part["decoding"], by_part["generation"]
    assert set(layers["results"]) == {"dense", "csr", "auto", "torch_csr", "scipy"}
    assert set(whole["results"]) == {"dense", "csr", "auto", "torch_csr"}
    for cell, rounds in ((layers, 3), (whole, 2)):
        assert cell["skipped"] == {}
        assert len(cell["bandwidth"]["seconds"]) == rounds
        for result in cell["results"].values():
            assert len(result["forward_seconds"]) == rounds
            assert "step_seconds" not in result
    weights, nonzeros = 2 * 32 * 48, 2 * 32 * 48 // 4  # of two layers
    expected = {"dense": 4 * weights, "csr": 6 * nonzeros, "auto": None}
    expected |= {"torch_csr": 12 * nonzeros + 2 * 8 * 49, "scipy": 8 * nonzeros + 2 * 4 * 49}
    assert {name: result["bytes"] for name, result in layers["results"].items()} == expected
    assert whole["results"]["dense"]["bytes"] > whole["results"]["csr"]["bytes"]
    assert whole["results"]["torch_csr"]["stored_weights"] == whole["results"]["csr"]["stored_weights"]
    assert whole["results"]["torch_csr"]["bytes"] is None


def test_its_files_are_a_table_and_a_figure_of_its_own(measured: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert sorted(path.name for path in measured.iterdir()) == sorted([LOCK, BENCH, run.DECODING_FIGURE, run.TABLE])
    assert (measured / run.DECODING_FIGURE).read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    rows = list(csv.DictReader((measured / run.TABLE).read_text().splitlines()))
    csr = next(row for row in rows if (row["part"], row["contender"]) == ("decoding", "csr"))
    assert float(csr["of_limit"]) == pytest.approx(float(csr["forward_speedup"]) / float(csr["limit"]), rel=1e-4)
    assert main(["report", str(measured)]) == 0
    out = capsys.readouterr().out
    assert "Products of few tokens" in out
    assert "Generation, times as fast as dense" in out


def test_the_limit_is_the_time_of_reading() -> None:
    # 1 GB in 0.1 s; 2e7 bytes then take 2 ms, where dense takes 8 ms and the contender 4.
    found = bound({"forward_speedup": 2.0}, 20_000_000, {"bytes": 10**9, "seconds": [0.1, 0.09, 0.3]}, [0.008])
    assert found == {
        "bytes": 20_000_000,
        "bandwidth": 1e10,
        "limit": pytest.approx(4.0),
        "of_limit": pytest.approx(0.5),
    }
    assert bound({"forward_speedup": 2.0}, None, {"bytes": 1, "seconds": [1.0]}, [1.0])["of_limit"] is None


@pytest.mark.parametrize(
    ("block", "bitmap", "expected"),
    [((1, 1), False, 6 * 384), ((1, 1), True, 4 * 384 + 32 * 48 // 8), ((16, 16), False, 4 * 512 + 2 * 4)],
)
def test_a_product_reads_values_and_indices(
    block: tuple[int, int], bitmap: bool, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(few_tokens, "_by_bitmap", lambda density, tokens, narrow: bitmap)
    pattern = CASE.pattern(block) if block == (1, 1) else LayerCase(64, 32, 4, 0.75, block, 0).pattern(block)
    layer = SparseLinear(pattern.shape[1], pattern.shape[0], pattern=pattern, bias=False, seed=0)
    assert bytes_of(layer, CASE.tokens) == expected


def test_a_generation_reads_all_weights_for_each_token_and_what_it_has_cached() -> None:
    model = dense_model(SMALL.model_config())
    hidden = sum(linear.weight.numel() for linear in hidden_linears(model).values())
    a_pass = 4 * (hidden + 64 * 32)
    # The first new token comes out of the pass over the prompt; the second reads 5 cached tokens, the third 6.
    cached = (5 + 6) * 2 * 4 * 2 * 32
    assert bytes_of_generation(model, SMALL, rows=2) == 3 * a_pass + 2 * cached
    sparse = sparse_model(SMALL.model_config(), 0.75, "csr", (16, 16))
    assert bytes_of_generation(sparse, SMALL, rows=2) == 3 * (6 * hidden // 4 + 4 * 64 * 32) + 2 * cached


def test_a_layer_of_another_library_computes_its_product_in_a_model() -> None:
    linear = nn.Linear(48, 32)
    layer = PeerLinear("torch_csr", linear, CASE)
    pattern = CASE.pattern()
    weight = pattern.scatter(CASE.values(pattern) * linear.weight.std())
    x = torch.randn(2, 3, 48)
    torch.testing.assert_close(layer(x), nn.functional.linear(x, weight, linear.bias))


@pytest.mark.parametrize("fault", ["wrong", "fails"])
def test_a_library_with_a_wrong_product_is_skipped(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def made(name: str, pattern: st.SparsityPattern, values: torch.Tensor) -> PeerLayer:
        weight = pattern.scatter(values)

        def product(x: torch.Tensor) -> torch.Tensor:
            if fault == "fails":
                raise RuntimeError("no such kernel")
            return x @ (weight + 0.01).t()

        return PeerLayer(product, [], weight)

    monkeypatch.setattr(decoding, "peer_layer", made)
    with pytest.raises(Skipped, match={"wrong": "relative error", "fails": "no such kernel"}[fault]):
        decoding._peer("scipy", [CASE], CASE.draw(4, 48, "input"))


@pytest.mark.parametrize("fault", ["bandwidth", "new_tokens", "bytes"])
def test_a_damaged_file_is_refused(
    fault: str, measured: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    values = read(measured)
    for cell in values["cells"].values():
        cell.pop(fault, None)
        if fault == "bytes":
            cell["results"]["csr"]["bytes"] = 0
    (tmp_path / BENCH).write_text(json.dumps(values))
    assert main(["report", str(tmp_path)]) == 2
    err = capsys.readouterr().err
    assert fault in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["decoding.layers=0"], ["decoding.layers=0", "at least 1"]),
        (["decoding.backends=[crs]"], ["decoding.backends='crs'", "did you mean 'csr'?"]),
        (["decoding.token_counts=[4,4]"], ["decoding.token_counts", "twice"]),
        (["decoding.d_model=33"], ["decoding: d_model=33"]),
        (["decoding.layers=10000000"], ["decoding.layers=10000000", "memory"]),
        (["decoding.token_counts=[2000000000]"], ["decoding.token_counts up to 2000000000", "memory"]),
        (["decoding.d_model=1000000"], ["decoding.d_model=1000000", "memory"]),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else None,
)
def test_bad_input_is_one_line_and_status_2(
    words: list[str], parts: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*WORDS, f"run_dir={tmp_path / 'run'}", *words]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    for part in parts:
        assert part in err


def test_a_measurement_is_made_anew_after_any_change_of_its_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "sparsetrain"
    nested = package / "sparsity" / "backends" / "csr.py"
    nested.parent.mkdir(parents=True)
    nested.write_text("a = 1\n")
    monkeypatch.setattr(machine.sparsetrain, "__file__", str(package / "__init__.py"))
    before = machine.code_fingerprint()
    nested.write_text("a = 2\n")
    assert machine.code_fingerprint() != before
