"""What a finished run would take on another machine, from its directory alone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import torch

from sparsetrain.cost.flops import hidden_shapes
from sparsetrain.cost.run_flops import RunFlops
from sparsetrain.cost.run_time import RunWork
from sparsetrain.errors import UserError
from sparsetrain.models.config import ModelConfig
from sparsetrain.optim import Budget
from sparsetrain.optim.batch_size import Decision
from sparsetrain.reading import read_json
from sparsetrain.runs.layout import BACKENDS
from sparsetrain.runs.provenance import machine
from sparsetrain.runs.recorded import read_recorded
from sparsetrain.runs.result import RunResult, finished
from sparsetrain.settings import build
from sparsetrain.shapes import check
from sparsetrain.sparsity import Static, make_rule
from sparsetrain.sparsity.evolution.managed import allocated_densities
from sparsetrain.stages.config import AdaptConfig, FinetuneConfig, RunConfig
from sparsetrain.stages.generate import run_config
from sparsetrain.stages.hidden import densities_of
from sparsetrain.stages.kinds import KINDS
from sparsetrain.stages.masks import sparsity_section
from sparsetrain.stages.work import prediction, work_on_task, work_on_text


def work_of(directory: Path) -> RunWork:
    """Return the work of a complete run, for `sparsetrain.cost.run_time.predicted`.

    A run that started from another one, or learned a task, keeps its densities, which are those of its weights.

    Raises:
        UserError: the directory holds no complete training, or its result or its weights lack what is needed.
    """
    done = finished(directory)
    kind = read_recorded(directory, RunConfig).kind
    schema = KINDS.get(kind)
    if schema is None or not issubclass(schema, RunConfig):
        raise UserError(f"{directory} is no training, but a run of kind {kind}")
    if done is None or not done.complete:
        raise UserError(f"{directory} is not complete: what it takes follows from its result")
    values = done.values
    for name in ("model", "steps", "tokens", "samples"):
        if not values.get(name):
            raise UserError(f"{directory}: its result has no {name}; an older version wrote it")
    config = build(schema, read_recorded(directory, schema).values)
    model = build(ModelConfig, {**values["model"], "sparsity": 0.0}, f"{directory}: model.")
    backends, threads = _backends(directory), (values.get("machine") or {}).get("threads")
    if isinstance(threads, int):
        config = replace(config, threads=threads)
    budget = _budget(config, values["steps"])
    if isinstance(config, FinetuneConfig):
        row = values["tokens"] / values["samples"]
        tokens = [round(row * phase.steps * phase.batch_size) for phase in budget.phases]
        return work_on_task(config, model, budget, tokens, densities_of(str(directory), model), backends)
    decisions = check(values.get("decisions", []), list[Decision], f"{directory}: decisions")
    budget.replay(msgspec.convert(decisions, list[Decision]))
    section = sparsity_section(config, budget)
    rule = make_rule(section, budget.total_steps)
    if config.init_from is None:
        densities_at = allocated_densities(hidden_shapes(model), section, rule)
    else:
        kept = densities_of(str(directory), model)
        fixed = rule.resizes or not kept or (isinstance(config, AdaptConfig) and config.train != "all")
        rule, densities_at = (Static() if fixed else rule), lambda _step: kept
    ledger = RunFlops(model, densities_at, rule, budget, config.loop.micro_batch_of)
    return work_on_text(config, ledger, backends)


def prediction_of(run: RunResult) -> dict[str, Any] | None:
    """Return the prediction in a result, or one made now if this machine trained the run and was calibrated since.

    None is a run without a prediction.
    """
    stored: dict[str, Any] | None = run.values.get("predicted")
    place = run.values.get("machine")
    if stored or not run.complete or not isinstance(place, dict):
        return stored
    if not run.values.get("step_seconds") or place.get("device") != machine(torch.device("cpu"))["device"]:
        return None
    try:
        return prediction(run_config(run.directory), work_of(run.directory)).get("predicted")
    except UserError:
        return None


def _budget(config: RunConfig, steps: int) -> Budget:
    """Return the budget of a run; the text that a length in epochs depends on, and FLOPs, are replaced by the steps."""
    known = config.budget
    if known.epochs is not None or known.flops is not None:
        known = replace(known, epochs=None, flops=None, steps=steps)
    return Budget.of(known, config.data.context)


def _backends(directory: Path) -> list[str]:
    path = directory / BACKENDS
    return list(read_json(path, dict[str, str]).values()) if path.exists() else []
