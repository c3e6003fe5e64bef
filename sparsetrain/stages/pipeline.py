"""The whole recipe at several sparsities: pre-train, fine-tune, soft-prompt, compare, report."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console

from sparsetrain.data import Corpus, TaskBatches, load_task, prepare
from sparsetrain.files import write_json
from sparsetrain.report.html import write_html
from sparsetrain.report.schema import validate_report
from sparsetrain.report.show import show_report
from sparsetrain.runs.metrics import read_metrics
from sparsetrain.screen import say
from sparsetrain.sparsity import SparsityConfig
from sparsetrain.stages.config import (
    FinetuneConfig,
    PipelineConfig,
    PretrainConfig,
    PromptConfig,
    PromptSection,
    RunConfig,
    total_steps,
)
from sparsetrain.stages.finetune import finetune
from sparsetrain.stages.finetune import memory_of as task_memory
from sparsetrain.stages.memory import check_memory
from sparsetrain.stages.pretrain import memory_of, pretrain, run_directory
from sparsetrain.stages.prompt import prompt
from sparsetrain.stages.run import Origin, RunResult, claimed, command_line, commit, finish, finished, skipped
from sparsetrain.training.state import Diverged, resolve_device

SCRATCH = "scratch"


def pipeline(config: PipelineConfig, console: Console | None = None) -> RunResult:
    """Run every arm and stage that is not done yet, write ``report.json`` and ``report.html``, print the table.

    Raises:
        UserError, Interrupted: as the stages do; what was finished stays and is skipped next time.
        Diverged: no arm came to an end. One that diverges beside others is named in the report and in the result.
    """
    console = console or Console()
    corpus = prepare(config.data, progress=True, console=console)
    origin = Origin.of_corpus(corpus)
    directory = run_directory("pipeline", config, origin)
    with claimed(directory, config, origin) as done:
        if done is not None:
            skipped(done, console)
            show_report(directory, console)
            return done
        _check_arms(config, corpus, directory)
        arms = [_run_arm(config, sparsity, directory, console) for sparsity in config.arms]
        scratch = None
        if config.pipeline.scratch:
            console.rule("from scratch")
            control = _finetune_config(config, 0.0, None, directory / SCRATCH / "finetune")
            scratch = _complete(_attempt(finetune, control, console))
        if not any(arm.finetune for arm in arms):
            raise Diverged(
                f"no arm of the pipeline in {directory} came to an end: {arms[0].pretrain.values.get('message')}"
            )
        report = _report(config, corpus, arms, scratch)
        validate_report(report)
        write_json(directory / "report.json", report)
        write_html(report, directory / "report.html")  # type: ignore[arg-type]
        diverged = [arm.name for arm in arms if len(arm.stages) < 2 + (config.pipeline.prompt is not None)]
        outcome = {"status": "complete", "stage": "pipeline", "report": "report.html", "diverged": diverged}
        result = finish(directory, outcome)
    show_report(directory, console)
    return result


def _check_arms(config: PipelineConfig, corpus: Corpus, directory: Path) -> None:
    """Raise `UserError` before the first arm is trained if a later stage could not be, for its task or its memory."""
    task, section = load_task(config.task), config.pipeline.prompt
    n_slots = 0 if section is None else section.n_tokens
    vocab_size = corpus.tokenizer.vocab_size
    samples = TaskBatches(
        task.train, corpus.tokenizer, task.answers, config.data.context, 1, config.seed, "check", n_slots
    )
    total_steps(config, len(corpus.train))
    for stage in (config.pipeline.finetune, section):
        if stage is not None:
            total_steps(dataclasses.replace(config, schedule=stage.schedule, stage=stage.stage), len(task.train))
    device, place = resolve_device(config.device), directory / "check"
    shortest, longest = samples.widths
    widths = (max(1, shortest - n_slots), max(1, longest - n_slots))
    for sparsity in config.arms:
        home = directory / arm_name(sparsity)
        if finished(home / "pretrain") is None:
            check_memory(*memory_of(_pretrain_config(config, sparsity, home), corpus), device, config.force)
        tuned = _finetune_config(config, sparsity, place, home / "finetune")
        if finished(home / "finetune") is None:
            needs = task_memory(tuned, "finetune", widths, len(task.train), vocab_size, "pipeline.finetune.stage")
            check_memory(*needs, device, config.force)
        if section is not None and finished(home / "prompt") is None:
            prompted = _prompt_config(config, section, sparsity, place, home)
            needs = task_memory(
                prompted, "prompt", samples.widths, len(task.train), vocab_size, "pipeline.prompt.stage"
            )
            check_memory(*needs, device, config.force)


@dataclasses.dataclass(frozen=True)
class _Arm:
    """One sparsity. A stage that diverged, and those that would have followed it, are None but for pre-training."""

    sparsity: float
    pretrain: RunResult
    finetune: RunResult | None = None
    prompt: RunResult | None = None

    @property
    def name(self) -> str:
        return arm_name(self.sparsity)

    @property
    def stages(self) -> list[RunResult]:
        return [stage for stage in (self.pretrain, self.finetune, self.prompt) if stage is not None]


def arm_name(sparsity: float) -> str:
    """Return what an arm is called in directories and reports."""
    return "dense" if sparsity == 0 else f"sparse-{sparsity:g}"


def _run_arm(config: PipelineConfig, sparsity: float, directory: Path, console: Console) -> _Arm:
    home = directory / arm_name(sparsity)
    console.rule(arm_name(sparsity))
    pretrained = _attempt(pretrain, _pretrain_config(config, sparsity, home), console)
    if not pretrained.complete:
        return _Arm(sparsity, pretrained)
    tuned = _attempt(finetune, _finetune_config(config, sparsity, pretrained.directory, home / "finetune"), console)
    section = config.pipeline.prompt
    start = pretrained if section is None or section.start == "pretrain" else tuned
    prompted = None
    if section is not None and start.complete:
        prompted = _attempt(prompt, _prompt_config(config, section, sparsity, start.directory, home), console)
    return _Arm(sparsity, pretrained, _complete(tuned), _complete(prompted))


def _attempt(stage: Callable[[Any, Console], RunResult], config: RunConfig, console: Console) -> RunResult:
    """Run a stage; one that diverges is a result, and the other arms go on."""
    try:
        return stage(config, console)
    except Diverged as error:
        say(console, f"diverged: {error}", style="red")
        assert config.run_dir is not None
        result = finished(Path(config.run_dir))
        assert result is not None
        return result


def _complete(run: RunResult | None) -> RunResult | None:
    return run if run is not None and run.complete else None


def _pretrain_config(config: PipelineConfig, sparsity: float, home: Path) -> PretrainConfig:
    return PretrainConfig(
        **_shared(config, sparsity, home / "pretrain"),
        optimizer=config.optimizer,
        schedule=config.schedule,
        stage=config.stage,
    )


def _prompt_config(
    config: PipelineConfig, section: PromptSection, sparsity: float, start: Path, home: Path
) -> PromptConfig:
    return PromptConfig(
        **_shared(config, sparsity, home / "prompt"),
        init_from=str(start),
        task=config.task,
        n_tokens=section.n_tokens,
        init=section.init,
        words=section.words,
        train=section.train,
        optimizer=section.optimizer,
        schedule=section.schedule,
        stage=section.stage,
    )


def _finetune_config(
    config: PipelineConfig, sparsity: float, init_from: Path | None, directory: Path
) -> FinetuneConfig:
    section = config.pipeline.finetune
    return FinetuneConfig(
        **_shared(config, sparsity, directory),
        init_from=None if init_from is None else str(init_from),
        task=config.task,
        mode=section.mode,
        optimizer=section.optimizer,
        schedule=section.schedule,
        stage=section.stage,
    )


def _shared(config: PipelineConfig, sparsity: float, directory: Path) -> dict[str, Any]:
    """Return the fields that every stage of an arm takes over from the pipeline."""
    names = [field.name for field in dataclasses.fields(RunConfig)]
    own = ("sparsity", "optimizer", "schedule", "stage", "init_from", "run_dir")
    shared = {name: getattr(config, name) for name in names if name not in own}
    if sparsity > 0:
        plan = dataclasses.replace(config.sparsity, sparsity=sparsity)
    else:
        plan = SparsityConfig(seed=config.sparsity.seed)
    return {**shared, "sparsity": plan, "run_dir": str(directory)}


def _report(config: PipelineConfig, corpus: Corpus, arms: list[_Arm], scratch: RunResult | None) -> dict[str, Any]:
    runs = [stage for arm in arms for stage in arm.stages] + ([] if scratch is None else [scratch])
    first = next(arm for arm in arms if arm.finetune is not None)
    assert first.finetune is not None
    return {
        "arms": [_arm_entry(arm) for arm in arms],
        "scratch": None
        if scratch is None
        else {key: scratch[key] for key in ("accuracy", "ci95", "macro_f1", "n_test")},
        "majority": first.finetune["majority"],
        "peak_rss_bytes": max(run["peak_rss_bytes"] for run in runs),
        "seconds": sum(run["seconds"] for run in runs),
        "commit": commit(),
        "overlap_train_test": max(run["overlap_train_test"] for run in runs if "overlap_train_test" in run.values),
        "command": command_line(),
        "machine": first.pretrain["machine"],
        "task": {
            "name": first.finetune["task"],
            "n_train": first.finetune["n_train"],
            "n_test": first.finetune["n_test"],
        },
        "model": first.pretrain["model"],
        "data": {
            key: corpus.manifest[key] for key in ("source", "licence", "vocab_size", "splits", "tokenizer_sha256")
        },
        "settings": _settings(config),
        "limits": _limits(config, corpus, arms),
    }


def _arm_entry(arm: _Arm) -> dict[str, Any]:
    entry: dict[str, Any] = {
        "name": arm.name,
        "sparsity": arm.sparsity,
        "density": arm.pretrain["density"],
        "train_flops": arm.pretrain["flops"]["total"],
        "pretrain": {key: arm.pretrain[key] for key in ("tokens", "loss_first", "loss_last", "bits_per_byte")},
        "flops": arm.pretrain["flops"],
        "bytes": arm.pretrain["bytes"],
        "seconds": {stage["stage"]: stage["seconds"] for stage in arm.stages},
        "curves": {stage["stage"]: _curve(stage.directory) for stage in arm.stages},
    }
    if not entry["bytes"]:
        del entry["bytes"]
    if (masks := arm.pretrain.values.get("masks")) is not None:
        entry["masks"] = {key: value for key, value in masks.items() if key != "layers"}
        entry["masks"]["dead_rows"] = sum(layer["dead_rows"] for layer in masks["layers"].values())
    for stage in (arm.finetune, arm.prompt):
        if stage is not None:
            entry[stage["stage"]] = _scored(stage)
            entry[f"{stage['stage']}_flops"] = stage["flops"]["total"]
    return entry


def _scored(run: RunResult) -> dict[str, Any]:
    return {key: run[key] for key in ("task", "n_test", "accuracy", "ci95", "macro_f1")}


def _curve(directory: Path) -> list[dict[str, Any]]:
    keep = ("step", "tokens", "loss", "lr", "val_loss", "bits_per_byte")
    records = read_metrics(directory / "metrics.jsonl")
    return [{key: record[key] for key in keep if key in record} for record in records]


def _settings(config: PipelineConfig) -> dict[str, Any]:
    """Return the settings that a reader needs to judge the numbers, by stage."""
    sections: dict[str, Any] = {
        "pretrain": config,
        "finetune": config.pipeline.finetune,
        "prompt": config.pipeline.prompt,
    }
    shown: dict[str, Any] = {"seed": config.seed, "parameterization": dataclasses.asdict(config.parameterization)}
    for name, section in sections.items():
        if section is not None:
            shown[name] = {
                "lr": section.optimizer.lr,
                "weight_decay": section.optimizer.weight_decay,
                "schedule": section.schedule.name,
                "batch_size": section.stage.batch_size,
                "context": config.data.context,
            }
    if config.pipeline.prompt is not None:
        shown["prompt"] |= {key: getattr(config.pipeline.prompt, key) for key in ("n_tokens", "train", "start")}
    return shown


def overlap_caveat(corpus: Corpus) -> list[str]:
    """Return a sentence for a corpus whose ids are not those of the tasks: then an overlap of 0 says nothing."""
    if corpus.manifest["source"] == "medline":
        return []
    return [
        "Documents of the task and of this corpus have different kinds of ids, so the overlap between the test "
        "examples and the training text was not checked."
    ]


def _limits(config: PipelineConfig, corpus: Corpus, arms: list[_Arm]) -> list[str]:
    """Return what the report does not show, for this configuration."""
    first = next(arm for arm in arms if arm.finetune is not None)
    tokens, stored = first.pretrain["tokens"], first.pretrain["bytes"]["parameters"] // 4
    limits = [
        *overlap_caveat(corpus),
        f"One seed ({config.seed}) of initialisation, masks and sample order.",
        f"{stored / 1e6:.2g} M parameters in the first arm and {tokens / 1e6:.2g} M tokens: far below the models of "
        "the papers. Only signs and rough ratios can be expected to carry over.",
        "Every arm used the same base hyperparameters"
        + (
            ", transferred by SμPar from the dense model; none was tuned for its sparsity."
            if config.parameterization.uses_density
            else "; under a parameterization without a density rule these are not equally good at every sparsity."
        ),
    ]
    if config.pipeline.scratch:
        limits.append("The control from scratch has the same fine-tuning as the others, not a longer one.")
    return limits
