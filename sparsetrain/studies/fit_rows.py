"""The rows of a sweep as laws need them: in curves, by length of training, with the best settings that were tried."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from sparsetrain.errors import UserError
from sparsetrain.report.law_plots import LawPoint
from sparsetrain.report.sweep import OVERRIDES
from sparsetrain.report.tables import Sheet
from sparsetrain.scaling.law import Law

PER = ("weight", "nonzero")
DECAY, BATCH = "optimizer.weight_decay", "budget.batch_size"
LENGTHS = ("budget.tokens", "budget.steps", "budget.epochs", "budget.flops")

Rows = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Fitted:
    """A law with the table and the points that it comes from.

    Notes are sentences about what is missing, and a caveat is one that the law's file has too.
    """

    law: Law
    sheet: Sheet
    points: Sequence[LawPoint]
    notes: Sequence[str]
    label: str = ""
    caveat: str = ""


def counted(per: str) -> str:
    """Return the column of the parameters that a law counts."""
    return f"{per}s"


def unknown(columns: str, per: str) -> UserError:
    """Return the error about a sweep none of whose rows has the columns that a law needs."""
    dense = "; masks that change their density leave nonzeros empty" if per == "nonzero" else ""
    return UserError(f"no row has {columns}: an older table lacks them; give the run directories{dense}")


def loss_of(row: Mapping[str, Any]) -> float:
    """Return the loss of a run, infinite if it diverged."""
    return math.inf if row.get("loss") is None else float(row["loss"])


def batch_of(row: Mapping[str, Any]) -> float:
    """Return the tokens of a step."""
    return float(row["tokens"]) / float(row["steps"])


def check_rows(rows: Rows) -> None:
    """Raise `UserError` unless all rows have the numbers that laws are made of."""
    for row in rows:
        for name in ("tokens", "steps"):  # a run may diverge in its first step
            if not row[name] and row["loss"] is not None:
                raise UserError(f"{row['run']}: {name}={_shown(row[name])} must be at least 1")
        for name in ("lr", DECAY):
            value = row.get(name, 0.0)
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if not number or not 0.0 <= value < math.inf:
                raise UserError(f"{row['run']}: {name}={_shown(value)} must be a number of at least 0 and finite")


def _shown(value: Any) -> str:
    return "" if value is None else f"{value!s:.60}"


def check_varied(rows: Rows, setting: str) -> None:
    """Raise `UserError` unless the runs of a sweep differ in a setting."""
    if len({row.get(setting) for row in rows}) < 2:
        raise UserError(f"{setting} has the same value in every run: there is no curve over it; give several")


def left_out(count: int, why: str) -> list[str]:
    """Return the sentence about runs that do not count, or nothing."""
    return [f"{count} run{'s' * (count != 1)} {why} {'are' if count != 1 else 'is'} left out."] if count else []


def grouped(rows: Rows, names: Sequence[str]) -> dict[tuple[Any, ...], list[Mapping[str, Any]]]:
    """Return rows by the values of columns."""
    groups: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for row in rows:
        groups.setdefault(tuple(row.get(name) for name in names), []).append(row)
    return groups


def levels(rows: Rows) -> list[list[Mapping[str, Any]]]:
    """Return rows in groups of as many tokens; a run is up to one batch longer than its budget."""
    found: list[list[Mapping[str, Any]]] = []
    for row in sorted(rows, key=lambda row: int(row["tokens"])):
        first = found[-1][0] if found else None
        if first is None or row["tokens"] - first["tokens"] >= max(batch_of(row), batch_of(first)):
            found.append([])
        found[-1].append(row)
    return found


def of_one_batch(rows: Rows) -> tuple[Rows, list[str]]:
    """Return the runs whose batch size is a number, and a note about the others."""
    kept = [row for row in rows if isinstance(row.get(BATCH), int | float)]
    return kept, left_out(len(rows) - len(kept), "whose batch size changes")


def distinguishing(rows: Rows, varied: Sequence[str], swept: Sequence[str]) -> list[str]:
    """Return the settings that runs of one law must have in common.

    These are all that differ, except the swept ones, seeds, lengths and sizes, and what a memory limit asks for. A rate
    and a batch size may follow size and length.
    """
    lengths = [name for name in varied if name in LENGTHS]
    names = []
    for name in dict.fromkeys(("lr", *varied)):
        if any(name == each or name.startswith(f"{each}.") for each in (*swept, *LENGTHS)):
            continue
        values = {row.get(name) for row in rows}
        size = name.startswith("model.") and all(isinstance(value, int | float) for value in values)
        if len(values) < 2 or size or name.endswith("seed") or name.startswith("loop."):
            continue
        if name in ("lr", BATCH):
            own = grouped(rows, ("width", "depth", *lengths)).values()
            if all(len({row.get(name) for row in of}) == 1 for of in own):
                continue
        names.append(name)
    return names


def tuned(rows: Rows, by: Sequence[str], varied: Sequence[str]) -> list[Mapping[str, Any]]:
    """Return, for each value of ``by``, the runs of the settings with the lowest mean loss over seeds."""
    kept: list[Mapping[str, Any]] = []
    for of in grouped(rows, by).values():
        tried = grouped(of, ("width", "depth", "lr", *varied))
        most = max(len({row["seed"] for row in each}) for each in tried.values())
        # The lowest mean of fewer seeds would be chosen for its luck.
        full = [each for each in tried.values() if len({row["seed"] for row in each}) == most]
        kept += min(full, key=lambda each: float(np.mean([loss_of(row) for row in each])))
    return kept


def named(names: Sequence[str], key: Sequence[Any], rows: Rows, sets: bool = False) -> str:
    """Return a curve's settings that differ between curves, for a reader or as overrides."""
    varying = [name for name in names if len({str(row.get(name)) for row in rows}) > 1]
    pairs = [(name, value) for name, value in zip(names, key, strict=True) if name in varying]
    if sets:
        return " ".join(f"{OVERRIDES.get(name, name)}={value}" for name, value in pairs)
    return ", ".join(f"{name.rpartition('.')[2]} {value}" for name, value in pairs) or "all runs"
