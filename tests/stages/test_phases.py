"""Runs in phases: resumed bit for bit on either side of a border, each phase with its own settings.

The runs are a few steps of a model of 16 features. ``tests/optim/test_budget.py`` tests how shares become steps.
"""

from __future__ import annotations

import csv
import itertools
import re
import shlex
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from runs import CLOCKS, assert_same_run, records, stop_after, tensors
from shell import Shell
from torch import Tensor

from sparsetrain.cost.available import Available
from sparsetrain.data import PackedSamples, prepare
from sparsetrain.errors import UserError
from sparsetrain.models import Transformer
from sparsetrain.runs.checkpoint import load_checkpoint
from sparsetrain.stages import FinetuneConfig, RunResult, finetune, pretrain
from sparsetrain.stages import memory as stage_memory
from sparsetrain.stages.plan import plan_of
from sparsetrain.training.state import Interrupted

Configure = Callable[..., Any]
Phases = list[dict[str, Any]]
Train = Callable[..., RunResult]

# Outputs of these tiny layers may lose all weights.
pytestmark = pytest.mark.filterwarnings("ignore:.* have no weight")

LAYERS = {"attn.qkv": (48, 16), "attn.out": (16, 16), "mlp.up": (64, 16), "mlp.down": (16, 64)}


# Resumed bit for bit.

# Steps of 64, 64, 128 and 128 tokens: borders after steps 3, 6 and 9 of 12.
EVERYTHING: Phases = [
    {"tokens": 192, "density": 0.25},
    {"tokens": 192, "context": 32, "batch_size": 2, "density": 1.0},
    {"tokens": 384, "context": 32, "density": 0.4, "schedule": {"name": "cosine", "warmup_steps": 2}},
    {"tokens": 384, "batch_size": 8, "density": 0.6},
]
PLAIN: Phases = [{name: value for name, value in phase.items() if name != "density"} for phase in EVERYTHING]
BORDERS = (3, 6, 9)
# Where each variant stops: one step before each border, at it, or one step behind it; each border has all three.
BESIDE = {"random": (-1, 0, 1), "gradient": (0, 1, -1), "rigl": (1, -1, 0)}
VARIANTS: dict[str, tuple[Phases, dict[str, Any]]] = {
    "random": (EVERYTHING, {"model.positions": "alibi", "model.dropout": 0.1, "sparsity.allocation": "erk"}),
    "gradient": (
        EVERYTHING,
        {
            "model.positions": "learned",
            "loop.accumulation": 2,
            "sparsity.evolution": {"grow": "gradient", "grown_moments": "mean"},
        },
    ),
    "rigl": (PLAIN, {"model.positions": "rope", "sparsity.evolution": {"rule": "rigl", "every": 2, "stop": 1.0}}),
}


def assert_same_masks_and_run(one: Path, other: Path) -> None:
    assert_same_run(one, other)
    first, second = (load_checkpoint(path / "checkpoints").state for path in (one, other))
    assert first | dict.fromkeys(CLOCKS) == second | dict.fromkeys(CLOCKS)


