"""``sparsetrain provision``: which models a budget pays for on which machines, with the loss that a law predicts.

Each candidate spends its share of the budget: its tokens are the budget over the cost of a token, in whole steps. Time,
memory and FLOPs are those of `sparsetrain.simulate`, over arrays. The loss is that of a law L(N, D). Of all candidates,
those are shown that no other one beats in loss, time and cost together.
"""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sparsetrain.cost.operations import LINEAR
from sparsetrain.cost.timing import BSR, CSR, skips_zeros
from sparsetrain.files import file_errors, typed_path, write_json
from sparsetrain.report.sweep import write_rows
from sparsetrain.scaling.published import chinchilla
from sparsetrain.stages.plan import vocabulary
from sparsetrain.stages.plan_inputs import Inputs
from sparsetrain.studies.provision_config import BUDGETS, ProvisionConfig
from sparsetrain.studies.provision_rows import Row, hours, numbers, row_of, shown
from sparsetrain.studies.provision_search import Machines, Place, Search, search

_COLUMNS = 100


@dataclass(frozen=True)
class Provision:
    """The answer of a plan.

    Args:
        budget: its kind, amount and unit.
        law: what the losses are from.
        candidates, valid: all of the grid, and the number that fits and is long enough.
        pareto: how many of these no other one beats.
        rows: the rows that are shown.
        notes: sentences.
    """

    budget: dict[str, Any]
    law: list[dict[str, Any]]
    candidates: int
    valid: int
    pareto: int
    rows: Sequence[Row]
    notes: Sequence[str]

    def as_dict(self) -> dict[str, Any]:
        """Return every field, as JSON has it."""
        return asdict(self)


def provision(config: ProvisionConfig) -> None:
    """Print a plan as text or JSON, and write it into a directory.

    Raises:
        UserError: see `provisioned`, or a file cannot be written.
    """
    found, front, answer = provisioned(config)
    if config.out is not None:
        _write(typed_path(config.out, "out"), found, front, answer)
    if config.format == "json":
        print(json.dumps(answer.as_dict(), indent=2, allow_nan=False))
        return
    for line in lines(answer):
        print(line)


def provisioned(config: ProvisionConfig) -> tuple[Search, list[Place], Provision]:
    """Return all candidates, the Pareto set, and the answer.

    Raises:
        UserError: a machine, a law or the grid is unusable; nothing fits; or the budget pays for nothing.
    """
    _, corpora = Inputs().corpora(config.data)
    found, laws, notes = search(config, vocabulary(config, corpora))
    front = found.front()
    rows, warnings = [], dict[str, list[str]]()
    for index, place in enumerate(thinned(front, config.rows), 1):
        row, said = row_of(found, place, laws)
        rows.append(row)
        for warning in said:
            warnings.setdefault(warning, []).append(f"{index}")
    notes += [f"Row{'s' * (len(of) > 1)} {', '.join(of)}: {warning}" for warning, of in warnings.items()]
    notes += _notes(found, rows, None if corpora is None else sum(corpora.train_tokens.values()))
    if len(rows) < len(front):
        notes.append(f"The Pareto set has {len(front)} candidates, of which {len(rows)} are shown.")
    answer = Provision(
        {"kind": config.kind, "amount": config.amount, "unit": BUDGETS[config.kind]},
        [
            {
                "sparsity": sparsity,
                "counts": law.inputs[0].unit,
                "source": law.source,
                "parameters": dict(law.parameters),
            }
            for sparsity, law in zip(found.sparsities, found.laws, strict=True)
        ],
        int(found.valid.size),
        int(found.valid.sum()),
        len(front),
        rows,
        list(dict.fromkeys(notes)),
    )
    return found, front, answer


def thinned(front: Sequence[Place], most: int) -> list[Place]:
    """Return at most this number of entries of a list, evenly, with both ends."""
    if len(front) <= most:
        return list(front)
    if most == 1:
        return [front[0]]
    return [front[round(index * (len(front) - 1) / (most - 1))] for index in range(most)]


