"""A stage of training, from its configuration to a run directory: one function `train` for text, tasks and prompts.

A `Stage` provides the data, the budget, the model and the evaluation. `train` claims the directory, builds the model,
trains or resumes, and writes the result.
"""

from __future__ import annotations

import glob
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

import torch
from rich.console import Console
from torch import nn

from sparsetrain.cost.flops import hidden_density
from sparsetrain.cost.footprint import Workload
from sparsetrain.cost.run_time import RunWork
from sparsetrain.data import Samples
from sparsetrain.models import Transformer
from sparsetrain.optim import Budget, RunSchedule, build_optimizer
from sparsetrain.parameterization import follow_density, param_groups
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
from sparsetrain.stages.stopwatch import Stopwatch
from sparsetrain.stages.work import prediction
from sparsetrain.training.loop import Trainer, load_weights
from sparsetrain.training.observers import OBSERVERS, Metrics, Observer, Progress, noise_scale_of
from sparsetrain.training.state import Diverged, TrainState, peak_rss_bytes, resolve_device, resolve_precision

C = TypeVar("C", bound=RunConfig)


@dataclass(frozen=True)
class Subject:
    """What is trained.

    Args:
        network: the transformer.
        module: everything that a checkpoint holds; it maps the inputs of a batch to the mean loss.
        masks: the manager that changes and watches the masks of the network; None if they do not change.
    """

    network: Transformer
    module: nn.Module
    masks: MaskManager | None = None


