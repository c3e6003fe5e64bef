"""Labels of new rows: a user's table, with what the model of a run on a task predicts of each row."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from sparsetrain.cost.footprint import Workload
from sparsetrain.data import Form
from sparsetrain.data.display import Display
from sparsetrain.data.table_writing import Added, write_table
from sparsetrain.data.tables import Table, kind_of, open_table
from sparsetrain.errors import UserError, check_choice, nearest
from sparsetrain.files import typed_path
from sparsetrain.runs.layout import CONFIG, TASK
from sparsetrain.runs.origin import run_tokenizer
from sparsetrain.screen import say
from sparsetrain.stages.config import model_config
from sparsetrain.stages.generate import model_settings
from sparsetrain.stages.loaded import Loaded, Prediction, load, trained_with
from sparsetrain.stages.memory import check_memory, memory_errors
from sparsetrain.stages.task_form import row_questions, run_form
from sparsetrain.training.state import DEVICES, resolve_device

_AT_A_TIME = 16_384  # questions that are in memory at a time, if a row has fewer
_ROWS = 64  # of a batch, see `Scorer`
_SHOWN = 10  # most labels in a line
_PATIENCE = 10.0  # seconds between lines about the progress, at least


@dataclass
class PredictConfig:
    """Label the rows of a table with the model of a run on a task.

    Args:
        init_from: the directory of a run of finetune or prompt; its task's own data are not needed.
        input: a .csv, .tsv, .jsonl or .parquet file with the columns that the task's template names.
        output: the file to write, in the format of its suffix: all columns of the input, then ``label`` (``predicted``
            if the input has a label) and a ``score_LABEL`` for each label. A file that is there is replaced.
        columns: for a column of the task's template, the column of the input that stands for it, ``{text: abstract}``.
        prefix: text before the names of the new columns.
        soft_prompt: use the run's soft prompt, if it has one.
        device: auto, cpu or cuda.
        force: run even if the estimated memory exceeds the free memory; the option ``--force`` sets it.

    Raises:
        UserError: a path is missing, or the device is unknown.
    """

    init_from: str | None = None
    input: str | None = None
    output: str | None = None
    columns: dict[str, str] | None = None
    prefix: str = ""
    soft_prompt: bool = True
    device: str = "auto"
    force: bool = False

    def __post_init__(self) -> None:
        check_choice("device", self.device, DEVICES)
        wanted = {
            "init_from": "the directory of a run of finetune or prompt, init_from=RUN_DIR",
            "input": "the table to label, input=FILE",
            "output": "the file to write, output=FILE",
        }
        for name, what in wanted.items():
            if getattr(self, name) is None:
                raise UserError(f"{name} is missing: {what}")


def predict(config: PredictConfig, console: Console | None = None) -> Path:
    """Write the input's rows with their labels and scores, in its order, and return the path of the output.

    Every row is checked before the first one is labelled. The output is written whole or not at all.

    Raises:
        UserError: there is no such run or it has no task; a file cannot be read or written; a column is missing; or the
            output would have a column twice.
    """
    screen = console or Console()
    assert config.init_from is not None
    assert config.input is not None
    assert config.output is not None
    directory = typed_path(config.init_from, "init_from")
    form = _form(directory)
    table, output = open_table(config.input), typed_path(config.output, "output")
    kind_of(output, "output")
    _check_output(output, table)
    renamed = _columns(config, form, table)
    counted = _checked(table, form, renamed)
    added = _added(config, form, table, counted.choices)
    _check_memory(directory, config)
    with memory_errors("this prediction"):
        loaded = load(directory, config.device, config.soft_prompt)
        labels: Counter[str] = Counter()
        with Display(screen, True) as display:
            progress = _Progress(screen, display, counted.questions)
            loaded.scorer.report = progress.more
            predictions = _predictions(loaded, table, renamed, counted.questions // counted.rows)
            write_table(output, table, added, _values(predictions, added, labels))
    say(screen, f"{counted.rows:,} rows: {_told(form, labels)}")
    say(screen, f"predictions: {output}")
    return output


def _form(directory: Path) -> Form:
    if not directory.is_dir():
        raise UserError(f"init_from={directory}: no such run directory")
    model_settings(directory)  # says what else it is than a run with weights
    form = run_form(directory)
    if form is None:
        raise UserError(
            f"init_from={directory}: it has no {TASK}, so that its labels are unknown; give a run of finetune or prompt"
        )
    return form


def _check_output(output: Path, table: Table) -> None:
    if output.is_dir():
        raise UserError(f"output={output} is a directory")
    if output.exists() and output.samefile(table.path):
        raise UserError(f"output={output} is the input; give another file, so that the input stays as it is")
    if output.exists() and (output.parent / CONFIG).exists():
        raise UserError(f"output={output} is the record of a run, in its directory; give another file")


def _columns(config: PredictConfig, form: Form, table: Table) -> dict[str, str]:
    """Return the input's column for each column of the form; raises `UserError` unless it has them."""
    given = config.columns or {}
    for name in given:
        if name not in form.columns:
            raise UserError(
                f"columns.{name}: the task asks with {', '.join(form.columns)}{nearest(name, form.columns)}"
            )
    renamed = {name: given.get(name, name) for name in form.columns}
    for name, column in renamed.items():
        if column not in table.columns:
            table.need(column, f"columns.{name}" if name in given else "")
    return renamed


