"""Generation for rows of unequal lengths, and decoding by the kernels, against passes over each row alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hardship import fill_with_poison

from sparsetrain.errors import UserError
from sparsetrain.models import ModelConfig, SoftPrompt, Transformer
from sparsetrain.sparsity import prepared, sparse_layers

LENGTHS = [7, 3, 12, 1]
KINDS: dict[str, dict[str, Any]] = {
    "alibi": {"positions": "alibi"},
    "rope": {"positions": "rope", "rope_fraction": 0.5, "n_kv_heads": 2},
    "learned": {"positions": "learned"},
    "plain heads": {"positions": "alibi", "n_heads": 3, "d_model": 60},
}


def model_of(kind: str, sparsity: float = 0.6) -> Transformer:
    shape = {"vocab_size": 50, "d_model": 64, "n_layers": 2, "n_heads": 4, "max_context": 64, "sparsity": sparsity}
    return Transformer(ModelConfig(**{**shape, **KINDS[kind], "seed": 0})).eval()


def padded(filler: int) -> tuple[torch.Tensor, torch.Tensor]:
    rows = [torch.randint(0, 50, (n,), generator=torch.Generator().manual_seed(n)) for n in LENGTHS]
    tokens = torch.full((len(rows), max(LENGTHS)), filler)
    for place, row in zip(tokens, rows, strict=True):
        place[: len(row)] = row
    return tokens, torch.tensor(LENGTHS)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_each_row_is_continued_as_if_it_were_alone(
    kind: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In float32 a kernel attends to the cache, in float64 torch does."""
    model = model_of(kind).to(dtype)
    fill_with_poison(monkeypatch)
    tokens, lengths = padded(49)
    found = model.generate(tokens, 9, temperature=0.0, stop_token=0, lengths=lengths)
    for row, whole, length in zip(found, tokens, LENGTHS, strict=True):
        alone = model.generate(whole[None, :length], 9, temperature=0.0, stop_token=0)[0]
        if dtype == torch.bfloat16:  # rounding differs with the rows of a product
            assert row[:length].tolist() == whole[:length].tolist()
            continue
        assert row[: len(alone)].tolist() == alone.tolist()
        assert set(row[len(alone) :].tolist()) <= {0}


@pytest.mark.parametrize("front", [False, True])
def test_a_soft_prompt_stands_at_its_place_in_each_row(front: bool) -> None:
    model = model_of("alibi")
    torch.manual_seed(0)
    prompt = SoftPrompt(3, 64, std=1.0, front=front)
    tokens, lengths = padded(49)
    found = model.generate(tokens, 5, temperature=0.0, prompt=prompt, lengths=lengths)
    for row, whole, length in zip(found, tokens, LENGTHS, strict=True):
        alone = model.generate(whole[None, :length], 5, temperature=0.0, prompt=prompt)[0]
        assert row[: length + 5].tolist() == alone.tolist()


def test_equal_lengths_are_no_lengths() -> None:
    model, tokens = model_of("alibi"), padded(1)[0]
    given = model.generate(tokens, 4, temperature=0.0, lengths=torch.full((4,), 12))
    assert given.tolist() == model.generate(tokens, 4, temperature=0.0).tolist()


@pytest.mark.parametrize("lengths", [[0, 3, 12, 1], [7, 3, 13, 1], [7, 3]])
def test_lengths_that_do_not_fit_are_refused(lengths: list[int]) -> None:
    with pytest.raises(UserError, match=r"lengths=\[.*\] must be one number from 1 to 12 for each row"):
        model_of("alibi").generate(padded(1)[0], 4, lengths=torch.tensor(lengths))


@pytest.mark.parametrize("sparsity", [0.1, 0.6, 0.85])
def test_greedy_tokens_equal_those_of_the_masked_backend(sparsity: float) -> None:
    model, tokens = model_of("alibi", sparsity), padded(3)[0]
    found = model.generate(tokens, 20, temperature=0.0)
    for _, layer in sparse_layers(model):
        layer.backend = "masked"
    assert found.tolist() == model.generate(tokens, 20, temperature=0.0).tolist()


def test_layers_are_prepared_only_inside() -> None:
    model, x = model_of("alibi", 0.2), torch.randn(1, 3, 64)
    layers = [layer for _, layer in sparse_layers(model)]
    first = layers[0]
    with torch.no_grad():
        with prepared(model), prepared(model):
            assert all(layer.prepared is not None for layer in layers)
            torch.testing.assert_close(first(x), first.to_linear()(x))
        assert all(layer.prepared is None for layer in layers)
        with prepared(model):  # what is not on a CPU, or no plain tensor, is left to the layer
            assert first.prepared(x.to("meta")) is None
            assert first.prepared(x.as_subclass(torch.nn.Buffer)) is None
        first.values.mul_(2.0)
        torch.testing.assert_close(first(x), first.to_linear()(x))
    with prepared(model):
        assert first(x.requires_grad_()).requires_grad  # a product that may be differentiated is the usual one
