"""Observers of a run: the progress line, the metrics file, and any others.

The loop calls an observer when the run starts, after every step and after every evaluation. The ``state`` of an
observer is saved with every checkpoint, and a resumed run restores it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from torch import nn

from sparsetrain.errors import UserError
from sparsetrain.optim.batch_size import Decision
from sparsetrain.optim.budget import Phase
from sparsetrain.registry import Registry
from sparsetrain.runs.metrics import MetricsLog
from sparsetrain.runs.optimizer_state import JSON
from sparsetrain.training.progress import ProgressBar


@dataclass(frozen=True)
class RunStart:
    """A run that starts or resumes.

    Args:
        title: name of the run for people.
        directory: the run directory.
        step: optimizer steps already done.
        total_steps: optimizer steps of the whole run.
        module: what is trained.
        seconds: time spent before an interruption.
    """

    title: str
    directory: Path
    step: int
    total_steps: int
    module: nn.Module
    seconds: float = 0.0


@dataclass(frozen=True)
class StepDone:
    """An optimizer step that was just made; the gradients still exist.

    Args:
        step: optimizer steps done, this one included.
        tokens: tokens seen so far.
        loss: mean over the batch, nats.
        grad_norm: gradient norm before clipping.
        lr: base learning rate of this step.
        tokens_per_second, flops_per_second: speed of this step.
        seconds: time of the run so far.
        phase: phase of the budget that the step belongs to.
        share: share of the run's tokens that was seen, by the budget.
        total_steps: optimizer steps of the whole run, as far as it is known: the noise scale may lead to fewer.
        logged: whether to record this step (every ``loop.log_every`` steps, the first and the last).
        masks: metrics of the masks, at logged steps only.
        observed: what the observers measured, at logged steps only.
        notes: what the progress line shows of that.
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
    share: float
    total_steps: int
    masks: Mapping[str, float] = field(default_factory=dict)
    observed: Mapping[str, Any] = field(default_factory=dict)
    notes: str = ""


@dataclass(frozen=True)
class Evaluated:
    """An evaluation after ``step`` steps: metrics by name, and, if masks evolve, metrics of the masks."""

    step: int
    tokens: int
    numbers: Mapping[str, float]
    final: bool
    masks: Mapping[str, Any] = field(default_factory=dict)


class Observer:
    """Base class of observers; its methods do nothing.

    ``name`` is the key of the observer's state in a checkpoint, so no two observers of a run may share it.
    """

    name = "observer"

    def start(self, run: RunStart) -> None:
        """Called once before the first step, after ``restore`` if the run is resumed."""

    def passes(self) -> AbstractContextManager[Any]:
        """Return a context for the forward and backward passes of a step.

        When it ends, the gradients are complete and not yet clipped.
        """
        return nullcontext()

    def measured(self) -> Mapping[str, Any]:
        """Return what this observer measured up to the present step, as entries of its record of metrics."""
        return {}

    def note(self) -> str:
        """Return the same in a few words, for the progress line."""
        return ""

    def step(self, done: StepDone) -> None:
        """Called after every optimizer step, before the gradients are freed."""

    def evaluation(self, found: Evaluated) -> None:
        """Called after every evaluation: before the first step, during training, and after the last step."""

    def decision(self, made: Decision) -> None:
        """Called when the noise scale was looked at, after the observers saw the step, to set the next batch size."""

    def state(self) -> dict[str, JSON]:
        """Return the state to save in a checkpoint. Files that the checkpoint relies on must be on disk on return."""
        return {}

    def restore(self, state: Mapping[str, JSON]) -> None:
        """Restore the state that `state` returned for the checkpoint that the run resumes from."""

    def result(self) -> Mapping[str, Any]:
        """Return entries for the result of a complete run."""
        return {}

    def close(self) -> None:
        """Called when the run ends, also after an error."""


NOISE_SCALE, NOISE_SCALE_ALL = "noise_scale", "noise_scale_all"  # either may lead the batch size

OBSERVERS: Registry[Callable[[], Observer]] = Registry("observer", "observe", calls={"": ()})
"""The observers that ``observe`` can name."""


def register_observer(name: str, make: Callable[[], Observer] | None = None) -> Any:
    """Make an observer available by name, for ``observe=NAME`` of every verb that trains.

    ```python
    @register_observer("loudness")
    class Loudness(Observer): ...
    ```

    Args:
        name: ASCII letters, digits, ``_``, ``-`` and ``.``, the first one a letter.
        make: a class of observers, or a function without arguments that returns one; without it the call returns a
            decorator.

    Returns:
        ``make``, or the decorator.

    Raises:
        UserError: the name is malformed or taken, or ``make`` needs arguments.
    """
    if make is None:
        return OBSERVERS.register(name)
    return OBSERVERS.register(name, make)


class Progress(Observer):
    """The progress line: a bar on a terminal, about ten lines in a log file."""

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
        more = "  ".join(filter(None, (more, done.notes)))
        self.bar.update(
            *(done.step, done.total_steps, done.share),
            *(done.loss, done.lr, done.tokens_per_second, done.flops_per_second),
            more,
        )

    def close(self) -> None:
        if self.bar is not None:
            self.bar.stop()
            self.bar = None


class Metrics(Observer):
    """Writes ``metrics.jsonl``: a record for each logged step and each evaluation.

    Args:
        phases: whether the run has several phases; then each record of a step includes its phase.
        sizes: whether the batch size changes during the run; then each record of a step includes it.
    """

    name = "metrics"

    def __init__(self, path: Path, phases: bool = False, sizes: bool = False) -> None:
        self.path, self.phases, self.sizes = path, phases, sizes
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
            **({"batch_size": done.phase.batch_size} if self.sizes else {}),
            **done.masks,
            **done.observed,
        )

    def decision(self, made: Decision) -> None:
        assert self.log is not None
        self.log.write(
            step=made.step, tokens=made.tokens, noise_scale=made.noise_scale, next_batch_size=made.batch_size
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


def noise_scale_of(observers: Sequence[Observer]) -> Callable[[], float]:
    """Return a function that gives the gradient noise scale in sequences, as the observer ``noise_scale`` measures it.

    That observer has a `sparsetrain.NoiseScale` as its attribute ``scale``; its examples are sequences.

    Raises:
        UserError: there is no such observer.
    """
    for observer in observers:
        scale = getattr(observer, "scale", None)
        if observer.name == NOISE_SCALE and scale is not None:
            return lambda: float(scale.value)
    raise UserError("budget.batch_size=gns needs an observer that measures the noise scale: observe=noise_scale")
