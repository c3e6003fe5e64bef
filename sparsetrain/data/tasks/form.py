"""The form of a task: how it turns a row of a table into a question, and which answers it compares.

A run on a task saves its form as ``task.json``, so that new rows can be labelled without the task's own data.
"""

from __future__ import annotations

import string
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple, NotRequired, TypedDict

from msgspec import Meta

from sparsetrain.errors import UserError, check_choice, nearest
from sparsetrain.files import write_json
from sparsetrain.reading import read_json

KINDS = ("one_label", "several_labels", "multiple_choice", "free_answer")
LENGTH_RULES = ("sum", "token", "byte")
NO_YES = (" no", " yes")  # the answers to the question whether a label holds
CUES = dict(zip(KINDS, ("\nlabel:", "\n{label}:", "\nanswer:", "\nanswer:"), strict=True))
"""What the default template of a kind has behind the text."""
LABEL = "label"  # in a template: the label that is asked about

_FORMAT = 1


class Asked(NamedTuple):
    """One question to the model: the text that it reads, the answers to compare, and the index of the right one.

    ``right`` is None where it is unknown, and where there are no answers to compare but a text to be generated.
    """

    source: str
    answers: tuple[str, ...]
    right: int | None


@dataclass(frozen=True)
class Form:
    """How a task asks its questions.

    Args:
        name: the name of the task.
        labels: the names of the labels: of the classes, or, for ``multiple_choice``, of the places of the choices.
        answers: ``answers[label]`` is the text that continues a source, with its leading space. For
            ``several_labels`` they are the answers no and yes; a ``multiple_choice`` has its own in each row.
        template: the source, with ``{column}`` for the text of a column; ``{{`` and ``}}`` are braces. For
            ``several_labels`` it has ``{label}`` once, and asks about each label in turn.
        kind: ``one_label``; ``several_labels``, any number of which may hold; ``multiple_choice``; or ``free_answer``.
        length_rule: how log-likelihoods of answers compare: their ``sum``, or divided by the number of their tokens
            (``token``) or UTF-8 bytes (``byte``).
        choices: for ``multiple_choice``, the columns of the choices, or one column that holds a list of them.
        separator: for ``several_labels``, the text between labels in a cell that holds them as text.
        max_new_tokens: for ``free_answer``, the most tokens of an answer.

    Raises:
        UserError: a field does not fit the kind of the task.
    """

    name: str
    labels: tuple[str, ...]
    answers: tuple[str, ...]
    template: str = "{text}"
    kind: str = "one_label"
    length_rule: str = "sum"
    choices: tuple[str, ...] = ()
    separator: str = "|"
    max_new_tokens: int = 32

    def __post_init__(self) -> None:
        check_choice("task.kind", self.kind, KINDS)
        check_choice("task.length_rule", self.length_rule, LENGTH_RULES)
        self._check_template()
        wanted = {"one_label": len(self.labels), "several_labels": 2}.get(self.kind, 0)
        least = {"one_label": 2, "several_labels": 1}.get(self.kind, 0)
        if len(self.labels) < least or len(self.answers) != wanted:
            raise UserError(
                f"task {self.name}: {len(self.labels)} labels and {len(self.answers)} answers; {self.kind} has at "
                f"least {least} labels and here {wanted} answers"
            )
        if (self.kind == "multiple_choice") != bool(self.choices):
            raise UserError(
                f"task.choices={list(self.choices)}: kind=multiple_choice needs the columns of its choices, and the "
                "other kinds have none"
            )
        if "" in self.answers:
            raise UserError(f"task {self.name}: an answer is empty; each is a text, mostly with a leading space")
        if not self.separator:
            raise UserError("task.label_separator is empty; it must be the text between two labels")
        if self.max_new_tokens < 1:
            raise UserError(f"task.max_new_tokens={self.max_new_tokens} is too small; the least is 1")

    def _check_template(self) -> None:
        fields = _fields(self.template)
        if not fields:
            raise UserError(f"task.template={self.template!r} has no {{column}}, so that all sources would be equal")
        if fields.count(LABEL) != (self.kind == "several_labels"):
            raise UserError(
                f"task.template={self.template!r}: {{{LABEL}}} stands for the label that is asked about; "
                "kind=several_labels has it once, and the other kinds do not have it"
            )

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns that a row must have, without the label."""
        return tuple(dict.fromkeys([*(name for name in _fields(self.template) if name != LABEL), *self.choices]))

    @property
    def ending(self) -> str:
        """The text of the template behind its last column."""
        literal, field, _, _ = list(string.Formatter().parse(self.template))[-1]
        return literal if field is None else ""

    def source(self, row: Mapping[str, Any], where: str) -> tuple[str, str]:
        """Return the source of a row: its text before the asked label, and after it; the second is mostly empty.

        Raises:
            UserError: the row lacks a column of the template; the line begins with ``where``.
        """
        parts = ["", ""]
        place = 0
        for literal, field, _, _ in string.Formatter().parse(self.template):
            parts[place] += literal
            if field == LABEL:
                place = 1
            elif field is not None:
                if field not in row:
                    raise UserError(f"{where}: no column {field!r} of the template{nearest(field, row)}")
                if isinstance(row[field], Mapping):
                    raise UserError(f"{where}: column {field!r} holds fields, {sorted(row[field])}; it must be text")
                parts[place] += as_text(row[field])
        return parts[0], parts[1]

    def asked(
        self,
        source: tuple[str, str],
        right: int | None = None,
        holds: frozenset[int] | None = None,
        choices: tuple[str, ...] = (),
    ) -> list[Asked]:
        """Return the questions about one row: one for each label of ``several_labels``, else one.

        Args:
            source: as `source` returns it.
            right: index of the right answer, if it is known.
            holds: for ``several_labels``, the labels that hold, if they are known.
            choices: for ``multiple_choice``, the answers of this row, with their leading spaces.
        """
        before, after = source
        if self.kind == "several_labels":
            return [
                Asked(f"{before}{label}{after}", self.answers, None if holds is None else int(index in holds))
                for index, label in enumerate(self.labels)
            ]
        if self.kind == "free_answer":
            return [Asked(before, (), None)]
        return [Asked(before, choices if self.kind == "multiple_choice" else self.answers, right)]

    def save(self, path: Path) -> None:
        """Write the form as JSON."""
        write_json(path, {"format": _FORMAT, **asdict(self)})

    @classmethod
    def load(cls, path: Path) -> Form:
        """Read a form that `save` wrote; raises `UserError` if the file is unreadable, damaged or of a later format."""
        content: dict[str, Any] = read_json(path, _Shape)
        if content["format"] > _FORMAT:
            raise UserError(f"{path}: format={content['format']} is of a later version of sparsetrain")
        names = cls.__dataclass_fields__
        lists: dict[str, Any] = {
            key: tuple(value) if isinstance(value, list) else value for key, value in content.items()
        }
        return cls(**{key: value for key, value in lists.items() if key in names})


class _Shape(TypedDict):
    format: Annotated[int, Meta(ge=1)]
    name: str
    labels: list[str]
    answers: list[str]
    template: str
    kind: str
    length_rule: str
    choices: NotRequired[list[str]]
    separator: NotRequired[str]
    max_new_tokens: NotRequired[int]


def as_text(value: Any) -> str:
    """Return the value of a cell as text: an empty cell is an empty text, a list its texts with spaces between."""
    if isinstance(value, list | tuple):
        return " ".join(map(as_text, value))
    return "" if value is None else str(value)


def _fields(template: str) -> list[str]:
    """Return the names in braces of a template, in their order.

    Raises:
        UserError: a brace is alone, or a name has a format or an index.
    """
    try:
        parts = list(string.Formatter().parse(template))
    except ValueError as error:
        raise UserError(f"task.template={template!r}: {error}; a brace of the text is written twice") from None
    for _, field, format_spec, conversion in parts:
        if field is not None and (not field or format_spec or conversion):
            raise UserError(f"task.template={template!r}: write {{column}}, the name of a column alone")
    return [field for _, field, _, _ in parts if field is not None]
