"""A model under an extended or another tokenizer: what stays, what is new, and what the optimizer knows."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from languages import ENGLISH, WRITTEN_ARABIC
from torch import Tensor, nn

from sparsetrain.data.tokenizer import Tokenizer
from sparsetrain.data.vocabulary import extend_tokenizer
from sparsetrain.errors import UserError
from sparsetrain.models import ModelConfig, Transformer
from sparsetrain.models.new_rows import DONOR_METHODS, METHODS
from sparsetrain.parameterization import Parameterization, param_groups
from sparsetrain.quantization.quantize import quantize
from sparsetrain.runs.checkpoint import OptimizerTensors, save_checkpoint
from sparsetrain.runs.layout import CHECKPOINTS, TOKENIZER
from sparsetrain.vocabulary import extend_embeddings

OLD = Tokenizer.train(ENGLISH, 340)
NEW = extend_tokenizer(OLD, WRITTEN_ARABIC, 40)
DONOR = Tokenizer.train(ENGLISH[:100] + WRITTEN_ARABIC, 500)
V, ADDED, D = OLD.vocab_size, 40, 24
MUP = Parameterization.mup(base_width=8, alpha_in=2.0, alpha_out=3.0)
TOKENS = torch.tensor([OLD.encode(ENGLISH[0])[:60]])


def build(tie: bool = True, rows: int = V, **options: Any) -> Transformer:
    config = {"d_model": D, "n_layers": 2, "n_heads": 2, "vocab_size": rows, "init_std": 0.3, "seed": 0}
    return Transformer(ModelConfig(**{**config, "tie_embeddings": tie, **options}), MUP)


def matrices(model: Transformer) -> list[Tensor]:
    return [model.embed.weight.detach(), model.head.weight.detach()]


def donor_of(method: str, seed: int = 5) -> Any:
    if method not in DONOR_METHODS:
        return None
    return DONOR, torch.randn(DONOR.vocab_size, 16, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("tie", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("method", METHODS)
def test_old_rows_stay_and_new_ones_have_the_old_norm(method: str, tie: bool) -> None:
    model, before = build(tie), build(tie)
    assert extend_embeddings(model, OLD, NEW, method, donor_of(method)) is model
    assert (model.head.weight is model.embed.weight) == tie
    for old, new in zip(matrices(before), matrices(model), strict=True):
        assert new.shape == (V + ADDED, D)
        assert torch.equal(new[:V], old)
        torch.testing.assert_close(new[V:].norm(dim=1), old.norm(dim=1).mean().expand(ADDED))
        assert method == "mean" or len(new[V:].unique(dim=0)) == ADDED


@pytest.mark.parametrize("tie", [True, False], ids=["tied", "untied"])
def test_text_of_the_first_language_has_the_same_logits_of_old_tokens(tie: bool) -> None:
    model, before = extend_embeddings(build(tie), OLD, NEW), build(tie)
    assert torch.equal(torch.tensor([NEW.encode(ENGLISH[0])[:60]]), TOKENS)
    with torch.no_grad():
        hidden = model.hidden(TOKENS)
        assert torch.equal(hidden, before.hidden(TOKENS))
        # The product of the same matrices; with more columns, the library may add in another order.
        assert torch.equal(F.linear(hidden * model.logit_scale, model.head.weight[:V]), before(TOKENS))
        torch.testing.assert_close(model(TOKENS)[..., :V], before(TOKENS))


def test_multipliers_and_roles_follow() -> None:
    """alpha_out / m_d is that of a model built with the new vocabulary, and so are the groups of the optimizer."""
    model, fresh = extend_embeddings(build(False), OLD, NEW), build(False, V + ADDED)
    assert model.logit_scale == fresh.logit_scale == 3.0 / (D / 8)
    assert model.embedding_scale == fresh.embedding_scale == 2.0
    assert model.config == fresh.config
    assert str(model) == str(fresh)
    ours, theirs = (param_groups(each, MUP, 0.1) for each in (model, fresh))
    for one, other in zip(ours, theirs, strict=True):
        assert [p.shape for p in one.pop("params")] == [p.shape for p in other.pop("params")]
        assert one == other
    fresh.load_state_dict(model.state_dict())


def test_subword_means_by_hand() -> None:
    """Each new token is spelled by the old tokens into which the old tokenizer cuts its text."""
    model, before = build(False), build(False)
    extend_embeddings(model, OLD, NEW, match_norms=False)
    checked = 0
    for token in range(V, V + ADDED):
        text = NEW.decode([token])
        if "\ufffd" not in text and text.isalpha():
            pieces = OLD.encode(text)
            for old, new in zip(matrices(before), matrices(model), strict=True):
                torch.testing.assert_close(new[token], old[pieces].mean(0))
            checked += 1
    assert checked > 5


def test_the_optimizer_goes_on() -> None:
    """Moments move with their rows, and a step with them is the step of torch's own state."""
    model = build(False)
    optimizer = torch.optim.AdamW(param_groups(model, MUP, 0.01, optimizer=torch.optim.AdamW))
    for _ in range(3):
        optimizer.zero_grad()
        model(TOKENS[:, :-1], TOKENS[:, 1:]).backward()
        optimizer.step()
    before = copy.deepcopy([optimizer.state[p] for p in (model.embed.weight, model.head.weight)])
    extend_embeddings(model, OLD, NEW, optimizer=optimizer)
    for weight, old in zip((model.embed.weight, model.head.weight), before, strict=True):
        assert weight.grad is None
        state = optimizer.state[weight]
        assert state["step"] == old["step"] == 3
        for key in ("exp_avg", "exp_avg_sq"):
            assert torch.equal(state[key][:V], old[key])
            assert torch.equal(state[key][V:], torch.zeros(ADDED, D))
    was = model.embed.weight.detach().clone()
    arabic = torch.tensor([NEW.encode(WRITTEN_ARABIC[0])[:50]])
    model(arabic[:, :-1], arabic[:, 1:]).backward()
    optimizer.step()
    moved = (model.embed.weight.detach() != was).any(1).nonzero().flatten().tolist()
    assert set(arabic[0, :-1].tolist()) <= set(moved)


