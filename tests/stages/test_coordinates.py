"""The coordinate check as a stage: its verdicts, its files, resuming after a kill, and refused settings."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from sparsetrain.cli.resolve import load
from sparsetrain.errors import UserError
from sparsetrain.parameterization import Coordinate, spreads
from sparsetrain.report.run_files import COLUMNS
from sparsetrain.studies import coordinates as module
from sparsetrain.studies.coordinates import CheckSection, CoordinatesConfig, coord_check, judge


def small(notes: Path, run_dir: Path, *more: str) -> CoordinatesConfig:
    words = [
        *("model=tiny", "model.d_model=64", "parameterization.base_width=16", f"data.path={notes}"),
        *("data.tokenizer=bytes", "data.context=48", "budget.batch_size=4", "optimizer.lr=2e-3"),
        *("check.steps=3", "check.seeds=1", f"run_dir={run_dir}", *more),
    ]
    return load("coord-check", words)


def test_over_sparsity_supar_keeps_its_scale_and_sp_and_mup_do_not(
    notes: Path, tmp_path: Path, screen: Console
) -> None:
    config = small(notes, tmp_path / "run", "check.values=[0,0.75,0.875]")
    result = coord_check(config, screen)
    verdicts = result["schemes"]
    assert {scheme: verdict["holds"] for scheme, verdict in verdicts.items()} == {
        "sp": False,
        "mup": False,
        "supar": True,
    }
    assert verdicts["sp"]["ratio"] > 4 > 2 >= verdicts["supar"]["ratio"]
    files = {path.name for path in (tmp_path / "run").iterdir() if not path.name.startswith(".")}
    assert files == {"config.yaml", "coordinates.csv", "figure.png", "result.json", "results.csv", "trials.jsonl"}
    assert (tmp_path / "run" / "figure.png").read_bytes().startswith(b"\x89PNG")
    with (tmp_path / "run" / "coordinates.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    assert {row["value"] for row in rows} == {"1.0", "0.25", "0.125"}  # densities
    assert {row["quantity"] for row in rows} == {"activation", "gradient", "update", "loss"}
    with (tmp_path / "run" / "results.csv").open() as stream:
        runs = list(csv.DictReader(stream))
    assert list(runs[0])[: len(COLUMNS)] == list(COLUMNS)
    assert [(run["parameterization"], run["sparsity"]) for run in runs] == [
        (scheme, sparsity) for scheme in ("sp", "mup", "supar") for sparsity in ("0.0", "0.75", "0.875")
    ]
    assert float(runs[0]["loss"]) < 6
    assert float(runs[-1]["update blocks.mlp.up"]) > 0
    text = screen.file.getvalue()  # type: ignore[attr-defined]
    assert "supar: worst max/min" in text
    assert "keeps its scale (limit 2)" in text
    # The second call trains nothing and gives the same result.
    assert coord_check(config, screen).values == result.values


@pytest.mark.parametrize(
    ("choice", "scheme", "more"),
    [
        ("width", "mup", ["check.values=[32,64,128]"]),
        ("depth", "completep", ["check.values=[2,4,8]", "parameterization.base_layers=2"]),
    ],
)
def test_other_axes_have_a_scheme_that_keeps_its_scale(
    notes: Path, tmp_path: Path, screen: Console, choice: str, scheme: str, more: list[str]
) -> None:
    words = [f"check={choice}", f"check.schemes=[{scheme}]", *more]
    verdict = coord_check(small(notes, tmp_path / "run", *words), screen)["schemes"][scheme]
    assert verdict["holds"], verdict["text"]


def test_a_check_that_was_killed_goes_on(
    notes: Path, tmp_path: Path, screen: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["check.values=[0,0.5]", "check.schemes=[supar]", "check.seeds=2"]
    whole = coord_check(small(notes, tmp_path / "whole", *words), screen)
    config = small(notes, tmp_path / "killed", *words)
    true_read, calls = module.read_coordinates, 0

    def read(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise KeyboardInterrupt  # no signal, because a background process of a shell may ignore it
        return true_read(*arguments)

    monkeypatch.setattr(module, "read_coordinates", read)
    with pytest.raises(KeyboardInterrupt):
        coord_check(config, screen)
    trials = tmp_path / "killed" / "trials.jsonl"
    with trials.open("a") as stream:
        stream.write('[["supar", 0.0')  # half a line, as after a kill
    assert coord_check(config, screen).values["schemes"] == whole["schemes"]
    assert calls == 5  # two before the kill, and the interrupted one again
    assert len([json.loads(line) for line in trials.read_text().splitlines()]) == 4
    assert (tmp_path / "killed" / "coordinates.csv").read_text() == (tmp_path / "whole" / "coordinates.csv").read_text()


def rows(ratio: float, last_loss: float) -> list[Coordinate]:
    return [
        Coordinate("supar", value, 0, kind, quantity, step, rms)
        for value, factor in ((0.5, 1.0), (1.0, ratio))
        for kind, quantity, step, rms in (
            ("mlp", "activation", 0, 1.0),
            ("mlp", "activation", 3, factor),
            ("mlp", "update", 3, 1.0),
            ("mlp", "gradient", 3, 100 * factor),
            ("loss", "loss", 0, 5.0),
            ("loss", "loss", 3, last_loss),
        )
    ]


@pytest.mark.parametrize(
    ("ratio", "last_loss", "holds"), [(1.9, 4.0, True), (2.1, 4.0, False), (1.0, 5.5, False), (math.inf, 4.0, False)]
)
def test_a_scheme_holds_when_no_ratio_is_above_the_limit_and_the_losses_fall(
    ratio: float, last_loss: float, holds: bool
) -> None:
    found = rows(ratio, last_loss)
    verdict = judge(CheckSection(schemes=["supar"]), found, spreads(found))["supar"]
    assert verdict["holds"] is holds
    assert ("the loss did not fall at 0.5, 1" in verdict["text"]) == (last_loss > 5)
    json.dumps(verdict, allow_nan=False)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["check.axis=height"], "check.axis='height' is not one of sparsity, width, depth"),
        (["check.schemes=[sp,supr]"], "check.schemes='supr' is not one of .*did you mean 'supar'"),
        (["check.schemes=[]"], "must name at least one scheme"),
        (["check.values=[0.5]"], "check.values=.* must name at least two values"),
        (["check.values=[0,1]"], r"a sparsity lies in \[0, 1\)"),
        (["check=width", "check.values=[32,40.5]"], "a width is a whole number"),
        (["check=width", "check.values=[64,80]"], "a width must be a multiple of d_head=32"),
        (["check=width", "check.values=[64,128]", "parameterization.base_width=96"], "base_width=96 is wider than"),
        (["check.seeds=0"], "check.seeds=0 must be at least 1"),
        (["check.limit=0.5"], "check.limit=0.5 must be at least 1"),
        (["check=hight"], "check=hight is not one of depth, sparsity, width"),
        (["optimizer=sgd"], "set parameterization.optimizer=sgd"),
        (["init_from=nowhere"], "a coordinate check starts from fresh models"),
    ],
)
def test_what_cannot_be_checked_is_one_line(notes: Path, tmp_path: Path, words: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        small(notes, tmp_path / "run", *words)
    assert "\n" not in str(caught.value)
