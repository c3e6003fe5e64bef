"""One stage of training, from its configuration to a run directory: the same `train` for text, tasks and prompts.

A `Stage` says what it is made from, how much of it there is, what is trained and how it is measured; `train` claims the
directory, builds, trains, goes on where a run was stopped, and writes the result.
"""

from __future__ import annotations

import glob
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

import torch
from rich.console import Console
from torch import nn

from sparsetrain.cost.flops import hidden_density
from sparsetrain.cost.footprint import Workload
from sparsetrain.models import Transformer
from sparsetrain.optim import Budget, RunSchedule, build_optimizer
from sparsetrain.parameterization import param_groups
from sparsetrain.runs.claim import claimed
from sparsetrain.runs.layout import METRICS
from sparsetrain.runs.origin import Origin
from sparsetrain.runs.provenance import commit, machine
from sparsetrain.runs.result import RunResult, finish
from sparsetrain.runs.weights import RunWeights
from sparsetrain.screen import say
from sparsetrain.sparsity import MaskManager, SparsityConfig, Static, sparse_layers
from sparsetrain.stages.backends import backends, settle_backends
from sparsetrain.stages.config import RunConfig, as_plain, identify, model_config
from sparsetrain.stages.directories import run_directory
from sparsetrain.stages.finished import skipped
from sparsetrain.stages.masks import seeded, starts_sparse
from sparsetrain.stages.memory import check_memory, memory_errors
from sparsetrain.training.loop import Samples, Trainer, load_weights
from sparsetrain.training.observers import Metrics, Observer, Progress
from sparsetrain.training.state import Diverged, TrainState, peak_rss_bytes, resolve_device, resolve_precision

C = TypeVar("C", bound=RunConfig)


@dataclass(frozen=True)
class Subject:
    """What is trained.

    Args:
        network: the transformer. module: all that a checkpoint holds; it maps a batch's inputs to the mean loss.
        masks: what changes the masks of the network and watches them; None where they stay as they are.
    """

    network: Transformer
    module: nn.Module
    masks: MaskManager | None = None


@dataclass(frozen=True)
class Course:
    """A training that is about to begin: its subject and what acts on it.

    Args:
        autocast: dtype of the autocast region, or None.
    """

    subject: Subject
    optimizer: torch.optim.Optimizer
    device: torch.device
    autocast: torch.dtype | None

    @property
    def network(self) -> Transformer:
        return self.subject.network

    def autocasting(self) -> torch.autocast:
        """Return the region in which the model computes."""
        return torch.autocast(self.device.type, self.autocast, enabled=self.autocast is not None)


class Stage(ABC, Generic[C]):
    """One kind of training.

    The methods are called in the order in which they stand here; `prepare` sets ``budget``.

    Args:
        config: a configuration of the stage's kind.
    """

    kind: ClassVar[str]
    """What it is called in directories, results and messages."""

    budget: Budget
    course: Course

    def __init__(self, config: C, console: Console | None = None) -> None:
        self.config, self.console = config, console or Console()

    @abstractmethod
    def origin(self) -> Origin:
        """Return the text and the weights that the run is made from.

        Raises:
            UserError: input that cannot be used.
        """

    def facts(self) -> dict[str, str | None]:
        """Return what identifies the run beside its settings and its origin."""
        return {}

    @abstractmethod
    def prepare(self, origin: Origin) -> None:
        """Read the examples and work out the budget, before anything is built.

        Raises:
            UserError: input that cannot be used.
        """

    @abstractmethod
    def workload(self, prefix: str = "") -> tuple[Workload, str, dict[str, str]]:
        """Return what the training holds in memory, its name in a message, and the settings that could be smaller.

        Args:
            prefix: of those settings, for a stage of a pipeline.
        """

    @abstractmethod
    def build(self, device: torch.device) -> Subject:
        """Return the model as it is before the first step."""

    @abstractmethod
    def samples(self) -> Sequence[Samples]:
        """Return the training data, one for each stream of the budget."""

    def begin(self, course: Course) -> None:
        """Take what `evaluate`, `flops_per_token` and `score` need of the training."""
        self.course = course

    @abstractmethod
    def evaluate(self, step: int, final: bool) -> dict[str, float]:
        """Return numbers about the model after ``step`` updates."""

    @abstractmethod
    def flops_per_token(self, step: int) -> float:
        """Return the training FLOPs per token, by the formula, of the update after ``step`` updates."""

    @abstractmethod
    def score(self, state: TrainState, directory: Path) -> dict[str, Any]:
        """Return the entries of the result of a training that came to its end.

        Raises:
            Diverged: a model that cannot be scored.
        """

    def entries(self) -> dict[str, Any]:
        """Return further entries of the result that are known before the first step."""
        return {}

    def describe(self) -> None:
        """Print what is to be learned, where the model's own line does not say it."""

    def diverged(self, directory: Path, clock: Stopwatch) -> dict[str, Any]:
        """Return the entries of the result of a training that diverged."""
        return {}

    @property
    def title(self) -> str:
        """What the progress line calls the run."""
        return self.kind