def _renamed(row: Mapping[str, Any], renamed: Mapping[str, str]) -> dict[str, Any]:
    """Return the columns of the form; a row of JSON lines may lack some."""
    return {name: row[column] for name, column in renamed.items() if column in row}


@dataclass
class _Counted:
    """What all rows of a table have: their number, that of their questions, and the most choices of one."""

    rows: int = 0
    questions: int = 0
    choices: int = 0


def _checked(table: Table, form: Form, renamed: Mapping[str, str]) -> _Counted:
    """Ask about every row once, without an answer; raises `UserError` for the first row that cannot be asked about."""
    counted = _Counted()
    for number, row in table.rows(list(renamed.values())):
        asked = row_questions(form, _renamed(row, renamed), table.where(number))
        counted.rows += 1
        counted.questions += len(asked)
        counted.choices = max(counted.choices, len(asked[0].answers))
    return counted


def _added(config: PredictConfig, form: Form, table: Table, choices: int) -> list[Added]:
    """Return the columns to add; raises `UserError` if the table has one of them already."""
    name = f"{config.prefix}label"
    if name == "label" and name in table.columns:
        name = "predicted"
    labels = list(form.labels) if form.kind != "free_answer" else []
    if form.kind == "multiple_choice":
        labels += [str(place) for place in range(len(labels), choices)]
    kind = "texts" if form.kind == "several_labels" else "text"
    added = [Added(name, kind, form.separator)]
    added += [Added(f"{config.prefix}score_{label}", "number") for label in labels]
    for column in added:
        if column.name in table.columns:
            raise UserError(
                f"input={table.path} has a column {column.name!r} already; prefix=TEXT_ puts a text before the names "
                "of the new columns"
            )
    return added


def _check_memory(directory: Path, config: PredictConfig) -> None:
    saved, (context, _) = model_settings(directory), trained_with(directory)
    shape = model_config(saved.model, run_tokenizer(directory).vocab_size)
    plan = saved.sparsity if saved.sparsity.is_sparse else None
    workload = Workload(shape, plan, evaluated=_ROWS, context=context, cached=context)
    what = f"prediction with rows of up to {context} tokens"
    check_memory(workload, what, {}, resolve_device(config.device), config.force)


def _predictions(loaded: Loaded, table: Table, renamed: Mapping[str, str], each: int) -> Iterator[Prediction]:
    """Yield the prediction of each row; ``each`` is the number of questions about one."""
    size = max(_ROWS, _AT_A_TIME // each)
    rows: list[dict[str, Any]] = []
    names: list[str] = []
    for number, row in table.rows(list(renamed.values())):
        rows.append(_renamed(row, renamed))
        names.append(table.where(number))
        if len(rows) == size:
            yield from loaded.label(rows, names)
            rows, names = [], []
    yield from loaded.label(rows, names)


def _values(predictions: Iterator[Prediction], added: list[Added], labels: Counter[str]) -> Iterator[list[Any]]:
    """Yield the values of the added columns, and count the labels."""
    for found in predictions:
        labels.update(found.label if isinstance(found.label, list) else [found.label])
        scores = list(found.scores.values())
        yield [found.label, *scores, *[None] * (len(added) - 1 - len(scores))]


def _told(form: Form, labels: Counter[str]) -> str:
    if form.kind in ("free_answer", "multiple_choice"):
        return f"{len(labels):,} different answers"
    shown = [f"{' '.join(label.split())} {labels[label]:,}" for label in form.labels[:_SHOWN]]
    return ", ".join(shown) + (", …" if len(form.labels) > _SHOWN else "")


class _Progress:
    """The progress over questions: a bar on a terminal, else up to ten lines with the time that is left."""

    def __init__(self, console: Console, display: Display, total: int) -> None:
        self._console, self._total, self._done = console, total, 0
        self._bar = display.task("predict")
        self._began: float | None = None
        self._last = 0.0

    def more(self, count: int) -> None:
        """Count questions that are about to be answered."""
        now, share = time.monotonic(), self._done / self._total
        self._done += count
        self._bar(share)
        if self._began is None:
            self._began = self._last = now
        elif not self._console.is_terminal and now - self._last > max(_PATIENCE, (now - self._began) / 10):
            self._last = now
            left = (now - self._began) * (1.0 / share - 1.0)
            say(self._console, f"predict  {share:.0%}  ETA {left:.0f}s")
