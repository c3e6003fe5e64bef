"""Generation: the cache against full passes, sampling against the transformers library."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import TopPLogitsWarper

from sparsetrain.errors import UserError
from sparsetrain.models import KVCache, ModelConfig, SoftPrompt, Transformer, attention
from sparsetrain.models.decoding.generate import nucleus, sample
from sparsetrain.parameterization import Parameterization

VOCAB = 40
KINDS: dict[str, dict[str, Any]] = {
    "alibi-gqa": {"n_kv_heads": 2},
    "rope": {"positions": "rope", "mlp": "swiglu", "n_kv_heads": 1},
    "learned": {"positions": "learned"},
    "none": {"positions": "none"},
    "six-heads-sparse": {"n_heads": 6, "sparsity": 0.5},
}


def build(**options: Any) -> Transformer:
    shape = {"d_model": 24, "n_layers": 2, "n_heads": 4, "vocab_size": VOCAB, "max_context": 32, "seed": 0}
    rules = Parameterization.mup(8, alpha_in=2.0, alpha_out=6.0)
    return Transformer(ModelConfig(**{**shape, "init_std": 0.3, **options}), rules)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("parts", [[20], [1] * 20, [7, 6, 1, 1, 5]])
def test_cached_hidden_states_equal_a_full_pass(
    kind: str, parts: list[int], monkeypatch: pytest.MonkeyPatch, device: torch.device
) -> None:
    monkeypatch.setattr(attention, "_QUERY_BLOCK", 4)
    model = build(**KINDS[kind]).to(device, torch.float64)
    tokens = torch.randint(0, VOCAB, (3, 20), device=device)
    cache = KVCache(model.config, 3, 20, device, torch.float64)
    pieces = [model.hidden(part, cache=cache) for part in tokens.split(parts, dim=1)]
    torch.testing.assert_close(torch.cat(pieces, dim=1), model.hidden(tokens))
    assert cache.length == 20


def test_a_full_cache_says_so() -> None:
    model = build()
    cache = KVCache(model.config, 1, 3, torch.device("cpu"), torch.float32)
    with pytest.raises(UserError, match="holds 3 tokens; 4 do not fit"):
        model.hidden(torch.zeros(1, 4, dtype=torch.long), cache=cache)


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_generation_equals_repeated_full_passes(kind: str, device: torch.device) -> None:
    model = build(**KINDS[kind]).to(device)
    tokens = torch.randint(0, VOCAB, (2, 5), device=device)
    expected = tokens
    for _ in range(12):
        expected = torch.cat((expected, model(expected)[:, -1].argmax(-1, keepdim=True)), dim=1)
    assert torch.equal(model.generate(tokens, 12, temperature=0.0), expected)


def test_multipliers_act_in_generation(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under muP, sampling uses the logits of the forward pass, including alpha_out / m_d."""
    model, seen = build(), []
    monkeypatch.setattr(
        "sparsetrain.models.decoding.generate.sample",
        lambda logits, *settings: seen.append(logits) or logits.argmax(-1),
    )
    tokens = model.generate(torch.randint(0, VOCAB, (2, 5)), 6)
    torch.testing.assert_close(torch.stack(seen, dim=1), model(tokens[:, :-1])[:, 4:])


@given(
    st.lists(st.floats(-8, 8, width=32), min_size=2, max_size=30, unique=True), st.floats(0.05, 0.99), st.integers(0, 9)
)
def test_top_p_matches_transformers(values: list[float], top_p: float, seed: int) -> None:
    logits = torch.tensor([values])
    logits = torch.cat((logits, logits.flip(1) * 0.7))
    theirs = TopPLogitsWarper(top_p)(None, logits.clone())
    ours = nucleus(logits, top_p)
    # If a cumulative sum equals top_p within rounding, both results are correct.
    sums = logits.softmax(-1).sort(-1).values.cumsum(-1)
    if ((sums - (1 - top_p)).abs() > 1e-5).all() and logits.unique().numel() == logits.numel():
        assert torch.equal(ours, theirs)
    assert bool((ours.isfinite() == (ours == logits)).all())
    assert bool(ours.isfinite().any(-1).all())


def test_sampling_frequencies_match_the_softmax() -> None:
    logits = torch.tensor([[0.0, 1.0, 2.0, -1.0]])
    draws = sample(logits.expand(20000, -1), 2.0, 1.0, torch.Generator().manual_seed(0))
    expected = (logits[0] / 2.0).softmax(0)
    torch.testing.assert_close(draws.bincount(minlength=4) / 20000, expected, atol=0.015, rtol=0.0)


def test_a_generator_makes_generation_repeatable() -> None:
    model, tokens = build(), torch.zeros(1, 2, dtype=torch.long)
    runs = [model.generate(tokens, 8, generator=torch.Generator().manual_seed(s)) for s in (0, 0, 1)]
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])


def test_stop_token_fills_its_row_and_ends_generation() -> None:
    model, tokens = build(), torch.tensor([[1, 2], [3, 4]])
    free = model.generate(tokens, 10, temperature=0.0)
    stop = int(free[0, 4])
    stopped = model.generate(tokens, 10, temperature=0.0, stop_token=stop)
    first = int((free[0, 2:] == stop).nonzero()[0]) + 2
    assert torch.equal(stopped[0, : first + 1], free[0, : first + 1])
    assert bool((stopped[0, first:] == stop).all())
    alone = model.generate(tokens[:1], 10, temperature=0.0, stop_token=stop)
    assert alone.shape[1] == first + 1


def test_dropout_is_off_and_the_mode_is_restored() -> None:
    model = build(dropout=0.5).train()
    tokens = torch.zeros(1, 2, dtype=torch.long)
    assert torch.equal(model.generate(tokens, 6, temperature=0.0), model.generate(tokens, 6, temperature=0.0))
    assert model.training


@pytest.mark.parametrize("positions", ["alibi", "learned"])
def test_soft_prompt_of_token_embeddings_generates_like_the_tokens(positions: str) -> None:
    model = build(positions=positions)
    source, words = torch.tensor([[5, 6, 7], [8, 9, 1]]), torch.tensor([[2, 3]])
    prompt = SoftPrompt.from_embeddings(model.embed.weight[words[0]])
    hard = model.generate(torch.cat((source, words.expand(2, -1)), dim=1), 6, temperature=0.0)
    soft = model.generate(source, 6, temperature=0.0, prompt=prompt)
    assert torch.equal(soft, torch.cat((hard[:, :3], hard[:, 5:]), dim=1))


def test_bfloat16_model_generates(device: torch.device) -> None:
    model = build().to(device, torch.bfloat16)
    assert model.generate(torch.zeros(2, 3, dtype=torch.long, device=device), 4).shape == (2, 7)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens=0"),
        ({"temperature": -1.0}, "temperature=-1.0"),
        ({"top_p": 0.0}, "top_p=0.0"),
        ({"max_new_tokens": 40}, "the model has learned only 32"),
    ],
)
def test_bad_settings_are_named(options: dict[str, Any], message: str) -> None:
    model = build(positions="learned")
    with pytest.raises(UserError, match=message):
        model.generate(torch.zeros(1, 3, dtype=torch.long), **{"max_new_tokens": 4, **options})