def train(stage: Stage[Any], observers: Sequence[Observer] = ()) -> RunResult:
    """Run a stage to its end, from where it stopped if it was stopped, and return its result.

    Args:
        observers: told of every step and evaluation, beside the progress line and the metrics.

    Raises:
        UserError: input that cannot be used. Interrupted: a signal ended it, resumably. Diverged: see there; the
            result then has the status ``diverged``.
    """
    config, console = stage.config, stage.console
    origin = stage.origin()
    run = identify(stage.kind, config, origin, stage.facts())
    directory = run_directory(run, config, origin)
    with claimed(directory, run, origin) as done:
        if done is not None:
            return skipped(done, console)
        stage.prepare(origin)
        check_memory(*stage.workload(), resolve_device(config.device), config.force)
        origin.save(directory)
        with memory_errors("this training"):
            return _train(stage, directory, observers)


def _train(stage: Stage[Any], directory: Path, more: Sequence[Observer]) -> RunResult:
    clock = Stopwatch()
    config, console, budget = stage.config, stage.console, stage.budget
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    device = resolve_device(config.device)
    autocast, reason = resolve_precision(config.loop.precision, device)
    subject = stage.build(device)
    network, module, masks = subject.network, subject.module, subject.masks
    schedule = RunSchedule(config.schedule, budget)
    tokens = budget.largest.tokens_per_step // config.loop.accumulation
    settle_backends(network, directory, tokens, autocast, mean_densities(masks, budget.total_steps))
    describe(network, reason, device, console)
    stage.describe()
    opt = config.optimizer
    optimizer = build_optimizer(param_groups(module, config.parameterization, opt.lr, opt.weight_decay, opt.eps), opt)
    stage.begin(Course(subject, optimizer, device, autocast))
    common = {
        "stage": stage.kind,
        "parameterization": config.parameterization.scheme,
        "sparsity": starts_sparse(config),
        "width": network.config.d_model,
        "depth": network.config.n_layers,
        "lr": opt.lr,
        "seed": config.seed,
        "precision": reason,
        "machine": machine(device),
        "commit": commit(),
        **stage.entries(),
    }
    trainer = Trainer(
        module=module,
        samples=stage.samples(),
        optimizer=optimizer,
        schedule=schedule,
        config=config.loop,
        clip=opt.clip,
        seed=config.seed,
        device=device,
        directory=directory,
        evaluate=stage.evaluate,
        flops_per_token=stage.flops_per_token,
        base_lr=opt.lr,
        autocast=autocast,
        title=stage.title,
        console=console,
        observers=[*usual_observers(directory, budget, masks, console), *more],
        masks=masks,
    )
    try:
        with clock.paused():
            state = trainer.run()
        scored = stage.score(state, directory)
    except Diverged as error:
        finish(
            directory,
            {**common, "status": "diverged", "message": str(error), **stage.diverged(directory, clock)},
        )
        raise
    trained = sum(p.numel() for group in optimizer.param_groups for p in group["params"])
    return finish(
        directory,
        {
            **common,
            **progress_entries(state, clock),
            **scored,
            "trained_parameters": trained,
            "model": asdict(network.config),
            "config": as_plain(config),
        },
    )


