"""What watches a run without taking part in it: the progress line, the metrics file, and whatever else is added.

An observer is told when the run starts, after every step and after every evaluation. What it has to remember over an
interruption is its ``state``, which every checkpoint keeps and a resumed run gives back.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from torch import nn

from sparsetrain.optim.budget import Phase
from sparsetrain.runs.metrics import MetricsLog
from sparsetrain.runs.optimizer_state import JSON
from sparsetrain.training.progress import ProgressBar


@dataclass(frozen=True)
class RunStart:
    """A run that begins or goes on.

    Args:
        title: for people. directory: the run's. step: updates done before. total_steps: updates in all.
        module: what is trained. seconds: spent before an interruption.
    """

    title: str
    directory: Path
    step: int
    total_steps: int
    module: nn.Module
    seconds: float = 0.0


@dataclass(frozen=True)
class StepDone:
    """An update that was just made; the gradients are still there.

    Args:
        step: updates done, this one included. tokens: tokens seen so far.
        loss: mean over the batch, nats. grad_norm: before clipping. lr: base learning rate of this update.
        tokens_per_second, flops_per_second: of this step. seconds: of the run so far.
        phase: that the update belongs to.
        logged: whether this step is one of those that are kept (``loop.log_every``, the first and the last).
        masks: of a logged step, numbers about the masks.
    """

    step: int
    tokens: int
    loss: float
    grad_norm: float
    lr: float
    tokens_per_second: float
    flops_per_second: float
    seconds: float
    phase: Phase
    logged: bool
    masks: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Evaluated:
    """An evaluation after ``step`` updates: ``numbers`` by name, and of masks that change what each layer's are."""

    step: int
    tokens: int
    numbers: Mapping[str, float]
    final: bool
    masks: Mapping[str, Any] = field(default_factory=dict)


class Observer:
    """Watches a run; the methods do nothing here.

    ``name`` is what its state is called in a checkpoint, and must differ between the observers of a run.
    """

    name = "observer"

    def start(self, run: RunStart) -> None:
        """Called once before the first step, after ``restore`` if the run is resumed."""

    def step(self, done: StepDone) -> None:
        """Called after every update, before the gradients are dropped."""

    def evaluation(self, found: Evaluated) -> None:
        """Called after every evaluation: before the first step, on the way, and after the last one."""

    def state(self) -> dict[str, JSON]:
        """Return what a resumed run gives back to `restore`; called before each checkpoint, so anything that the
        checkpoint relies on must be on the disk when it returns.
        """
        return {}

    def restore(self, state: Mapping[str, JSON]) -> None:
        """Take back what `state` returned when the checkpoint was saved that the run goes on from."""

    def close(self) -> None:
        """Called when the run ends, in whatever way."""


class Progress(Observer):
    """The progress line: a bar on a terminal, about ten lines in a log."""

    name = "progress"

    def __init__(self, console: Console, evolves: bool) -> None:
        self.console, self.evolves = console, evolves
        self.bar: ProgressBar | None = None

    def start(self, run: RunStart) -> None:
        self.bar = ProgressBar(run.title, run.total_steps, self.console)
        self.bar.start()

    def step(self, done: StepDone) -> None:
        assert self.bar is not None
        more = ""
        if done.masks and self.evolves:
            more = (
                f"density {done.masks['density']:.3g} (target {done.masks['target_density']:.3g})  "
                f"R_s {done.masks['itop_rate']:.2f}  overlap {done.masks['mask_overlap']:.2f}"
            )
        self.bar.update(done.step, done.loss, done.lr, done.tokens_per_second, done.flops_per_second, more)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.stop()
            self.bar = None


class Metrics(Observer):
    """``metrics.jsonl``: a record for each logged step and each evaluation.

    Args:
        phases: whether the run has several, of which each record then names its own.
    """

    name = "metrics"

    def __init__(self, path: Path, phases: bool = False) -> None:
        self.path, self.phases = path, phases
        self.log: MetricsLog | None = None

    def start(self, run: RunStart) -> None:
        self.log = MetricsLog(self.path, run.step if run.step else -1)

    def step(self, done: StepDone) -> None:
        if not done.logged:
            return
        assert self.log is not None
        self.log.write(
            step=done.step,
            tokens=done.tokens,
            loss=done.loss,
            lr=done.lr,
            grad_norm=done.grad_norm,
            tokens_per_second=done.tokens_per_second,
            flops_per_second=done.flops_per_second,
            seconds=done.seconds,
            **({"phase": done.phase.index} if self.phases else {}),
            **done.masks,
        )

    def evaluation(self, found: Evaluated) -> None:
        assert self.log is not None
        self.log.write(step=found.step, tokens=found.tokens, **found.numbers, **found.masks)

    def state(self) -> dict[str, JSON]:
        if self.log is not None:
            self.log.sync()
        return {}

    def close(self) -> None:
        if self.log is not None:
            self.log.close()
            self.log = None
