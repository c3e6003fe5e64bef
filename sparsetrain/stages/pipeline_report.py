"""The content of a pipeline's ``report.json``, made from the results of its stages."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence, Set
from pathlib import Path
from typing import Any, Protocol

from sparsetrain.data import SOURCES, TASKS, Corpora
from sparsetrain.report.pairs import divided
from sparsetrain.report.run_files import moments_of
from sparsetrain.report.schema import STAGES as TASK_STAGES
from sparsetrain.report.task import overlap_sentences
from sparsetrain.runs.layout import METRICS
from sparsetrain.runs.metrics import read_metrics
from sparsetrain.runs.provenance import command_line, commit
from sparsetrain.runs.result import RunResult
from sparsetrain.stages.config import AdaptConfig, PromptConfig, RunConfig
from sparsetrain.stages.kinds import RUN_SETTINGS
from sparsetrain.stages.pipeline_arms import Arm
from sparsetrain.stages.pipeline_config import PipelineConfig, StageEntry
from sparsetrain.stages.predicted import prediction_of

Row = dict[str, Any]

_SCRATCH = ("accuracy", "ci95", "macro_f1", "n_test")
_SCORED = ("task", "n_test", "accuracy", "ci95", "macro_f1")
_TEXT = ("tokens", "loss_first", "loss_last", "bits_per_byte")
_COMPARED = ("file", "hub")  # tasks whose examples are looked for by their text
_LONG = ("config", "model", "machine")  # entries of a result that the report has elsewhere, or the run's own file has


class Runs(Protocol):
    """The results of an arm's stages, by name."""

    arm: Arm
    entries: list[StageEntry]
    runs: dict[str, RunResult]

    @property
    def name(self) -> str: ...

    def complete(self, name: str) -> RunResult | None: ...


def report(
    config: PipelineConfig, corpora: Corpora, arms: Sequence[Runs], once: Mapping[str, RunResult]
) -> dict[str, Any]:
    """Return the content of ``report.json``; at least one arm must be complete."""
    every = [run for runs in arms for run in runs.runs.values()] + [run for run in once.values() if run.complete]
    timed = [run for run in every if "seconds" in run.values]
    scored = [run for run in every if run.values.get("accuracy") is not None]
    entries = [_arm_entry(config, runs, once) for runs in arms]
    scratch = next((run for run in once.values() if run.complete and "accuracy" in run.values), None)
    first = main_stage(arms[0].entries, "pretrain")
    pretrained = [runs.runs[first.name] for runs in arms if first is not None and first.name in runs.runs]
    trained = [run for run in every if run["stage"] != "evaluate"]
    shown = next((run for run in [*pretrained, *trained] if run.complete), trained[0])
    # The stages that stand for the arms in the tables; an earlier one may be on another task.
    shown_stages = [main_stage(runs.entries, kind) for runs in arms for kind in TASK_STAGES]
    names = {stage.name for stage in shown_stages if stage is not None}
    mains = [run for runs in arms for name, run in runs.runs.items() if name in names and run in scored]
    main = next(iter([*mains, *scored]), None)
    return {
        "arms": entries,
        "scratch": None if scratch is None else {key: scratch.values.get(key) for key in _SCRATCH},
        "majority": None if main is None else main["majority"],
        "bag_of_words": None if main is None else main.values.get("bag_of_words"),
        "peak_rss_bytes": max(run["peak_rss_bytes"] for run in timed),
        "seconds": sum(run["seconds"] for run in timed),
        "commit": commit(),
        "overlap_train_test": max([run["overlap_train_test"] or 0 for run in scored], default=0),
        "command": command_line(),
        "machine": shown["machine"],
        "task": {} if main is None else {"name": main["task"], "n_train": main["n_train"], "n_test": main["n_test"]},
        "model": shown["model"],
        "data": _data(corpora),
        "settings": _settings(config),
        "limits": [
            *dict.fromkeys(sentence for run in scored for sentence in overlap_sentences(run.values)),
            *_limits(config, corpora, shown, {run["task"] for run in scored}, scratch is not None),
        ],
        **({"once": {name: result_of(run) for name, run in once.items()}} if once else {}),
    }


def _data(corpora: Corpora) -> dict[str, Any]:
    """Return what the report says about the text: of a single corpus, or of each by its name."""
    keys = ("source", "licence", "vocab_size", "splits", "tokenizer_sha256")
    found = {name: {key: corpus.manifest[key] for key in keys} for name, corpus in corpora.items()}
    return next(iter(found.values())) if len(found) == 1 else found


def main_stage(entries: Sequence[StageEntry], kind: str) -> StageEntry | None:
    """Return the stage that represents a kind in the report: the one with the kind's name, else the first of it."""
    of_kind = [entry for entry in entries if entry.run == kind]
    return next((entry for entry in of_kind if entry.name == kind), of_kind[0] if of_kind else None)


def result_of(run: RunResult) -> Row:
    """Return the part of a stage's result that goes into the report."""
    values = {key: value for key, value in run.values.items() if key not in _LONG}
    if isinstance(values.get("masks"), Mapping):
        values["masks"] = {key: value for key, value in values["masks"].items() if key != "layers"}
    if (predicted := prediction_of(run)) is not None:
        values["predicted"] = predicted
    return values


