"""Tables of arms, with a row for each stage, arm and seed.

There are two kinds of table. In a table of pipelines, an arm is a kind of pre-training (``dense``, ``sparse-0.75``,
``sparse-0.75_two_phase``, or ``scratch`` for no pre-training). Its stages are stages of text, such as ``pretrain``,
and ways of learning a task, such as ``finetune`` or ``prompt-frozen``. In a table of masks, an arm is an evolution
rule, and a row is one pre-training run.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NotRequired, get_type_hints

from sparsetrain.errors import UserError
from sparsetrain.report.measured import join_measured, read_beside
from sparsetrain.report.run_files import Flops, Loss, TableRow, read_table, table_cell
from sparsetrain.report.sweep import write_rows
from sparsetrain.shapes import Count, Fraction, NonNegative, check
from sparsetrain.sparsity.evolution.base import RULES

PRETRAIN, SCRATCH = "pretrain", "scratch"
WAYS = ("finetune", "finetune-sparse", "prompt", "prompt-frozen")
"""Stages that end in an accuracy, in the order of display; other stages come after them."""
STAGE_COLUMNS = (
    *("arm", "stage", "task", "status", "density", "tokens", "bits_per_byte"),
    *("accuracy", "ci_low", "ci_high", "macro_f1", "n_test", "majority"),
    *("flops", "flop_ratio_formula", "seconds", "peak_rss_bytes"),
    *("weights", "nonzeros", "tokens_per_weight", "tokens_per_nonzero"),
)
MASK_COLUMNS = (
    *("rule", "status", "tokens", "bits_per_byte", "density", "itop_rate", "mask_overlap", "dead_rows"),
    *("flops", "seconds", "peak_rss_bytes"),
)
"""The columns that follow those of every table of an experiment."""
MOMENTS = ("before", "initialised")
TOKENS = ("tokens_per_byte", "tokens_per_word")
"""What a tokenizer makes of a corpus; the second is its fertility."""
"""When an adaptation scores its corpora, beside its end."""
_BITS = "bits_per_byte_"
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
    flops: Flops | None
    seconds: NotRequired[float | None]
    peak_rss_bytes: NotRequired[Count | None]
    step_seconds: NotRequired[NonNegative | None]
    predicted_seconds: NotRequired[NonNegative | None]
    predicted_low: NotRequired[NonNegative | None]
    predicted_high: NotRequired[NonNegative | None]
    predicted_over_measured: NotRequired[NonNegative | None]
    predicted_for: NotRequired[str | None]


class StageRow(_Row):
    """One stage of an arm for one seed; ``task`` is null for a stage of text, and accuracies are fractions.

    A stage of several corpora has the columns ``loss_NAME`` and ``bits_per_byte_NAME`` for
    each, and an adaptation ``bits_per_byte_before_NAME`` and ``bits_per_byte_initialised_NAME``. ``weights`` and
    ``nonzeros`` count the hidden matrices; ``nonzeros`` is null if they changed in number. Settings of a stage on a
    task are chosen by its ``validation_accuracy``; ``bag_of_words`` is the test accuracy of counting words.
    """

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
    weights: NotRequired[Count | None]
    nonzeros: NotRequired[Count | None]
    tokens_per_weight: NotRequired[NonNegative | None]
    tokens_per_nonzero: NotRequired[NonNegative | None]
    forgetting: NotRequired[Loss | None]
    reported_bits_per_byte: NotRequired[Loss | None]
    validation_accuracy: NotRequired[Fraction | None]
    bag_of_words: NotRequired[Fraction | None]


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
    if name not in ("parameterization", "commit", "status", "arm", "stage", "task", "rule", "predicted_for")
}


@dataclass(frozen=True)
class Arms:
    """A table of arms.

    Args:
        rows: each has the keys of `StageRow` or of `MaskRow`, and possibly more.
        columns: the columns of ``results.csv``, in order.
        where: the file or directory, for errors.
        courses: the `Course` of each run of masks by rule and seed, if the metrics of the run still exist.
        measured: the rows of each further table of evaluations that exists, see `sparsetrain.report.measured`.
    """

    rows: list[Row]
    columns: tuple[str, ...]
    where: str
    courses: Mapping[tuple[str, int], Course] = field(default_factory=dict)
    measured: Mapping[str, list[Row]] = field(default_factory=dict)

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
    """Return the table of a ``results.csv``, and those of evaluations beside it; unknown columns are kept unchanged.

    Raises:
        UserError: the file is no CSV, no table of arms or has no row, or a cell is not valid for its column.
    """
    cells = read_table(path)
    if not cells:
        raise UserError(f"{path} has no row")
    columns = tuple(cells[0])
    of_masks = "rule" in columns
    if not of_masks and ("arm" not in columns or not {"stage", "how"} & set(columns)):
        raise UserError(
            f"{path} is no table of arms: it has neither a column rule nor the columns arm and stage; sparsetrain "
            "sweep reads the table of a sweep"
        )
    scores = set() if of_masks else set(score_columns(columns))
    rows = []
    for number, texts in enumerate(cells, start=1):
        row = {name: table_cell(text) if name in _NUMBERS | scores else text or None for name, text in texts.items()}
        if not of_masks:
            row.setdefault("stage", row.get("how"))  # the name of the column in older tables
            row.setdefault("task", None if row["stage"] == PRETRAIN else _FIRST_TASK)
        rows.append(check_row(row, MaskRow if of_masks else StageRow, scores, f"{path}, row {number}"))
    return Arms(rows, columns, str(path), measured={} if of_masks else read_beside(path))


def check_row(row: Row, shape: type, scores: Collection[str], where: str) -> Row:
    """Return a row if it has the shape and its ``scores``, which no shape names, are numbers or null.

    Raises:
        UserError: it does not; the line begins with ``where`` and the column.
    """
    check({name: row.get(name) for name in scores}, dict[str, Loss | None], where)
    found: Row = check(row, shape, where)
    return found


def corpora(columns: Iterable[str]) -> list[str]:
    """Return the corpora that a table scores one by one, in the order of its columns."""
    known = dict.fromkeys(columns)
    names = [name.removeprefix(_BITS) for name in known if name.startswith(_BITS)]
    return [name for name in names if f"loss_{name}" in known]


def score_columns(columns: Iterable[str]) -> list[str]:
    """Return the columns of a table that hold scores of a corpus, which its user has named."""
    known = list(columns)
    if not (names := corpora(known)):
        return []
    own = {f"{key}_{name}" for name in names for key in ("loss", "bits_per_byte")}
    begin = (*(f"{_BITS}{moment}_" for moment in MOMENTS), *(f"{key}_" for key in TOKENS))
    return [name for name in known if name in own or name.startswith(begin)]


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
        join_measured([table.measured for table in tables]),
    )


def arm_names(rows: Sequence[Row]) -> list[str]:
    """Return the arms in order of sparsity, and last the arm without pre-training."""
    sparsity = {row["arm"]: row["sparsity"] for row in reversed(rows)}
    return sorted(dict.fromkeys(row["arm"] for row in rows), key=lambda name: (name == SCRATCH, sparsity[name]))


def text_stages(rows: Sequence[Row]) -> list[str]:
    """Return the stages of text: pre-training first, and then as in the rows."""
    # A fine-tuning that diverged has no task either, and no loss.
    names = [row["stage"] for row in rows if not row["task"] and (row["stage"] == PRETRAIN or _scored(row))]
    return _ordered(names, (PRETRAIN,))


def _scored(row: Row) -> bool:
    return any(value is not None for name, value in row.items() if name.startswith(("loss", _BITS[:-1])))


def pretrained(rows: Sequence[Row]) -> list[str]:
    """Return the arms that have learnt from text, in order of sparsity."""
    stages = text_stages(rows)
    return arm_names([row for row in rows if not row["task"] and row["stage"] in stages])


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
        if row.get(key) is not None and all(row[name] == value for name, value in wanted.items())
    }