@pytest.mark.parametrize("name", list(VARIANTS))
def test_a_run_stopped_after_every_step_is_the_same_run(
    name: str, train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = VARIANTS[name]
    assert train("whole", *settings)["steps"] == 12
    for step in range(1, 12):
        with monkeypatch.context() as patch:
            stop_after(patch, 1)  # the first one of this process
            with pytest.raises(Interrupted, match=f"stopped after step {step} of 12"):
                train("cut", *settings)
    assert train("cut", *settings).complete
    assert_same_masks_and_run(tmp_path / "whole", tmp_path / "cut")


@pytest.mark.parametrize("name", list(VARIANTS))
def test_a_run_stopped_beside_a_border_is_the_same_run(
    name: str, train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The test above stops at all of these steps in one run; here each stop has the rest of the run behind it.
    settings = VARIANTS[name]
    train("whole", *settings)
    for border, beside in zip(BORDERS, BESIDE[name], strict=True):
        place = f"cut-{border + beside}"
        with monkeypatch.context() as patch:
            stop_after(patch, border + beside, settings[1].get("loop.accumulation", 1))
            with pytest.raises(Interrupted, match=f"stopped after step {border + beside} of 12"):
                train(place, *settings)
        train(place, *settings)
        assert_same_masks_and_run(tmp_path / "whole", tmp_path / place)


def test_phases_that_change_nothing_are_the_run_without_them(train: Train, tmp_path: Path) -> None:
    dropout = {"model.dropout": 0.1}
    train("one", None, dropout)
    train("two", [{"share": 0.3}, {"share": 0.5, "context": 16}, {"share": 0.2, "batch_size": 4}], dropout)
    # Equal densities in all phases mean the same as a sparsity.
    equal: Phases = [{"share": 0.5, "density": 0.25}, {"share": 0.5}]
    train("equal", equal, dropout)
    train("other", equal[:1] * 2, {**dropout, "sparsity": {"sparsity": 0.0}})
    bare = [{key: value for key, value in record.items() if key != "phase"} for record in records(tmp_path / "one")]
    for name in ("two", "equal", "other"):
        found = records(tmp_path / name)
        assert [record["phase"] for record in found if "loss" in record][::11] == [0, 2 if name == "two" else 1]
        assert [{key: value for key, value in record.items() if key != "phase"} for record in found] == bare
        first, second = tensors(tmp_path / "one"), tensors(tmp_path / name)
        assert first.keys() == second.keys()
        assert all(torch.equal(first[key], second[key]) for key in first)
    # A rule that exchanges weights keeps acting if all densities are equal.
    rigl = VARIANTS["rigl"][1]
    train("rigl", None, rigl)
    train("rigl equal", equal, rigl)
    assert tensors(tmp_path / "rigl")["blocks.0.mlp.up.col"].equal(
        tensors(tmp_path / "rigl equal")["blocks.0.mlp.up.col"]
    )


# Masks at a border.


# `sparsity=vspdf`, in three ways.


# Data, costs and learning rates of each phase.


def test_batches_have_the_shapes_of_their_phase_and_no_sample_comes_twice(
    train: Train, tiny: Configure, monkeypatch: pytest.MonkeyPatch
) -> None:
    phases: Phases = [
        {"tokens": 192},
        {"tokens": 256, "batch_size": 8},
        {"tokens": 256, "context": 32, "batch_size": 2},
        {"tokens": 128},
    ]
    true_forward, seen = Transformer.forward, []

    def forward(self: Transformer, *arguments: Any, **named: Any) -> Tensor:
        if self.training:
            seen.append(named["tokens"])
        return true_forward(self, *arguments, **named)

    monkeypatch.setattr(Transformer, "forward", forward)
    run = train("run", phases)
    assert [tuple(tokens.shape) for tokens in seen] == [(4, 16)] * 3 + [(8, 16)] * 2 + [(2, 32)] * 4 + [(4, 16)] * 2
    assert (run["samples"], run["tokens"]) == (12 + 16 + 8 + 8, sum(phase["tokens"] for phase in phases))
    # The first two phases read one stream, as a run without phases does; the others have streams of their own.
    corpus = prepare(tiny(phases).data)
    whole = PackedSamples(corpus.train, 16, 0, "pretrain")
    assert whole.samples_per_epoch > 28
    first = torch.cat(seen[:5])
    assert first.equal(whole.batch(0, 28).tokens)
    assert max(Counter(map(tuple, first.tolist())).values()) == 1
    assert torch.cat(seen[5:9]).equal(PackedSamples(corpus.train, 32, 0, "pretrain-1").batch(0, 8).tokens)
    assert torch.cat(seen[9:]).equal(PackedSamples(corpus.train, 16, 0, "pretrain-2").batch(0, 8).tokens)


def test_an_evaluation_has_the_context_of_its_phase(train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    true_losses = Transformer.token_losses

    def token_losses(self: Transformer, tokens: Tensor, targets: Tensor) -> Tensor:
        seen.append(tokens.shape[1])
        return true_losses(self, tokens, targets)

    monkeypatch.setattr(Transformer, "token_losses", token_losses)
    run = train("run", PLAIN, {"loop.eval_every": 3})
    found = [record for record in records(run.directory) if "val_loss" in record]
    # Before the first step, and after the last step of each phase.
    assert [(record["step"], record["context"]) for record in found] == [(0, 16), (3, 16), (6, 32), (9, 32), (12, 16)]
    assert [context for context, _ in itertools.groupby(seen)] == [16, 32, 16]
    steps = [record for record in records(run.directory) if "loss" in record]
    assert [record["phase"] for record in steps] == [0] * 3 + [1] * 3 + [2] * 3 + [3] * 3
    single = train("single", None)
    assert not any({"phase", "context"} & record.keys() for record in records(single.directory))
    assert "phases" not in single.values
    batches = train("batches", [{"share": 0.5}, {"share": 0.5, "batch_size": 2}])
    assert not any("context" in record for record in records(batches.directory))


def peaks_and_decays(directory: Path) -> list[tuple[float, float]]:
    groups = [group["options"] for group in load_checkpoint(directory / "checkpoints").optimizer.groups]
    return [(group["initial_lr"], group["weight_decay"]) for group in groups]


def test_a_phase_may_warm_up_again_and_groups_keep_the_rates_of_the_first(train: Train) -> None:
    run = train("run", EVERYTHING)
    whole = [min((step + 1) / 1, (12 - step) / 11) for step in range(12)]  # linear to zero with a tenth of warmup
    rates = [record["lr"] / 4e-3 for record in records(run.directory) if "loss" in record]
    assert rates[:6] + rates[9:] == pytest.approx(whole[:6] + whole[9:], abs=0.1)
    assert rates[6] < rates[5]
    assert rates[7] > rates[6]
    # The groups of a model that keeps the first density.
    static = train("static", None)
    dense = train("dense", None, {"sparsity": {"sparsity": 0.0}})
    one, other, third = (peaks_and_decays(each.directory) for each in (run, static, dense))
    assert one == other
    assert one != third


def test_flops_are_those_of_each_step(train: Train, tiny: Configure) -> None:
    run = train("run", EVERYTHING)
    # 6 (nnz + V d + 2 L T d) a token: the paper's equation, for 257 bytes and one layer.
    expected = []
    for (steps, batch, context), density in zip(
        [(3, 4, 16), (3, 2, 32), (3, 4, 32), (3, 8, 16)], (0.25, 1.0, 0.4, 0.6), strict=True
    ):
        nnz = sum(round(density * rows * columns) for rows, columns in LAYERS.values())
        expected.append(steps * batch * context * 6 * (nnz + 257 * 16 + 2 * context * 16))
    assert [phase["flops"] for phase in run["phases"]] == pytest.approx(expected, rel=1e-12)
    assert run["flops"]["total"] == pytest.approx(sum(expected), rel=1e-12)
    assert [(phase["steps"], phase["context"], phase["batch_size"]) for phase in run["phases"]] == [
        (3, 16, 4),
        (3, 32, 2),
        (3, 32, 4),
        (3, 16, 8),
    ]
    assert sum(phase["tokens"] for phase in run["phases"]) == run["tokens"]
    planned = plan_of(tiny(EVERYTHING)).runs[0]
    assert [phase.flops for phase in planned.phases] == pytest.approx(expected, rel=1e-12)
    # A budget in FLOPs is the largest number of steps that it pays for.
    shares = [{**phase, "share": 0.25} for phase in EVERYTHING]
    for phase in shares:
        del phase["tokens"]
    limit = 1.0e8
    paid = plan_of(tiny(shares, {"budget": {"flops": limit, "batch_size": 4}})).runs[0]
    more = plan_of(tiny(shares, {"budget": {"steps": paid.steps + 1, "batch_size": 4}})).runs[0]
    assert paid.flops <= limit < more.flops
    assert paid.steps > 8


# Later stages and readers of a run in phases.


def test_phases_of_a_task_change_batches_and_schedules_and_resume(
    tiny: Configure, tmp_path: Path, screen: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    phases: Phases = [{"share": 0.5}, {"share": 0.5, "batch_size": 8, "schedule": {"name": "constant"}}]
    changes = {"data.context": 64, "model.max_context": 64, "budget": {"epochs": 1.0, "batch_size": 4}}

    def tune(name: str) -> RunResult:
        return finetune(tiny(phases, changes, FinetuneConfig, run_dir=tmp_path / name), screen)

    # 36 examples: 18 make 4.5 steps of 4, and 18 make 2.25 steps of 8.
    whole = tune("whole")
    assert (whole["steps"], whole["samples"]) == (7, 5 * 4 + 2 * 8)
    for step in (4, 5, 6):
        with monkeypatch.context() as patch:
            stop_after(patch, step)
            with pytest.raises(Interrupted, match=f"stopped after step {step} of 7"):
                tune(f"cut-{step}")
        tune(f"cut-{step}")
        assert_same_run(tmp_path / "whole", tmp_path / f"cut-{step}")


def test_reports_sweeps_and_tables_read_runs_in_phases(shell: Shell) -> None:
    lists = ["[{share: 0.5, density: 0.5}, {share: 0.5, context: 24, density: 0.25}]", "[{share: 0.5}, {share: 0.5}]"]
    words = [*shell.tiny, "sparsity.sparsity=0.75", f"budget.phases={','.join(lists)}", "runs_dir=swept"]
    words.append("optimizer.lr=0.004,0.008")
    status, _, err = shell.run("pretrain", "-m", *words)
    assert status == 0, err
    runs = sorted(path.parent for path in (shell.home / "swept").rglob("result.json"))
    assert len(runs) == 4
    assert any("-s0.5-phases-" in run.name for run in runs)
    for run in runs:
        status, out, err = shell.run("report", str(run))
        assert status == 0, err
        assert "complete" in out
    status, out, err = shell.run("sweep", "swept", "--out", "out")
    assert status == 0, err
    with (shell.home / "out" / "results.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    assert [row["budget.phases"] for row in rows] == [text for text in lists for _ in range(2)]
    # The printed command to run next can be typed as it is.
    line = next(line for line in out.splitlines() if line.lstrip().startswith("sparsity.sparsity=0.5"))
    phases = next(word for word in shlex.split(line) if word.startswith("budget.phases="))
    status, planned, err = shell.run("plan", "pretrain", *shell.tiny, phases)
    assert status == 0, err
    rows_of_phases = [row.split() for row in planned.splitlines() if re.match("    [01] ", row)]
    assert [row[-4:-2] for row in rows_of_phases] == [["0.5", "48"], ["0.25", "24"]]


# Refused settings, each in one line.


def test_memory_is_that_of_the_largest_phase(
    tiny: Configure, tmp_path: Path, screen: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    phases: Phases = [{"share": 0.3}, {"share": 0.6, "batch_size": 64, "context": 32}, {"share": 0.1, "batch_size": 32}]
    alone = plan_of(tiny(None, {"budget": {"steps": 100, "batch_size": 64}, "data.context": 32})).runs[0]
    planned = plan_of(tiny(phases, {"budget": {"steps": 100, "batch_size": 4}})).runs[0]
    assert planned.workload is not None
    assert planned.workload == alone.workload
    monkeypatch.setattr(stage_memory, "available_memory", lambda *_: Available(1_000_000, "available"))
    config = tiny(phases, {"budget": {"steps": 100, "batch_size": 4}}, run_dir=tmp_path / "run")
    with pytest.raises(UserError) as caught:
        pretrain(config, screen)
    line = str(caught.value)
    assert "training with budget.phases[1] (batch_size=64, context=32)" in line
    assert "budget.phases[1].batch_size=" in line
    assert "\n" not in line


HALVES: Phases = [{"share": 0.5, "density": 0.5}, {"share": 0.5}]


@pytest.mark.parametrize(
    ("phases", "changes", "message"),
    [
        (HALVES, {"sparsity": {"nnz": 500}}, r"density: sparsity\.nnz=500 already sets the number of weights"),
        (
            HALVES,
            {"sparsity.evolution": {"rule": "rigl", "every": 2}},
            r"density: .*rule=rigl changes the masks itself",
        ),
        (HALVES, {"sparsity.evolution": {"rule": "gmp", "every": 2}}, r"density: .*rule=gmp changes the masks itself"),
        (HALVES, {"sparsity.pattern": "nm"}, r"density: sparsity\.pattern=nm would not survive"),
        (
            [{"share": 0.5}, {"share": 0.5, "context": 33}],
            {"model.positions": "learned"},
            r"budget\.phases\[1\]\.context=33 is longer than model\.max_context=32",
        ),
        (
            [{"share": 0.5, "context": 8}, {"share": 0.5}],
            {"model.positions": "learned", "data.context": 40},
            r"data\.context=40 is longer than model\.max_context=32",
        ),
        (
            [{"share": 0.5}, {"share": 0.5, "context": 10**6}],
            {},
            r"budget\.phases\[1\]: share=0\.5 .* shorter than one",
        ),
        (
            [{"tokens": 64}, {"tokens": 10**6, "context": 10**5, "batch_size": 1}],
            {},
            r"holds \d+ tokens, fewer than context \+ 1 = 100001",
        ),
        (
            [{"share": 0.5}, {"share": 0.5, "schedule": {"warmup_steps": 30}}],
            {},
            r"budget\.phases\[1\]\.schedule\.warmup_steps=30 must be below the 6 steps",
        ),
    ],
)
def test_phases_that_cannot_be_are_one_line(
    phases: Phases, changes: dict[str, Any], message: str, train: Train, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message) as caught:
        train("run", phases, changes)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_a_configuration_of_phases_that_cannot_be_is_one_line(tiny: Configure) -> None:
    odd: Phases = [{"share": 0.5, "batch_size": 6}, {"share": 0.5, "batch_size": 3}]
    with pytest.raises(
        UserError, match=r"^budget\.phases\[1\]\.batch_size=3 is not divisible by loop\.accumulation=2$"
    ):
        tiny(odd, {"loop.accumulation": 2})
    assert tiny(odd, {"loop.accumulation": 3}).budget.batch_size == 4  # no phase uses it
    with pytest.raises(UserError, match=r"^budget\.batch_size=4 is not divisible by loop\.accumulation=3$"):
        tiny([odd[0], {"share": 0.5}], {"loop.accumulation": 3})
    for name, value in (("context", 32), ("density", 0.5)):
        with pytest.raises(
            UserError, match=rf"^budget\.phases\[0\]\.{name}={value}: the phases of a task may differ only"
        ):
            tiny([{"share": 1.0, name: value}], kind=FinetuneConfig)


def test_densities_are_refused_beside_a_run_to_start_from(train: Train, tiny: Configure, tmp_path: Path) -> None:
    start = train("start", None, {"budget": {"steps": 1, "batch_size": 4}})
    with pytest.raises(UserError, match=r"density: a run with init_from=.* keeps the densities"):
        pretrain(tiny(HALVES, init_from=start.directory, run_dir=tmp_path / "next"))
    other: Phases = [{"share": 0.5}, {"share": 0.5, "context": 32, "batch_size": 2}]
    assert pretrain(tiny(other, init_from=start.directory, run_dir=tmp_path / "next"), Console(quiet=True)).complete
