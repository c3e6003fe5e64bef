"""Blocks that are added to a model, and rows of a matrix that are trained alone."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from sparsetrain.models import ModelConfig, Transformer
from sparsetrain.models.frozen_rows import train_rows
from sparsetrain.models.new_blocks import added, deepened, sources, with_identities

# Outputs of these tiny layers may lose all weights.
pytestmark = pytest.mark.filterwarnings("ignore:.* have no weight")

TOKENS = torch.arange(40).view(2, 20)


def test_copies_stand_behind_the_blocks_of_llama_pro() -> None:
    """LLaMA Pro cuts the blocks into groups and adds a copy of the last block behind each."""
    assert [old for old, _ in sources(4, 2)] == [0, 1, 1, 2, 3, 3]
    assert added(4, 2) == [2, 5]
    assert added(4, 1) == [4]
    assert added(3, 3) == [1, 3, 5]
    assert [old for old, _ in sources(5, 2)] == [0, 1, 2, 2, 3, 4, 4]
    assert sources(2, 0) == [(0, False), (1, False)]
    assert deepened({"blocks.1.mlp.up": 0.25, "head": 1.0}, 2, 1) == {
        "head": 1.0,
        "blocks.1.mlp.up": 0.25,
        "blocks.2.mlp.up": 0.25,
    }


@pytest.mark.parametrize("new_blocks", [1, 2, 3])
@pytest.mark.parametrize("sparsity", [0.0, 0.75])
@pytest.mark.parametrize("options", [{}, {"mlp": "swiglu", "bias": True, "norm": "rmsnorm", "positions": "learned"}])
def test_the_deeper_model_computes_the_same_bits(options: dict[str, str], sparsity: float, new_blocks: int) -> None:
    shape = {"d_model": 16, "n_heads": 2, "vocab_size": 40, "sparsity": sparsity, "init_std": 0.3, **options}
    model = Transformer(ModelConfig(**shape, n_layers=3, seed=0))  # type: ignore[arg-type]
    deeper = Transformer(ModelConfig(**shape, n_layers=3 + new_blocks, seed=1))  # type: ignore[arg-type]
    with torch.no_grad():
        for parameter in model.parameters():
            if not bool(parameter.any()):  # biases start at zero
                parameter.uniform_(-1.0, 1.0)
        deeper.load_state_dict(with_identities(model.state_dict(), 3, new_blocks))
        assert torch.equal(deeper(TOKENS), model(TOKENS))
    deeper(TOKENS[:, :-1], TOKENS[:, 1:]).backward()
    for place in added(3, new_blocks):
        outputs = deeper.get_submodule(f"blocks.{place}.attn.out"), deeper.get_submodule(f"blocks.{place}.mlp.down")
        for layer in outputs:
            assert all(parameter.grad is not None and bool(parameter.grad.any()) for parameter in layer.parameters())


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.SGD])
def test_rows_are_trained_as_a_matrix_of_their_own(kind: type[torch.optim.Optimizer]) -> None:
    """The oracle is a parameter that has these rows alone, between constant ones."""
    rows, options = [1, 4], {"lr": 0.1, "weight_decay": 0.3} | ({"momentum": 0.9} if kind is torch.optim.SGD else {})
    whole = nn.Parameter(torch.randn(6, 3))
    alone, others = nn.Parameter(whole.detach()[rows].clone()), whole.detach().clone()
    one, other = kind([whole], **options), kind([alone], **options)  # type: ignore[arg-type]
    train_rows(whole, rows, one)
    target = torch.randn(6, 3)
    for _ in range(4):
        one.zero_grad()
        other.zero_grad()
        (whole * target).sin().sum().backward()
        (alone * target[rows]).sin().sum().backward()
        assert whole.grad is not None
        assert alone.grad is not None
        torch.testing.assert_close(whole.grad.norm(), alone.grad.norm())  # what clipping sees
        one.step()
        other.step()
    assert torch.equal(whole.detach()[rows], alone.detach())
    kept = [row for row in range(6) if row not in rows]
    assert torch.equal(whole.detach()[kept], others[kept])
    assert not torch.equal(whole.detach()[rows], others[rows])
