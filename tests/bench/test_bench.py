"""The verb as a whole: all parts on a small scale, its files, resuming, and unusable input."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from sparsetrain.bench import BenchConfig, bench, cells, run
from sparsetrain.bench.peers import missing
from sparsetrain.bench.timing import interleaved
from sparsetrain.cli import main
from sparsetrain.cli.resolve import load
from sparsetrain.report.bench import rows_of
from sparsetrain.runs.claim import locked
from sparsetrain.runs.layout import BENCH, LOCK

PNG = b"\x89PNG\r\n\x1a\n"
# Only the masked backend, which compiles nothing; just the two tests of csr take seconds.
TINY = [
    *("preset=quick", "backends=[masked]", "peers=[torch_csr,scipy]", "shapes=[[32,48]]", "tokens=64"),
    *("gpt.backends=[masked]", "gpt.d_model=32", "scaling.backends=[masked]", "scaling.shape=[32,32]", "repeats=2"),
    *("decoding.backends=[masked]", "decoding.shape=[32,48]", "decoding.token_counts=[1]"),
]


def tiny(directory: Path, *words: str) -> list[str]:
    return [*TINY, f"run_dir={directory}", *words]


def read(directory: Path) -> dict[str, Any]:
    return json.loads((directory / BENCH).read_text())


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a bench with all parts and the sparse kernels."""
    directory = tmp_path_factory.mktemp("bench") / "run"
    words = ["backends=[csr,masked]", "gpt.backends=[csr]", "scaling.backends=[csr]", "sparsities=[0.5,0.75]"]
    torch.set_num_threads(1)
    assert main(["bench", *tiny(directory, *words)]) == 0
    return directory


def test_every_part_leaves_its_raw_times(whole: Path) -> None:
    values = read(whole)
    assert values["complete"]
    assert set(values) == {
        *("format", "config", "machine", "code", "commit", "complete", "unavailable", "cells", "summary")
    }
    assert {cell["part"] for cell in values["cells"].values()} == {
        *("layer", "nnz", "tokens", "model", "reference", "decoding", "generation")
    }
    for cell in values["cells"].values():
        assert {"part", "threads", "tokens", "sparsity", "in_features", "out_features"} < set(cell)
        if cell["part"] in ("decoding", "generation"):
            continue
        for name, result in cell["results"].items():
            assert len(result["forward_seconds"]) == 2
            assert all(seconds > 0 for seconds in result["forward_seconds"])
            if name == "scipy":
                assert "step_seconds" not in result
            else:
                assert all(s > f for s, f in zip(result["step_seconds"], result["forward_seconds"], strict=True))
    layer = next(cell for cell in values["cells"].values() if cell["part"] == "layer")
    assert set(layer["results"]) == {"dense", "csr", "masked", "torch_csr", "scipy"}
    assert layer["skipped"] == {}


def test_the_machine_is_described(whole: Path) -> None:
    machine = read(whole)["machine"]
    assert {"processor", "cores", "caches", "vector_flags", "versions", "python"} < set(machine)
    assert machine["versions"]["torch"] == torch.__version__
    assert "numba" in machine["versions"]


def test_ratios_use_the_dense_times_of_the_same_cell(whole: Path) -> None:
    values = read(whole)
    rows = list(csv.DictReader((whole / run.TABLE).read_text().splitlines()))
    assert len(rows) == sum(len(cell["results"]) for cell in values["cells"].values())
    for cell in values["cells"].values():
        kind, ratio = ("step_seconds", "speedup")
        if "step_seconds" not in cell["results"]["dense"]:
            kind, ratio = ("forward_seconds", "forward_speedup")
        dense = cell["results"]["dense"][kind]
        for row in rows_of(cell):
            own = cell["results"][row["contender"]].get(kind)
            if own is not None and len(own) == 2:
                assert row[ratio] == pytest.approx(sum(dense) / sum(own))  # the median of two is their mean
            if row["contender"] == "dense":
                assert row[ratio] == 1.0


