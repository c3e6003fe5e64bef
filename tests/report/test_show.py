"""The output of ``sparsetrain report`` for directories in every state."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from rich.console import Console

from sparsetrain.errors import UserError
from sparsetrain.report.show import show_run


def stage(directory: Path, *, steps: int | None, status: str | None) -> None:
    directory.mkdir(parents=True)
    (directory / "config.yaml").write_text("seed: 0\n")
    if steps is not None:
        lines = [json.dumps({"step": step, "tokens": step, "loss": 2.0}) for step in range(steps + 1)]
        (directory / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    if status is not None:
        (directory / "result.json").write_text(json.dumps({"stage": "pretrain", "status": status, "accuracy": 0.5}))


def shown(directory: Path, capsys: pytest.CaptureFixture[str]) -> str:
    show_run(directory, Console(width=200))
    return capsys.readouterr().out


def test_an_unfinished_pipeline_lists_its_stages(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stage(tmp_path / "dense" / "pretrain", steps=7, status="complete")
    stage(tmp_path / "dense" / "finetune", steps=3, status=None)
    stage(tmp_path / "sparse-0.75" / "pretrain", steps=None, status=None)
    lines = shown(tmp_path, capsys).splitlines()
    assert [line.split(maxsplit=1) for line in lines] == [
        ["dense/finetune", "at step 3, not finished"],
        ["dense/pretrain", "complete"],
        ["sparse-0.75/pretrain", "not begun"],
    ]


def test_a_run_shows_its_result_and_its_curve(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stage(tmp_path / "run", steps=7, status="complete")
    output = shown(tmp_path / "run", capsys)
    assert "complete" in output
    assert "0.5" in output
    stage(tmp_path / "going", steps=4, status=None)
    assert "at step 4, not finished" in shown(tmp_path / "going", capsys)


def test_a_directory_without_a_run_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no run") as caught:
        show_run(tmp_path, Console())
    assert "\n" not in str(caught.value)
