"""Batches of questions for scoring, and the tokens of the answers that are compared."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from sparsetrain.data.tasks.batches import CHUNK, Rows, Sources
from sparsetrain.data.tasks.form import Asked
from sparsetrain.data.tokenizer import Tokenizer
from sparsetrain.data.tokens import Batch
from sparsetrain.errors import UserError


@dataclass
class ScoringBatch:
    """Sources of equal length, without answers.

    Args:
        batch: the sources, without padding and without targets.
        examples: LongTensor [B], the index of each row's question.
    """

    batch: Batch
    examples: torch.Tensor


def scored_tokens(answers: Sequence[str], tokenizer: Tokenizer) -> list[list[int]]:
    """Return the tokens to score for each of the answers that are compared.

    They include the end of the document only if the tokens of one answer are a prefix of another's. Otherwise the
    answers exclude each other without it.

    Raises:
        UserError: two answers have the same tokens, so that no score tells them apart.
    """
    encoded = tokenizer.encode_continuations(answers)
    ordered = sorted(range(len(encoded)), key=lambda index: encoded[index])
    ends = False
    for one, other in itertools.pairwise(ordered):
        before, after = encoded[one], encoded[other]
        if before == after:
            raise UserError(
                f"the answers {answers[one]!r} and {answers[other]!r} have the same tokens, so that no score tells "
                "them apart; give one of them another text with task.answers"
            )
        ends |= after[: len(before)] == before
    return [[*answer, tokenizer.eos_id] for answer in encoded] if ends else encoded


def question_batches(
    questions: Sequence[Asked],
    tokenizer: Tokenizer,
    context: int,
    n_slots: int = 0,
    batch_size: int = 64,
    names: Sequence[str] = (),
    max_new_tokens: int = 0,
) -> Iterator[ScoringBatch]:
    """Yield the source of every question once, with its soft-prompt slots, in batches of equal length.

    Sources are cut as in `TaskBatches`, so that a question is scored after the same tokens as in training.

    Args:
        questions: the questions to score. The answers of each set the room for its source.
        tokenizer: the tokenizer of the model.
        context: largest number of tokens of a row, answer included.
        n_slots: soft-prompt vectors after the source.
        batch_size: largest number of rows of a batch.
        names: what errors call each question; its index by default.
        max_new_tokens: the room of the answer to a question without answers, which is generated.

    Raises:
        UserError: a source is empty, or ``context`` leaves no room for a source.
    """
    rows = Rows(tokenizer, context, n_slots)
    sources = Sources(rows, tokenizer, max_new_tokens)
    for start in range(0, len(questions), CHUNK):
        end = min(start + CHUNK, len(questions))
        sources.extend(questions[start:end], names[start:end] or [f"{index}" for index in range(start, end)])
    by_length: dict[int, list[int]] = {}
    for index, length in enumerate(sources.tokens.lengths().tolist()):
        by_length.setdefault(length, []).append(index)
    for length in sorted(by_length):
        members = by_length[length]
        for start in range(0, len(members), batch_size):
            indices = members[start : start + batch_size]
            yield ScoringBatch(rows.questions([sources.tokens[index] for index in indices]), torch.tensor(indices))
