"""Calls of observers against hand-computed steps of a model with one weight, and their saved state."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor, nn

from sparsetrain.data import Batch
from sparsetrain.optim import Budget, BudgetConfig, PhaseConfig, RunSchedule, ScheduleConfig
from sparsetrain.runs.checkpoint import list_checkpoints, load_checkpoint
from sparsetrain.runs.optimizer_state import JSON
from sparsetrain.training.loop import Trainer
from sparsetrain.training.observers import Evaluated, Observer, RunStart, StepDone
from sparsetrain.training.state import Diverged, LoopConfig

LR, CLIP, CONTEXT = 0.5, 1.5, 3
# Two steps with 2 sequences, then four with 4.
BUDGET = Budget.of(
    BudgetConfig(phases=[PhaseConfig(tokens=12, batch_size=2), PhaseConfig(tokens=48, batch_size=4)]), CONTEXT
)
SCHEDULE = RunSchedule(ScheduleConfig(warmup=0.0), BUDGET)


class OneWeight(nn.Module):
    """The loss is half the squared difference between the weight and the mean target."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros((), dtype=torch.float64))

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        return (self.weight - targets.double().mean()).square() / 2


class Numbered:
    """Sample n has the target n."""

    def __init__(self, fails_at: int | None = None) -> None:
        self.fails_at = fails_at

    def batch(self, first: int, count: int) -> Batch:
        if first == self.fails_at:
            raise KilledError
        rows = torch.arange(first, first + count)[:, None].expand(count, CONTEXT)
        return Batch(rows, rows)


class KilledError(Exception):
    """Ends a run without a checkpoint of its own."""


class Recorder(Observer):
    """Records every call; its state is the sum of the losses and the number of evaluations."""

    name = "recorder"

    def __init__(self) -> None:
        self.calls: list[tuple[object, ...]] = []
        self.module: nn.Module | None = None
        self.total, self.evaluations = 0.0, 0

    def start(self, run: RunStart) -> None:
        self.module = run.module
        self.calls.append(("start", run.title, run.step, run.total_steps))

    def step(self, done: StepDone) -> None:
        self.total += done.loss
        assert min(done.tokens_per_second, done.seconds) > 0
        assert done.flops_per_second == pytest.approx(7 * done.tokens_per_second)
        numbers = (done.loss, done.grad_norm, self._gradient(), done.lr)
        self.calls.append(("step", done.step, done.tokens, *numbers, done.phase.index, done.logged))

    def evaluation(self, found: Evaluated) -> None:
        self.evaluations += 1
        self.calls.append(("evaluation", found.step, found.tokens, dict(found.numbers), found.final, self._gradient()))

    def state(self) -> dict[str, JSON]:
        self.calls.append(("state",))
        return {"total": self.total, "evaluations": self.evaluations}

    def restore(self, state: Mapping[str, JSON]) -> None:
        self.calls.append(("restore", dict(state)))
        total, evaluations = state["total"], state["evaluations"]
        assert isinstance(total, float)
        assert isinstance(evaluations, int)
        self.total, self.evaluations = total, evaluations

    def close(self) -> None:
        self.calls.append(("close",))

    def _gradient(self) -> float | None:
        assert self.module is not None
        (weight,) = self.module.parameters()
        return None if weight.grad is None else weight.grad.item()


class Silent(Observer):
    """Has no state, so that checkpoints do not contain it."""

    name = "silent"


def trainer(
    directory: Path, *observers: Observer, samples: Numbered | None = None, evaluate: Callable[..., float] = float
) -> Trainer:
    module = OneWeight()
    optimizer = torch.optim.SGD([{"params": [module.weight], "initial_lr": LR}], lr=LR)
    return Trainer(
        module=module,
        samples=[samples or Numbered()],
        optimizer=optimizer,
        schedule=SCHEDULE,
        config=LoopConfig(log_every=4, eval_every=3, checkpoint_every=2, keep_last=9),
        clip=CLIP,
        seed=0,
        device=torch.device("cpu"),
        directory=directory,
        evaluate=lambda step, _final: {"score": evaluate(step)},
        flops_per_token=lambda _step: 7.0,
        peak_lr=LR,
        autocast=None,
        title="toy",
        console=Console(file=io.StringIO()),
        observers=[Silent(), *observers],
    )


