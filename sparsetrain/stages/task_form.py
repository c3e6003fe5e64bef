"""The form of a run's task, from its directory alone, and the questions that it asks about new rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sparsetrain.data import Asked, Form
from sparsetrain.data.tasks.cells import choices_of
from sparsetrain.data.tasks.form import LABEL
from sparsetrain.data.tasks.pubmedqa import LABELS
from sparsetrain.data.tasks.section_roles import CATEGORIES
from sparsetrain.errors import UserError, nearest
from sparsetrain.runs.layout import CONFIG, TASK
from sparsetrain.runs.recorded import read_recorded
from sparsetrain.stages.config import FinetuneConfig

ON_TASKS = ("finetune", "prompt")  # kinds of runs
_ROLES = tuple(category.lower() for category in CATEGORIES)
FORMS = {
    form.name: form
    for form in (
        Form("section_roles", _ROLES, tuple(f" {role}" for role in _ROLES), "{text}\nrole:"),
        Form("pubmedqa", LABELS, tuple(f" {label}" for label in LABELS), "{context}\nquestion: {question}\nanswer:"),
    )
}
"""The forms of tasks whose runs may be older than ``task.json``."""


def run_form(directory: Path) -> Form | None:
    """Return how the task of a run asks; None for a run on text, and for an old run on a task that is not built in.

    Raises:
        UserError: a file of the run is damaged.
    """
    if (directory / TASK).exists():
        return Form.load(directory / TASK)
    if not (directory / CONFIG).exists():
        return None
    recorded = read_recorded(directory, FinetuneConfig)
    task = recorded.values.get("task")
    if recorded.kind not in ON_TASKS or not isinstance(task, Mapping):
        return None
    return FORMS.get(str(task.get("name")))


def row_questions(form: Form, row: Mapping[str, Any], where: str) -> list[Asked]:
    """Return the questions about a row of a table: one for each label of ``several_labels``, else one.

    Raises:
        UserError: a column is missing, or its cell cannot be used; the line begins with ``where``.
    """
    choices: tuple[str, ...] = ()
    if form.kind == "multiple_choice":
        for column in form.choices:
            if column not in row:
                raise UserError(f"{where}: no column {column!r} of the choices{nearest(column, row)}")
        choices = tuple(f" {choice}" for choice in choices_of(row, form.choices, where))
    asked = form.asked(form.source(row, where), choices=choices)
    if not asked[0].source:
        raise UserError(f"{where}: {', '.join(form.columns)} is empty, so that there is nothing to read")
    return asked


def label_of(form: Form, asked: Asked, predicted: Any) -> Any:
    """Return what is predicted of a row, as `Scorer.answered` says it, in words.

    It is a label, the text of a choice, the text of a free answer or, for several labels, the list of labels that hold.
    """
    if form.kind == "several_labels":
        return [form.labels[index] for index in sorted(predicted)]
    if form.kind == "multiple_choice":
        return asked.answers[predicted].strip()
    return predicted.strip() if form.kind == "free_answer" else form.labels[predicted]


def cued(form: Form, prompt: str, columns: Mapping[str, str]) -> str:
    """Return a prompt in the form's template, to be answered by generation.

    Args:
        prompt: the text of the one column that ``columns`` does not give. Without ``columns`` it stands for all that
            comes before the end of a template with several.
        columns: the texts of other columns; for ``several_labels``, ``label`` is the label that is asked about.

    Raises:
        UserError: a column is unknown, or it is not clear which one the prompt is.
    """
    needed = [name for name in form.columns if f"{{{name}}}" in form.template]
    needed += [LABEL] if form.kind == "several_labels" else []
    for name in columns:
        if name not in needed:
            raise UserError(f"columns.{name}: the task asks with {_listed(needed)}{nearest(name, needed)}")
    free = [name for name in needed if name not in columns]
    if len(free) > 1 and not columns and form.kind != "several_labels":
        return prompt + form.ending
    if len(free) > 1 or (free and free == [LABEL]):
        given = ", ".join(f"{name}: ..." for name in needed if name != free[0])
        raise UserError(
            f"prompt: the task of the run asks with {_listed(needed)}; give what is not the prompt, "
            f"'columns={{{given}}}', or cue=false to continue the prompt as it is"
        )
    if prompt and not free:
        raise UserError(f"prompt={prompt[:40]!r}: columns gives all that the task asks with, {_listed(needed)}")
    row = {**columns, **dict.fromkeys(free, prompt)}
    before, after = form.source(row, "columns")
    return f"{before}{row.get(LABEL, '') if form.kind == 'several_labels' else ''}{after}"


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
