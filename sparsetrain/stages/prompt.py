"""Soft prompts: learned vectors between question and answer or before both, trained alone or with the model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from rich.console import Console
from torch import Tensor

from sparsetrain import seeds
from sparsetrain.data import Batch, Tokenizer
from sparsetrain.errors import UserError
from sparsetrain.models import Prompted, SoftPrompt, Transformer, tensor_traits
from sparsetrain.parameterization import Role, TensorTraits, assign
from sparsetrain.runs.result import RunResult
from sparsetrain.sparsity import densify
from sparsetrain.stages.config import PromptConfig
from sparsetrain.stages.stage import Subject, train
from sparsetrain.stages.task_stage import TaskStage
from sparsetrain.training.observers import Observer


def prompt(config: PromptConfig, console: Console | None = None, observers: Sequence[Observer] = ()) -> RunResult:
    """Learn a soft prompt (with ``train=both`` also the model) and return the result.

    Args:
        observers: as in `pretrain`.

    Raises:
        UserError: ``init_from`` is missing, or the input cannot be used.
        Interrupted, Diverged: as in `finetune`.
    """
    return train(Prompting(config, console), observers)


class Prompting(TaskStage[PromptConfig]):
    """Training of a soft prompt, with ``train=both`` together with the model."""

    kind: ClassVar[str] = "prompt"

    def __init__(self, config: PromptConfig, console: Console | None = None) -> None:
        super().__init__(config, console)
        if config.init_from is None:
            raise UserError("init_from is missing: a soft prompt needs a trained model, init_from=RUN_DIR")

    @property
    def slots(self) -> int:
        return self.config.n_tokens

    @property
    def trained(self) -> bool:
        return self.config.train == "both"

    def subject(self, network: Transformer, tokenizer: Tokenizer) -> Subject:
        rules = self.config.parameterization
        if self.config.mode == "dense" and self.trained:
            densify(network)  # not for a frozen model, whose zeros would stay zero
        prompted = Prompted(network, initial_prompt(network, tokenizer, self.config))
        if not self.trained:
            network.requires_grad_(False)
        traits_of = {f"model.{name}": traits for name, traits in tensor_traits(network, rules).items()}
        traits_of["prompt.vectors"] = TensorTraits(Role.PROMPT)
        assign(prompted, traits_of, rules, network.config.n_layers)
        return Subject(network, prompted)

    def embeddings(self, batch: Batch) -> Tensor:
        prompted = self.training.subject.module
        assert isinstance(prompted, Prompted)
        assert batch.slots is not None
        return prompted.embeddings(batch.tokens, batch.slots)


def initial_prompt(model: Transformer, tokenizer: Tokenizer, config: PromptConfig) -> SoftPrompt:
    """Return the initial prompt: embeddings of words, or normal draws with the model's ``init_std``."""
    front = config.position == "front"
    if config.init == "random":
        fresh = SoftPrompt(config.n_tokens, model.config.d_model, front=front)
        draws = torch.empty(fresh.vectors.shape).normal_(generator=seeds.generator(config.seed, "init", "prompt"))
        with torch.no_grad():
            fresh.vectors.copy_(draws * model.config.init_std)
        return fresh
    ids = tokenizer.encode_continuation(" " + config.words.strip())
    repeated = (ids * -(-config.n_tokens // len(ids)))[: config.n_tokens]
    rows = model.embed.weight.detach()[torch.tensor(repeated, device=model.embed.weight.device)]
    return SoftPrompt.from_embeddings(rows, front=front)
