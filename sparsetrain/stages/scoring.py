"""The questions of a task's form, answered by a model: one function for evaluation, ``predict`` and `st.load`.

Shapes: Q questions, C answers, E rows of a table, L labels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from sparsetrain.data import Asked, Batch, Form, ScoringBatch, Tokenizer, question_batches, scored_tokens
from sparsetrain.models import Transformer
from sparsetrain.models.config import DYNAMIC
from sparsetrain.models.decoding.generate import continued
from sparsetrain.models.decoding.score import own_continuation_scores
from sparsetrain.training.evaluate import evaluating, label_likelihoods

_ROWS = 64  # of a batch


class Answered(NamedTuple):
    """Answers to the questions about E rows.

    Args:
        predicted: for each row the index of a label or a choice, the frozen set of the labels that hold, or a text.
        probabilities: float64 ``[E, L]`` of the labels, see `Scorer.probabilities`; None for free answers.
    """

    predicted: list[Any]
    probabilities: np.ndarray | None

    @classmethod
    def of(cls, parts: Sequence[Answered]) -> Answered:
        """Return the answers of all parts; rows of a part with fewer choices get zeros behind theirs."""
        predicted = [found for part in parts for found in part.predicted]
        shares = [part.probabilities for part in parts if part.probabilities is not None]
        if not shares:
            return cls(predicted, None)
        most = max(each.shape[1] for each in shares)
        return cls(predicted, np.concatenate([np.pad(each, ((0, 0), (0, most - each.shape[1]))) for each in shares]))


class Scorer:
    """Scores the answers to the questions of a form.

    Args:
        form: how the task asks.
        tokenizer: the tokenizer of the model.
        network: the transformer.
        module: the network, with its soft prompt if it has one; it is in evaluation mode while it scores.
        embed: returns the embeddings of a batch's tokens and soft prompt, ``[batch, time, d_model]``.
        context: largest number of tokens of a row, answer included.
        slots: soft-prompt positions in each row.
        autocasting: returns the autocast region that the model computes in.

    Attributes:
        report: called with the number of questions of each batch that was answered.
    """

    def __init__(
        self,
        form: Form,
        tokenizer: Tokenizer,
        network: Transformer,
        module: nn.Module,
        embed: Callable[[Batch], Tensor],
        context: int,
        slots: int,
        autocasting: Callable[[], AbstractContextManager[object]],
    ) -> None:
        self.form, self.tokenizer, self.network, self.module = form, tokenizer, network, module
        self.embed, self.context, self.slots, self.autocasting = embed, context, slots, autocasting
        self.report: Callable[[int], None] = lambda _count: None
        self._answers: dict[tuple[str, ...], list[list[int]]] = {}

    def scores(self, questions: Sequence[Asked], names: Sequence[str] = ()) -> Tensor:
        """Return the score of each answer to each question, by the form's length rule: float64 ``[Q, C]``, in nats.

        C is the largest number of answers; questions with fewer have -inf behind theirs. A score is NaN where the model
        returns NaN.

        Args:
            questions: at least one.
            names: what errors call each question.

        Raises:
            UserError: a source is empty, or an answer leaves no room for a source.
        """
        alike = all(asked.answers == questions[0].answers for asked in questions)
        # Answers of different lengths in one batch are padded, which `positions_scale=dynamic` does not allow.
        size = 1 if not alike and self.network.config.positions_scale == DYNAMIC else _ROWS
        batches = question_batches(questions, self.tokenizer, self.context, self.slots, size, names)
        most = max(len(asked.answers) for asked in questions)

        def score(batch: ScoringBatch) -> Tensor:
            asked = [questions[index] for index in batch.examples.tolist()]
            self.report(len(asked))
            with self.autocasting():
                embeddings = self.embed(batch.batch)
                if alike:
                    return self.network.continuation_scores(embeddings, self._tokens(asked[0].answers))
                own = own_continuation_scores(self.network, embeddings, [self._tokens(one.answers) for one in asked])
            return nn.functional.pad(own, (0, most - own.shape[1]), value=-torch.inf)

        found = label_likelihoods(self.module, score, batches, len(questions))
        return self._by_length(found, questions)

    def answered(self, questions: Sequence[Asked], names: Sequence[str] = ()) -> Answered | None:
        """Return the answers to the questions about rows; None where the model gives one the likelihood NaN.

        One of several labels holds if yes is more likely than no. Otherwise the answer of the highest score is taken,
        and for a free answer the text.

        Raises:
            UserError: as `scores` and `texts`.
        """
        if self.form.kind == "free_answer":
            return Answered(self.texts(questions, self.form.max_new_tokens, names), None)
        scores = self.scores(questions, names)
        if bool(scores.isnan().any()):
            return None
        found = scores.argmax(1)
        predicted: list[Any] = found.tolist()
        if self.form.kind == "several_labels":
            rows = found.reshape(-1, len(self.form.labels))
            predicted = [frozenset(row.nonzero()[:, 0].tolist()) for row in rows]
        return Answered(predicted, self.probabilities(scores).numpy())

    def probabilities(self, scores: Tensor) -> Tensor:
        """Return the probability of each label of each row, float64 ``[E, L]``, for the `scores` of its questions.

        For ``several_labels``, whose rows have a question for each label, it is that of the answer yes. Else the
        probabilities of a row sum to 1.
        """
        shares = scores.softmax(dim=1)
        return shares[:, 1].reshape(-1, len(self.form.labels)) if self.form.kind == "several_labels" else shares

    def texts(self, questions: Sequence[Asked], max_new_tokens: int, names: Sequence[str] = ()) -> list[str]:
        """Return the most likely text behind each question, up to the end of the document, without its leading space.

        Args:
            questions: questions without answers to compare.
            max_new_tokens: the most tokens of a text.
            names: what errors call each question.

        Raises:
            UserError: a source is empty, or ``max_new_tokens`` leaves no room for a source.
        """
        found = [""] * len(questions)
        end = self.tokenizer.eos_id
        batches = question_batches(
            *(questions, self.tokenizer, self.context, self.slots, _ROWS, names), max_new_tokens=max_new_tokens
        )
        with evaluating(self.module), torch.no_grad():
            for batch in batches:
                self.report(len(batch.examples))
                with self.autocasting():
                    new = continued(self.network, self.embed(batch.batch), max_new_tokens, 0.0, stop_token=end)
                for index, ids in zip(batch.examples.tolist(), new.tolist(), strict=True):
                    found[index] = self.tokenizer.decode(ids[: ids.index(end)] if end in ids else ids).removeprefix(" ")
        return found

    def _tokens(self, answers: tuple[str, ...]) -> list[list[int]]:
        if answers not in self._answers:
            if len(self._answers) > _ROWS:  # each question of a multiple choice has its own
                self._answers.clear()
            self._answers[answers] = scored_tokens(answers, self.tokenizer)
        return self._answers[answers]

    def _by_length(self, likelihoods: Tensor, questions: Sequence[Asked]) -> Tensor:
        if self.form.length_rule == "sum":
            return likelihoods
        lengths = torch.ones_like(likelihoods)
        for row, asked in enumerate(questions):
            lengths[row, : len(asked.answers)] = torch.tensor(self._lengths(asked.answers), dtype=torch.float64)
        return likelihoods / lengths

    def _lengths(self, answers: tuple[str, ...]) -> list[int]:
        if self.form.length_rule == "byte":
            return [len(answer.encode()) for answer in answers]
        return [len(tokens) for tokens in self._tokens(answers)]
