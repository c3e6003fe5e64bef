"""Tables of arms, with a row for each stage, arm and seed, and their means and differences.

There are two kinds of table. In a table of pipelines, an arm is a kind of pre-training (``dense``, ``sparse-0.75``, or
``scratch`` for no pre-training). Its stages are ``pretrain`` and ways of learning a task, such as ``finetune`` or
``prompt-frozen``. In a table of masks, an arm is an evolution rule, and a row is one pre-training run.

Every interval is Student's t at 95 %, over seeds. Differences are paired by seed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NotRequired, get_type_hints

import numpy as np

from sparsetrain.errors import UserError
from sparsetrain.reading import read_csv
from sparsetrain.report.run_files import Flops, Loss, TableRow, table_cell
from sparsetrain.report.sweep import write_rows
from sparsetrain.report.tables import Sheet
from sparsetrain.report.text import percent, si
from sparsetrain.scaling.intervals import Interval, mean_interval, paired
from sparsetrain.scaling.transfer import relative_gap
from sparsetrain.shapes import Count, Fraction, check
from sparsetrain.sparsity.evolution.base import RULES

PRETRAIN, SCRATCH = "pretrain", "scratch"
WAYS = ("finetune", "finetune-sparse", "prompt", "prompt-frozen")
"""Stages that end in an accuracy, in the order of display; other stages come after them."""
STAGE_COLUMNS = (
    *("arm", "stage", "task", "status", "density", "tokens", "bits_per_byte"),
    *("accuracy", "ci_low", "ci_high", "macro_f1", "n_test", "majority"),
    *("train_flops", "flop_ratio_formula", "seconds", "peak_rss_bytes"),
)
MASK_COLUMNS = (
    *("rule", "status", "tokens", "bits_per_byte", "density", "itop_rate", "mask_overlap", "dead_rows"),
    *("train_flops", "seconds", "peak_rss_bytes"),
)
"""The columns that follow those of every table of an experiment."""
_FIRST_TASK = "section_roles"  # the task of old tables, which have no column for it
_ALIKE = ("parameterization", "sparsity", "width", "depth", "lr")  # columns that are equal for all seeds of an arm

Row = dict[str, Any]
Course = list[tuple[float, float, float]]
"""Masks over a run: fraction of training, density of the hidden matrices, and R_s, the share of weights ever active."""


class _Row(TableRow):
    """Columns of both kinds of table. Losses are in nats per token, null if diverged; FLOPs follow the formula."""

    status: NotRequired[str | None]
    bits_per_byte: Loss | None
    density: NotRequired[Fraction | None]
    train_flops: Flops | None
    seconds: NotRequired[float | None]
    peak_rss_bytes: NotRequired[Count | None]


class StageRow(_Row):
    """One stage of an arm for one seed; ``task`` is null for pre-training, and accuracies are fractions."""

    arm: str
    stage: str
    task: str | None
    accuracy: Fraction | None
    ci_low: NotRequired[Fraction | None]
    ci_high: NotRequired[Fraction | None]
    macro_f1: NotRequired[Fraction | None]
    n_test: NotRequired[Count | None]
    majority: Fraction | None
    flop_ratio_formula: NotRequired[Flops | None]


class MaskRow(_Row):
    """One run under an evolution rule; its masks are measured at the end, over all sparse layers."""

    rule: str
    itop_rate: Fraction | None
    mask_overlap: Fraction | None
    dead_rows: Count | None


_NUMBERS = {
    name
    for shape in (StageRow, MaskRow)
    for name in get_type_hints(shape)
    if name not in ("parameterization", "commit", "status", "arm", "stage", "task", "rule")
}


@dataclass(frozen=True)
class Arms:
    """A table of arms.

    Args:
        rows: each has the keys of `StageRow` or of `MaskRow`, and possibly more.
        columns: the columns of ``results.csv``, in order.
        where: the file or directory, for errors.
        courses: the `Course` of each run of masks by rule and seed, if the metrics of the run still exist.
    """

    rows: list[Row]
    columns: tuple[str, ...]
    where: str
    courses: Mapping[tuple[str, int], Course] = field(default_factory=dict)

    @property
    def of_masks(self) -> bool:
        return "rule" in self.columns

    def identities(self) -> list[tuple[Any, ...]]:
        """Return the values that identify each row; the seed comes last."""
        names = ("rule", "seed") if self.of_masks else ("arm", "stage", "task", "seed")
        return [tuple(row[name] for name in names) for row in self.rows]

    def write(self, path: Path) -> None:
        """Write ``results.csv``; a table from `read_arms` gives the same bytes again."""
        write_rows([{name: row.get(name) for name in self.columns} for row in self.rows], path, self.columns)


def read_arms(path: Path) -> Arms:
    """Return the table of a ``results.csv``; unknown columns are kept unchanged.

    Raises:
        UserError: the file is no CSV, no table of arms or has no row, or a cell is not valid for its column.
    """
    cells = read_csv(path)
    if not cells:
        raise UserError(f"{path} has no row")
    columns = tuple(cells[0])
    of_masks = "rule" in columns
    if not of_masks and ("arm" not in columns or not {"stage", "how"} & set(columns)):
        raise UserError(
            f"{path} is no table of arms: it has neither a column rule nor the columns arm and stage; sparsetrain "
            "sweep reads the table of a sweep"
        )
    rows = []
    for number, texts in enumerate(cells, start=1):
        row = {name: table_cell(text) if name in _NUMBERS else text or None for name, text in texts.items()}
        if not of_masks:
            row.setdefault("stage", row.get("how"))  # the name of the column in older tables
            row.setdefault("task", None if row["stage"] == PRETRAIN else _FIRST_TASK)
        rows.append(check(row, MaskRow if of_masks else StageRow, f"{path}, row {number}"))
    return Arms(rows, columns, str(path))


def join(tables: Sequence[Arms]) -> Arms:
    """Return the union of several tables.

    Raises:
        UserError: the tables are of both kinds, a row occurs twice, or runs of an arm differ in more than the seed.
    """
    if len({table.of_masks for table in tables}) > 1:
        raise UserError("stages of pipelines and single runs of masks are two tables: report them one at a time")
    seen: dict[tuple[Any, ...], str] = {}
    first: dict[tuple[Any, ...], tuple[Row, str]] = {}
    for table in tables:
        for key, row in zip(table.identities(), table.rows, strict=True):
            if key in seen:
                name = "/".join(str(part) for part in key[:-1] if part)
                raise UserError(f"{name} of seed {key[-1]} occurs twice: in {seen[key]} and in {table.where}")
            seen[key] = table.where
            other, where = first.setdefault(key[:-1], (row, table.where))
            changed = [name for name in _ALIKE if row[name] != other[name]]
            if changed:
                values = f"{changed[0]}={row[changed[0]]} (there: {other[changed[0]]})"
                raise UserError(f"{table.where} and {where} differ in more than the seed: {values}")
    columns = dict.fromkeys(name for table in tables for name in table.columns)
    if "stage" in columns:
        columns.pop("how", None)
    return Arms(
        [row for table in tables for row in table.rows],
        tuple(columns),
        ", ".join(table.where for table in tables),
        {key: course for table in tables for key, course in table.courses.items()},
    )


def arm_names(rows: Sequence[Row]) -> list[str]:
    """Return the arms in order of sparsity, and last the arm without pre-training."""
    sparsity = {row["arm"]: row["sparsity"] for row in reversed(rows)}
    return sorted(dict.fromkeys(row["arm"] for row in rows), key=lambda name: (name == SCRATCH, sparsity[name]))


def pretrained(rows: Sequence[Row]) -> list[str]:
    """Return the pre-trained arms in order of sparsity."""
    return arm_names([row for row in rows if row["stage"] == PRETRAIN])


def ways(rows: Sequence[Row]) -> list[str]:
    """Return the stages that learn a task, in the order of `WAYS`."""
    return _ordered([row["stage"] for row in rows if row["task"]], WAYS)


def tasks(rows: Sequence[Row]) -> list[str]:
    """Return the tasks in the order of the rows."""
    return list(dict.fromkeys(row["task"] for row in rows if row["task"]))


def rules(rows: Sequence[Row]) -> list[str]:
    """Return the evolution rules in the order of their registration, unknown ones last."""
    return _ordered([row["rule"] for row in rows], RULES.names())


def _ordered(names: Sequence[str], known: Sequence[str]) -> list[str]:
    return sorted(dict.fromkeys(names), key=lambda name: known.index(name) if name in known else len(known))


def select(rows: Sequence[Row], key: str, **wanted: Any) -> dict[int, float]:
    """Return ``key`` by seed, for the rows whose columns equal ``wanted``; a row with a null ``key`` is left out."""
    return {
        row["seed"]: row[key]
        for row in rows
        if row[key] is not None and all(row[name] == value for name, value in wanted.items())
    }


def means(rows: Sequence[Row]) -> Sheet:
    """Return the mean over seeds of each stage of each arm."""
    body = []
    for task in [None, *tasks(rows)]:
        for arm in arm_names(rows):
            for stage in ways(rows) if task else [PRETRAIN]:
                same = {"arm": arm, "stage": stage, "task": task}
                seeds = select(rows, "seed", **same)
                bits, accuracy, flops = (
                    list(select(rows, name, **same).values()) for name in ("bits_per_byte", "accuracy", "train_flops")
                )
                if seeds:
                    name = ", ".join([arm, stage, *([task] if task else [])])
                    cells = _mean(bits, 1.0, 4), _mean(accuracy, 100.0, 1), si(float(np.mean(flops or [0])), "FLOP")
                    body.append((name, str(len(seeds)), *cells))
    majority = {task: select(rows, "majority", task=task) for task in tasks(rows)}
    note = "Brackets: 95 %, Student's t over seeds."
    for task, shares in majority.items():
        if shares:
            note += f" Majority class, {task}: {percent(float(np.mean(list(shares.values()))))}."
    columns = ("stage", "seeds", "bits per byte", "accuracy, %", "training")
    return Sheet("Arms", columns, tuple(body), note)


def differences(rows: Sequence[Row], with_tasks: bool = True) -> Sheet:
    """Return differences paired by seed: of arms from the densest and from scratch, of stages from fine-tuning.

    Args:
        rows: of a table of pipelines.
        with_tasks: whether to include accuracies on tasks beside the losses of pre-training.
    """
    body = []
    arms = pretrained(rows)

    def compare(name: str, key: str, one: Row, other: Row) -> None:
        a, b = select(rows, key, **one), select(rows, key, **other)
        if key == "accuracy":
            mean, half, count = paired(a, b)
            numbers, ends = f"{100 * mean:+.2f} points", (100 * (mean - half), 100 * (mean + half))
        elif gap := relative_gap(a, b):
            numbers, count, inner = f"{100 * gap.relative:+.2f} %", gap.seeds, gap.interval or (0.0, 0.0)
            ends = (100 * inner[0], 100 * inner[1])
        else:
            count = 0
        if not count:
            return
        interval = f"[{ends[0]:.2f}, {ends[1]:.2f}]" if count > 1 else "-"
        apart = "one seed" if count < 2 else "not told apart" if ends[0] <= 0.0 <= ends[1] else "told apart"
        body.append((name, numbers, interval, str(count), apart))

    for arm in arms[1:]:
        one, base = ({"arm": name, "stage": PRETRAIN} for name in (arm, arms[0]))
        compare(f"{arm} - {arms[0]}, bits per byte", "bits_per_byte", one, base)
    for task in tasks(rows) if with_tasks else []:
        for stage in ways(rows):
            for arm in arms[1:]:
                one, base = ({"arm": name, "stage": stage, "task": task} for name in (arm, arms[0]))
                compare(f"{arm} - {arms[0]}, {stage}, {task}", "accuracy", one, base)
        for arm in arms:
            tuned, control = ({"arm": name, "stage": WAYS[0], "task": task} for name in (arm, SCRATCH))
            compare(f"{arm} - {SCRATCH}, {WAYS[0]}, {task}", "accuracy", tuned, control)
            for stage in ways(rows):
                if stage != WAYS[0]:
                    compare(f"{stage} - {WAYS[0]}, {arm}, {task}", "accuracy", tuned | {"stage": stage}, tuned)
    columns = ("difference", "mean", "95 % interval", "seeds", "")
    return Sheet("Differences, paired by seed", columns, tuple(body))


def mask_means(rows: Sequence[Row]) -> Sheet:
    """Return, for each evolution rule, the means over seeds of the loss and of the masks at the end."""
    body = []
    for rule in rules(rows):
        same = [row for row in rows if row["rule"] == rule]
        cells = [_mean([row["loss"] for row in same if row["loss"] is not None], 1.0, 4)]
        for key in ("density", "itop_rate", "mask_overlap"):
            values = list(select(same, key).values())
            cells.append(f"{np.mean(values):.3f}" if values else "-")
        dead = sorted(set(select(same, "dead_rows").values()))
        cells.append(" to ".join(f"{end}" for end in dict.fromkeys((dead[0], dead[-1]))) if dead else "-")
        steps = sorted(set(select(same, "steps").values()))
        body.append((rule, str(len(same)), ", ".join(map(str, steps)), *cells))
    columns = ("rule", "seeds", "steps", "loss", "density", "ever active", "overlap", "outputs without a weight")
    note = "Brackets: 95 %, Student's t over seeds. Loss: validation, nats per token. Masks: at the end."
    return Sheet("Masks that evolve", columns, tuple(body), note)


def _mean(samples: Sequence[float], factor: float, digits: int) -> str:
    """Return the mean with its interval, such as ``1.970 [1.963, 1.976]``; a dash for no samples."""
    if not samples:
        return "-"
    interval: Interval | None = mean_interval(samples)
    text = f"{factor * float(np.mean(samples)):.{digits}f}"
    return text if interval is None else f"{text} [{', '.join(f'{factor * end:.{digits}f}' for end in interval)}]"