def test_the_summary_holds_limits_beside_results(whole: Path) -> None:
    summary = read(whole)["summary"]
    csr = {entry["sparsity"]: entry for entry in summary["layers"] if entry["contender"] == "csr"}
    assert csr[0.5]["limit"] == 2.0
    assert csr[0.75]["limit"] == 4.0
    assert 24 <= csr[0.75]["state_bytes_per_weight"] <= 40
    models = [entry for entry in summary["models"] if entry["contender"] == "csr"]
    assert all(1.0 < entry["amdahl_limit"] < 1.0 / (1.0 - entry["sparsity"]) for entry in models)
    assert {entry["contender"] for entry in summary["models"] if entry["part"] == "reference"} == {
        *("dense", "plain_torch")
    }
    (fits,) = [entry for entry in summary["scaling"] if entry["contender"] == "csr"]
    assert fits["nnz"]["n"] == fits["tokens"]["n"] == 3
    assert fits["tokens"]["r_squared"] <= 1.0


def test_the_files_are_whole(whole: Path) -> None:
    assert sorted(path.name for path in whole.iterdir()) == sorted(
        [LOCK, BENCH, run.FIGURE, run.DECODING_FIGURE, run.TABLE]
    )
    figure = (whole / run.FIGURE).read_bytes()
    assert figure.startswith(PNG)
    assert len(figure) > 10_000


def test_report_shows_the_tables_again(whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(whole)]) == 0
    out = capsys.readouterr().out
    for part in ("Training step of a layer", "Training step of a GPT", "How the step grows", "Memory of a layer"):
        assert part in out


def test_the_same_command_measures_nothing_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["bench", *tiny(tmp_path / "run", "what=layers")]
    assert main(words) == 0
    before = read(tmp_path / "run")

    def never(*_: Any) -> None:
        raise AssertionError("measured again")

    monkeypatch.setattr(run, "measure", never)
    capsys.readouterr()
    assert main(words) == 0
    assert "2 of 2 cells already measured" in capsys.readouterr().out
    assert read(tmp_path / "run") == before


def test_an_interrupted_bench_keeps_its_cells_and_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["bench", *tiny(tmp_path / "run", "what=layers")]
    measured: list[str] = []

    def stopping(group: Sequence[cells.Cell], config: BenchConfig) -> list[dict[str, Any]]:
        if measured:
            raise KeyboardInterrupt
        measured.extend(cell.key for cell in group)
        return cells.measure(group, config)

    with monkeypatch.context() as patch:
        patch.setattr(run, "measure", stopping)
        assert main(words) == 130
    assert list(read(tmp_path / "run")["cells"]) == measured
    assert not read(tmp_path / "run")["complete"]
    capsys.readouterr()
    assert main(words) == 0
    assert "1 of 2 cells already measured" in capsys.readouterr().out
    assert read(tmp_path / "run")["complete"]


def test_the_points_of_a_series_take_turns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Measured one after the other, points would differ by disturbances of the machine and bend the fitted line.
    rounds: list[list[Any]] = []

    def watched(works: Any, *rest: Any) -> Any:
        rounds.append(list(works))
        return interleaved(works, *rest)

    monkeypatch.setattr(cells, "interleaved", watched)
    assert main(["bench", *tiny(tmp_path / "run", "what=scaling")]) == 0
    config = read(tmp_path / "run")["config"]
    points = [len(config["scaling"][name]) for name in ("sparsities", "token_counts")]
    assert [len(names) for names in rounds] == [2 * count for count in points]
    assert [{name for _, name in names} for names in rounds] == [{"dense", "masked"}] * 2
    # One more point: its whole series is measured again, the other series is not.
    more = [0.25, *config["scaling"]["sparsities"]]
    assert main(["bench", *tiny(tmp_path / "run", "what=scaling", f"scaling.sparsities={more}")]) == 0
    assert [len(names) for names in rounds[2:]] == [2 * len(more)]


