"""What a run would do: phases, tokens, FLOPs, memory, directory and progress, without training or writing anything.

A corpus that is not prepared yet stays so. Numbers that depend on its length are then unknown, and a note says so.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from sparsetrain.cost.flops import hidden_density, hidden_shapes, training_flops_per_token
from sparsetrain.cost.footprint import Workload
from sparsetrain.cost.run_flops import RunFlops
from sparsetrain.data import Corpora, Task, TaskConfig
from sparsetrain.errors import UserError
from sparsetrain.models.config import ModelConfig
from sparsetrain.models.new_blocks import deepened
from sparsetrain.optim import Budget, RunSchedule
from sparsetrain.runs.checkpoint import list_checkpoints
from sparsetrain.runs.claim import check_same
from sparsetrain.runs.layout import CHECKPOINTS, CONFIG, RESULT
from sparsetrain.runs.origin import Origin, source_key
from sparsetrain.runs.recorded import Recorded
from sparsetrain.runs.result import load_result
from sparsetrain.sparsity import Rule, SparsityConfig, Static, make_rule
from sparsetrain.sparsity.evolution.managed import allocated_densities, check_allocated_evolution
from sparsetrain.stages.adapt import donor_facts
from sparsetrain.stages.config import (
    AdaptConfig,
    FinetuneConfig,
    PretrainConfig,
    PromptConfig,
    RunConfig,
    as_plain,
    model_config,
)
from sparsetrain.stages.directories import run_directory
from sparsetrain.stages.evaluate_config import EvaluateConfig
from sparsetrain.stages.hidden import densities_of, follows, hidden_of
from sparsetrain.stages.masks import sparsity_section
from sparsetrain.stages.memory import memory_fits
from sparsetrain.stages.pipeline import needs_task, own_text, planned_stages, stage_of
from sparsetrain.stages.pipeline_config import PipelineConfig
from sparsetrain.stages.plan_adapt import planned_adaptation
from sparsetrain.stages.plan_inputs import Inputs
from sparsetrain.stages.planned import Plan, PlannedPhase, PlannedRun
from sparsetrain.stages.pretrain import budget_of, workload_of
from sparsetrain.stages.task_stage import TaskStage, task_facts
from sparsetrain.stages.text import Reading, Text
from sparsetrain.stages.work import work_on_task, work_on_text
from sparsetrain.training.state import resolve_device

_UNKNOWN = 1 << 30  # validation tokens to assume for an unprepared text: enough for every evaluation


def status_of(directory: Path) -> tuple[str, int]:
    """Return the progress of a run, ``done``, ``stopped at step N`` or ``new``, and N."""
    saved = list_checkpoints(directory / CHECKPOINTS)
    step = int(saved[-1].rpartition("-")[2]) if saved else 0
    if (directory / RESULT).exists():
        status = load_result(directory / RESULT).get("status")
        return ("done" if status == "complete" else f"done ({status})"), step
    return (f"stopped at step {step}" if saved else "new"), step


def plan_of(config: RunConfig, inputs: Inputs | None = None) -> Plan:
    """Return what a configuration would run.

    Args:
        inputs: a cache of corpora and tasks, to be shared by the points of a sweep.

    Raises:
        UserError: the run itself would refuse the input.
    """
    inputs = inputs or Inputs()
    if isinstance(config, PipelineConfig):
        return _pipeline(config, inputs)
    if isinstance(config, FinetuneConfig):
        return Plan([_task("prompt" if isinstance(config, PromptConfig) else "finetune", config, inputs)])
    return Plan([plan_text("adapt" if isinstance(config, AdaptConfig) else "pretrain", config, inputs)])


def _pipeline(config: PipelineConfig, inputs: Inputs) -> Plan:
    name, corpora = inputs.corpora(config.data)
    origin = None if corpora is None else inputs.origin(corpora, None)
    tasked = needs_task(config)
    task, notes = _task_and_notes(inputs, config.task, config) if tasked else (None, [])
    known = task if isinstance(task, Task) else None
    facts = {"corpus": name, "source": None, **task_facts(known)}
    directory = _directory(Recorded("pipeline", type(config), as_plain(config), facts), config, origin)
    runs: dict[str, PlannedRun] = {}
    for arm, entry, settings in planned_stages(config, directory):
        title = f"{entry.name} (once)" if arm is None else f"{arm.name}/{entry.name}"
        assert settings.run_dir is not None
        start = None if settings.init_from is None else runs[settings.init_from]
        try:
            if isinstance(settings, EvaluateConfig):
                place = Path(settings.run_dir)
                runs[settings.run_dir] = PlannedRun(title, place, *status_of(place), trains=False)
            elif isinstance(settings, PretrainConfig):
                own = own_text(config, entry, settings) and start is not None
                runs[settings.run_dir] = plan_text(title, settings, inputs, start, own)
            else:
                assert isinstance(settings, FinetuneConfig)
                runs[settings.run_dir] = _task(title, settings, inputs, start)
        except UserError:
            if not (directory / RESULT).exists():
                raise
            notes = [*notes, f"{title} could not be repeated."]
    done = sum(run.done for run in runs.values())
    status = status_of(directory)[0]
    if status == "new" and (directory / CONFIG).exists():
        status = f"stopped, {done} of {len(runs)} runs done"
    return Plan(list(runs.values()), directory, status, notes)


def plan_text(
    name: str, config: RunConfig, inputs: Inputs, start: PlannedRun | None = None, own_text: bool = False
) -> PlannedRun:
    """Return what a pre-training or an adaptation would do.

    Args:
        start: the planned run that it starts from; None if that run exists or there is none.
        own_text: whether it reads another text than ``start``, with the tokenizer of ``start``.

    Raises:
        UserError: the run itself would refuse the input.
    """
    key, corpora, kind, facts = "", None, "pretrain", {}
    if isinstance(config, AdaptConfig):
        kind, facts = "adapt", donor_facts(config)
        config, key, corpora, notes = planned_adaptation(config, inputs)
        notes += [] if corpora is not None or notes else [_unprepared(config)]
    elif own_text and start is not None and config.data.tokenizer_path is None:
        notes = [f"The text needs the tokenizer of {start.directory}, which does not exist yet."]
    else:
        key, corpora = inputs.corpora(config.data)
        notes = [] if corpora is not None else [_unprepared(config)]
    seen = None if start is not None else config.init_from
    origin = None if corpora is None else inputs.origin(corpora, seen)
    facts |= {"corpus": key} | ({"source": source_key(config.init_from)} if start is None else {})
    directory = _directory(Recorded(kind, type(config), as_plain(config), facts), config, origin)
    run = PlannedRun(name, directory, *status_of(directory), origin=origin, notes=notes)
    model = model_config(config.model, vocabulary(config, corpora, start))
    if corpora is None and config.budget.epochs is not None:
        return run
    text = None if corpora is None else Text(corpora, config)
    budget = budget_of(config, model, None if text is None else text.samples_per_epoch)
    reads: list[dict[str, Reading]] = [{} for _ in budget.phases]
    if text is not None:
        text.check(budget)
        reads = text.read(budget) if config.data.sources else reads
    section = sparsity_section(config, budget)
    rule, densities = _masks(config, model, section, budget, start)
    ledger = RunFlops(model, densities, rule, budget, config.loop.micro_batch_of)
    phases = [
        PlannedPhase(
            phase.steps,
            phase.tokens,
            rates,
            (hidden_density(model, densities(phase.first_step)), hidden_density(model, densities(phase.end_step - 1))),
            phase.context,
            phase.batch_size,
            ledger.between(phase.first_step, phase.end_step)["total"],
            read,
        )
        for phase, rates, read in zip(budget.phases, inputs.rates(config, budget), reads, strict=True)
    ]
    dense = sum(training_flops_per_token(model, 1.0, phase.context).total * phase.tokens for phase in budget.phases)
    validation = corpora.validation_tokens if corpora is not None else _UNKNOWN
    workload = workload_of(config, model, budget, section, validation)
    curves = inputs.curves(config, budget)
    if budget.config.led is not None:
        run = replace(run, notes=[*run.notes, _bounds(budget)])
    run = replace(run, work=work_on_text(config, ledger))
    hidden = hidden_of(model, config.parameterization, config.optimizer, densities(0))
    planned = _with(run, phases, workload, dense, densities(budget.total_steps), curves, config)
    peak = RunSchedule(config.schedule, budget, config.optimizer).peak()
    hidden = replace(hidden, peak=peak, resizes=rule.resizes and bool(densities(0)))
    if config.optimizer.name != "adamw":
        return planned
    return replace(planned, hidden=hidden, notes=[*planned.notes, *follows(config.parameterization, hidden)])


def _bounds(budget: Budget) -> str:
    return (
        f"The noise scale leads the batch size: the run has between {budget.fewest_steps()} and {budget.total_steps} "
        f"steps, and what is shown is for {budget.phases[0].batch_size} sequences in each."
    )


def _masks(
    config: RunConfig, model: ModelConfig, section: SparsityConfig, budget: Budget, start: PlannedRun | None
) -> tuple[Rule, Callable[[int], Mapping[str, float]]]:
    """Return the rule of a pre-training, and a function from completed steps to the density of each sparse layer."""
    rule = make_rule(section, budget.total_steps)
    shapes = hidden_shapes(model)
    if config.init_from is None or (start is not None and start.final_densities is None):
        check_allocated_evolution(shapes, section, rule)
        return rule, allocated_densities(shapes, section, rule)
    kept = _start_densities(config, model, start)
    static = rule.resizes or not kept or (isinstance(config, AdaptConfig) and config.train != "all")
    return (Static() if static else rule), lambda _step: kept


def _task(name: str, config: FinetuneConfig, inputs: Inputs, start: PlannedRun | None = None) -> PlannedRun:
    stage = stage_of(config)
    assert isinstance(stage, TaskStage)
    task, notes = _task_and_notes(inputs, config.task, config)
    stage.known = task if isinstance(task, Task) else None
    facts: dict[str, str | None]
    if start is not None:
        origin = start.origin
        facts = {} if origin is None else {"corpus": origin.corpus}
    elif config.init_from is not None:
        origin = stage.origin()
        facts = dict(origin.facts)
    else:
        text, corpora = inputs.corpora(config.data)
        origin = None if corpora is None else inputs.origin(corpora, None)
        facts = {"corpus": text, "source": None}
        notes += [_unprepared(config)] if origin is None else []
    run = Recorded(stage.kind, type(config), as_plain(config), {**facts, **task_facts(stage.known)})
    directory = _directory(run, config, origin)
    planned = PlannedRun(name, directory, *status_of(directory), origin=origin, notes=notes)
    if isinstance(task, UserError) and not planned.done:
        raise task
    if stage.known is None or origin is None:
        return planned
    stage.prepare(origin)
    budget, model = stage.budget, model_config(config.model, origin.tokenizer.vocab_size)
    densities: Mapping[str, float] = {}
    if config.mode != "dense" or not stage.trained:
        densities = _start_densities(config, model, start)
    per_token, density = _per_token(model, densities, config), hidden_density(model, densities)
    phases = []
    for phase, rates in zip(budget.phases, inputs.rates(config, budget), strict=True):
        # Rows are as long as their text, so the number of tokens follows only from the batches.
        tokens = sum(
            stage.examples.tokens(budget.samples_at(step)[1], phase.batch_size)
            for step in range(phase.first_step, phase.end_step)
        )
        counts = (phase.context, phase.batch_size, per_token * tokens)
        phases.append(PlannedPhase(phase.steps, tokens, rates, (density, density), *counts))
    tokens_of = [phase.tokens for phase in phases]
    planned = replace(planned, work=work_on_task(config, model, budget, tokens_of, densities))
    dense = _per_token(model, {}, config) * sum(phase.tokens for phase in phases)
    return _with(planned, phases, stage.workload()[0], dense, densities, inputs.curves(config, budget), config)


def _with(
    run: PlannedRun,
    phases: Sequence[PlannedPhase],
    workload: Workload,
    dense_flops: float,
    final_densities: Mapping[str, float],
    curves: Mapping[str, Sequence[float]],
    config: RunConfig,
) -> PlannedRun:
    notes, fits = list(run.notes), run.done or memory_fits(workload, resolve_device(config.device))
    if not fits:
        notes.append("This exceeds the available memory: the run is refused without --force.")
    return replace(
        run,
        phases=phases,
        workload=workload,
        fits=fits,
        dense_flops=dense_flops,
        final_densities=final_densities,
        curves=curves,
        notes=notes,
    )


def _directory(run: Recorded, config: RunConfig, origin: Origin | None) -> Path:
    """Return the directory of a run.

    Raises:
        UserError: it holds another run.
    """
    directory = run_directory(run, config, origin)
    if origin is not None and (directory / CONFIG).exists():
        check_same(directory, run, origin)
    return directory


def _task_and_notes(inputs: Inputs, task: TaskConfig, config: RunConfig) -> tuple[Task | UserError | None, list[str]]:
    found = inputs.task(task)
    if found is not None:
        return found, []
    name = "" if config.run_dir is not None else "; the name of a new directory depends on it"
    return None, [f"The task {task.name} is not on this machine and would be downloaded{name}."]


def _start_densities(config: RunConfig, model: ModelConfig, start: PlannedRun | None) -> Mapping[str, float]:
    """Return the density of each sparse layer at the start of a run."""
    shapes = hidden_shapes(model)
    if config.init_from is None:
        return allocated_densities(shapes, config.sparsity, Static())(0) if config.sparsity.is_sparse else {}
    found = densities_of(config.init_from, model) if start is None else start.final_densities or {}
    if isinstance(config, AdaptConfig):
        return deepened(found, model.n_layers - config.new_blocks, config.new_blocks)
    return found


def vocabulary(config: RunConfig, corpora: Corpora | None, start: PlannedRun | None = None) -> int:
    """Return the size of a run's vocabulary; for a tokenizer that is not trained yet, the one that is wanted."""
    if corpora is not None:
        return corpora.tokenizer.vocab_size
    if isinstance(config, AdaptConfig):
        return 1  # its model has a number of rows
    if config.data.tokenizer_path is None and start is not None and start.origin is not None:
        return start.origin.tokenizer.vocab_size
    fixed = config.data.fixed_tokenizer()
    return config.data.vocab_size if fixed is None else fixed.vocab_size


def _unprepared(config: RunConfig) -> str:
    trained = config.data.tokenizer == "bpe" and config.data.tokenizer_path is None
    size = f"; until then a vocabulary of {config.data.vocab_size} tokens is assumed" if trained else ""
    return f"The text is not prepared yet{size}. Prepare it with: sparsetrain data, with the same data settings."


def _per_token(model: ModelConfig, densities: Mapping[str, float], config: RunConfig) -> float:
    return training_flops_per_token(model, densities or 1.0, config.data.context).total