def _notes(found: Search, rows: Sequence[Row], text: int | None) -> list[str]:
    notes = ["The commands set model, sparsity, budget and rates; add the other settings given here, such as data."]
    if any(law is chinchilla for law in found.laws):
        said = "which counts all stored parameters and was fitted to dense models on other text"
        notes.append(f"The loss is by {chinchilla.source}, {said}; sparse models need a law of their own.")
    if any(row.devices > 1 for row in rows):
        notes.append(
            "`sparsetrain pretrain` trains on one device; rows with more say what data parallelism would take."
        )
    if max(found.sparsities) > 0.0:
        blind = [group for group in found.groups if not _uses_zeros(group)]
        names = dict.fromkeys(group.machine.name for group in blind)
        notes += [
            f"{name} cannot skip such zeros: sparse matrices take the time of dense ones there." for name in names
        ]
    guessed = [group.machine.name for group in found.groups if group.machine.spread is None]
    notes += [f"{name} has no measured steps: the band of its times is a guess." for name in guessed]
    if found.config.sparsity.evolution.rule != "static":
        notes.append(f"Mask updates of rule={found.config.sparsity.evolution.rule} are not counted.")
    if text is None:
        notes.append("The text is not prepared yet, so it is not known how often a run reads it.")
    elif rows and (most := max(row.tokens for row in rows)) > text:
        notes.append(f"The longest run reads the text {most / text:.3g} times; the laws are about texts read once.")
    return notes


def _uses_zeros(group: Machines) -> bool:
    known = any(group.machine.has_backend(LINEAR, name) for name in (CSR, BSR))
    return known or skips_zeros(group.machine, group.setting)


def lines(answer: Provision) -> Iterator[str]:
    """Yield the answer as text; only commands are longer than 100 columns."""
    budget = answer.budget
    yield f"budget: {budget['amount']:g} {budget['unit']}"
    yield f"candidates: {answer.candidates:,}, of which {answer.valid:,} fit and are long enough"
    for source in dict.fromkeys(law["source"] or "a file without a source" for law in answer.law):
        yield f"loss: {source}"
    yield ""
    yield from shown(answer.rows)
    for index, row in enumerate(answer.rows, 1):
        yield ""
        yield from _wrapped(f"{index}. {row.why}")
        yield from _wrapped(
            f"lr {row.learning_rate:.4g} (hidden {row.hidden_learning_rate:.4g}), init std {row.init_std:.4g} (hidden "
            f"{row.hidden_init_std:.4g}), weight decay {row.weight_decay:.4g} (hidden {row.hidden_weight_decay:.4g}), "
            f"tau {row.tau:.3g}; {row.tokens_per_parameter:.3g} tokens a weight; 90 % of times from "
            f"{hours(row.band[0])} to {hours(row.band[1])}; {_divided(row)}",
            "   ",
        )
        yield f"   {row.command}"
    if answer.notes:
        yield ""
    for note in answer.notes:
        yield from _wrapped(f"note: {note}")


def _divided(row: Row) -> str:
    zero = f", ZeRO {row.zero}" if row.zero else ""
    again = ", recomputed activations" if row.recompute != "none" else ""
    return f"{row.dtype}, micro-batches of {row.micro_batch}{zero}{again}"


def _wrapped(text: str, indent: str = "") -> list[str]:
    return textwrap.wrap(
        text, _COLUMNS, initial_indent=indent, subsequent_indent=indent or "   ", break_on_hyphens=False
    )


def _write(out: Path, found: Search, front: Sequence[Place], answer: Provision) -> None:
    from sparsetrain.report.provision_plots import provision_figure

    table = []
    for place in front:
        values = numbers(found, place)
        model, band, interval = values.pop("model"), values.pop("band"), values.pop("loss_interval")
        table.append({**model, **values, "seconds_low": band[0], "seconds_high": band[1], "loss_interval": interval})
    for row in table:
        low, high = row.pop("loss_interval") or (None, None)
        row |= {"loss_low": low, "loss_high": high}
    with file_errors(out):
        out.mkdir(parents=True, exist_ok=True)
        write_rows(table, out / "results.csv")
        write_json(out / "provision.json", answer.as_dict())
        provision_figure(table, answer.budget["kind"], out / "provision.png")