def test_a_bench_can_be_made_in_slices(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["bench", *tiny(tmp_path / "run", "what=layers")]
    assert main([*words, "max_seconds=1e-9"]) == 0
    assert "run it again" in capsys.readouterr().out
    assert not read(tmp_path / "run")["complete"]
    assert (tmp_path / "run" / run.FIGURE).read_bytes().startswith(PNG)
    assert main(words) == 0
    assert read(tmp_path / "run")["complete"]


def test_other_code_measures_again_and_another_machine_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["bench", *tiny(tmp_path / "run", "what=layers", "sparsities=[0.5]")]
    assert main(words) == 0
    monkeypatch.setattr(run, "code_fingerprint", lambda: "other")
    capsys.readouterr()
    assert main(words) == 0
    assert "the code has changed since 1 cells were measured" in capsys.readouterr().out
    assert read(tmp_path / "run")["code"] == "other"
    monkeypatch.setattr(run, "describe_machine", lambda: {"processor": "another"})
    assert main(words) == 2
    assert "processor=another" in capsys.readouterr().err


def test_a_directory_takes_more_sparsities_but_no_other_settings(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    directory = tmp_path / "run"
    assert main(["bench", *tiny(directory, "what=layers", "sparsities=[0.5]")]) == 0
    assert main(["bench", *tiny(directory, "what=layers", "sparsities=[0.9]")]) == 0
    assert {cell["sparsity"] for cell in read(directory)["cells"].values()} == {0.5, 0.9}
    capsys.readouterr()
    assert main(["bench", *tiny(directory, "what=layers", "sparsities=[0.9]", "seed=1")]) == 2
    err = capsys.readouterr().err
    assert "seed=1 (there: 0)" in err
    assert err.count("\n") == 1


def test_without_run_dir_the_directory_is_named_by_the_configuration(tmp_path: Path) -> None:
    words = [*TINY, f"runs_dir={tmp_path}", "what=layers", "sparsities=[0.5]"]
    first = bench(load("bench", words)).directory
    assert first.parent == tmp_path
    assert first.name.startswith("bench-layers-")
    assert bench(load("bench", [*words, "max_seconds=9"])).directory == first
    assert bench(load("bench", [*words, "seed=1"])).directory != first


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["what=layer"], ["what='layer'", "did you mean 'layers'?"]),
        (["sparsities=[1.0]"], ["sparsities=1.0", "[0, 1)"]),
        (["sparsities=[]"], ["sparsities=[]", "at least one"]),
        (["sparsities=[0.5,0.5]"], ["sparsities", "no sparsity twice"]),
        (["shapes=[[512]]"], ["shapes", "[512]", "two integers"]),
        (["shapes=[[512,0]]"], ["shapes", "[512, 0]"]),
        (["threads=[0]"], ["threads=0", "at least 1"]),
        (["threads=[4096]"], ["threads=[4096]", "cores"]),
        (["backends=[crs]"], ["backends='crs'", "did you mean 'csr'?"]),
        (["peers=[cupy]"], ["peers='cupy'", "torch_csr"]),
        (["repeats=0"], ["repeats=0"]),
        (["repeats=many"], ["repeats", "many"]),
        (["max_seconds=0"], ["max_seconds=0"]),
        (["gpt.d_model=33"], ["gpt: d_model=33"]),
        (["scaling.token_counts=[8,8]"], ["scaling.token_counts", "twice"]),
        (["preset=quik"], ["preset=quik", "did you mean 'quick'?"]),
        (["sparsity=0.5"], ["sparsity", "did you mean"]),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else None,
)
def test_bad_input_is_one_line_and_status_2(
    words: list[str], parts: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", f"run_dir={tmp_path / 'run'}", *words]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    for part in parts:
        assert part in err
    assert not (tmp_path / "run").exists()


def test_a_directory_in_use_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with locked(tmp_path / "run"):
        assert main(["bench", *tiny(tmp_path / "run")]) == 2
    assert "in use by another process" in capsys.readouterr().err


def test_a_foreign_file_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / BENCH).write_text('{"format": 99}')
    assert main(["bench", *tiny(tmp_path)]) == 2
    assert "no file of this version" in capsys.readouterr().err


def test_a_peer_that_is_not_installed_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    reason = missing("sparselab") or "not installed (pip install sparselab)"
    for module in (cells, run):
        monkeypatch.setattr(module, "missing", lambda name: reason if name == "sparselab" else None)
    words = tiny(tmp_path / "run", "what=layers", "sparsities=[0.5]", "peers=[sparselab,scipy]")
    assert main(["bench", *words]) == 0
    assert f"skipped sparselab: {reason}" in capsys.readouterr().out
    values = read(tmp_path / "run")
    assert values["unavailable"] == {"sparselab": reason}
    assert all("sparselab" not in cell["results"] for cell in values["cells"].values())


def test_the_full_preset_is_the_defaults_of_the_settings() -> None:
    assert load("bench", []) == BenchConfig()