@dataclass(frozen=True)
class Training:
    """A training that is about to begin: the subject, its optimizer and its device.

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
        """Return the autocast region that the model computes in."""
        return torch.autocast(self.device.type, self.autocast, enabled=self.autocast is not None)


class Stage(ABC, Generic[C]):
    """One kind of training.

    `train` calls the methods in the order in which they are defined; `prepare` sets ``budget``.

    Args:
        config: a configuration of this kind.
    """

    kind: ClassVar[str]
    """Name of the kind in directories, results and messages."""

    budget: Budget
    training: Training

    def __init__(self, config: C, console: Console | None = None) -> None:
        self.config, self.console = config, console or Console()

    @abstractmethod
    def origin(self) -> Origin:
        """Return the text, tokenizer and weights that the run starts from.

        Raises:
            UserError: the input cannot be used.
        """

    def facts(self) -> dict[str, str | None]:
        """Return what identifies the run besides its settings and its origin."""
        return {}

    @abstractmethod
    def prepare(self, origin: Origin) -> None:
        """Read the examples and compute the budget, before the model is built.

        Raises:
            UserError: the input cannot be used.
        """

    def save(self, origin: Origin, directory: Path) -> None:
        """Write into the run directory what a user of the trained model needs besides its weights."""
        origin.save(directory)

    @abstractmethod
    def workload(self, prefix: str = "") -> tuple[Workload, str, dict[str, str]]:
        """Return what the training holds in memory, its description for messages, and the settings to reduce.

        Args:
            prefix: prefix of the keys of those settings, for a stage of a pipeline.
        """

    @abstractmethod
    def build(self, device: torch.device) -> Subject:
        """Return the model before the first step."""

    @abstractmethod
    def samples(self) -> Sequence[Samples]:
        """Return the training data, one source per stream of the budget."""

    def begin(self, training: Training) -> None:
        """Store the training, which `evaluate`, `flops_per_token` and `score` use."""
        self.training = training

    @abstractmethod
    def evaluate(self, step: int, final: bool) -> dict[str, float]:
        """Return metrics of the model after ``step`` steps."""

    @abstractmethod
    def flops_per_token(self, step: int) -> float:
        """Return the training FLOPs per token, by formula, of the step that follows ``step`` steps."""

    @abstractmethod
    def work(self, state: TrainState) -> RunWork:
        """Return the work of the complete training, of which `prediction` predicts the time."""

    @abstractmethod
    def score(self, state: TrainState, directory: Path) -> dict[str, Any]:
        """Return the entries for the result of a complete training.

        Raises:
            Diverged: the model cannot be scored.
        """

    def entries(self) -> dict[str, Any]:
        """Return further entries for the result that are known before the first step."""
        return {}

    def describe(self) -> None:
        """Print what the model learns from, if the line about the model does not say it."""

    def trained_parameters(self) -> int:
        """Return the number of weights that the training may change."""
        return sum(p.numel() for group in self.training.optimizer.param_groups for p in group["params"])

    def diverged(self, directory: Path, clock: Stopwatch) -> dict[str, Any]:
        """Return the entries for the result of a training that diverged."""
        return {}

    @property
    def title(self) -> str:
        """Name of the run in the progress line."""
        return self.kind


def train(stage: Stage[Any], observers: Sequence[Observer] = ()) -> RunResult:
    """Run a stage to its end, resuming it if it was stopped, and return its result.

    Args:
        observers: called at each step and evaluation, in addition to the progress line and the metrics.

    Raises:
        UserError: the input cannot be used.
        Interrupted: a signal stopped the run, which can be resumed.
        Diverged: the training diverged; the result has the status ``diverged``.
    """
    origin = stage.origin()
    config, console = stage.config, stage.console  # the origin may complete the configuration
    run = identify(stage.kind, config, origin, stage.facts())
    directory = run_directory(run, config, origin)
    with claimed(directory, run, origin) as done:
        if done is not None:
            return skipped(done, console)
        stage.prepare(origin)
        check_memory(*stage.workload(), resolve_device(config.device), config.force)
        stage.save(origin, directory)
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
    schedule = RunSchedule(config.schedule, budget, config.optimizer)
    tokens = config.loop.micro_batch_of(budget.largest.batch_size) * budget.largest.context
    settle_backends(network, directory, tokens, autocast, mean_densities(masks, budget.total_steps))
    describe(network, reason, device, console)
    stage.describe()
    opt = config.optimizer
    optimizer = build_optimizer(param_groups(module, config.parameterization, opt.lr, opt.weight_decay, opt.eps), opt)
    stage.begin(Training(subject, optimizer, device, autocast))
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
    given = {observer.name for observer in more}
    chosen = [OBSERVERS[name]() for name in config.observers() if name not in given]
    observers = [*usual_observers(directory, budget, masks, console), *chosen, *more]
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
        peak_lr=opt.lr,
        autocast=autocast,
        title=stage.title,
        console=console,
        observers=observers,
        masks=masks,
    )
    if config.parameterization.follow == "density":
        trainer.follow = partial(follow_density, module, optimizer)
    if budget.config.led is not None:
        trainer.noise_scale = noise_scale_of(observers)
    try:
        with clock.paused():
            state = trainer.run()
        scored = stage.score(state, directory)
    except Diverged as error:
        finish(directory, {**common, "status": "diverged", "message": str(error), **stage.diverged(directory, clock)})
        raise
    return finish(
        directory,
        {
            **common,
            **progress_entries(state, clock),
            **prediction(config, stage.work(state)),
            **({"decisions": [asdict(made) for made in budget.decisions]} if budget.config.led is not None else {}),
            **scored,
            **{key: value for observer in observers for key, value in observer.result().items()},
            "trained_parameters": stage.trained_parameters(),
            "model": asdict(network.config),
            "config": as_plain(config),
        },
    )


def usual_observers(directory: Path, budget: Budget, masks: MaskManager | None, console: Console) -> list[Observer]:
    """Return the observers of every run: the progress line and the metrics file."""
    evolves = masks is not None and not isinstance(masks.rule, Static)
    several = len({phase.index for phase in budget.phases}) > 1
    metrics = Metrics(directory / METRICS, phases=several, sizes=budget.config.changing is not None)
    return [Progress(console, evolves), metrics]


def mean_densities(masks: MaskManager | None, total_steps: int) -> dict[str, float] | None:
    """Return the mean of the first and the last density of each layer; None without a mask manager."""
    if masks is None:
        return None
    first, last = masks.densities_at(0), masks.densities_at(total_steps)
    return {name: (density + last[name]) / 2 for name, density in first.items()}


def build_model(
    config: RunConfig, vocab_size: int, device: torch.device, sparsity: SparsityConfig | None = None
) -> Transformer:
    """Return the freshly initialised model of a configuration, on ``device``.

    Args:
        sparsity: the sparsity section to use instead of the configuration's.
    """
    shape = model_config(config.model, vocab_size, config.seed)
    return Transformer(shape, config.parameterization, seeded(config) if sparsity is None else sparsity).to(device)


def restored_model(
    config: RunConfig, weights: RunWeights, vocab_size: int, device: torch.device, source: Path
) -> Transformer:
    """Return the model of the run ``source`` with its final weights; the layers that are sparse there are sparse here.

    The sparsity section of ``config`` does not determine these layers, since phases may have changed the densities.

    Raises:
        UserError: the weights have another shape.
    """
    sparsity = SparsityConfig()
    if weights.sparse:
        # Loading the weights replaces this density by theirs.
        sparsity = SparsityConfig(
            sparsity=config.sparsity.sparsity or 0.5,
            include=[glob.escape(name) for name in weights.sparse_layers],
            exclude=[],
            backend=config.sparsity.backend,
            seed=config.seed,
        )
    model = build_model(config, vocab_size, device, sparsity)
    load_weights(model, weights.model, str(source))
    return model


def layer_densities(model: Transformer) -> dict[str, float]:
    """Return the density of each sparse layer, by name; layers that are not listed are dense."""
    return {name: layer.pattern.density for name, layer in sparse_layers(model)}


def overall_density(model: Transformer) -> float:
    """Return nonzeros divided by elements, over all hidden matrices (those in blocks)."""
    return hidden_density(model.config, layer_densities(model))


def progress_entries(state: TrainState, clock: Stopwatch) -> Mapping[str, Any]:
    """Return the entries about progress and time for the result of a complete run."""
    return {
        "status": "complete",
        "steps": state.step,
        "samples": state.samples_seen,
        "tokens": state.tokens_seen,
        "seconds": state.seconds + clock.seconds(),
        **({} if state.step_seconds is None else {"step_seconds": state.step_seconds}),
        "peak_rss_bytes": peak_rss_bytes(),
    }


def describe(model: Transformer, precision: str, device: torch.device, console: Console) -> None:
    """Print one line about the model before training."""
    stored = sum(parameter.numel() for parameter in model.parameters())
    layers = list(sparse_layers(model))
    empty = sum(layer.pattern.empty_rows for _, layer in layers)
    warning = f"; {empty} outputs have no weights" if empty else ""
    say(
        console,
        f"model: {stored:,} parameters, hidden density {overall_density(model):.4g}, backend {backends(model)}, "
        f"{device.type}, {precision}{warning}",
    )
