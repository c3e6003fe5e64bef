"""Soft prompts: learned vectors between a question and its answer, alone or together with the model."""

from __future__ import annotations

import torch
from rich.console import Console
from torch import Tensor

from sparsetrain import seeds
from sparsetrain.data import Batch, Tokenizer
from sparsetrain.errors import UserError
from sparsetrain.models import Prompted, SoftPrompt, Transformer, tensor_specs
from sparsetrain.parameterization import Role, TensorSpec, assign
from sparsetrain.sparsity import densify
from sparsetrain.stages.config import PromptConfig
from sparsetrain.stages.finetune import TaskModel, run_task
from sparsetrain.stages.run import RunResult


def prompt(config: PromptConfig, console: Console | None = None) -> RunResult:
    """Learn a soft prompt (and, with ``train=both``, the model) and return the result.

    Raises:
        UserError: no ``init_from``, or input that cannot be used. Interrupted, Diverged: as `finetune`.
    """
    if config.init_from is None:
        raise UserError("init_from is missing: a soft prompt is learned for a trained model, init_from=RUN_DIR")
    rules = config.parameterization

    def prepare_model(model: Transformer, tokenizer: Tokenizer) -> TaskModel:
        if config.mode == "dense" and config.train == "both":
            densify(model)  # of a frozen model the zeros would not train
        prompted = Prompted(model, initial_prompt(model, tokenizer, config))
        if config.train == "prompt":
            model.requires_grad_(False)
        specs = {f"model.{name}": spec for name, spec in tensor_specs(model, rules).items()}
        specs["prompt.vectors"] = TensorSpec(Role.PROMPT)
        assign(prompted, specs, rules, model.config.n_layers)

        def loss(batch: Batch) -> Tensor:
            value: Tensor = prompted(batch.tokens, batch.targets, _slots(batch))
            return value

        return TaskModel(
            model, prompted, loss, embeddings=lambda batch: prompted.embeddings(batch.tokens, _slots(batch))
        )

    return run_task(config, "prompt", prepare_model, config.n_tokens, console or Console())


def _slots(batch: Batch) -> Tensor:
    assert batch.slots is not None
    return batch.slots


def initial_prompt(model: Transformer, tokenizer: Tokenizer, config: PromptConfig) -> SoftPrompt:
    """Return the prompt before training: embeddings of words, or normal draws of the model's initial scale."""
    if config.init == "random":
        fresh = SoftPrompt(config.n_tokens, model.config.d_model)
        draws = torch.empty(fresh.vectors.shape).normal_(generator=seeds.generator(config.seed, "init", "prompt"))
        with torch.no_grad():
            fresh.vectors.copy_(draws * model.config.init_std)
        return fresh
    ids = tokenizer.encode(" " + config.words.strip())
    repeated = (ids * -(-config.n_tokens // len(ids)))[: config.n_tokens]
    rows = model.embed.weight.detach()[torch.tensor(repeated, device=model.embed.weight.device)]
    return SoftPrompt.from_embeddings(rows)
