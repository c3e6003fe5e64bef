"""The training loop, shared by pre-training, fine-tuning and soft prompts.

Each step is a function of the configuration, the seeds and the step number. A run that was killed and resumed
therefore ends with the same bits as an uninterrupted one.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import torch
from rich.console import Console
from torch import nn

from sparsetrain import seeds
from sparsetrain.data import Samples
from sparsetrain.errors import NotFiniteError, UserError
from sparsetrain.optim.batch_size import Decision
from sparsetrain.optim.run_schedule import RunSchedule
from sparsetrain.runs.checkpoint import (
    JSON,
    Checkpoint,
    list_checkpoints,
    load_checkpoint,
    optimizer_tensors,
    restore_optimizer,
    save_checkpoint,
)
from sparsetrain.runs.layout import CHECKPOINTS
from sparsetrain.screen import say
from sparsetrain.shapes import check
from sparsetrain.sparsity import MaskManager, Static
from sparsetrain.training.observers import Evaluated, Observer, RunStart, StepDone
from sparsetrain.training.state import Clock, Diverged, Interrupted, LoopConfig, TrainState, stop_requests

_log = logging.getLogger(__name__)

MASK_HISTORY = "mask_history/"  # prefix of the mask manager's tensors in a checkpoint


@dataclass
class Trainer:
    """Runs one stage to its last step, resuming from its newest checkpoint if there is one.

    Args:
        module: called with the ``inputs`` of a batch (tokens, targets, and slots if any), it returns the mean
            cross-entropy of the targets in nats; it holds all parameters and buffers that a checkpoint must contain.
        samples: the training data, one source per stream of the budget.
        optimizer: one of `build_optimizer`, whose groups have their peak learning rate.
        schedule: the settings of the optimizer at each step; its ``budget`` gives the number of steps and the
            batch size and samples of each step.
        config: settings of the loop.
        clip: maximum gradient norm; 0 disables clipping.
        seed: seed of dropout.
        directory: the run directory; checkpoints go into its ``checkpoints/``.
        evaluate: called with the number of steps done and whether training is finished, before the first step, every
            ``eval_every`` steps and after the last one; it returns metrics for the observers.
        flops_per_token: maps a number of steps done to the training FLOPs per token of the next step.
        peak_lr: the peak learning rate before the parameterization scales it, for the observers.
        autocast: dtype of the autocast region, or None.
        observers: called at each step and evaluation; their state is part of every checkpoint.
        masks: changes the masks of sparse layers after a step; its state is part of every checkpoint.
        follow: called after an update that changed the density of a layer, for what follows from it.
        noise_scale: returns the gradient noise scale in sequences, NaN if it is unknown; needed if it leads the batch
            size of the budget. Its decisions are part of every checkpoint.
    """

    module: nn.Module
    samples: Sequence[Samples]
    optimizer: torch.optim.Optimizer
    schedule: RunSchedule
    config: LoopConfig
    clip: float
    seed: int
    device: torch.device
    directory: Path
    evaluate: Callable[[int, bool], Mapping[str, float]]
    flops_per_token: Callable[[int], float]
    peak_lr: float
    autocast: torch.dtype | None
    title: str
    console: Console
    observers: Sequence[Observer] = ()
    masks: MaskManager | None = None
    follow: Callable[[], object] | None = None
    noise_scale: Callable[[], float] | None = None
    _first_seconds: float | None = field(default=None, init=False)  # of the first step of this process, until the next

    def run(self) -> TrainState:
        """Train to the end and return the final state.

        Raises:
            Diverged: a loss, a gradient or a weight is not finite.
            Interrupted: SIGINT or SIGTERM arrived; the step was finished and the state saved.
            UserError: no checkpoint is readable or fits the model, or the disk is full.
        """
        if self.masks is not None:
            self.masks.attach(self.optimizer)
        state = self._resume()
        budget = self.schedule.budget
        clock = Clock(state.seconds)
        self.module.train()
        try:
            with stop_requests() as stop:
                for observer in self.observers:
                    observer.start(
                        RunStart(self.title, self.directory, state.step, budget.total_steps, self.module, state.seconds)
                    )
                if state.step == 0:
                    self._evaluate(state, False)
                while state.step < budget.total_steps:
                    done = self._step(state, clock)
                    for observer in self.observers:
                        observer.step(done)
                    self._decide(state.step)
                    self.optimizer.zero_grad(set_to_none=True)
                    last = state.step == budget.total_steps
                    if self._due(self.config.eval_every, state.step, last):
                        self._evaluate(state, last)
                        self.module.train()
                    stopping = stop.signal_number is not None
                    if stopping or self._due(self.config.checkpoint_every, state.step, last):
                        state.seconds = clock.seconds()
                        self._save(state)
                    if stopping:
                        break
                if stop.signal_number is not None:
                    # Raised after the last step too, since neither scoring nor another stage should begin.
                    raise Interrupted(
                        f"stopped after step {state.step} of {budget.total_steps}, saved in {self.directory}; "
                        "the same command resumes it",
                        stop.signal_number,
                    )
        finally:
            for observer in self.observers:
                observer.close()
        return state

    @staticmethod
    def _due(every: int, step: int, last: bool) -> bool:
        return last or (every > 0 and step % every == 0)

    def _decide(self, step: int) -> None:
        """Let the noise scale set the size of the next batches, if a decision is due after ``step`` steps."""
        if self.noise_scale is None or not self.schedule.budget.decides(step):
            return
        made = self.schedule.budget.decide(step, self.noise_scale())
        for observer in self.observers:
            observer.decision(made)

    def _layers(self) -> dict[str, Any]:
        """Return the metrics of masks that evolve, over all layers and for each, for the observers."""
        if self.masks is None or isinstance(self.masks.rule, Static):
            return {}
        return {**self.masks.watch(), "layers": {layer.name: layer.numbers() for layer in self.masks.report()}}

    def _step(self, state: TrainState, clock: Clock) -> StepDone:
        """Do one optimizer step, update the masks if an update is due, and return the facts about the step."""
        before = time.monotonic()
        budget = self.schedule.budget
        phase, per_token = budget.at(state.step), self.flops_per_token(state.step)
        factor = self.schedule.apply(self.optimizer.param_groups, state.step)
        # Dropout depends on (seed, step) only, so that a checkpoint need not contain the state of a generator.
        torch.manual_seed(seeds.derive_seed(self.seed, "dropout", state.step))
        micro = self.config.micro_batch_of(phase.batch_size)
        stream, first = budget.samples_at(state.step)
        batches = [
            self.samples[stream].batch(first + index * micro, micro) for index in range(phase.batch_size // micro)
        ]
        targets = [int((batch.targets >= 0).sum()) for batch in batches]
        total = torch.zeros((), device=self.device)
        with ExitStack() as watching:
            for observer in self.observers:
                watching.enter_context(observer.passes())
            for batch, count in zip(batches, targets, strict=True):
                with torch.autocast(self.device.type, self.autocast, enabled=self.autocast is not None):
                    # Weighted by its number of targets, so that accumulation does not change the mean.
                    micro_loss = self.module(**batch.to(self.device).inputs()) * (count / sum(targets))
                with self._ranking(factor):  # RigL ranks dense gradients inside the backward pass
                    micro_loss.backward()
                total += micro_loss.detach()
        loss = total.item()
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        norm = float(nn.utils.clip_grad_norm_(parameters, self.clip if self.clip > 0 else math.inf))
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise Diverged(self._diagnosis(f"loss {loss} and gradient norm {norm} at step {state.step + 1}", factor))
        self.optimizer.step()
        state.step += 1
        if self.masks is not None:
            with self._ranking(factor):
                update = self.masks.step(self.optimizer)
            if update is not None and update.resized and self.follow is not None:
                self.follow()
        logged = state.step == 1 or self._due(
            self.config.log_every, state.step, state.step == self.schedule.total_steps
        )
        watched = self.masks.watch() if logged and self.masks is not None else {}
        observed: dict[str, Any] = {}
        for observer in self.observers if logged else ():
            observed |= observer.measured()
        state.samples_seen += phase.batch_size
        tokens = sum(batch.tokens.numel() for batch in batches)
        state.tokens_seen += tokens
        seconds = time.monotonic() - before
        self._count(state, seconds)
        speed = tokens / seconds
        return StepDone(
            step=state.step,
            tokens=state.tokens_seen,
            loss=loss,
            grad_norm=norm,
            lr=self.peak_lr * factor,
            tokens_per_second=speed,
            flops_per_second=speed * per_token,
            seconds=clock.seconds(),
            phase=phase,
            logged=logged,
            share=budget.tokens_at(state.step) / budget.tokens,
            total_steps=budget.total_steps,
            masks=watched,
            observed=observed,
            notes="  ".join(filter(None, (observer.note() for observer in self.observers if logged))),
        )

    def _count(self, state: TrainState, seconds: float) -> None:
        """Add the seconds of a step. The first after a start, which compiles kernels, counts as the second at most."""
        if state.step_seconds is None:
            return
        state.step_seconds += seconds
        if self._first_seconds is None:
            self._first_seconds = seconds
        else:
            state.step_seconds -= max(0.0, self._first_seconds - seconds)
            self._first_seconds = 0.0

    @contextmanager
    def _ranking(self, factor: float) -> Iterator[None]:
        """Turn `NotFiniteError`, which a rule raises if it cannot rank weights or gradients, into `Diverged`."""
        try:
            yield
        except NotFiniteError as error:
            raise Diverged(self._diagnosis(str(error), factor)) from None

    def _evaluate(self, state: TrainState, final: bool) -> None:
        """Pass the metrics of `evaluate` to the observers; raise `Diverged` if one of them is not finite."""
        numbers = self.evaluate(state.step, final)
        broken = [f"{name} {value}" for name, value in numbers.items() if not math.isfinite(value)]
        if broken:
            raise Diverged(self._diagnosis(f"{broken[0]} after step {state.step}", self._factor_before(state.step)))
        found = Evaluated(state.step, state.tokens_seen, numbers, final, self._layers())
        for observer in self.observers:
            observer.evaluation(found)

    def _factor_before(self, step: int) -> float:
        """Return the schedule's factor in the optimizer step that led to ``step``."""
        return self.schedule.factor(max(0, step - 1))

    def _diagnosis(self, what: str, factor: float) -> str:
        saved = list_checkpoints(self.directory / CHECKPOINTS)
        return (
            f"{self.title}: {what}; "
            f"last good checkpoint: {saved[-1] if saved else 'none'}; "
            f"likely causes: learning rate too high ({self.peak_lr * factor:.2g} now), warmup too short, "
            f"no clipping (clip={self.clip:g}), or bf16 (autocast: {self.autocast})"
        )

    def _trained(self) -> list[tuple[str, nn.Parameter]]:
        return [(name, parameter) for name, parameter in self.module.named_parameters() if parameter.requires_grad]

    def _setup(self) -> JSON:
        """Return what the bits of a run depend on besides its configuration."""
        return {
            "device": self.device.type,
            "autocast": None if self.autocast is None else str(self.autocast),
            "threads": torch.get_num_threads(),
        }

    def _save(self, state: TrainState) -> None:
        for name, parameter in self._trained():
            # A step can break weights although loss and gradient were finite; no checkpoint may hold such weights.
            if not bool(torch.isfinite(parameter).all()):
                what = f"{name} is not finite after step {state.step}"
                raise Diverged(self._diagnosis(what, self._factor_before(state.step)))
        optimizer = optimizer_tensors(self.optimizer, self._trained())
        document: dict[str, JSON] = {**asdict(state), "setup": self._setup()}
        watching = {observer.name: kept for observer in self.observers if (kept := observer.state())}
        if watching:
            document["observers"] = dict(watching)
        if self.schedule.budget.decisions:
            document["decisions"] = [asdict(made) for made in self.schedule.budget.decisions]
        if self.masks is not None:
            document["masks"], history = self.masks.state()
            # Stored with the optimizer's state: resuming needs it, but a run that starts from the weights does not.
            optimizer = optimizer._replace(
                tensors=optimizer.tensors | {f"{MASK_HISTORY}{name}": bits for name, bits in history.items()}
            )
        save_checkpoint(
            self.directory / CHECKPOINTS,
            state.step,
            self.module.state_dict(),
            optimizer,
            document,
            self.config.keep_last,
        )

    def _resume(self) -> TrainState:
        directory = self.directory / CHECKPOINTS
        if not list_checkpoints(directory):
            return TrainState()
        stored = load_checkpoint(directory)
        load_weights(self.module, stored.model, str(stored.path))
        restore_optimizer(self.optimizer, stored.optimizer, self._trained())
        state = dict(stored.state)
        decisions = check(state.pop("decisions", []), list[Decision], f"checkpoint {stored.path}: decisions")
        self.schedule.budget.replay(msgspec.convert(decisions, list[Decision]))
        say(self.console, f"{self.title}: resuming after step {stored.step} of {self.schedule.total_steps}")
        self._resume_masks(state.pop("masks", None), stored)
        watching = state.pop("observers", {})
        assert isinstance(watching, dict)
        for observer in self.observers:
            if observer.name in watching:
                observer.restore(watching[observer.name])  # type: ignore[arg-type]
        before = state.pop("setup", None)
        if before != self._setup():
            _log.warning(
                "%s started with %s and resumes with %s: its bits may differ from those of an uninterrupted run",
                *(self.title, before, self._setup()),
            )
        state.setdefault("step_seconds", None)
        return TrainState(**state)  # type: ignore[arg-type]

    def _resume_masks(self, saved: JSON, stored: Checkpoint) -> None:
        if self.masks is None:
            return
        if not isinstance(saved, dict):
            raise UserError(f"checkpoint {stored.path} has no state of the masks: an older version wrote it")
        history = stored.optimizer.tensors
        self.masks.load_state(
            saved, {name.removeprefix(MASK_HISTORY): history[name] for name in history if name.startswith(MASK_HISTORY)}
        )


def load_weights(module: nn.Module, tensors: Mapping[str, Any], source: str) -> None:
    """Load a ``state_dict``; torch's multi-line error becomes one line.

    Raises:
        UserError: names or shapes differ, or the pattern of a sparse layer is malformed.
    """
    try:
        module.load_state_dict(dict(tensors))
    except RuntimeError as error:
        complaints = [line.strip() for line in str(error).splitlines()[1:]]
        raise UserError(f"checkpoint {source} does not fit this model: {' '.join(complaints[:2])}") from None
