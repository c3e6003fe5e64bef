"""Scores of the questions of a form against log-softmax over whole rows."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch

from sparsetrain.data import Tokenizer
from sparsetrain.data.tasks.form import Asked, Form
from sparsetrain.errors import UserError
from sparsetrain.models import ModelConfig, Transformer
from sparsetrain.stages.scoring import Scorer

BYTES = Tokenizer.bytes()


def scorer(form: Form, **model: Any) -> Scorer:
    network = Transformer(ModelConfig(16, 2, 2, BYTES.vocab_size, init_std=0.3, seed=0, max_context=64, **model))
    return Scorer(
        form, BYTES, network, network, lambda batch: network.embed_tokens(batch.tokens), 48, 0, contextlib.nullcontext
    )


def expected(found: Scorer, asked: Asked, ended: bool = False) -> list[float]:
    """Return the log-likelihoods of the answers to one question, each by a pass over the whole row."""
    source, likelihoods = BYTES.encode(asked.source), []
    for answer in asked.answers:
        said = BYTES.encode(answer) + [BYTES.eos_id] * ended
        with torch.no_grad():
            log_p = found.network.eval()(torch.tensor([source + said]))[0].double().log_softmax(-1)
        likelihoods.append(sum(log_p[len(source) - 1 + n, token].item() for n, token in enumerate(said)))
    return likelihoods


CHOICES = [(" a", " bcd", " ef"), (" long one", " x"), (" no", " none")]
CHOICE = Form("t", (), (), "{text}", "multiple_choice", choices=("choices",))


@pytest.mark.parametrize("scale", [1.0, "dynamic"])
def test_each_question_of_a_multiple_choice_has_answers_of_its_own(scale: Any) -> None:
    form = CHOICE
    found = scorer(form, positions="rope", positions_scale=scale)
    asked = [Asked("which one" + "?" * (n % 2), choices, None) for n, choices in enumerate(CHOICES)]
    scores = found.scores(asked)
    assert scores.shape == (3, 3)
    for row, one in enumerate(asked):
        # " no" begins " none", so the end of the document counts there.
        told = expected(found, one, ended=row == 2)
        assert scores[row, : len(told)].tolist() == pytest.approx(told, rel=1e-5)
        assert scores[row, len(told) :].tolist() == [-torch.inf] * (3 - len(told))
    torch.testing.assert_close(found.probabilities(scores).sum(1), torch.ones(3, dtype=torch.float64))


@pytest.mark.parametrize(("rule", "lengths"), [("sum", [1, 1, 1]), ("token", [2, 4, 4]), ("byte", [2, 4, 4])])
def test_the_length_rule_divides_the_scores(rule: str, lengths: list[int]) -> None:
    form = Form("t", ("a", "b", "c"), (" a", " bcd", " éf"), "{text}", length_rule=rule)
    found = scorer(form)
    asked = form.asked(("what is it", ""))
    told = [total / length for total, length in zip(expected(found, asked[0]), lengths, strict=True)]
    assert found.scores(asked)[0].tolist() == pytest.approx(told, rel=1e-5)


def test_several_labels_are_asked_about_one_by_one() -> None:
    form = Form("t", ("cold", "warm"), (" no", " yes"), "{text}\nis it {label}?", "several_labels")
    found = scorer(form)
    asked = [one for text in ("ice", "the sun") for one in form.asked((text, "?"))]
    shares = found.probabilities(found.scores(asked))
    told = [torch.tensor(expected(found, one)).softmax(0)[1].item() for one in asked]
    assert shares.shape == (2, 2)
    assert shares.flatten().tolist() == pytest.approx(told, rel=1e-4)


def test_scores_do_not_depend_on_the_other_rows() -> None:
    form = Form("t", ("a", "b"), (" yes", " no"))
    found = scorer(form)
    asked = [Asked("word " * (n % 5) + f"{n}?", form.answers, None) for n in range(200)]
    together = found.scores(asked)
    alone = torch.cat([found.scores([one]) for one in asked])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)
    assert torch.equal(together.argmax(1), alone.argmax(1))


def test_texts_are_those_of_generation() -> None:
    found = scorer(Form("t", (), (), kind="free_answer"))
    asked = [Asked(text, (), None) for text in ("once", "upon a time", "twice")]
    whole = []
    for one in asked:
        row = torch.tensor([BYTES.encode(one.source)])
        whole.append(BYTES.decode(found.network.generate(row, 5, 0.0, stop_token=BYTES.eos_id)[0, row.shape[1] :]))
    assert found.texts(asked, 5) == [text.removeprefix(" ") for text in whole]
    assert found.texts([Asked("x" * 99 + "once", (), None)], 44) == found.texts([Asked("once", (), None)], 44)
    # A model that ends at once says nothing.
    with torch.no_grad():
        found.network.head.weight.zero_()[BYTES.eos_id] = 1.0
        found.network.final_norm.weight.zero_()
        found.network.final_norm.bias = torch.nn.Parameter(torch.ones(16))
    assert found.texts(asked, 5) == [""] * 3


def test_an_empty_source_is_named() -> None:
    found = scorer(Form("t", ("a", "b"), (" yes", " no")))
    with pytest.raises(UserError, match=r"rows\.csv, line 7 has an empty source"):
        found.scores([Asked("", (" yes", " no"), None)], ["rows.csv, line 7"])
