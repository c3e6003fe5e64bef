"""Pipelines: a list of stages run in several arms and compared in a report; pre-training alone is a list of one."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from sparsetrain.data import Corpora, DataConfig, prepare_corpora
from sparsetrain.errors import UserError
from sparsetrain.files import write_json
from sparsetrain.optim import RunSchedule
from sparsetrain.report.html import write_html
from sparsetrain.report.schema import validate_report
from sparsetrain.report.show import show_report
from sparsetrain.runs.claim import claimed
from sparsetrain.runs.layout import CONFIG, PAGE, REPORT, TOKENIZER
from sparsetrain.runs.origin import Origin
from sparsetrain.runs.recorded import read_recorded
from sparsetrain.runs.result import RunResult, finish, finished
from sparsetrain.screen import say
from sparsetrain.stages.adapt import Adaptation
from sparsetrain.stages.config import (
    AdaptConfig,
    FinetuneConfig,
    PretrainConfig,
    PromptConfig,
    RunConfig,
    StageConfig,
    identify,
)
from sparsetrain.stages.directories import run_directory
from sparsetrain.stages.evaluate import evaluate, held_out_titles
from sparsetrain.stages.evaluate_config import EvaluateConfig, check_evaluation
from sparsetrain.stages.finetune import Finetuning
from sparsetrain.stages.finished import skipped
from sparsetrain.stages.kinds import KINDS
from sparsetrain.stages.memory import check_memory
from sparsetrain.stages.pipeline_arms import Arm
from sparsetrain.stages.pipeline_config import PipelineConfig, StageEntry
from sparsetrain.stages.pipeline_report import report
from sparsetrain.stages.pretrain import Pretraining
from sparsetrain.stages.prompt import Prompting
from sparsetrain.stages.stage import Stage, train
from sparsetrain.stages.task_stage import available_task, task_facts
from sparsetrain.training.probes import TITLE
from sparsetrain.training.state import Diverged, resolve_device

_log = logging.getLogger(__name__)


@dataclass
class ArmRuns:
    """The results of an arm's stages, by name; stages after one that diverged are missing."""

    arm: Arm
    entries: list[StageEntry]
    runs: dict[str, RunResult] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return self.arm.name

    def complete(self, name: str) -> RunResult | None:
        """Return the result of a stage, or None if it did not run or diverged."""
        run = self.runs.get(name)
        return run if run is not None and run.complete else None

    @property
    def is_complete(self) -> bool:
        return all(self.complete(entry.name) for entry in self.entries)


def pipeline(config: PipelineConfig, console: Console | None = None) -> RunResult:
    """Run each arm and stage that is not done yet, write ``report.json`` and ``report.html``, and print the table.

    Raises:
        UserError, Interrupted: as the stages do; finished stages are kept and skipped the next time.
        Diverged: all arms diverged. If only some did, the report and the result name them.
    """
    console = console or Console()
    corpora = prepare_corpora(config.data, progress=True, console=console)
    origin = Origin.of_corpora(corpora)
    # A pipeline without a stage on a task needs no task.
    tasked = needs_task(config)
    run = identify("pipeline", config, origin, task_facts(available_task(config.task) if tasked else None))
    directory = run_directory(run, config, origin)
    with claimed(directory, run, origin) as done:
        if done is not None:
            skipped(done, console)
            show_report(directory, console)
            return done
        check_stages(config, corpora, directory, console)
        runs = _run_stages(config, directory, console)
        arms = [ArmRuns(arm, config.of_arm(arm), runs.get(arm, {})) for arm in config.arms]
        once = runs.get(None, {})
        if not any(arm.is_complete for arm in arms):
            raise Diverged(f"every arm of the pipeline in {directory} diverged: {_why(arms)}")
        content = report(config, corpora, arms, once)
        validate_report(content)
        write_json(directory / REPORT, content)
        # A section of a user must not cost the page of a long training.
        write_html(content, directory / PAGE, _omitted)  # type: ignore[arg-type]
        diverged = [arm.name for arm in arms if not arm.is_complete]
        outcome = {"status": "complete", "stage": "pipeline", "report": PAGE, "diverged": diverged}
        result = finish(directory, outcome)
    show_report(directory, console)
    return result


