"""Training and scoring on a labelled task: the common part of fine-tuning and soft prompts."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from sparsetrain.cost.flops import training_flops_per_token
from sparsetrain.cost.footprint import Workload
from sparsetrain.cost.run_time import RunWork
from sparsetrain.data import (
    Batch,
    Example,
    Samples,
    Task,
    TaskBatches,
    TaskConfig,
    Tokenizer,
    answer_tokens,
    load_task,
    prepare_corpora,
    scoring_batches,
)
from sparsetrain.errors import UserError
from sparsetrain.models import Transformer
from sparsetrain.optim import Budget
from sparsetrain.runs.origin import Origin
from sparsetrain.runs.weights import read_weights
from sparsetrain.screen import say
from sparsetrain.stages.backends import backend_names
from sparsetrain.stages.config import FinetuneConfig, model_config
from sparsetrain.stages.memory import adjustable, training_workload
from sparsetrain.stages.stage import (
    Stage,
    Subject,
    Training,
    build_model,
    layer_densities,
    overall_density,
    restored_model,
)
from sparsetrain.stages.work import work_on_task
from sparsetrain.training.evaluate import TaskScore, label_likelihoods, score_labels
from sparsetrain.training.state import Diverged, TrainState

C = TypeVar("C", bound=FinetuneConfig)


def available_task(config: TaskConfig) -> Task | None:
    """Return a task, or None if its data is unavailable; a finished run on it does not need the data."""
    try:
        return load_task(config)
    except UserError:
        return None


def task_facts(task: Task | None) -> dict[str, str | None]:
    """Return the facts about a task that identify a run on it."""
    return {"task_fingerprint": None if task is None else task.fingerprint()}


class TaskStage(Stage[C]):
    """Training on ``config.task``, from the weights of ``init_from`` or from a fresh model."""

    known: Task | None = None
    """The task, if it is already loaded."""

    @property
    def slots(self) -> int:
        """Soft-prompt positions in each row."""
        return 0

    @property
    def trained(self) -> bool:
        """Whether the weights of the model are trained, and not only the prompt."""
        return True

    @abstractmethod
    def subject(self, network: Transformer, tokenizer: Tokenizer) -> Subject:
        """Turn the loaded or fresh transformer into what is trained."""

    @abstractmethod
    def embeddings(self, batch: Batch) -> Tensor:
        """Return the embeddings of a batch's tokens and soft prompt, ``[batch, time, d_model]``."""

    def origin(self) -> Origin:
        if self.config.init_from is None:
            return Origin.of_corpora(prepare_corpora(self.config.data, progress=True, console=self.console))
        return Origin.of_run(self.config.init_from)

    def facts(self) -> dict[str, str | None]:
        self.known = available_task(self.config.task)
        return task_facts(self.known)

    def prepare(self, origin: Origin) -> None:
        config = self.config
        self.made_from = origin
        self.task = self.known or load_task(config.task)
        self.budget = Budget.of(config.budget, config.data.context, lambda _context: len(self.task.train))
        self.examples = TaskBatches(
            *(self.task.train, origin.tokenizer, self.task.answers, self.context, config.budget.first_batch),
            *(config.samples_seed, self.kind, self.slots),
        )

    @property
    def context(self) -> int:
        """Maximum number of tokens per row; all phases on a task have the same context."""
        return self.budget.phases[0].context

    def samples(self) -> Sequence[Samples]:
        return [self.examples]

    def workload(self, prefix: str = "") -> tuple[Workload, str, dict[str, str]]:
        config, widths = self.config, self.examples.widths
        model = model_config(config.model, self.made_from.tokenizer.vocab_size)
        # Only a run that sees every row is certain to see the longest one.
        rows = sum(phase.steps * phase.batch_size for phase in self.budget.phases)
        width = widths[1 if rows >= self.examples.examples_per_epoch else 0]
        dense = config.mode == "dense" and config.init_from is not None and self.trained
        batch_size = self.budget.largest.batch_size
        workload = training_workload(
            *(config, model, None if dense else config.sparsity),
            batch_size=batch_size,
            context=width,
            evaluated=1,
            cached=width,
            trained=self.trained,
            prompt_tokens=self.slots,
        )
        what = f"{self.kind} with {prefix}budget.batch_size={batch_size}, rows of {width} tokens and a model of "
        what += f"model.d_model={model.d_model} and model.n_layers={model.n_layers}"
        return workload, what, adjustable(config, prefix)

    def build(self, device: torch.device) -> Subject:
        tokenizer = self.made_from.tokenizer
        network = self._load(tokenizer.vocab_size, device)
        self.pretrained_density = overall_density(network)
        subject = self.subject(network, tokenizer)
        subject.module.to(device)
        return subject

    def _load(self, vocab_size: int, device: torch.device) -> Transformer:
        """Return the model that the stage starts from, with its masks."""
        config = self.config
        if config.init_from is None:
            # Without a checkpoint there are no masks to keep: the sparsity section applies.
            return build_model(config, vocab_size, device)
        start = Path(config.init_from)
        model = restored_model(config, read_weights(start), vocab_size, device, start)
        # Loading has replaced the configured densities by those of the checkpoint.
        model.parameterize(config.parameterization, reinitialise=False)
        return model

    def describe(self) -> None:
        say(self.console, f"task: {self.task.describe()}")
        if not self.made_from.knows_its_text:
            say(
                self.console,
                "warning: the text of the imported model is unknown, so whether it holds test examples is not known",
            )

    def begin(self, training: Training) -> None:
        super().begin(training)
        network = training.network
        self.flops = training_flops_per_token(network.config, layer_densities(network) or 1.0, self.context)
        self.answers = answer_tokens(self.task, self.made_from.tokenizer)

    def entries(self) -> dict[str, Any]:
        return {
            "pretrained_density": self.pretrained_density,
            "density": overall_density(self.training.network),
            "init_from": self.config.init_from,
            "source": self.made_from.source,
        }

    def flops_per_token(self, step: int) -> float:
        return self.flops.total

    def work(self, state: TrainState) -> RunWork:
        network, row = self.training.network, state.tokens_seen / state.samples_seen
        tokens = [round(row * phase.steps * phase.batch_size) for phase in self.budget.phases]
        densities, names = layer_densities(network), backend_names(network)
        return work_on_task(self.config, network.config, self.budget, tokens, densities, names)

    def evaluate(self, step: int, final: bool) -> dict[str, float]:
        found = self._score(self.task.validation[: self.config.loop.eval_sequences])
        return {"val_accuracy": found.accuracy, "val_macro_f1": found.macro_f1}

    def _row_scores(self, batch: Batch) -> Tensor:
        with self.training.autocasting():
            embeddings = self.embeddings(batch.to(self.training.device))
            return self.training.network.continuation_scores(embeddings, self.answers)

    def _score(self, examples: list[Example]) -> TaskScore:
        tokenizer = self.made_from.tokenizer
        batches = scoring_batches(examples, self.task, tokenizer, self.context, self.slots)
        likelihoods = label_likelihoods(self.training.subject.module, self._row_scores, batches, len(examples))
        if bool(likelihoods.isnan().any()):
            return TaskScore(len(examples), math.nan, (math.nan, math.nan), math.nan)
        truth = np.array([example.label for example in examples])
        return score_labels(likelihoods.argmax(1).numpy(), truth)

    def score(self, state: TrainState, directory: Path) -> dict[str, Any]:
        test, origin = self._score(self.task.test), self.made_from
        if math.isnan(test.accuracy):
            raise Diverged(f"{self.kind}: the trained model gives an answer of the test set the likelihood NaN")
        return {
            "task": self.task.name,
            "n_test": test.n,
            "accuracy": test.accuracy,
            "ci95": list(test.ci95),
            "macro_f1": test.macro_f1,
            "majority": self.task.majority(),
            "n_train": len(self.task.train),
            "overlap_train_test": self.task.overlap(origin.train_ids) if origin.knows_its_text else None,
            "flops": self.flops.for_tokens(state.tokens_seen).as_dict(),
        }