def _arm_entry(config: PipelineConfig, runs: Runs, once: Mapping[str, RunResult]) -> Row:
    first = main_stage(runs.entries, "pretrain")
    pretrained = runs.runs.get(first.name) if first is not None else None
    # Arms without a pre-training of their own show the shared one that they start from.
    pretrained = pretrained or next((run for run in once.values() if run["stage"] == "pretrain"), None)
    # An evaluation trains nothing; what it measures is a training of the arm, or one that runs once.
    base = pretrained or next(run for run in [*runs.runs.values(), *once.values()] if run["stage"] != "evaluate")
    entry: Row = {
        "name": runs.name,
        "sparsity": base["sparsity"],
        "density": base["density"],
        "train_flops": base["flops"]["total"],
        "pretrain": {key: base.values.get(key) for key in _TEXT},
        "flops": base["flops"],
        "bytes": base.values.get("bytes"),
        "seconds": {name: run["seconds"] for name, run in runs.runs.items() if "seconds" in run.values},
        "curves": {name: _curve(run.directory) for name, run in runs.runs.items()},
        "stages": {name: result_of(run) for name, run in runs.runs.items()},
    }
    entry["pretrain"]["tokens"] = entry["pretrain"]["tokens"] or 0
    entry["pretrain"] |= _by_corpus(base)
    entry["texts"] = {
        name: {**{key: run.values.get(key) for key in _TEXT if key != "loss_first"}, **_by_corpus(run)}
        for name, run in runs.runs.items()
        if run["stage"] not in TASK_STAGES
    }
    if not entry["bytes"]:
        del entry["bytes"]
    if (masks := base.values.get("masks")) is not None:
        entry["masks"] = {key: value for key, value in masks.items() if key != "layers"}
        entry["masks"]["dead_rows"] = sum(layer["dead_rows"] for layer in masks["layers"].values())
    for kind in TASK_STAGES:
        stage = main_stage(runs.entries, kind)
        run = None if stage is None else runs.complete(stage.name)
        if run is not None:
            entry[kind] = {key: run.values.get(key) for key in _SCORED}
            entry[f"{kind}_flops"] = run["flops"]["total"]
    return entry


def _by_corpus(run: RunResult) -> dict[str, Any]:
    """Return the final scores of each of several corpora."""
    scores = {
        name: {"val_loss": score.get("val_loss", score.get("loss")), "bits_per_byte": score.get("bits_per_byte")}
        for name, score in moments_of(run.values)["after"].items()
    }
    return {"corpora": scores} if scores else {}


def _curve(directory: Path) -> list[Row]:
    noise = ("noise_scale", "noise_scale_low", "noise_scale_high")
    keep = ("step", "tokens", "loss", "lr", "val_loss", "bits_per_byte", *noise)
    if not (directory / METRICS).exists():
        return []
    return [{key: record[key] for key in keep if key in record} for record in read_metrics(directory / METRICS)]


def _settings(config: PipelineConfig) -> Row:
    """Return, by stage, the settings that a reader needs to judge the numbers."""
    shown: Row = {"seed": config.seed, "parameterization": dataclasses.asdict(config.parameterization)}
    arm = config.arms[0]
    for entry in config.stages:
        settings = config.stage_config(entry, None if entry.once else arm, "from" if entry.start else None)
        if not isinstance(settings, RunConfig):
            names = {each.name for each in dataclasses.fields(settings)} - RUN_SETTINGS
            shown[entry.name] = {name: getattr(settings, name) for name in sorted(names)}
            continue
        shown[entry.name] = _stage_settings(settings)
        if isinstance(settings, PromptConfig):
            shown[entry.name] |= {"n_tokens": settings.n_tokens, "train": settings.train, "start": entry.start}
        if isinstance(settings, AdaptConfig):
            vocabulary = {"n_tokens": settings.vocabulary.n_tokens, "method": settings.vocabulary.method}
            own = {"train": settings.train, "new_blocks": settings.new_blocks, "start": entry.start}
            shown[entry.name] |= {**vocabulary, **own}
    return shown


def _stage_settings(settings: RunConfig) -> Row:
    return {
        "lr": settings.optimizer.lr,
        "weight_decay": settings.optimizer.weight_decay,
        "schedule": settings.schedule.name,
        "batch_size": settings.budget.first_batch,
        "context": settings.data.context,
    }


def overlap_caveat(corpora: Corpora, tasks: Iterable[str]) -> list[str]:
    """Return a warning if the ids of the corpus differ in kind from those of tasks, so that an overlap of 0 is void.

    Rows of the user's have their texts compared, whatever their ids.
    """
    tasks = [name for name in tasks if name not in _COMPARED]
    sources = {corpus.manifest["source"] for corpus in corpora.values()}
    kinds = {SOURCES[name].ids if name in SOURCES else None for name in sources}
    if all(name in TASKS and TASKS[name].ids is not None and kinds == {TASKS[name].ids} for name in tasks):
        return []
    return [
        "Documents of the task and of this corpus have different kinds of ids, so the overlap between the test "
        "examples and the training text was not checked."
    ]


def _limits(config: PipelineConfig, corpora: Corpora, first: RunResult, tasks: Set[str], scratch: bool) -> list[str]:
    """Return sentences about the limits of the report's results, for this configuration."""
    stored = (first.values.get("bytes") or {}).get("parameters", 0) // 4
    tokens = first.values.get("tokens") or 0
    limits = [
        *overlap_caveat(corpora, tasks),
        f"One seed ({config.seed}) of initialisation, masks and sample order.",
        f"{stored / 1e6:.2g} M parameters in the first arm and {tokens / 1e6:.2g} M tokens: far below the models of "
        "the papers. Only signs and rough ratios can be expected to carry over.",
        "Every arm used the same base hyperparameters"
        + ("" if {divided(arm.name)[1] for arm in config.arms} <= {"", "run"} else ", but for what its name says")
        + (
            ", transferred by SμPar from the dense model; none was tuned for its sparsity."
            if config.parameterization.uses_density
            else "; under a parameterization without a density rule these are not equally good at every sparsity."
        ),
    ]
    if scratch:
        limits.append("The control from scratch has the same fine-tuning as the others, not a longer one.")
    return limits
