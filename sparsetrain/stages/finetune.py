"""Fine-tuning on a labelled task: dense from a sparse checkpoint, sparse, or from scratch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from rich.console import Console
from torch import Tensor

from sparsetrain.data import Batch, Tokenizer
from sparsetrain.models import Transformer
from sparsetrain.runs.result import RunResult
from sparsetrain.sparsity import densify
from sparsetrain.stages.config import FinetuneConfig
from sparsetrain.stages.stage import Subject, train
from sparsetrain.stages.task_stage import TaskStage
from sparsetrain.training.observers import Observer


def finetune(config: FinetuneConfig, console: Console | None = None, observers: Sequence[Observer] = ()) -> RunResult:
    """Run fine-tuning to its end, resuming it if it was stopped, and return the result.

    Without ``init_from`` the model starts from random weights: the baseline that shows what pre-training contributes.

    Args:
        observers: as in `pretrain`.

    Raises:
        UserError: the input cannot be used.
        Interrupted: a signal stopped the run, which can be resumed.
        Diverged: the training diverged.
    """
    return train(Finetuning(config, console), observers)


class Finetuning(TaskStage[FinetuneConfig]):
    """Training of the whole model, densely or with its masks."""

    kind: ClassVar[str] = "finetune"

    def subject(self, network: Transformer, tokenizer: Tokenizer) -> Subject:
        if self.config.mode == "dense":
            densify(network)
            network.parameterize(self.config.parameterization, reinitialise=False)
        return Subject(network, network)

    def embeddings(self, batch: Batch) -> Tensor:
        return self.training.network.embed_tokens(batch.tokens)
