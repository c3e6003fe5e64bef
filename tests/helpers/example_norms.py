"""The oracle of per-example gradient norms: autograd, one example at a time; and small language models for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sparsetrain
from sparsetrain import ModelConfig, SparsityConfig, Transformer

Share = Callable[[int], Tensor]  # from an example to its share of the batch's loss


def one_at_a_time(model: nn.Module, share: Share, examples: int) -> dict[str, Tensor]:
    """Return the squared norms of B times the gradient of each example's share of the loss."""
    found: dict[str, list[Tensor]] = {}
    for example in range(examples):
        model.zero_grad()
        (examples * share(example)).backward()
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                found.setdefault(name, []).append(parameter.grad.double().square().sum())
    model.zero_grad()
    return {name: torch.stack(squares) for name, squares in found.items()}


def assert_norms(
    model: nn.Module, loss: Callable[[], Tensor], share: Share, examples: int, rtol: float = 1e-5, **options: Any
) -> dict[str, Tensor]:
    """Compare norms with the oracle, and the gradients with those without the context."""
    expected = one_at_a_time(model, share, examples)
    loss().backward()
    plain = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    model.zero_grad()
    with sparsetrain.per_example_norms(model, **options) as norms:
        loss().backward()
    found = norms.squared
    assert found.keys() == expected.keys() == plain.keys()
    for name, squared in expected.items():
        torch.testing.assert_close(found[name].double(), squared, rtol=rtol, atol=0.0, msg=f"{name}: {found[name]}")
    for name, parameter in model.named_parameters():
        if name in plain:
            assert parameter.grad is not None
            torch.testing.assert_close(parameter.grad, plain[name], rtol=1e-4, atol=1e-6)
    return found


def language_model(targets: Tensor, tokens: Tensor, model: nn.Module) -> tuple[Callable[[], Tensor], Share]:
    """Return the loss of a batch, and the share of each example in it."""
    count = int((targets >= 0).sum())

    def share(example: int) -> Tensor:
        logits = model(tokens[example : example + 1])
        logits = logits if isinstance(logits, Tensor) else logits.logits
        return F.cross_entropy(logits[0], targets[example], ignore_index=-100, reduction="sum") / count

    return lambda: model(tokens, targets), share


def transformer(plan: SparsityConfig | None = None, **options: Any) -> Transformer:
    given = {"d_model": 32, "n_layers": 2, "n_heads": 2, "vocab_size": 47, "max_context": 32, "seed": 0} | options
    return Transformer(ModelConfig(**given), plan=plan)


def batch(examples: int = 3, length: int = 19, masked: float = 0.3) -> tuple[Tensor, Tensor]:
    tokens, targets = torch.randint(0, 47, (2, examples, length))
    targets[torch.rand(examples, length) < masked] = -100
    targets[0] = -100  # an example without targets
    targets[1, 0] = 5
    return tokens, targets
