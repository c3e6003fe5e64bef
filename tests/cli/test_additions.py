"""Additions that need no change of the library: a schedule shape, a pipeline stage, a phase."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import sparsetrain as st
from sparsetrain.optim import SCHEDULES, SEGMENTS


@pytest.fixture
def square() -> Iterator[None]:
    """A schedule shape as a single function."""

    @st.register_schedule("square")
    def square(i: int, n: int, start: float, to: float) -> float:
        return start + (to - start) * (i / n) ** 2

    yield
    SEGMENTS.unregister("square")
    SCHEDULES.unregister("square")


def records(directory: Path, key: str) -> list[float]:
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return [line[key] for line in lines if key in line]


def test_a_schedule_is_a_segment_and_a_file(shell: Any, square: None, tmp_path: Path) -> None:
    folder = tmp_path / "mine" / "schedule"
    folder.mkdir(parents=True)
    (folder / "fall.yaml").write_text("segments: [{shape: warmup, steps: 2}, {shape: square, to: 0.0}]\n")
    words = [*shell.tiny, "--config-dir", str(folder.parent), "schedule=fall", "budget.steps=6", "optimizer.lr=0.016"]
    status, _, err = shell.run("pretrain", *words, "loop.log_every=1", "run_dir=run")
    assert status == 0, err
    rates = [0.008, 0.016, 0.016, 0.016 * 15 / 16, 0.016 * 12 / 16, 0.016 * 7 / 16]
    assert records(Path("run"), "lr") == rates
    named = [word for word in words if word != "schedule=fall"]
    own = ["schedule.name=square", "schedule.warmup_steps=2", "loop.log_every=1", "run_dir=named"]
    assert shell.run("pretrain", *named, *own)[0] == 0
    assert records(Path("named"), "lr") == rates
    assert "schedule.name='sqare' is not one of linear_to_zero," in shell.refused(
        "pretrain", *named, "schedule.name=sqare"
    )
    (folder / "fall.yaml").write_text("segments: [{shape: sqare, to: 0.0}]\n")
    assert "did you mean 'square'?" in shell.refused("pretrain", *words, "run_dir=other")


def test_a_stage_is_a_line_of_a_file(shell: Any, tmp_path: Path) -> None:
    folder = tmp_path / "mine" / "pipeline"
    folder.mkdir(parents=True)
    stages = ["{name: pretrain}", "{name: longer, run: pretrain, from: pretrain, budget: {steps: 2}}"]
    (folder / "two.yaml").write_text("stages:\n" + "".join(f"  - {stage}\n" for stage in stages))
    words = [*shell.tiny, "--config-dir", str(folder.parent), "pipeline=two", "run_dir=run"]
    status, _, err = shell.run("pipeline", *words, "pipeline.arms={seed: [0, 1]}")
    assert status == 0, err
    report = json.loads(Path("run/report.json").read_text())
    assert [(arm["name"], *arm["stages"]) for arm in report["arms"]] == [
        ("seed-0", "pretrain", "longer"),
        ("seed-1", "pretrain", "longer"),
    ]
    for arm in report["arms"]:
        assert arm["pretrain"]["loss_last"] == arm["stages"]["pretrain"]["loss_last"]
        assert arm["stages"]["longer"]["loss_first"] == pytest.approx(arm["pretrain"]["loss_last"], rel=0.02)
        assert arm["stages"]["longer"]["steps"] == 2


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["budget.phases=[{share: 0.7}, {share: 0.25}]"], "shares [0.7, 0.25] add up to 0.95; they must add up to 1"),
        (["budget.phases=[{share: 0.99}, {share: 0.01}]"], "phases[1]: share=0.01 of a run of 3 steps is shorter than"),
        (["budget.phases=[{share: 0.5, contxt: 8}, {share: 0.5}]"], "contxt"),
        (["budget.tokens=100"], "budget.steps=3 and budget.tokens=100: a run has one length"),
        (["model.positions=learned", "data.context=200"], "data.context=200 is longer than model.max_context="),
        (
            ["model.positions=learned", "budget.phases=[{share: 0.5}, {share: 0.5, context: 4096}]"],
            "budget.phases[1].context=4096 is longer than model.max_context=",
        ),
    ],
)
def test_a_budget_that_cannot_be_is_one_line(shell: Any, words: list[str], said: str) -> None:
    assert said in shell.refused("pretrain", *shell.tiny, *words)


@pytest.mark.parametrize(
    ("stages", "said"),
    [
        ("[{name: a, run: pretrain}, {name: b, run: finetune, from: c}]", "stages[1].from=c names no stage"),
        ("[{name: a, run: pretrain, from: b}, {name: b, run: pretrain, from: a}]", "a from b from a is a cycle"),
    ],
)
def test_stages_that_cannot_be_are_one_line(shell: Any, stages: str, said: str) -> None:
    assert said in shell.refused("pipeline", *shell.tiny, f"pipeline.stages={stages}")