def usual_observers(directory: Path, budget: Budget, masks: MaskManager | None, console: Console) -> list[Observer]:
    """Return what watches a run: its progress line and its metrics."""
    evolves = masks is not None and not isinstance(masks.rule, Static)
    return [Progress(console, evolves), Metrics(directory / METRICS, phases=len(budget.phases) > 1)]


def mean_densities(masks: MaskManager | None, total_steps: int) -> dict[str, float] | None:
    """Return the density of each layer half way between the first step and the last; None without masks."""
    if masks is None:
        return None
    first, last = masks.densities_at(0), masks.densities_at(total_steps)
    return {name: (density + last[name]) / 2 for name, density in first.items()}


def build_model(
    config: RunConfig, vocab_size: int, device: torch.device, plan: SparsityConfig | None = None
) -> Transformer:
    """Return the freshly initialised model of a configuration, on ``device``.

    Args:
        plan: the sparsity section to use; None for the configuration's.
    """
    shape = model_config(config.model, vocab_size, config.seed)
    return Transformer(shape, config.parameterization, seeded(config) if plan is None else plan).to(device)


def restored_model(
    config: RunConfig, weights: RunWeights, vocab_size: int, device: torch.device, source: Path
) -> Transformer:
    """Return the model of the run ``source`` with the weights that it ended with, sparse where they are.

    The sparsity section alone does not say which layers these are, since the phases of that run may have had other
    densities.

    Raises:
        UserError: weights of another shape.
    """
    plan = SparsityConfig()
    if weights.sparse:
        # The density is replaced by that of the weights.
        plan = SparsityConfig(
            sparsity=config.sparsity.sparsity or 0.5,
            include=[glob.escape(name) for name in weights.sparse_layers],
            exclude=[],
            backend=config.sparsity.backend,
            seed=config.seed,
        )
    model = build_model(config, vocab_size, device, plan)
    load_weights(model, weights.model, str(source))
    return model


def layer_densities(model: Transformer) -> dict[str, float]:
    """Return the density of each sparse layer, by name; the rest is dense."""
    return {name: layer.pattern.density for name, layer in sparse_layers(model)}


def overall_density(model: Transformer) -> float:
    """Return nonzeros over elements of all hidden matrices: those of the blocks."""
    return hidden_density(model.config, layer_densities(model))


class Stopwatch:
    """Counts what a stage spends outside its loop, whose own clock runs on over interruptions."""

    def __init__(self) -> None:
        self._started = time.monotonic()
        self._inside = 0.0

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave out the time of the block."""
        before = time.monotonic()
        try:
            yield
        finally:
            self._inside += time.monotonic() - before

    def seconds(self) -> float:
        return time.monotonic() - self._started - self._inside


def progress_entries(state: TrainState, clock: Stopwatch) -> Mapping[str, Any]:
    """Return what every finished run says about its course."""
    return {
        "status": "complete",
        "steps": state.step,
        "samples": state.samples_seen,
        "tokens": state.tokens_seen,
        "seconds": state.seconds + clock.seconds(),
        "peak_rss_bytes": peak_rss_bytes(),
    }


def describe(model: Transformer, precision: str, device: torch.device, console: Console) -> None:
    """Print one line about the model that is about to be trained."""
    stored = sum(parameter.numel() for parameter in model.parameters())
    layers = list(sparse_layers(model))
    empty = sum(layer.pattern.empty_rows for _, layer in layers)
    warning = f"; {empty} outputs have no weight at all" if empty else ""
    say(
        console,
        f"model: {stored:,} parameters, hidden density {overall_density(model):.4g}, backend {backends(model)}, "
        f"{device.type}, {precision}{warning}",
    )