def _omitted(error: UserError) -> None:
    _log.warning("%s; the page omits it", error)


def _why(arms: list[ArmRuns]) -> str:
    """Return the message of the first stage that diverged."""
    broken = (run for runs in arms for run in runs.runs.values() if not run.complete)
    return str(next(broken).values.get("message"))


def stage_of(config: RunConfig, console: Console | None = None, corpora: Corpora | None = None) -> Stage[RunConfig]:
    """Return the stage that a configuration describes."""
    if isinstance(config, PromptConfig):
        return Prompting(config, console)  # type: ignore[return-value]
    if isinstance(config, FinetuneConfig):
        return Finetuning(config, console)  # type: ignore[return-value]
    if isinstance(config, AdaptConfig):
        return Adaptation(config, console, corpora)
    assert isinstance(config, PretrainConfig)
    return Pretraining(config, console, corpora)


def stage_directory(directory: Path, arm: Arm | None, entry: StageEntry) -> Path:
    """Return the run directory of a stage of a pipeline: ``ARM/STAGE``, or ``STAGE/KIND`` if it runs once."""
    return directory / entry.name / entry.run if arm is None else directory / arm.name / entry.name


def needs_task(config: PipelineConfig) -> bool:
    """Whether a stage of a pipeline learns a task."""
    return any(issubclass(KINDS[entry.run], FinetuneConfig) for entry in config.stages)


def planned_stages(config: PipelineConfig, directory: Path) -> Iterator[tuple[Arm | None, StageEntry, StageConfig]]:
    """Yield each stage in running order: its arm (None for a stage that runs once), its entry and its configuration.

    ``init_from`` is the directory of the stage that it starts from, which may not exist yet.
    """
    first = needed_first(config)
    rest = [entry for entry in config.stages if entry.once and entry not in first]
    for arm, entries in ((None, first), *((arm, config.of_arm(arm)) for arm in config.arms), (None, rest)):
        for entry in entries:
            yield arm, entry, _config_of(config, entry, arm, directory)


def _config_of(config: PipelineConfig, entry: StageEntry, arm: Arm | None, directory: Path) -> StageConfig:
    by_name = {stage.name: stage for stage in config.stages}
    start = None
    if entry.start is not None:
        first = by_name[entry.start]
        start = str(stage_directory(directory, None if first.once else arm, first))
    settings = config.stage_config(entry, arm, start, str(stage_directory(directory, arm, entry)))
    if start is None:
        return settings
    earlier = adaptations_before(config, entry)
    if earlier and isinstance(settings, RunConfig):
        settings.model = _adapted(settings.model, earlier, Path(start))
    if isinstance(settings, PretrainConfig) and not isinstance(settings, AdaptConfig):
        tokenizer = Path(start) / TOKENIZER
        # Text must be read with the tokenizer of the weights, which exists as soon as they do.
        if own_text(config, entry, settings) and settings.data.tokenizer_path is None and tokenizer.exists():
            settings.data = replace(settings.data, tokenizer_path=str(tokenizer))
    return settings


def adaptations_before(config: PipelineConfig, entry: StageEntry) -> list[StageEntry]:
    """Return the adaptations from whose weights a stage starts, directly or through others."""
    by_name = {stage.name: stage for stage in config.stages}
    found = []
    while entry.start is not None:
        entry = by_name[entry.start]
        if entry.run == "adapt":
            found.append(entry)
    return found


def own_text(config: PipelineConfig, entry: StageEntry, settings: StageConfig) -> bool:
    """Whether a stage reads its text with a tokenizer, or from sources, that the first stages do not share."""
    if not isinstance(settings, PretrainConfig):
        return False
    adapted = isinstance(settings, AdaptConfig) or bool(adaptations_before(config, entry))
    return adapted or "data" in entry.settings or _texts(settings) != _texts(config)


