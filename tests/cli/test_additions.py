"""Additions that need no change of the library: a rule, a pattern, a schedule shape, a pipeline stage, a phase."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import assert_same_run, stop_after
from safetensors.torch import load_file
from torch import Tensor

import sparsetrain as st
from sparsetrain.cli.checks import as_typed, check
from sparsetrain.cli.multirun import points
from sparsetrain.optim import SCHEDULES, SEGMENTS
from sparsetrain.sparsity.evolution.base import RULES
from sparsetrain.sparsity.patterns.spec import PATTERNS


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


@pytest.fixture
def largest_go() -> Iterator[None]:
    """A rule of evolution as a single class."""

    @st.register_rule("largest_go")
    @dataclass(frozen=True, kw_only=True)
    class LargestGo(st.SET):
        exponent: float = 1.0

        def score(self, values: Tensor, gradient: Tensor) -> Tensor:
            return -(values.abs() ** self.exponent)

    yield
    RULES.unregister("largest_go")


def masks_and_weights(checkpoint: Path) -> dict[str, tuple[Tensor, Tensor]]:
    """Return the mask and the dense weight of each sparse layer."""
    tensors, found = load_file(checkpoint / "model.safetensors"), {}
    for name in (name.removesuffix(".values") for name in tensors if name.endswith(".values")):
        row_ptr, col = tensors[f"{name}.row_ptr"].long(), tensors[f"{name}.col"].long()
        shape = len(row_ptr) - 1, 128
        mask, weight = torch.zeros(shape, dtype=torch.bool), torch.zeros(shape)
        rows = torch.repeat_interleave(torch.arange(shape[0]), row_ptr.diff())
        mask[rows, col], weight[rows, col] = True, tensors[f"{name}.values"]
        found[name] = mask, weight
    return found


def test_a_rule_of_evolution_is_a_class_and_a_file(
    shell: Any, largest_go: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "mine" / "sparsity"
    folder.mkdir(parents=True)
    own = "sparsity: 0.75\nevolution: {rule: largest_go, exponent: 2.0, every: 2, drop_fraction: 0.5}\n"
    (folder / "contrary.yaml").write_text(own)
    words = [*shell.tiny, "--config-dir", str(folder.parent), "sparsity=contrary", "budget.steps=6"]
    # Kept weights do not change at such a rate, so that a checkpoint tells what the next update ranked.
    words += ["optimizer.lr=1e-12", "loop.checkpoint_every=1", "loop.keep_last=6", "sparsity.evolution.stop=1.0"]
    words += ["sparsity.evolution.drop_schedule=constant"]
    assert shell.run("pretrain", *words, "run_dir=run")[0] == 0
    before, after = (masks_and_weights(Path(f"run/checkpoints/step-{step:08d}")) for step in (3, 4))
    assert len(before) == 8
    for name, (was, weight) in before.items():
        now = after[name][0]
        gone, kept, grown = was & ~now, was & now, now & ~was
        assert int(gone.sum()) == int(grown.sum()) == int(was.sum()) // 2
        assert weight[gone].abs().min() >= weight[kept].abs().max()
    with monkeypatch.context() as patch:
        stop_after(patch, 3)
        assert shell.run("pretrain", *words, "run_dir=cut")[0] == 143
    assert shell.run("pretrain", *words, "run_dir=cut")[0] == 0
    assert_same_run(Path("run"), Path("cut"))
    other = [*words, "run_dir=other", "sparsity.evolution.exponnt=1.0"]
    assert "did you mean 'sparsity.evolution.exponent'?" in shell.refused("pretrain", *other)
    line = shell.refused("pretrain", *words, "run_dir=other", "sparsity.evolution.curve=linear")
    assert "sparsity.evolution.curve is no setting of rule=largest_go; it has every, start," in line
    assert "exponent" in line.partition("; it has")[2]
    said = shell.run("pretrain", "--help", "sparsity.evolution.exponent")[1]
    assert said.startswith("\n  sparsity.evolution.exponent = 1.0  number; with rule=largest_go".lstrip("\n"))


@pytest.fixture
def first_inputs() -> Iterator[None]:
    """A pattern as a single function."""

    @st.register_pattern("first_inputs")
    def first_inputs(
        spec: Any, shape: tuple[int, int], density: float, generator: Any, weight: Tensor, *, offset: int = 0
    ) -> Tensor:
        mask = torch.zeros(shape[1], shape[0], dtype=torch.bool)
        mask.view(-1)[: round(density * mask.numel())] = True
        return mask.roll(offset, 0).t()

    yield
    PATTERNS.unregister("first_inputs")


def test_a_pattern_is_a_function_and_a_file(
    shell: Any, first_inputs: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "mine" / "sparsity"
    folder.mkdir(parents=True)
    (folder / "first.yaml").write_text("sparsity: 0.75\npattern: first_inputs\noptions: {offset: 3}\n")
    words = [*shell.tiny, "--config-dir", str(folder.parent), "sparsity=first", "budget.steps=4"]
    assert shell.run("pretrain", *words, "run_dir=run")[0] == 0
    masks = masks_and_weights(Path("run/checkpoints/step-00000004"))
    assert len(masks) == 8
    for name, (mask, _) in masks.items():
        columns = mask.any(0).nonzero()[:, 0].tolist()
        assert columns == list(range(3, 3 + len(columns)))
        assert mask[:, 3 : 3 + len(columns)].all()
        assert len(columns) == (32 if name.endswith("mlp.down") else 8)  # of 128 and 32 inputs
    with monkeypatch.context() as patch:
        stop_after(patch, 2)
        assert shell.run("pretrain", *words, "run_dir=cut")[0] == 143
    assert shell.run("pretrain", *words, "run_dir=cut")[0] == 0
    assert_same_run(Path("run"), Path("cut"))
    assert shell.run("pretrain", *words, "run_dir=none", "sparsity.options.offset=0")[0] == 0
    mask, _ = masks_and_weights(Path("none/checkpoints/step-00000004"))["blocks.0.attn.out"]
    assert mask[:, 0].all()
    swept = ["sparsity.sparsity=0.75", "sparsity.pattern=first_inputs", "sparsity.options.offset=0,2"]
    given = as_typed("pretrain", swept, sweep=True)
    check("pretrain", given, sweep=True)
    assert [found.sparsity.options for found in points("pretrain", given)] == [{"offset": 0}, {"offset": 2}]
    for own, said in (
        ("sparsity.options.ofset=1", "sparsity.options.ofset is no option of the pattern first_inputs (did you mean"),
        ("sparsity.pattern=first_input", "did you mean 'first_inputs'?"),
        ("sparsity.pattern=random", "sparsity.options.offset is no option of the pattern random; it has none"),
        (
            "sparsity.evolution.rule=set",
            "'first_inputs' would not outlast the first update of rule=set",
        ),
    ):
        assert said in shell.refused("pretrain", *words, "run_dir=other", own)


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
