"""Training and scoring on a labelled task: the common part of fine-tuning and soft prompts."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

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
    load_task,
    prepare_corpora,
)
from sparsetrain.errors import UserError
from sparsetrain.models import Transformer
from sparsetrain.optim import Budget
from sparsetrain.runs.layout import METRICS, PREDICTIONS, TASK
from sparsetrain.runs.metrics import read_metrics
from sparsetrain.runs.origin import Origin
from sparsetrain.runs.weights import read_weights
from sparsetrain.screen import say
from sparsetrain.stages.backends import backend_names
from sparsetrain.stages.config import FinetuneConfig, model_config
from sparsetrain.stages.memory import adjustable, training_workload
from sparsetrain.stages.scoring import Answered, Scorer
from sparsetrain.stages.stage import (
    Stage,
    Subject,
    Training,
    build_model,
    layer_densities,
    overall_density,
    restored_model,
)
from sparsetrain.stages.text_overlap import text_overlap
from sparsetrain.stages.work import work_on_task
from sparsetrain.training.bag_of_words import bag_of_words
from sparsetrain.training.state import Diverged, TrainState
from sparsetrain.training.task_scores import score_task, write_predictions

C = TypeVar("C", bound=FinetuneConfig)

_AT_A_TIME = 16_384  # examples whose questions are in memory at a time


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
        self.budget = Budget.of(config.budget, config.data.context, lambda _context: self.task.rows_per_epoch)
        self.examples = TaskBatches(
            *(self.task.train, origin.tokenizer, self.task.form, self.context, config.budget.first_batch),
            *(config.samples_seed, self.kind, self.slots),
        )

    def save(self, origin: Origin, directory: Path) -> None:
        super().save(origin, directory)
        self.task.form.save(directory / TASK)

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
        self.scorer = Scorer(
            *(self.task.form, self.made_from.tokenizer, network, training.subject.module),
            lambda batch: self.embeddings(batch.to(training.device)),
            *(self.context, self.slots, training.autocasting),
        )

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
        examples = self.task.validation[: self.config.loop.eval_sequences]
        answered = self._answered(examples)
        if answered is None:
            return {"val_accuracy": math.nan, "val_macro_f1": math.nan}
        found = score_task(self.task, examples, answered.predicted)
        return {f"val_{name}": found[name] for name in ("accuracy", "macro_f1", "token_f1") if name in found}

    def _answered(self, examples: Sequence[Example]) -> Answered | None:
        """Return the model's answers to examples; None where it gives an answer the likelihood NaN."""
        parts = []
        for start in range(0, len(examples), _AT_A_TIME):
            some = examples[start : start + _AT_A_TIME]
            asked = [each for example in some for each in example.asked(self.scorer.form)]
            each = len(asked) // len(some)
            part = self.scorer.answered(asked, [example.id for example in some for _ in range(each)])
            if part is None:
                return None
            parts.append(part)
        return Answered.of(parts)

    def score(self, state: TrainState, directory: Path) -> dict[str, Any]:
        task, origin = self.task, self.made_from
        answered = self._answered(task.test)
        if answered is None:
            raise Diverged(f"{self.kind}: the trained model gives an answer of the test set the likelihood NaN")
        write_predictions(directory / PREDICTIONS, task, task.test, answered.predicted, answered.probabilities)
        bag = bag_of_words(task)
        return {
            "task": task.name,
            "kind": task.kind,
            **score_task(task, task.test, answered.predicted),
            "majority": task.majority(),
            "validation_accuracy": read_metrics(directory / METRICS)[-1].get("val_accuracy"),
            **({} if bag is None else {"bag_of_words": bag}),
            "n_train": len(task.train),
            "overlap_train_test": task.overlap(origin.train_ids) if origin.knows_its_text else None,
            **text_overlap(task, self.config.data, origin),
            "flops": self.flops.for_tokens(state.tokens_seen).as_dict(),
        }
