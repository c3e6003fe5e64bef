"""The table of an adaptation: what each corpus gains by new tokens and by training, and what is forgotten."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sparsetrain.report.schema import Report
from sparsetrain.report.tables import Sheet
from sparsetrain.report.text import ABSENT, clean

_MOMENTS = ("before", "initialised", "after")


def adaptation_sheet(found: Mapping[str, Any], title: str = "Adaptation") -> Sheet:
    """Return one row per corpus, from the entry ``adaptation`` of a ``result.json``."""
    columns = ["Corpus"]
    columns += [f"Tokens per {unit}, {which}" for unit in ("byte", "word") for which in ("old", "new")]
    columns += [f"Loss {moment}" for moment in _MOMENTS] + [f"Bits per byte {moment}" for moment in _MOMENTS]
    rows = []
    for name, entry in found["corpora"].items():
        cells = [entry[f"tokens_per_{unit}"][which] for unit in ("byte", "word") for which in ("old", "new")]
        cells += [entry[key][moment] for key in ("val_loss", "bits_per_byte") for moment in _MOMENTS]
        rows.append((clean(name), *(f"{value:.4f}" for value in cells)))
    return Sheet(title, tuple(columns), tuple(rows), " ".join(_sentences(found)))


def _sentences(found: Mapping[str, Any]) -> list[str]:
    first, forgetting = clean(found["first"]), found["forgetting"]
    shown = "is not known, since the run reads a single corpus" if forgetting is None else f"{forgetting:+.4f}"
    sentences = [
        "Before: the model of init_from under its own tokenizer. Initialised: after the extension, before training.",
        f"Forgetting, in bits per byte of {first} since the first adaptation began: {shown}.",
        f"New tokens: {found['new_rows']:,} of {found['new_tokens']:,}. New blocks: {found['new_blocks']}.",
    ]
    for name, norms in found["row_norms"]["after"].items():
        at_first = found["row_norms"]["initialised"][name]
        if norms["new"] is not None:
            sentences.append(
                f"Mean norm of the rows of {clean(name)}: old {_number(norms['old'])}, new {_number(norms['new'])} "
                f"({_number(at_first['old'])} and {_number(at_first['new'])} at first)."
            )
    return sentences


def _number(value: float | None) -> str:
    return ABSENT if value is None else f"{value:.3g}"


def adaptations(report: Report) -> list[Sheet]:
    """Return the table of each adaptation of a pipeline."""
    groups = [("once", report.get("once", {})), *((arm["name"], arm.get("stages", {})) for arm in report["arms"])]
    return [
        adaptation_sheet(found, f"Adaptation: {clean(name)}/{clean(stage)}")
        for name, runs in groups
        for stage, result in runs.items()
        if (found := result.get("adaptation")) is not None
    ]
