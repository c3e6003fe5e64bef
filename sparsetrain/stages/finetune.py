"""Fine-tuning on a labelled task: dense from a sparse checkpoint, sparse, or from scratch."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from torch import Tensor, nn

from sparsetrain.cost.flops import training_flops_per_token
from sparsetrain.cost.footprint import Workload
from sparsetrain.data import Batch, Task, TaskBatches, Tokenizer, answer_tokens, load_task, prepare, scoring_batches
from sparsetrain.data.tasks import Example
from sparsetrain.models import Transformer
from sparsetrain.optim import Schedule, build_optimizer
from sparsetrain.parameterization import param_groups
from sparsetrain.screen import say
from sparsetrain.sparsity import densify
from sparsetrain.stages.backends import settle_backends
from sparsetrain.stages.config import FinetuneConfig, PromptConfig, as_plain, model_config, total_steps
from sparsetrain.stages.memory import adjustable, check_memory, memory_errors, training
from sparsetrain.stages.pretrain import (
    Stopwatch,
    build_model,
    describe,
    layer_densities,
    overall_density,
    progress_entries,
    run_directory,
)
from sparsetrain.stages.run import (
    Origin,
    RunResult,
    claimed,
    commit,
    finish,
    machine,
    run_weights,
    skipped,
)
from sparsetrain.training.evaluate import TaskScore, label_likelihoods, score_labels
from sparsetrain.training.loop import Trainer, load_weights
from sparsetrain.training.state import Diverged, resolve_device, resolve_precision


def finetune(config: FinetuneConfig, console: Console | None = None) -> RunResult:
    """Fine-tune to the end, from where it stopped if it was stopped, and return the result.

    Without ``init_from`` the model starts from its initial values: the control that shows what pre-training is worth.

    Raises:
        UserError: input that cannot be used. Interrupted: a signal ended it, resumably. Diverged: see there.
    """
    rules = config.parameterization

    def prepare_model(model: Transformer, _tokenizer: Tokenizer) -> TaskModel:
        if config.mode == "dense":
            densify(model)
            model.parameterize(rules, reinitialise=False)
        return TaskModel(
            network=model,
            module=model,
            loss=lambda batch: model.loss(batch.tokens, batch.targets),
            embeddings=lambda batch: model.embed_tokens(batch.tokens),
        )

    return run_task(config, "finetune", prepare_model, 0, console or Console())


@dataclass(frozen=True)
class TaskModel:
    """A model in training on a task.

    Args:
        network: the transformer. module: all that a checkpoint holds.
        loss: mean cross-entropy of a batch's targets in nats.
        embeddings: of a batch's tokens and soft prompt, ``[B, T, d_model]``.
    """

    network: Transformer
    module: nn.Module
    loss: Callable[[Batch], Tensor]
    embeddings: Callable[[Batch], Tensor]


def run_task(
    config: FinetuneConfig,
    verb: str,
    prepare_model: Callable[[Transformer, Tokenizer], TaskModel],
    n_slots: int,
    console: Console,
) -> RunResult:
    """Train and score a model on ``config.task``: what fine-tuning and soft prompts have in common.

    Args:
        prepare_model: makes the loaded (or fresh) transformer what is to be trained.
        n_slots: soft-prompt places in every row.
    """
    if config.init_from is None:
        origin = Origin.of_corpus(prepare(config.data, progress=True, console=console))
    else:
        origin = Origin.of_run(config.init_from)
    directory = run_directory(verb, config, origin)
    with claimed(directory, config, origin) as done:
        if done is not None:
            return skipped(done, console)
        # Before the model is built: what is to be learned says how long the rows are.
        task = load_task(config.task)
        stage, tokenizer = config.stage, origin.tokenizer
        samples = TaskBatches(
            *(task.train, tokenizer, task.answers, config.data.context, stage.batch_size),
            *(config.samples_seed, verb, n_slots),
        )
        needs = memory_of(config, verb, samples.widths, samples.examples_per_epoch, tokenizer.vocab_size)
        check_memory(*needs, resolve_device(config.device), config.force)
        with memory_errors("this training"):
            return _train(config, verb, origin, directory, prepare_model, n_slots, task, samples, console)


def memory_of(
    config: FinetuneConfig,
    verb: str,
    widths: tuple[int, int],
    examples: int,
    vocab_size: int,
    stage: str = "stage",
) -> tuple[Workload, str, dict[str, str]]:
    """Return what a training on a task holds in memory, its name in a message, and what could be smaller.

    Args:
        widths: tokens of the shortest and of the longest row.
        examples: how many there are to train on.
        stage: the name of the section with the settings of the loop.
    """
    model, slots = model_config(config.model, vocab_size), 0
    # The longest row is certain to come if every row does.
    rows = total_steps(config, examples) * config.stage.batch_size
    width = widths[1 if rows >= examples else 0]
    trained, dense = True, config.mode == "dense" and config.init_from is not None
    if isinstance(config, PromptConfig):
        trained, slots = config.train == "both", config.n_tokens
        dense = dense and trained
    workload = training(
        *(config, model, config.stage),
        dense=dense,
        context=width,
        evaluated=1,
        cached=width,
        trained=trained,
        prompt_tokens=slots,
    )
    what = f"{verb} with {stage}.batch_size={config.stage.batch_size}, rows of {width} tokens and a model of "
    what += f"model.d_model={model.d_model} and model.n_layers={model.n_layers}"
    return workload, what, adjustable(config, stage)


def load_model(config: FinetuneConfig, vocab_size: int, device: torch.device) -> Transformer:
    """Return the model that a stage starts from, with its topology."""
    if config.init_from is None:
        # From scratch there is nothing whose masks could be kept: the model is what the sparsity section says.
        return build_model(config, vocab_size, device)
    source = Path(config.init_from)
    weights = run_weights(source)
    weights = {name.removeprefix("model."): value for name, value in weights.items() if not name.startswith("prompt.")}
    sparse = any(name.endswith(".row_ptr") for name in weights)
    model = build_model(config, vocab_size, device, sparse=sparse)
    load_weights(model, weights, str(source))
    # The layers now have the checkpoint's densities, whatever the configuration said.
    model.parameterize(config.parameterization, reinitialise=False)
    return model


def _train(
    config: FinetuneConfig,
    verb: str,
    origin: Origin,
    directory: Path,
    prepare_model: Callable[[Transformer, Tokenizer], TaskModel],
    n_slots: int,
    task: Task,
    samples: TaskBatches,
    console: Console,
) -> RunResult:
    clock = Stopwatch()
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    device = resolve_device(config.device)
    autocast, reason = resolve_precision(config.stage.precision, device)
    tokenizer = origin.tokenizer
    network = load_model(config, tokenizer.vocab_size, device)
    pretrained_density = overall_density(network)
    subject = prepare_model(network, tokenizer)
    subject.module.to(device)
    origin.save(directory)
    settings, opt = config.stage, config.optimizer
    context = config.data.context
    settle_backends(network, directory, settings.batch_size // settings.accumulation * context, autocast)
    describe(network, reason, device, console)
    say(console, f"task: {task.describe()}")

    schedule = Schedule(config.schedule, total_steps(config, samples.examples_per_epoch))
    rules = config.parameterization
    optimizer = build_optimizer(param_groups(subject.module, rules, opt.lr, opt.weight_decay, opt.eps), opt)
    flops = training_flops_per_token(network.config, layer_densities(network) or 1.0, context)

    answers = answer_tokens(task, tokenizer)

    def row_scores(batch: Batch) -> Tensor:
        with torch.autocast(device.type, autocast, enabled=autocast is not None):
            return network.continuation_scores(subject.embeddings(batch.to(device)), answers)

    def score(examples: list[Example]) -> TaskScore:
        batches = scoring_batches(examples, task, tokenizer, context, n_slots)
        likelihoods = label_likelihoods(subject.module, row_scores, batches, len(examples))
        if bool(likelihoods.isnan().any()):
            return TaskScore(len(examples), math.nan, (math.nan, math.nan), math.nan)
        truth = np.array([example.label for example in examples])
        return score_labels(likelihoods.argmax(1).numpy(), truth)

    def evaluate(_final: bool) -> dict[str, float]:
        result = score(task.validation[: settings.eval_sequences])
        return {"val_accuracy": result.accuracy, "val_macro_f1": result.macro_f1}

    trainer = Trainer(
        module=subject.module,
        loss=subject.loss,
        samples=samples,
        optimizer=optimizer,
        schedule=schedule,
        config=settings,
        clip=opt.clip,
        seed=config.seed,
        device=device,
        directory=directory,
        evaluate=evaluate,
        flops_per_token=flops.total,
        base_lr=opt.lr,
        autocast=autocast,
        title=verb,
        console=console,
    )
    common = {
        "stage": verb,
        "parameterization": config.parameterization.scheme,
        "sparsity": config.sparsity.sparsity,
        "pretrained_density": pretrained_density,
        "density": overall_density(network),
        "width": network.config.d_model,
        "depth": network.config.n_layers,
        "lr": opt.lr,
        "seed": config.seed,
        "init_from": config.init_from,
        "source": origin.source,
        "precision": reason,
        "machine": machine(device),
        "commit": commit(),
    }
    try:
        with clock.paused():
            state = trainer.run()
        test = score(task.test)
        if math.isnan(test.accuracy):
            raise Diverged(f"{verb}: the trained model gives the answers of the test set no likelihood")
    except Diverged as error:
        finish(directory, {**common, "status": "diverged", "message": str(error)})
        raise
    overlap = task.overlap(origin.train_ids)
    return finish(
        directory,
        {
            **common,
            **progress_entries(state, clock),
            "task": task.name,
            "n_test": test.n,
            "accuracy": test.accuracy,
            "ci95": list(test.ci95),
            "macro_f1": test.macro_f1,
            "majority": task.majority(),
            "n_train": len(task.train),
            "overlap_train_test": overlap,
            "flops": flops.for_tokens(state.tokens_seen).as_dict(),
            "trained_parameters": sum(p.numel() for group in optimizer.param_groups for p in group["params"]),
            "model": asdict(network.config),
            "config": as_plain(config),
        },
    )