def by_hand() -> list[tuple[object, ...]]:
    """Return the calls of the six steps, computed for one weight."""
    calls: list[tuple[object, ...]] = [("start", "toy", 0, 6), ("evaluation", 0, 0, {"score": 0.0}, False, None)]
    weight, sample, tokens = 0.0, 0, 0
    for step in range(6):
        batch = 2 if step < 2 else 4
        gap = weight - (sample + (batch - 1) / 2)
        clipped = math.copysign(min(abs(gap), CLIP), gap)
        lr = LR * SCHEDULE.factor(step)
        weight, sample, tokens = weight - lr * clipped, sample + batch, tokens + batch * CONTEXT
        numbers = tuple(pytest.approx(value, rel=1e-5) for value in (gap**2 / 2, abs(gap), clipped, lr))
        calls.append(("step", step + 1, tokens, *numbers, int(step >= 2), step + 1 in (1, 4, 6)))
        if step + 1 in (3, 6):
            calls.append(("evaluation", step + 1, tokens, {"score": float(step + 1)}, step + 1 == 6, None))
        if step + 1 in (2, 4, 6):
            calls.append(("state",))
    return [*calls, ("close",)]


def kept(directory: Path) -> dict[str, Any]:
    """Return the state of the observers in each checkpoint."""
    place = directory / "checkpoints"
    return {name: load_checkpoint(place, name).state["observers"] for name in list_checkpoints(place)}


def test_an_observer_sees_every_step_and_evaluation_with_its_gradients(tmp_path: Path) -> None:
    seen = Recorder()
    assert trainer(tmp_path, seen).run().step == 6
    assert seen.calls == by_hand()
    losses = [call[3] for call in seen.calls if call[0] == "step"]
    assert kept(tmp_path) == {
        f"step-{step:08d}": {"recorder": {"total": sum(losses[:step]), "evaluations": evaluations}}
        for step, evaluations in ((2, 1), (4, 2), (6, 3))
    }


def test_the_state_comes_back_in_a_resumed_run_whatever_the_killed_one_saw_later(tmp_path: Path) -> None:
    whole, killed, resumed, added = (Recorder() for _ in range(4))
    added.name = "added"
    trainer(tmp_path / "whole", whole).run()
    with pytest.raises(KilledError):  # in the last step, two steps after the newest checkpoint
        trainer(tmp_path / "cut", killed, samples=Numbered(fails_at=16)).run()
    assert killed.calls == [*whole.calls[:-4], ("close",)]
    trainer(tmp_path / "cut", resumed, added).run()
    state = kept(tmp_path / "whole")["step-00000004"]["recorder"]
    tail = whole.calls[whole.calls.index(("state",), whole.calls.index(("state",)) + 1) + 1 :]
    assert resumed.calls == [("restore", state), ("start", "toy", 4, 6), *tail]
    assert added.calls == resumed.calls[1:]  # no checkpoint contains its state
    assert (resumed.total, resumed.evaluations) == (whole.total, whole.evaluations)
    assert kept(tmp_path / "cut")["step-00000006"]["recorder"] == kept(tmp_path / "whole")["step-00000006"]["recorder"]


class FailsToStart(Observer):
    """Raises because its file cannot be opened."""

    def start(self, run: RunStart) -> None:
        raise OSError("no space")


def test_observers_are_closed_however_a_run_ends(tmp_path: Path) -> None:
    diverged, first, last = Recorder(), Recorder(), Recorder()
    with pytest.raises(Diverged, match="score nan after step 3; last good checkpoint: step-00000002"):
        trainer(tmp_path / "a", diverged, evaluate=lambda step: math.nan if step == 3 else 0.0).run()
    assert [call[0] for call in diverged.calls[-2:]] == ["step", "close"]  # not called for a value that is not finite
    with pytest.raises(OSError, match="no space"):
        trainer(tmp_path / "b", first, FailsToStart(), last).run()
    assert [call[0] for call in first.calls] == ["start", "close"]
    assert [call[0] for call in last.calls] == ["close"]