def _adapted(model: dict[str, Any], earlier: list[StageEntry], start: Path) -> dict[str, Any]:
    """Return the section ``model`` of the pipeline with what adaptations have made of the model."""
    found = {**model, "n_layers": model["n_layers"] + sum(entry.settings.get("new_blocks", 0) for entry in earlier)}
    if (start / CONFIG).exists():
        found["vocab_size"] = read_recorded(start, RunConfig).values["model"].get("vocab_size")
    return found


def check_stages(config: PipelineConfig, corpora: Corpora, directory: Path, console: Console) -> None:
    """Raise `UserError` before the first stage trains if the task, the schedule or the memory of any stage is wrong."""
    device = resolve_device(config.device)
    origin = Origin.of_corpora(corpora)
    trainings: dict[str | None, RunConfig] = {}
    others: set[str | None] = set()  # the stages that do not read ``corpora``
    for arm, entry, settings in planned_stages(config, directory):
        if isinstance(settings, EvaluateConfig):
            same = "data" not in entry.settings and settings.init_from not in others
            _check_evaluation(settings, trainings[settings.init_from], corpora if same else None, entry)
            continue
        assert isinstance(settings, RunConfig)
        trainings[settings.run_dir] = settings
        if own := own_text(config, entry, settings):
            others.add(settings.run_dir)
        if finished(stage_directory(directory, arm, entry)) is not None:
            continue
        waits = isinstance(settings, AdaptConfig) or settings.data.tokenizer_path is None
        if own and settings.init_from is not None and waits and finished(Path(settings.init_from)) is None:
            continue  # its text needs the tokenizer of a run that does not exist yet
        stage = stage_of(settings, console, None if own else corpora)
        stage.prepare(origin)
        # Raises if a schedule does not fit the length.
        RunSchedule(settings.schedule, stage.budget, settings.optimizer)
        check_memory(*stage.workload(f"pipeline.stages.{entry.name}."), device, config.force)


def _texts(config: RunConfig) -> dict[str, DataConfig]:
    """Return what determines the text and the tokenizer of a run, by corpus."""
    return {name: replace(corpus, context=1) for name, corpus in config.data.members().items()}


def _check_evaluation(settings: EvaluateConfig, run: RunConfig, corpora: Corpora | None, entry: StageEntry) -> None:
    try:
        check_evaluation(settings, run, corpora)
        if TITLE in settings.probes:
            held_out_titles(settings.data or run.data, set())
    except UserError as error:
        raise UserError(f"pipeline.stages: {entry.name}: {error}") from None


def needed_first(config: PipelineConfig) -> list[StageEntry]:
    """Return the stages that run once and that arms start from, directly or indirectly, in order."""
    entries = config.stages
    needed: set[str] = set()
    for entry in reversed(entries):  # an entry comes after the one that it starts from
        if entry.start is not None and (not entry.once or entry.name in needed):
            needed.add(entry.start)
    return [entry for entry in entries if entry.once and entry.name in needed]


def _run_stages(config: PipelineConfig, directory: Path, console: Console) -> dict[Arm | None, dict[str, RunResult]]:
    """Run each stage whose start is complete; return the results by arm (None: stages that run once) and name."""
    runs: dict[Arm | None, dict[str, RunResult]] = {}
    done: dict[str | None, RunResult] = {}
    heading = ""
    for arm, entry, settings in planned_stages(config, directory):
        start = done.get(settings.init_from)
        if settings.init_from is not None and (start is None or not start.complete):
            continue  # the stage that it starts from diverged
        title = arm.name if arm is not None else "from scratch" if entry.name == "scratch" else entry.name
        if title != heading:
            console.rule(title)
            heading = title
        done[settings.run_dir] = runs.setdefault(arm, {})[entry.name] = _attempt(settings, console)
    return runs


def _attempt(config: StageConfig, console: Console) -> RunResult:
    """Run a stage; if it diverges, return its result, so that the other arms continue."""
    if isinstance(config, EvaluateConfig):
        return evaluate(config, console)
    assert isinstance(config, RunConfig)
    try:
        return train(stage_of(config, console))
    except Diverged as error:
        say(console, f"diverged: {error}", style="red")
        assert config.run_dir is not None
        result = finished(Path(config.run_dir))
        assert result is not None
        return result
