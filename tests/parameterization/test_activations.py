"""A small coordinate check: what each parameterization does to the scale of activations across density."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sparsetrain.models import ModelConfig, Transformer
from sparsetrain.parameterization import Parameterization, param_groups

P = Parameterization
WIDTH, VOCAB = 128, 61
SPARSITIES = (0.0, 0.5, 0.75, 0.875)
LAYERS = ("blocks.0.attn.qkv", "blocks.0.mlp.up", "blocks.0.mlp.down", "blocks.1.attn.qkv", "blocks.1.mlp.down")


def scales(rules: Parameterization, sparsity: float, steps: int) -> dict[str, float]:
    """Root mean square of each layer's output after ``steps`` steps, its mean over two seeds."""
    total = dict.fromkeys(LAYERS, 0.0)
    for seed in (0, 1):
        config = ModelConfig(WIDTH, 2, 4, VOCAB, max_context=32, seed=seed, sparsity=sparsity, init_std=0.05)
        model = Transformer(config, rules)
        optimizer = torch.optim.AdamW(param_groups(model, rules, lr=2e-3))
        tokens = torch.randint(0, VOCAB, (4, 33), generator=torch.Generator().manual_seed(seed))
        for _ in range(steps):
            model.loss(tokens[:, :-1], tokens[:, 1:]).backward()
            optimizer.step()
            optimizer.zero_grad()
        seen: dict[str, Tensor] = {}

        def record(name: str, seen: dict[str, Tensor], model: Transformer) -> None:
            model.get_submodule(name).register_forward_hook(lambda _m, _i, output: seen.update({name: output.detach()}))

        for name in LAYERS:
            record(name, seen, model)
        with torch.no_grad():
            model(tokens[:, :-1])
        for name in LAYERS:
            total[name] += float(seen[name].square().mean().sqrt()) / 2
    return total


def spread(rules: Parameterization, steps: int) -> dict[str, float]:
    """Largest over smallest scale across the sparsities, by layer."""
    runs = [scales(rules, sparsity, steps) for sparsity in SPARSITIES]
    return {name: max(run[name] for run in runs) / min(run[name] for run in runs) for name in LAYERS}


def test_supar_keeps_activations_across_density_at_initialisation() -> None:
    assert max(spread(P.supar(32), 0).values()) < 1.15


@pytest.mark.parametrize("rules", [P.sp(), P.mup(32)], ids=["sp", "mup"])
def test_sp_and_mup_shrink_with_density_as_its_root(rules: Parameterization) -> None:
    found = spread(rules, 0)
    for name in ("blocks.0.attn.qkv", "blocks.0.mlp.up"):
        assert found[name] == pytest.approx(8**0.5, rel=0.15)
    # Behind two sparse matrices the loss adds up.
    assert found["blocks.0.mlp.down"] > 5.0


def test_supar_keeps_activations_across_density_while_training() -> None:
    supar, sp = spread(P.supar(32), 10), spread(P.sp(), 10)
    assert max(supar.values()) < 1.5
    assert sp["blocks.0.mlp.down"] > 4 * supar["blocks.0.mlp.down"]
