"""A run that is loaded for use: its model, its tokenizer, how its task asks, and its soft prompt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch

from sparsetrain.data import Batch, Form, Tokenizer
from sparsetrain.errors import UserError
from sparsetrain.files import typed_path
from sparsetrain.models import Prompted, SoftPrompt, Transformer
from sparsetrain.models.decoding.generate import continued
from sparsetrain.runs.layout import CONFIG
from sparsetrain.runs.origin import run_tokenizer
from sparsetrain.runs.quantized import is_quantized, load_quantized
from sparsetrain.runs.recorded import read_recorded
from sparsetrain.stages.config import RunConfig
from sparsetrain.stages.generate import load_run
from sparsetrain.stages.scoring import Scorer
from sparsetrain.stages.task_form import cued, label_of, row_questions, run_form
from sparsetrain.training.state import resolve_device, resolve_precision


class Prediction(NamedTuple):
    """What a model says of a row.

    Args:
        label: the label; for several labels, the list of the labels that hold; for a multiple choice, the text of the
            choice; for a free answer, the text.
        scores: the probability of each label; of a choice by its place; empty for a free answer.
    """

    label: Any
    scores: dict[str, float]


@dataclass(frozen=True)
class Loaded:
    """A run that is loaded for use, as `sparsetrain.load` returns it.

    Attributes:
        model: the model, in evaluation mode: ``model(ids)`` maps int64 ids ``[batch, tokens]`` to logits ``[batch,
            tokens, vocabulary]``. A soft prompt is not part of it.
        tokenizer: ``tokenizer.encode(text)`` is a list of ids, and ``tokenizer.decode(ids)`` their text.
        task: how the run's task asks: its labels, answers and template; None for a run on text.
        prompt: the soft prompt that the run learned, with ``prompt.vectors`` ``[n_tokens, d_model]``; None without one.
        directory: the directory of the run.
        context: the most tokens of a row that the run was trained on.
        precision: ``loop.precision`` of the run, in which it scores.
    """

    model: Transformer
    tokenizer: Tokenizer
    task: Form | None
    prompt: SoftPrompt | None
    directory: Path
    context: int
    precision: str = "fp32"

    def predict(self, rows: Sequence[str | Mapping[str, Any]], batch: int = 16_384) -> list[Prediction]:
        """Label rows with the run's task, as its evaluation labels test rows.

        Args:
            rows: for each row, the columns that the task's template names; a text alone is the one column.
            batch: rows whose questions are in memory at a time.

        Raises:
            UserError: the run has no task, a row lacks a column, or the model gives an answer the likelihood NaN.
        """
        form = self._form()
        found: list[Prediction] = []
        for start in range(0, len(rows), batch):
            some = list(rows[start : start + batch])
            names = [f"row {start + number}" for number in range(len(some))]
            found += self.label([self._row(form, row) for row in some], names)
        return found

    def label(self, rows: Sequence[Mapping[str, Any]], names: Sequence[str]) -> list[Prediction]:
        """Label rows that are all in memory, see `predict`; ``names`` has what an error calls each of them."""
        form = self._form()
        asked = [row_questions(form, row, name) for row, name in zip(rows, names, strict=True)]
        questions = [each for row in asked for each in row]
        named = [name for row, name in zip(asked, names, strict=True) for _ in row]
        answered = self.scorer.answered(questions, named) if questions else None
        if questions and answered is None:
            raise UserError(f"{self.directory}: its model gives an answer the likelihood NaN")
        if answered is None:
            return []
        found = []
        for number, (row, predicted) in enumerate(zip(asked, answered.predicted, strict=True)):
            shares = [] if answered.probabilities is None else answered.probabilities[number].tolist()
            if form.kind == "multiple_choice":
                shares = shares[: len(row[0].answers)]
            places = [*form.labels, *(str(place) for place in range(len(form.labels), len(shares)))]
            found.append(Prediction(label_of(form, row[0], predicted), dict(zip(places, shares, strict=False))))
        return found

    def generate(
        self,
        text: str,
        max_new_tokens: int = 100,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
        **columns: str,
    ) -> str:
        """Return what the model writes behind a text, which a run on a task puts into the task's template.

        Args:
            text: the text to continue, or the one column of the template that ``columns`` does not give.
            max_new_tokens: the most tokens of the new text, which ends before the end of the document.
            temperature, top_p: see `Transformer.generate`; temperature 0 takes the most likely token.
            seed: of the draws.
            columns: the other columns of the template.

        Raises:
            UserError: a setting is out of range, or the template has other columns.
        """
        if self.task is not None:
            text = cued(self.task, text, columns)
        elif columns:
            raise UserError(f"{', '.join(columns)}: {self.directory} has no task, so that there is no template")
        device = self.model.embed.weight.device
        ids = torch.tensor([self.tokenizer.encode(text) or [self.tokenizer.eos_id]], device=device)
        embeddings = self.model.embed_tokens(ids)
        if self.prompt is not None:
            embeddings = self.prompt.attach(embeddings)
        draws = torch.Generator(device).manual_seed(seed)
        end = self.tokenizer.eos_id
        new = continued(self.model, embeddings, max_new_tokens, temperature, top_p, end, draws)[0].tolist()
        return self.tokenizer.decode(new[: new.index(end)] if end in new else new)

    def _form(self) -> Form:
        if self.task is None:
            raise UserError(
                f"{self.directory} was trained on no task, so that it has no labels; give a run of finetune or prompt"
            )
        return self.task

    def _row(self, form: Form, row: str | Mapping[str, Any]) -> Mapping[str, Any]:
        if not isinstance(row, str):
            return row
        if len(form.columns) > 1:
            raise UserError(f"a row has the columns {', '.join(form.columns)}; give them by their names, not a text")
        return {form.columns[0]: row}

    @cached_property
    def scorer(self) -> Scorer:
        """Scores the task's questions with the model and its soft prompt, as the run's own evaluation does."""
        device = self.model.embed.weight.device
        module = self.model if self.prompt is None else Prompted(self.model, self.prompt)
        dtype, _ = resolve_precision(self.precision, device)

        def embed(batch: Batch) -> torch.Tensor:
            batch = batch.to(device)
            if not isinstance(module, Prompted):
                return self.model.embed_tokens(batch.tokens)
            assert batch.slots is not None
            return module.embeddings(batch.tokens, batch.slots)

        return Scorer(
            *(self._form(), self.tokenizer, self.model, module, embed, self.context),
            0 if self.prompt is None else len(self.prompt.vectors),
            nullcontext if dtype is None else lambda: torch.autocast(device.type, dtype),
        )


def load(run_dir: str | Path, device: str = "cpu", soft_prompt: bool = True) -> Loaded:
    """Load a run from its directory alone, wherever that now lies: its text, task and earlier runs are not needed.

    Args:
        run_dir: the directory of a run that trains a model, also of a stage of a pipeline; or of a quantized model,
            which has neither task nor soft prompt.
        device: ``auto``, ``cpu`` or ``cuda``.
        soft_prompt: whether to load the run's soft prompt.

    Raises:
        UserError: there is no such run, it has no weights, or a file of it is damaged.
    """
    directory, where = typed_path(run_dir, "init_from"), resolve_device(device)
    if is_quantized(directory):
        model = load_quantized(directory).to(where).eval()
        return Loaded(model, run_tokenizer(directory), None, None, directory, model.config.max_context)
    if not (directory / CONFIG).exists() and not directory.is_dir():
        raise UserError(f"init_from={run_dir}: no such run directory")
    model, prompt = load_run(directory, where)
    context, precision = trained_with(directory)
    return Loaded(
        *(model, run_tokenizer(directory), run_form(directory), prompt if soft_prompt else None),
        *(directory, context, precision),
    )


def trained_with(directory: Path) -> tuple[int, str]:
    """Return the context of a run, in tokens, and its ``loop.precision``.

    Raises:
        UserError: its ``config.yaml`` is damaged or has no context.
    """
    values = read_recorded(directory, RunConfig).values
    data, loop, budget = (_section(values, name) for name in ("data", "loop", "budget"))
    phases = [phase for phase in budget.get("phases") or [] if isinstance(phase, Mapping)]
    context = max((phase.get("context") or 0 for phase in phases), default=0) or data.get("context")
    if not isinstance(context, int) or isinstance(context, bool) or context < 1:
        raise UserError(f"{directory / CONFIG}: data.context={context!r} must be a whole number of at least 1")
    return context, str(loop.get("precision", "auto"))


def _section(values: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    found = values.get(name)
    return found if isinstance(found, Mapping) else {}
