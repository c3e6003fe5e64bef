"""Pre-training: text in, a run directory with a language model out."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from sparsetrain.cost.flops import matrices
from sparsetrain.cost.footprint import Workload
from sparsetrain.cost.memory import state_bytes
from sparsetrain.data import Batch, Corpus, PackedSamples, prepare, sequential_windows
from sparsetrain.errors import UserError
from sparsetrain.models import Transformer
from sparsetrain.models.config import ModelConfig
from sparsetrain.optim import Schedule, build_optimizer
from sparsetrain.parameterization import param_groups
from sparsetrain.runs.metrics import read_metrics
from sparsetrain.screen import say
from sparsetrain.sparsity import MaskManager, SparsityConfig, Static, make_rule, sparse_layers
from sparsetrain.stages.backends import backends, settle_backends
from sparsetrain.stages.config import PretrainConfig, RunConfig, as_plain, fingerprint, model_config, total_steps
from sparsetrain.stages.ledger import FlopLedger, steps_for_flops
from sparsetrain.stages.memory import adjustable, check_memory, memory_errors, training
from sparsetrain.stages.run import Origin, RunResult, claimed, commit, finish, machine, run_weights, skipped
from sparsetrain.training.evaluate import score_text
from sparsetrain.training.loop import Trainer, load_weights
from sparsetrain.training.state import Diverged, TrainState, peak_rss_bytes, resolve_device, resolve_precision

FINAL_EVALUATION = 1024  # sequences of validation text, at most, for the loss that a run reports


def pretrain(config: PretrainConfig, console: Console | None = None) -> RunResult:
    """Run pre-training to its end, from where it stopped if it was stopped, and return its result.

    Raises:
        UserError: input that cannot be used. Interrupted: a signal ended it, resumably. Diverged: see there; the
            result then has the status ``diverged``.
    """
    console = console or Console()
    corpus = prepare(config.data, progress=True, console=console)
    origin = Origin.of_corpus(corpus, config.init_from)
    directory = run_directory("pretrain", config, origin)
    with claimed(directory, config, origin) as done:
        if done is not None:
            return skipped(done, console)
        origin.save(directory)
        check_memory(*memory_of(config, corpus), resolve_device(config.device), config.force)
        with memory_errors("this training"):
            return _train(config, corpus, directory, console)


def run_directory(verb: str, config: RunConfig, origin: Origin) -> Path:
    """Return the directory that the configuration names, or one below ``runs_dir`` named after what it is."""
    if config.run_dir is not None:
        return Path(config.run_dir)
    model = model_config(config.model, 1)
    rule = config.sparsity.evolution.rule
    masks = f"s{config.sparsity.sparsity:g}" + ("" if rule == "static" else f"-{rule}")
    name = f"{verb}-d{model.d_model}-L{model.n_layers}-{masks}-lr{config.optimizer.lr:g}"
    return Path(config.runs_dir) / f"{name}-seed{config.seed}-{fingerprint(config, origin.corpus, origin.source)}"


def build_model(config: RunConfig, vocab_size: int, device: torch.device, sparse: bool = True) -> Transformer:
    """Return the freshly initialised model of a configuration, on ``device``."""
    plan = mask_plan(config) if sparse else SparsityConfig()
    shape = model_config(config.model, vocab_size, config.seed)
    return Transformer(shape, config.parameterization, plan).to(device)


def mask_plan(config: RunConfig) -> SparsityConfig:
    """Return the sparsity section with the seed that its masks are drawn from."""
    seed = config.seed if config.sparsity.seed is None else config.sparsity.seed
    return SparsityConfig(**{**vars(config.sparsity), "seed": seed})


def mask_manager(config: RunConfig, model: Transformer, total_steps: int) -> MaskManager | None:
    """Return what changes the masks of a pre-training and watches them; None for a dense model.

    A run that starts from another keeps the densities that it finds there: gradual pruning and variable sparsity are
    over, SET and RigL go on.

    Raises:
        UserError: a rule that would act after the end, or never.
    """
    plan = mask_plan(config)
    rule = make_rule(plan, total_steps)
    if not any(True for _ in sparse_layers(model)):
        return None
    if config.init_from is None:
        return MaskManager(model, rule, plan=plan)
    keeps = plan.evolution.rule in ("set", "rigl")
    return MaskManager(model, rule if keeps else Static(), include=["*"], seed=plan.seed)


def pretrain_steps(config: RunConfig, model: ModelConfig, samples_per_epoch: int) -> int:
    """Return the number of updates of a pre-training, which may be stated in FLOPs."""
    stage, schedule = config.stage, config.schedule
    if stage.flops is None or schedule.steps is not None or schedule.tokens is not None:
        return total_steps(config, samples_per_epoch)
    context = config.data.context
    tokens, ranked = stage.batch_size * context, stage.batch_size // stage.accumulation * context
    return steps_for_flops(stage.flops, model, config.sparsity, context, tokens, ranked)


def layer_densities(model: Transformer) -> dict[str, float]:
    """Return the density of each sparse layer, by name; the rest is dense."""
    return {name: layer.pattern.density for name, layer in sparse_layers(model)}


def overall_density(model: Transformer) -> float:
    """Return nonzeros over elements of all hidden matrices: those of the blocks."""
    hidden = matrices(model.config, layer_densities(model) or 1.0)
    return sum(matrix.nnz for matrix in hidden) / sum(matrix.numel for matrix in hidden)


def memory_of(config: RunConfig, corpus: Corpus) -> tuple[Workload, str, dict[str, str]]:
    """Return what a pre-training holds in memory, its name in a message, and the settings that could be smaller.

    Raises:
        UserError: a text shorter than the context, or more of it than learned positions.
    """
    model, stage, context = (
        model_config(config.model, corpus.tokenizer.vocab_size),
        config.stage,
        config.data.context,
    )
    check_context(model, context)
    PackedSamples(corpus.train, context, config.samples_seed, "pretrain")  # says if the text is shorter
    windows = -(-max(0, len(corpus.validation) - 1) // context)
    workload = training(config, model, stage, evaluated=min(stage.batch_size, FINAL_EVALUATION, windows))
    what = (
        f"training with stage.batch_size={stage.batch_size}, data.context={context}, "
        f"model.d_model={model.d_model} and model.n_layers={model.n_layers}"
    )
    return workload, what, adjustable(config)


def _train(config: PretrainConfig, corpus: Corpus, directory: Path, console: Console) -> RunResult:
    clock = Stopwatch()
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    device = resolve_device(config.device)
    autocast, reason = resolve_precision(config.stage.precision, device)
    model = build_model(config, corpus.tokenizer.vocab_size, device)
    if config.init_from is not None:
        load_weights(model, run_weights(Path(config.init_from)), config.init_from)
        # The layers now have the densities of that run's end.
        model.parameterize(config.parameterization, reinitialise=False)
    context, settings = config.data.context, config.stage
    check_context(model.config, context)
    samples = PackedSamples(corpus.train, context, config.samples_seed, "pretrain")
    schedule = Schedule(config.schedule, pretrain_steps(config, model.config, samples.samples_per_epoch))
    masks = mask_manager(config, model, schedule.total_steps)
    ends = [masks.densities_at(step) for step in (0, schedule.total_steps)] if masks is not None else [{}, {}]
    mean_densities = {name: (density + ends[1][name]) / 2 for name, density in ends[0].items()}
    tokens = settings.batch_size // settings.accumulation * context
    settle_backends(model, directory, tokens, autocast, mean_densities)
    describe(model, reason, device, console)
    flops = FlopLedger(
        model.config,
        masks.densities_at if masks is not None else lambda _step: {},
        masks.rule if masks is not None else Static(),
        context,
        settings.batch_size * context,
        tokens,
    )
    opt = config.optimizer
    optimizer = build_optimizer(param_groups(model, config.parameterization, opt.lr, opt.weight_decay, opt.eps), opt)
    token_bytes = corpus.tokenizer.token_bytes

    def losses(batch: Batch) -> torch.Tensor:
        batch = batch.to(device)
        with torch.autocast(device.type, autocast, enabled=autocast is not None):
            return model.token_losses(batch.tokens, batch.targets)

    def evaluate(final: bool) -> dict[str, float]:
        windows = sequential_windows(corpus.validation, context, FINAL_EVALUATION if final else settings.eval_sequences)
        score = score_text(model, losses, windows.split(settings.batch_size), token_bytes)
        return {"val_loss": score.loss, "bits_per_byte": score.bits_per_byte}

    trainer = Trainer(
        module=model,
        loss=lambda batch: model.loss(batch.tokens, batch.targets),
        samples=samples,
        optimizer=optimizer,
        schedule=schedule,
        config=settings,
        clip=opt.clip,
        seed=config.seed,
        device=device,
        directory=directory,
        evaluate=evaluate,
        flops_per_token=lambda step: flops.per_token(step).total,
        base_lr=opt.lr,
        autocast=autocast,
        title=f"pretrain s={config.sparsity.sparsity:g}",
        console=console,
        masks=masks,
    )
    common = {
        "stage": "pretrain",
        "parameterization": config.parameterization.scheme,
        "sparsity": config.sparsity.sparsity,
        "width": model.config.d_model,
        "depth": model.config.n_layers,
        "lr": opt.lr,
        "seed": config.seed,
        "corpus": corpus.directory.name,
        "precision": reason,
        "backend": backends(model),
        "machine": machine(device),
        "commit": commit(),
    }
    try:
        with clock.paused():
            state = trainer.run()
    except Diverged as error:
        records = read_metrics(directory / "metrics.jsonl")
        seen = records[-1]["tokens"] if records else 0
        ended = {
            "status": "diverged",
            "message": str(error),
            "tokens": seen,
            "seconds": clock.seconds(),
            "peak_rss_bytes": peak_rss_bytes(),
            "loss_first": records[0].get("val_loss") if records else None,
            "loss_last": None,
            "bits_per_byte": None,
            "density": overall_density(model),
            "flops": flops.through(records[-1]["step"] if records else 0),
            "bytes": {},
            "model": asdict(model.config),
        }
        finish(directory, {**common, **ended})
        raise
    evaluated = [record for record in read_metrics(directory / "metrics.jsonl") if "val_loss" in record]
    used = state_bytes(model, optimizer)
    return finish(
        directory,
        {
            **common,
            **progress_entries(state, clock),
            "loss_first": evaluated[0]["val_loss"],
            "loss_last": evaluated[-1]["val_loss"],
            "bits_per_byte": evaluated[-1]["bits_per_byte"],
            "density": overall_density(model),
            "flops": flops.through(state.step),
            **_mask_entries(masks),
            "bytes": {"parameters": used.parameters, "optimizer": used.optimizer, "index": used.index},
            "model": asdict(model.config),
            "config": as_plain(config),
        },
    )


def _mask_entries(masks: MaskManager | None) -> dict[str, Any]:
    """Return what a result says about masks at the end: over all layers, and of each."""
    if masks is None:
        return {}
    watched = masks.watch()
    layers = {layer.name: layer.numbers() for layer in masks.report()}
    return {"masks": {"rule": masks.rule.name, **watched, "layers": layers}}


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


def progress_entries(state: TrainState, clock: Stopwatch) -> dict[str, Any]:
    """Return what every finished run says about its course."""
    return {
        "status": "complete",
        "steps": state.step,
        "samples": state.samples_seen,
        "tokens": state.tokens_seen,
        "seconds": state.seconds + clock.seconds(),
        "peak_rss_bytes": peak_rss_bytes(),
    }


def check_context(model: ModelConfig, context: int) -> None:
    """Raise `UserError` if a model with learned positions is asked for more of them than it has."""
    if model.positions == "learned" and context > model.max_context:
        raise UserError(f"data.context={context} is longer than model.max_context={model.max_context}")


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