def test_an_optimizer_that_cannot_follow_leaves_everything_as_it_was() -> None:
    model = build()
    factored = torch.optim.Adafactor(model.parameters())
    model(TOKENS[:, :-1], TOKENS[:, 1:]).backward()
    factored.step()
    before = copy.deepcopy(model.state_dict())
    state = {key: value.clone() for key, value in factored.state[model.embed.weight].items()}
    with pytest.raises(UserError, match="Adafactor keeps row_var of shape"):
        extend_embeddings(model, OLD, NEW, optimizer=factored)
    with pytest.raises(UserError, match=r"optimizer: it does not hold embed\.weight"):
        extend_embeddings(model, OLD, NEW, optimizer=torch.optim.SGD(build().parameters()))
    assert model.config.vocab_size == V
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
    for key, value in state.items():
        assert torch.equal(factored.state[model.embed.weight][key], value)


def test_rows_without_a_token() -> None:
    """New tokens take padded rows, which get values too; the matrix never shrinks below the new size."""
    before = build(rows=V + 50)
    model = extend_embeddings(build(rows=V + 50), OLD, NEW)
    assert model.config.vocab_size == V + 50
    old, new = before.embed.weight, model.embed.weight
    assert torch.equal(new[:V], old[:V])
    assert torch.equal(new[V + ADDED :], old[V + ADDED :])
    assert not (new[V : V + ADDED] == old[V : V + ADDED]).any()

    model = extend_embeddings(build(), OLD, NEW, multiple_of=64)
    assert model.config.vocab_size == len(model.embed.weight) == 384 + 64 * (V + ADDED > 384)
    padded = model.embed.weight[V + ADDED :]
    torch.testing.assert_close(padded, build().embed.weight.mean(0).expand_as(padded))


def test_replacement_goes_by_bytes() -> None:
    model, before = build(False), build(False)
    extend_embeddings(model, OLD, DONOR)
    assert model.config.vocab_size == DONOR.vocab_size
    places = {spelling: index for index, spelling in enumerate(OLD.spellings)}
    found = [(index, places[spelling]) for index, spelling in enumerate(DONOR.spellings) if spelling in places]
    assert (DONOR.eos_id, OLD.eos_id) in found
    assert 257 < len(found) < V
    ours, theirs = torch.tensor(found).T
    for old, new in zip(matrices(before), matrices(model), strict=True):
        assert torch.equal(new[ours], old[theirs])
        assert bool(new.isfinite().all())


