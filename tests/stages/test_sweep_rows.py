"""The rows that a sweep is read into: its settings, the names of its runs, and its table."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import yaml
from made_runs import write_run

from sparsetrain.errors import UserError
from sparsetrain.report.sweep import labels_of, lines_of, next_commands, write_rows
from sparsetrain.studies.sweep import read_sweep, show_sweep


def test_other_settings_become_columns_and_tell_curves_apart(tmp_path: Path) -> None:
    for std in (0.01, 0.02, 0.04):
        for decay in (0.0, 0.1):
            for alpha in (0.5, 1.0):
                words = [f"model.init_std={std}", f"optimizer.weight_decay={decay}", f"parameterization.alpha={alpha}"]
                write_run(tmp_path, words, loss_last=2.0 + abs(math.log2(std / 0.02)) + decay)
    found = read_sweep([tmp_path])
    assert found.varied == ["model.init_std", "optimizer.weight_decay"]
    assert {row["parameterization"] for row in found.rows} == {"supar (alpha=0.5)", "supar (alpha=1.0)"}
    lines = lines_of(found.rows, "model.init_std", ["optimizer.weight_decay"])
    assert len(lines) == 4
    assert {line.optimum.log2 for line in lines} == {math.log2(0.02)}
    assert set(labels_of(lines, ["optimizer.weight_decay"])) == {"weight_decay 0", "weight_decay 0.1"}


def test_runs_whose_directories_have_the_same_name_are_told_apart(tmp_path: Path) -> None:
    for place in ("a", "b"):
        write_run(tmp_path / place, [f"optimizer.weight_decay={0.1 if place == 'a' else 0.2}"], loss_last=2.0)
    write_run(tmp_path / "b", ["optimizer.weight_decay=0.3"])
    found = read_sweep([tmp_path / "a", tmp_path / "b"])
    assert {row["run"]: row["optimizer.weight_decay"] for row in found.rows} == {
        "a/run-0": 0.1,
        "b/run-0": 0.2,
        "run-1": 0.3,
    }
    assert {name: path.parent.name for name, path in found.directories.items()} == {
        "a/run-0": "a",
        "b/run-0": "b",
        "run-1": "b",
    }
    write_rows(found.rows, tmp_path / "results.csv")
    assert read_sweep([tmp_path / "results.csv"]).rows == found.rows


def test_what_to_run_next_says_null_and_an_empty_list_as_the_command_line_takes_them(tmp_path: Path) -> None:
    for place, phases in enumerate(("null", "[]")):
        for lr in (0.01, 0.02):
            write_run(tmp_path, [f"budget.phases={phases}", "budget.steps=3"], lr=lr, loss_last=2.0 + place + lr)
    found = read_sweep([tmp_path])
    commands = " ".join(next_commands(lines_of(found.rows, "lr", found.varied), "lr", found.varied, [0]))
    assert "budget.phases=null" in commands
    assert "budget.phases=[]" in commands


def test_a_batch_size_that_is_a_number_a_ramp_or_led_is_one_setting(tmp_path: Path) -> None:
    sizes = ("8", "16", "{start: 8, end: 64}", "{led_by: gns, start: 8, end: 64}")
    for size in sizes:
        for lr in (0.01, 0.02):
            write_run(tmp_path, ["budget.tokens=4800", f"budget.batch_size={size}"], lr=lr)
    found = read_sweep([tmp_path])
    assert found.varied == ["budget.batch_size"]
    shown = {row["budget.batch_size"] for row in found.rows}
    assert {8, 16} < shown
    sections = [yaml.safe_load(text) for text in shown if isinstance(text, str)]
    assert {section["led_by"] for section in sections} == {"tokens", "gns"}
    lines = lines_of(found.rows, "lr", found.varied)
    expected = {"batch_size 8", "batch_size 16", "batch_size led_by tokens", "batch_size led_by gns"}
    assert set(labels_of(lines, found.varied)) == expected


def test_a_table_beside_runs_has_the_columns_in_which_they_differ(tmp_path: Path) -> None:
    for place, stds in {"old": (0.1, 0.2), "new": (0.2, 0.4)}.items():
        for std in stds:
            write_run(tmp_path / place, [f"model.init_std={std}", f"optimizer.lr={std}"])
    show_sweep([tmp_path / "old"], "model.init_std", tmp_path, 3, False)
    table = tmp_path / "results.csv"
    (tmp_path / "new" / "run-1").rename(tmp_path / "new" / "run-2")  # run-0 is in both; the directory takes precedence
    found = read_sweep([tmp_path / "new", table])
    assert [(row["run"], row["model.init_std"]) for row in found.rows] == [
        ("run-0", 0.2),
        ("run-1", 0.2),
        ("run-2", 0.4),
    ]
    assert read_sweep([tmp_path / "new" / "run-2", table]).varied == ["model.init_std"]  # one run alone varies nothing
    decayed = write_run(tmp_path / "decayed", ["optimizer.weight_decay=0.5"])
    with pytest.raises(UserError, match=r"results.csv has no column optimizer.weight_decay, which differs"):
        read_sweep([tmp_path / "new", decayed, table])
    other = tmp_path / "other.csv"
    other.write_text(table.read_text().replace("model.init_std", "model.dropout").replace("run-", "more-"))
    with pytest.raises(UserError, match=r"results.csv has no column model.dropout, which differs"):
        read_sweep([table, other])
    other.write_text(table.read_text().replace("model.init_std", "init_from"))  # a setting of the top level
    assert read_sweep([other]).varied == ["init_from"]
    table.write_text(table.read_text().replace(",tokens,", ",words,"))
    with pytest.raises(UserError, match=r"results.csv is not the table of a sweep: it has no column tokens"):
        read_sweep([table])


def test_what_is_no_sweep_is_one_line(tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(UserError, match="empty holds no run"):
        read_sweep([empty])
    directory = write_run(tmp_path / "runs", [])
    with pytest.raises(UserError, match="x=lr has the same value in every run"):
        show_sweep([directory], "lr", None, 3, False)
    with pytest.raises(UserError, match="x=width distinguishes curves"):
        show_sweep([directory], "width", None, 3, False)
    with pytest.raises(UserError, match="x=lrr is not a number in every run; columns: parameterization, sparsity"):
        show_sweep([directory], "lrr", None, 3, False)
    with pytest.raises(UserError, match="no setting varies over the 1 runs"):
        show_sweep([directory], "lr", None, 3, True)
    (directory / "result.json").unlink()
    with pytest.raises(UserError, match=r"no finished pre-training run \(1 unfinished\)"):
        read_sweep([directory])


# Cost.
