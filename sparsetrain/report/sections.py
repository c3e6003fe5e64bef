"""The library's own sections of ``report.html``.

A section is a function here, which returns the variables of a template in ``templates/sections``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sparsetrain.report import tables, task
from sparsetrain.report.adaptation import adaptations
from sparsetrain.report.findings import cautions, findings
from sparsetrain.report.plots import text_curves
from sparsetrain.report.registry import register_section
from sparsetrain.report.schema import Report
from sparsetrain.report.times import times

_ALWAYS_LIMITS = (
    "FLOPs are counted by a formula: what a machine would do that skips every zero, not how long anything took.",
    "An interval covers the sampling of test examples, not the choice of a seed: another seed may move it further.",
)
_GROUPS = ("machine", "data", "task", "model", "settings")


@register_section("found", "What was found", 10, "sections/found.html.j2")
def found(report: Report) -> Mapping[str, Any]:
    shown = {"sheet": tables.results(report), "texts": tables.texts(report)}
    return {"findings": findings(report), "cautions": cautions(report), **shown}


@register_section("curves", "Training curves", 20, "sections/curves.html.j2")
def curves(report: Report) -> Mapping[str, Any]:
    return {"texts": list(text_curves(report))}


@register_section("cost", "Cost", 30, "sections/cost.html.j2")
def cost(report: Report) -> Mapping[str, Any]:
    return {"sheet": tables.cost(report), "times": times(report)}


@register_section("flops", "FLOPs by term", 40, "sections/flops.html.j2")
def flops(report: Report) -> Mapping[str, Any]:
    return {"sheet": tables.flops(report)}


@register_section("masks", "Masks", 50, "sections/masks.html.j2")
def masks(report: Report) -> Mapping[str, Any]:
    return {"sheet": tables.masks(report)}


@register_section("memory", "Memory", 60, "sections/memory.html.j2")
def memory(report: Report) -> Mapping[str, Any]:
    return {"sheet": tables.memory(report)}


@register_section("limits", "What this does not show", 70, "sections/limits.html.j2")
def limits(report: Report) -> Mapping[str, Any]:
    return {"limits": [*report.get("limits", []), *_ALWAYS_LIMITS]}


@register_section("provenance", "What was run", 80, "sections/provenance.html.j2")
def provenance(report: Report) -> Mapping[str, Any]:
    """Return the command, and groups of settings and facts: the run, and every group that the report has."""
    run = {"commit": report["commit"] or "not known"}
    if isinstance(machine := report.get("machine"), str):
        run["machine"] = machine
    groups = {name.capitalize(): group for name in _GROUPS if isinstance(group := report.get(name), Mapping)}
    return {"command": report.get("command"), "groups": {"Run": run, **groups}}


@register_section("adaptation", "Adaptation", 25, "sections/adaptation.html.j2")
def adaptation(report: Report) -> Mapping[str, Any]:
    return {"sheets": adaptations(report)}


@register_section("labels", "Labels", 22, "sections/labels.html.j2")
def labels(report: Report) -> Mapping[str, Any]:
    return {"sheets": task.labels(report)}