def test_the_same_tokenizer_changes_nothing() -> None:
    model = extend_embeddings(build(), OLD, OLD)
    assert torch.equal(model.embed.weight, build().embed.weight)


@pytest.mark.parametrize("method", ["omp", "least_squares"])
def test_a_donor_model_gives_each_matrix_its_own_rows(method: str, tmp_path: Path) -> None:
    """A donor with the old rows under the new tokenizer gives its own rows, as a model and as a run directory."""
    lender, before = build(False, NEW.vocab_size), build(False)
    for own, lent in zip((before.embed, before.head), (lender.embed, lender.head), strict=True):
        own.weight.data = lent.weight.data[:V].clone()
    save_checkpoint(tmp_path / CHECKPOINTS, 1, lender.state_dict(), OptimizerTensors({}, []), {}, 1)
    NEW.save(tmp_path / TOKENIZER)
    for donor in ((NEW, lender), tmp_path):
        model = extend_embeddings(copy.deepcopy(before), OLD, NEW, method, donor, match_norms=False)
        for own, lent in zip(matrices(model), matrices(lender), strict=True):
            torch.testing.assert_close(own, lent)


def test_random_rows_follow_their_seed() -> None:
    rows = [extend_embeddings(build(), OLD, NEW, "random", seed=seed).embed.weight[V:] for seed in (0, 0, 1)]
    assert torch.equal(rows[0], rows[1])
    assert not torch.equal(rows[0], rows[2])


GOOD = torch.ones(DONOR.vocab_size, 4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "mode"}, "method='mode'|method=mode"),
        ({"method": "omp"}, "method=omp needs a donor"),
        ({"method": "mean", "donor": (DONOR, GOOD)}, "method=mean uses no donor; these do: similarity, omp, least_sq"),
        ({"method": "omp", "donor": (DONOR, GOOD[:10])}, r"its matrix has shape \[10, 4\], but \[tokens, width\]"),
        ({"method": "omp", "donor": (DONOR, GOOD / 0)}, "the donor's matrix has values that are not finite"),
        ({"method": "omp", "donor": (DONOR, "rows")}, "its matrix is a str, not numbers"),
        ({"method": "omp", "donor": 3}, "donor is neither"),
        ({"method": "omp", "donor": "none"}, "^donor: none: no such run directory"),
        ({"method": "omp", "donor": (Tokenizer.bytes(), torch.ones(257, 4))}, "shares no token of two or more bytes"),
        ({"method": "omp", "donor": (DONOR, GOOD), "k": 0}, "k=0 is not a positive integer"),
        ({"method": "omp", "donor": (DONOR, GOOD * 1j)}, "donor: its matrix is complex"),
        ({"old": None}, "old: a NoneType is neither a tokenizer nor the path of one"),
        ({"seed": "a"}, "seed='a' is not an integer"),
        ({"multiple_of": 1.5}, "multiple_of=1.5 is not a positive integer"),
        ({"new": "none.json"}, "none.json: no such file"),
        ({"old": DONOR}, f"old has {DONOR.vocab_size} tokens, more than the {V} rows of the model"),
    ],
)
def test_bad_arguments_are_one_line_and_change_nothing(options: dict[str, Any], message: str) -> None:
    model = build()
    with pytest.raises(UserError, match=message) as caught:
        extend_embeddings(**{"model": model, "old": OLD, "new": NEW, **options})
    assert "\n" not in str(caught.value)
    assert torch.equal(model.embed.weight, build().embed.weight)
    assert model.config.vocab_size == V


def test_bad_models_are_refused() -> None:
    with pytest.raises(UserError, match="model is a DataParallel, not a bare"):
        extend_embeddings(nn.DataParallel(build()), OLD, NEW)  # type: ignore[arg-type]
    broken = build(False)
    broken.head.weight.data[3, 0] = float("nan")
    with pytest.raises(UserError, match=r"the model's head\.weight has values that are not finite"):
        extend_embeddings(broken, OLD, NEW)
    assert len(broken.embed.weight) == V
    with pytest.raises(UserError, match="no embedding or head of parameters; a quantized model"):
        extend_embeddings(quantize(build()), OLD, NEW)
    with torch.device("meta"):
        empty = build()
    with pytest.raises(UserError, match=r"the model's embed\.weight has no values"):
        extend_embeddings(empty, OLD, NEW)
