"""Scores against hand calculations, loops and closed formulas."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from sparsetrain.data import Batch, ScoringBatch, Tokenizer, question_batches, scored_tokens
from sparsetrain.data.tasks.base import Example, Task
from sparsetrain.models import ModelConfig, Transformer
from sparsetrain.training.evaluate import label_likelihoods, macro_f1, score_text, wilson

labels = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=40)


def tiny(vocab_size: int) -> Transformer:
    shape = ModelConfig(d_model=16, n_layers=1, n_heads=2, vocab_size=vocab_size, init_std=0.5, dropout=0.3, seed=0)
    return Transformer(shape)


def test_score_text_matches_cross_entropy_and_byte_counts_by_hand() -> None:
    model = tiny(11)
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, 11, (5, 7), generator=generator)
    targets = torch.randint(0, 11, (5, 7), generator=generator)
    targets[0, :3] = -100
    targets[4] = -100
    token_bytes = torch.tensor([1, 2, 3, 1, 1, 5, 1, 4, 1, 2, 0])
    sizes = torch.where(targets >= 0, token_bytes[targets.clamp(min=0)], 0)
    model.train()
    score = score_text(
        model, lambda b: model.token_losses(b.tokens, b.targets), Batch(tokens, targets, None, sizes).split(2)
    )
    assert model.training  # dropout was off during the call and is on again
    model.eval()
    with torch.no_grad():
        logits = model(tokens).flatten(0, 1)
    nats = F.cross_entropy(logits, targets.flatten(), ignore_index=-100, reduction="sum").item()
    counted = [target for target in targets.flatten().tolist() if target >= 0]
    size = sum(token_bytes.tolist()[target] for target in counted)
    assert (score.tokens, score.bytes) == (len(counted), size)
    assert score.loss == pytest.approx(nats / len(counted), rel=1e-6)
    assert score.bits_per_byte == pytest.approx(nats / math.log(2) / size, rel=1e-6)


def test_label_likelihoods_match_a_loop_of_log_softmax() -> None:
    tokenizer = Tokenizer.bytes()
    model = tiny(tokenizer.vocab_size).train()
    examples = [Example(str(n), "word " * n + "?", 0) for n in (5, 1, 3)]
    answers = (" yes", " no", " noon")  # " no" begins " noon", so the end of the document counts
    task = Task("t", ("yes", "no", "noon"), answers, examples, examples, examples)
    found = label_likelihoods(
        model,
        lambda b: model.continuation_scores(model.embed_tokens(b.batch.tokens), scored_tokens(answers, tokenizer)),
        question_batches(list(task.asked(examples)), tokenizer, 48, 0, 2),
        len(examples),
    )
    model.eval()
    expected = torch.zeros(3, 3, dtype=torch.float64)
    for row, example in enumerate(examples):
        source = tokenizer.encode(example.source)
        for column, answer in enumerate(answers):
            said = [*tokenizer.encode(answer), tokenizer.eos_id]
            text = source + said
            with torch.no_grad():
                log_p = model(torch.tensor([text]))[0].double().log_softmax(-1)
            for place, token in enumerate(said):
                expected[row, column] += log_p[len(source) - 1 + place, token]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert found.dtype == torch.float64


@pytest.mark.parametrize(
    ("predicted", "truth", "expected"),
    [
        ([0, 1, 2], [0, 1, 2], 1.0),
        ([1, 0], [0, 1], 0.0),
        # label 0: precision 1/2, recall 1/1; label 1: 2/2 and 2/3
        ([0, 0, 1, 1], [0, 1, 1, 1], (2 / 3 + 4 / 5) / 2),
        # always the majority; the other label counts as 0
        ([0, 0, 0, 0], [0, 0, 0, 1], (6 / 7 + 0) / 2),
        # a label that is only predicted counts as 0 as well
        ([0, 2], [0, 0], (2 / 3 + 0) / 2),
    ],
)
def test_macro_f1_matches_a_table(predicted: list[int], truth: list[int], expected: float) -> None:
    assert macro_f1(np.array(predicted), np.array(truth)) == pytest.approx(expected)


@given(labels)
def test_macro_f1_matches_a_confusion_matrix(pairs: list[tuple[int, int]]) -> None:
    predicted, truth = (np.array(side) for side in zip(*pairs, strict=True))
    confusion = np.zeros((4, 4))
    np.add.at(confusion, (truth, predicted), 1)
    with np.errstate(invalid="ignore"):
        precision = np.diag(confusion) / confusion.sum(0)
        recall = np.diag(confusion) / confusion.sum(1)
        f1 = 2 * precision * recall / (precision + recall)
    seen = (confusion.sum(0) + confusion.sum(1)) > 0
    assert macro_f1(predicted, truth) == pytest.approx(np.nan_to_num(f1)[seen].mean())


@given(st.integers(1, 500).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_ci95_matches_the_closed_wilson_formula(case: tuple[int, int]) -> None:
    right, n = case
    found = wilson(right, n)
    z, p = 1.959963984540054, right / n
    middle = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    assert found == pytest.approx((middle - half, middle + half), abs=1e-9)
    assert found[0] <= p + 1e-12
    assert p <= found[1] + 1e-12


def test_label_likelihoods_refuse_examples_that_were_not_scored_and_keep_nan() -> None:
    rows = [ScoringBatch(Batch(torch.zeros(1, 1, dtype=torch.int64), torch.zeros(1, 1), None), torch.tensor([1]))]
    model = nn.Identity()
    with pytest.raises(ValueError, match="1 of 2 examples were not scored"):
        label_likelihoods(model, lambda b: torch.zeros(1, 3), rows, 2)
    rows.append(ScoringBatch(rows[0].batch, torch.tensor([0])))
    assert label_likelihoods(model, lambda b: torch.full((1, 3), math.nan), rows, 2).isnan().all()


def test_a_failing_evaluation_leaves_the_model_training() -> None:
    model = nn.Linear(2, 2).train()

    def fails(_: Batch) -> torch.Tensor:
        raise RuntimeError("no")

    batch = Batch(torch.zeros(1, 2, dtype=torch.int64), torch.zeros(1, 2, dtype=torch.int64), None)
    with pytest.raises(RuntimeError, match="no"):
        score_text(model, fails, [batch])
    assert model.training
