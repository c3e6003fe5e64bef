"""Pre-training: from a text to a run directory with a language model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from rich.console import Console

from sparsetrain.cost.footprint import Workload
from sparsetrain.cost.memory import state_bytes
from sparsetrain.cost.run_flops import RunFlops, planned_flops
from sparsetrain.cost.run_time import RunWork
from sparsetrain.data import Batch, Corpora, Samples, document_border, prepare_corpora, sequential_windows
from sparsetrain.errors import UserError
from sparsetrain.models.config import ModelConfig
from sparsetrain.optim.budget import Budget, SamplesPerEpoch
from sparsetrain.runs.layout import METRICS
from sparsetrain.runs.metrics import read_metrics
from sparsetrain.runs.origin import Origin
from sparsetrain.runs.result import RunResult
from sparsetrain.runs.weights import read_weights
from sparsetrain.sparsity import MaskManager, SparsityConfig, Static, sparsify
from sparsetrain.stages.backends import backend_names, backends
from sparsetrain.stages.config import PretrainConfig, RunConfig, model_config
from sparsetrain.stages.generate import run_config
from sparsetrain.stages.masks import mask_manager, sparsity_section, starts_sparse
from sparsetrain.stages.memory import adjustable, training_workload
from sparsetrain.stages.stage import (
    Stage,
    Subject,
    Training,
    build_model,
    overall_density,
    restored_model,
    train,
)
from sparsetrain.stages.stopwatch import Stopwatch
from sparsetrain.stages.text import Text, total
from sparsetrain.stages.work import work_on_text
from sparsetrain.training.evaluate import TextScore, score_text
from sparsetrain.training.observers import Observer
from sparsetrain.training.state import TrainState, peak_rss_bytes

FINAL_EVALUATION = 1024  # maximum number of validation sequences for the loss at the end
# Names in ``metrics.jsonl`` of a loss in nats a token and of bits per byte: over the validation text, and over the part
# of it that is only reported on.
VALIDATION = {"loss": "val_loss", "bits_per_byte": "bits_per_byte"}
REPORTED = {"loss": "reported_loss", "bits_per_byte": "reported_bits_per_byte"}
_LEAST_TOKENS = 2  # of a text that a loss is over


def pretrain(config: PretrainConfig, console: Console | None = None, observers: Sequence[Observer] = ()) -> RunResult:
    """Run pre-training to its end, resuming it if it was stopped, and return its result.

    Args:
        observers: called at each step and evaluation, in addition to the progress line and the metrics.

    Raises:
        UserError: the input cannot be used.
        Interrupted: a signal stopped the run, which can be resumed.
        Diverged: the training diverged; the result has the status ``diverged``.
    """
    return train(Pretraining(config, console), observers)


class Pretraining(Stage[RunConfig]):
    """Training on text, from scratch or from the weights of ``init_from``.

    Args:
        corpora: the prepared text, if it is already loaded.
    """

    kind: ClassVar[str] = "pretrain"

    def __init__(self, config: RunConfig, console: Console | None = None, corpora: Corpora | None = None) -> None:
        super().__init__(config, console)
        self._corpora = corpora

    @property
    def corpora(self) -> Corpora:
        if self._corpora is None:
            self._corpora = prepare_corpora(self.config.data, progress=True, console=self.console)
        return self._corpora

    @property
    def title(self) -> str:
        return f"pretrain s={starts_sparse(self.config):g}"

    def origin(self) -> Origin:
        return Origin.of_corpora(self.corpora, self.config.init_from)

    def prepare(self, origin: Origin | None = None) -> None:
        config = self.config
        self.model = model_config(config.model, self.corpora.tokenizer.vocab_size)
        self.text = Text(self.corpora, config)
        self.budget = budget_of(config, self.model, self.text.samples_per_epoch)
        self.sparsity = sparsity_section(config, self.budget)
        self.text.check(self.budget)
        self.borders = _borders(config, self.corpora)

    def samples(self) -> Sequence[Samples]:
        return self.text.streams(self.budget)

    def workload(self, prefix: str = "") -> tuple[Workload, str, dict[str, str]]:
        workload = workload_of(self.config, self.model, self.budget, self.sparsity, self.corpora.validation_tokens)
        largest, model = self.budget.largest, self.model
        if self.config.budget.phases is None:
            size = f"{prefix}budget.batch_size={largest.batch_size}, data.context={largest.context}"
        else:
            size = (
                f"{prefix}budget.phases[{largest.index}] (batch_size={largest.batch_size}, context={largest.context})"
            )
        what = f"training with {size}, model.d_model={model.d_model} and model.n_layers={model.n_layers}"
        return workload, what, self._adjustable(prefix)

    def _adjustable(self, prefix: str) -> dict[str, str]:
        """Return the settings that could be reduced, by their keys in the phase that needs the most memory."""
        known, index = adjustable(self.config, prefix), self.budget.largest.index
        if self.config.budget.phases:
            for name in ("batch_size", "context"):
                if name in known and getattr(self.config.budget.phases[index], name) is not None:
                    known[name] = f"{prefix}budget.phases[{index}].{name}"
        return known

    def build(self, device: torch.device) -> Subject:
        config = self.config
        if config.init_from is None:
            model = build_model(config, self.corpora.tokenizer.vocab_size, device, self.sparsity)
        else:
            start = Path(config.init_from)
            model = restored_model(config, read_weights(start), self.corpora.tokenizer.vocab_size, device, start)
            if prunes(config):
                sparsify(model, plan=self.sparsity)
            # The masks decided the densities, so initial values and learning rates must be computed for them.
            model.parameterize(config.parameterization, reinitialise=False)
        return Subject(model, model, mask_manager(config, model, self.budget, drawn=prunes(config)))

    def entries(self) -> dict[str, Any]:
        return {"corpus": self.corpora.key, "backend": backends(self.training.network)}

    def begin(self, training: Training) -> None:
        super().begin(training)
        masks = training.subject.masks
        self.flops = RunFlops(
            training.network.config,
            masks.densities_at if masks is not None else lambda _step: {},
            masks.rule if masks is not None else Static(),
            self.budget,
            self.config.loop.micro_batch_of,
        )

    def flops_per_token(self, step: int) -> float:
        return self.flops.per_token(step).total

    def work(self, state: TrainState) -> RunWork:
        return work_on_text(self.config, self.flops, backend_names(self.training.network))

    def evaluate(self, step: int, final: bool) -> dict[str, float]:
        phase, model = self.budget.before(step), self.training.network
        limit = FINAL_EVALUATION if final else self.config.loop.eval_sequences

        def losses(batch: Batch) -> torch.Tensor:
            batch = batch.to(self.training.device)
            with self.training.autocasting():
                return model.token_losses(batch.tokens, batch.targets)

        def numbers_of(names: Mapping[str, str], ranges: Mapping[str, tuple[int, int | None]]) -> dict[str, float]:
            scores = {}
            for name, corpus in self.corpora.items():
                windows = sequential_windows(corpus.validation, phase.context, limit, *ranges[name])
                scores[name] = score_text(model, losses, windows.split(phase.batch_size))
            numbers = _numbers(TextScore.of(list(scores.values())), names)
            if len(scores) > 1:
                for name, score in scores.items():
                    numbers |= _numbers(score, names, f"_{name}")
            return numbers

        numbers = numbers_of(VALIDATION, {name: (0, self.borders.get(name)) for name in self.corpora})
        if final and self.borders:
            numbers |= numbers_of(REPORTED, {name: (border, None) for name, border in self.borders.items()})
        return {**numbers, "context": phase.context} if len(self.budget.contexts) > 1 else numbers

    def score(self, state: TrainState, directory: Path) -> dict[str, Any]:
        records = [record for record in read_metrics(directory / METRICS) if "val_loss" in record]
        model = self.training.network
        used = state_bytes(model, self.training.optimizer)
        return {
            "loss_first": records[0]["val_loss"],
            "loss_last": records[-1]["val_loss"],
            "bits_per_byte": records[-1]["bits_per_byte"],
            **{key: records[-1][key] for key in REPORTED.values() if key in records[-1]},
            **self._by_corpus(records[-1]),
            "density": overall_density(model),
            "flops": self.flops.through(state.step),
            **_mask_entries(self.training.subject.masks),
            "bytes": {"parameters": used.parameters, "optimizer": used.optimizer, "index": used.index},
            **({"phases": self._phases()} if len(self.budget.phases) > 1 else {}),
        }

    def _by_corpus(self, last: Mapping[str, Any]) -> dict[str, Any]:
        """Return the entries about each of several corpora for the result."""
        if len(self.corpora) == 1:
            return {}
        read = total(self.text.read(self.budget))
        names = [*VALIDATION.values(), *(key for key in REPORTED.values() if key in last)]
        return {
            "corpora": {
                name: {**{key: last[f"{key}_{name}"] for key in names}, **vars(read[name])} for name in self.corpora
            }
        }

    def _phases(self) -> list[dict[str, Any]]:
        """Return the facts about each phase for the result."""
        return [
            {
                "steps": phase.steps,
                "context": phase.context,
                "batch_size": phase.batch_size,
                "tokens": phase.tokens,
                "flops": self.flops.between(phase.first_step, phase.end_step)["total"],
            }
            for phase in self.budget.phases
        ]

    def diverged(self, directory: Path, clock: Stopwatch) -> dict[str, Any]:
        records = read_metrics(directory / METRICS)
        return {
            "tokens": records[-1]["tokens"] if records else 0,
            "seconds": clock.seconds(),
            "peak_rss_bytes": peak_rss_bytes(),
            "loss_first": records[0].get("val_loss") if records else None,
            "loss_last": None,
            "bits_per_byte": None,
            "density": overall_density(self.training.network),
            "flops": self.flops.through(records[-1]["step"] if records else 0),
            "bytes": {},
            "model": asdict(self.training.network.config),
        }


def prunes(config: RunConfig) -> bool:
    """Return whether a pre-training makes the model of a dense run sparse before its first step."""
    if config.init_from is None or not config.sparsity.is_sparse:
        return False
    return not run_config(Path(config.init_from)).sparsity.is_sparse


def _borders(config: RunConfig, corpora: Corpora) -> dict[str, int]:
    """Return where the text that is only reported on begins in the validation text of each corpus; empty without one.

    Raises:
        UserError: a validation text has no border between documents to divide it at.
    """
    share = config.reported_share if isinstance(config, PretrainConfig) else 0.0
    borders = {}
    for name, corpus in corpora.items() if share else ():
        border = document_border(corpus.validation, corpus.tokenizer.eos_id, share)
        if border is None or min(border, len(corpus.validation) - border) < _LEAST_TOKENS:
            of = f" of {name}" if len(corpora) > 1 else ""
            raise UserError(
                f"reported_share={share}: the validation text{of} cannot be divided between two documents; it needs "
                "more documents, or another share"
            )
        borders[name] = border
    return borders


def _numbers(score: TextScore, names: Mapping[str, str], suffix: str = "") -> dict[str, float]:
    return {f"{names[key]}{suffix}": getattr(score, key) for key in ("loss", "bits_per_byte")}


def budget_of(config: RunConfig, model: ModelConfig, samples_per_epoch: SamplesPerEpoch | None) -> Budget:
    """Return the budget of a pre-training.

    Args:
        samples_per_epoch: maps a context to the samples of one pass over the text; None if the text is unknown.

    Raises:
        UserError: see `Budget.of`; or a context is longer than the learned positions.
    """
    check_contexts(model, config)
    flops = planned_flops(model, partial(sparsity_section, config), config.loop.micro_batch_of)
    return Budget.of(config.budget, config.data.context, samples_per_epoch, flops)


def workload_of(
    config: RunConfig, model: ModelConfig, budget: Budget, sparsity: SparsityConfig, validation_tokens: int
) -> Workload:
    """Return what a pre-training holds in memory, in the phase that needs the most."""
    largest = budget.largest
    windows = -(-max(0, validation_tokens - 1) // max(budget.contexts))
    return training_workload(
        *(config, model, sparsity),
        batch_size=largest.batch_size,
        context=largest.context,
        evaluated=min(largest.batch_size, FINAL_EVALUATION, windows),
    )


def check_contexts(model: ModelConfig, config: RunConfig) -> None:
    """Raise `UserError` if a context is longer than a model's learned positions."""
    for name, context in config.budget.named("context", "data.context", config.data.context).items():
        if model.positions == "learned" and context > model.max_context:
            raise UserError(f"{name}={context} is longer than model.max_context={model.max_context}")


def _mask_entries(masks: MaskManager | None) -> dict[str, Any]:
    """Return the entries about masks for the result: over all layers, and for each."""
    if masks is None:
        return {}
    watched = masks.watch()
    layers = {layer.name: layer.numbers() for layer in masks.report()}
    return {"masks": {"rule": masks.rule.name, **watched, "layers": layers}}
