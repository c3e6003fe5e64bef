"""Conversion of settings of earlier formats: pipeline stages become a list, densities phases, rules sections, and the
cut of plain text a setting."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import Any

from sparsetrain.data.sources.plain_text import BLANK_LINE
from sparsetrain.sparsity.config import of_rule

Values = dict[str, Any]


def cut_by_blank_lines(values: Values) -> Values:
    """Return settings of a format before 3 in which the cut of plain text is said, of each corpus.

    Corpora without plain text get no setting, which would tell them from later ones.
    """
    values = _cut_stages(values)
    data = values.get("data")
    if not isinstance(data, Mapping):
        return values
    sources = data.get("sources")
    if isinstance(sources, Mapping):
        data = {**data, "sources": {name: _cut(each) for name, each in sources.items()}}
    return {**values, "data": _cut(data)}


def _cut_stages(values: Values) -> Values:
    pipeline = values.get("pipeline")
    stages = pipeline.get("stages") if isinstance(pipeline, Mapping) else None
    if not isinstance(pipeline, Mapping) or not isinstance(stages, list):
        return values
    cut = [cut_by_blank_lines(dict(stage)) if isinstance(stage, Mapping) else stage for stage in stages]
    return {**values, "pipeline": {**pipeline, "stages": cut}}


def _cut(source: Any) -> Any:
    path = source.get("path") if isinstance(source, Mapping) else None
    if not isinstance(path, str) or path.lower().endswith((".jsonl", ".parquet")):
        return source
    return {"separator": BLANK_LINE, **source}


def densities_in_phases(values: Values) -> Values:
    """Return settings in which the phases of the rule ``vspdf`` are phases of the budget.

    In format 1 ``sparsity.sparsity`` applied from the start, and each phase of the rule gave a sparsity and the
    fraction of training from which it applied.
    """
    sparsity, budget = values.get("sparsity"), values.get("budget")
    evolution = sparsity.get("evolution") if isinstance(sparsity, Mapping) else None
    if not isinstance(sparsity, Mapping) or not isinstance(evolution, Mapping) or not isinstance(budget, Mapping):
        return values
    phases: Any = evolution.get("phases")
    if evolution.get("rule") != "vspdf" or budget.get("phases") is not None or not _are_phases(phases):
        return values
    starts = [0.0, *(phase["at"] for phase in phases), 1.0]
    shares = [round(end - start, 12) for start, end in pairwise(starts)]
    densities = [None, *(round(1.0 - phase["sparsity"], 12) for phase in phases)]
    listed = [
        {"share": share, **({} if density is None else {"density": density})}
        for share, density in zip(shares, densities, strict=True)
    ]
    return {
        **values,
        "sparsity": {**sparsity, "evolution": {**evolution, "rule": "static", "phases": []}},
        "budget": {**budget, "phases": listed},
    }


def _are_phases(phases: Any) -> bool:
    return (
        isinstance(phases, list)
        and bool(phases)
        and all(
            isinstance(phase, Mapping) and all(isinstance(phase.get(name), int | float) for name in ("at", "sparsity"))
            for phase in phases
        )
    )


def stages_of_pipeline(values: Values, renamed: Callable[[Mapping[str, Any]], Values]) -> Values:
    """Return settings in which the fixed stages of a pipeline are a list, and its sparsities are arms.

    Args:
        renamed: converts the settings of a stage to their new names.
    """
    section = values.get("pipeline")
    if not isinstance(section, Mapping) or "stages" in section:
        return values
    sparsity = values.get("sparsity")
    own = sparsity.get("sparsity") if isinstance(sparsity, Mapping) else 0.0
    arms = section.get("sparsities") or ([0.0, own] if own else [0.0])
    stages: list[Values] = [{"name": "pretrain"}]
    tuned = section.get("finetune")
    tuning = renamed(tuned) if isinstance(tuned, Mapping) else {}
    stages.append({"name": "finetune", "from": "pretrain", **tuning})
    if isinstance(section.get("prompt"), Mapping):
        prompt = renamed(section["prompt"])
        stages.append({"name": "prompt", "from": prompt.pop("start", "pretrain"), **prompt})
    if section.get("scratch", True):
        stages.append({"name": "scratch", "run": "finetune", "once": True, "sparsity": {"sparsity": 0.0}, **tuning})
    return {**values, "pipeline": {"arms": {"sparsity.sparsity": arms}, "stages": stages}}


def without_other_rules(values: Values) -> Values:
    """Return settings in which a section of evolution has only the settings of its own rule.

    Earlier versions recorded the settings of all rules in that section.
    """
    found = _of_its_rule(values)
    pipeline = found.get("pipeline")
    stages = pipeline.get("stages") if isinstance(pipeline, Mapping) else None
    if isinstance(pipeline, Mapping) and isinstance(stages, list):
        # A stage without a rule uses the rule of the pipeline.
        return {**found, "pipeline": {**pipeline, "stages": [_of_its_rule(stage, named=True) for stage in stages]}}
    return found


def _of_its_rule(values: Any, named: bool = False) -> Any:
    """Return settings without those of other rules; with ``named``, keep a section that names no rule unchanged."""
    sparsity = values.get("sparsity") if isinstance(values, Mapping) else None
    evolution = sparsity.get("evolution") if isinstance(sparsity, Mapping) else None
    if not isinstance(sparsity, Mapping) or not isinstance(evolution, Mapping):
        return values
    if named and "rule" not in evolution:
        return values
    return {**values, "sparsity": {**sparsity, "evolution": of_rule(evolution)}}
