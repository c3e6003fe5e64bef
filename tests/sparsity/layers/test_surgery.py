"""Surgery on other people's models: the same function as the dense model whose weights are masked."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM
from transformers.pytorch_utils import Conv1D

from sparsetrain.errors import UserError
from sparsetrain.sparsity import SparseLinear, SparsityConfig, SparsityGroup, densify, sparse_layers, sparsify

VOCAB = 37


def mlp(depth: int = 3, width: int = 16) -> nn.Sequential:
    return nn.Sequential(*(m for _ in range(depth) for m in (nn.Linear(width, width), nn.GELU())), nn.Linear(width, 5))


def gpt2() -> GPT2LMHeadModel:
    config = GPT2Config(vocab_size=VOCAB, n_positions=16, n_embd=24, n_layer=2, n_head=3)
    return GPT2LMHeadModel(config).eval()


def llama() -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=3,
        num_key_value_heads=3,
    )
    return LlamaForCausalLM(config).eval()


def run(model: nn.Module) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    if isinstance(model, nn.Sequential):
        return model(torch.randn(3, 16, generator=generator))
    return model(torch.randint(0, VOCAB, (2, 11), generator=generator)).logits


MODELS: dict[str, tuple[Callable[[], Any], set[str]]] = {
    "mlp": (mlp, {"0", "2", "4", "6"}),
    "gpt2": (
        gpt2,
        {
            f"transformer.h.{i}.{part}"
            for i in range(2)
            for part in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
        },
    ),
    "llama": (
        llama,
        {f"model.layers.{i}.self_attn.{part}_proj" for i in range(2) for part in "qkvo"}
        | {f"model.layers.{i}.mlp.{part}_proj" for i in range(2) for part in ("gate", "up", "down")},
    ),
}


def scrambled(kind: str) -> Any:
    """A model whose every parameter matters."""
    model = MODELS[kind][0]()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def masked(dense: Any, sparse: nn.Module) -> Any:
    """A copy of ``dense`` with each weight multiplied by the mask of the sparse layer of that name."""
    other = copy.deepcopy(dense)
    with torch.no_grad():
        for name, layer in sparse_layers(sparse):
            module = other.get_submodule(name)
            mask = layer.pattern.mask()
            module.weight.mul_(mask.t() if isinstance(module, Conv1D) else mask)
    return other


@pytest.mark.parametrize("kind", MODELS)
def test_logits_and_gradients_equal_those_of_the_masked_dense_model(kind: str) -> None:
    dense = scrambled(kind)
    sparse = sparsify(copy.deepcopy(dense), 0.6, seed=0)
    assert {name for name, _ in sparse_layers(sparse)} == MODELS[kind][1]
    reference = masked(dense, sparse)
    ours, theirs = run(sparse), run(reference)
    torch.testing.assert_close(ours, theirs)
    assert float((theirs - run(dense)).detach().abs().max()) > 0.1  # the mask matters
    ours.square().mean().backward()
    theirs.square().mean().backward()
    for name, layer in sparse_layers(sparse):
        module = reference.get_submodule(name)
        gradient = module.weight.grad.t() if isinstance(module, Conv1D) else module.weight.grad
        torch.testing.assert_close(layer.values.grad, layer.pattern.gather(gradient))
        torch.testing.assert_close(layer.bias is None, module.bias is None)


@pytest.mark.parametrize("kind", MODELS)
def test_density_is_exact_in_every_layer(kind: str) -> None:
    for _, layer in sparse_layers(sparsify(scrambled(kind), 0.7, seed=0)):
        assert layer.values.numel() == round(0.3 * layer.in_features * layer.out_features)


@pytest.mark.parametrize("kind", MODELS)
def test_densify_gives_the_same_logits_and_exact_zeros(kind: str) -> None:
    model = sparsify(scrambled(kind), 0.6, seed=0)
    expected = run(model)
    masks = {name: layer.pattern.mask() for name, layer in sparse_layers(model)}
    kinds = {name: type(MODELS[kind][0]().get_submodule(name)) for name in masks}
    assert densify(model) is model
    assert not list(sparse_layers(model))
    torch.testing.assert_close(run(model), expected)
    for name, mask in masks.items():
        linear = model.get_submodule(name)
        assert type(linear) is kinds[name]
        assert torch.equal(linear.weight != 0, mask.t() if isinstance(linear, Conv1D) else mask)
        assert linear.weight.requires_grad


def test_sparsify_is_in_place_and_keeps_mode_device_and_frozen_weights(device: torch.device) -> None:
    model = mlp().to(device).eval()
    model[0].weight.requires_grad_(False)
    assert sparsify(model, 0.5, seed=0) is model
    first = model[0]
    assert isinstance(first, SparseLinear)
    assert not first.training
    assert first.values.device.type == first.col.device.type == device.type
    assert not first.values.requires_grad
    assert first.bias is not None
    assert first.bias.requires_grad


# -- masks -----------------------------------------------------------------------------------------------------------


def masks(model: nn.Module) -> dict[str, Tensor]:
    return {name: layer.pattern.mask() for name, layer in sparse_layers(model)}


def test_masks_differ_between_layers_and_depend_on_seed_and_name_only() -> None:
    small, large = masks(sparsify(mlp(2), 0.5, seed=0)), masks(sparsify(mlp(3), 0.5, seed=0))
    assert torch.equal(small["0"], large["0"])
    assert torch.equal(small["2"], large["2"])
    assert not torch.equal(large["0"], large["2"])
    assert not torch.equal(large["2"], large["4"])
    assert not torch.equal(large["0"], masks(sparsify(mlp(3), 0.5, seed=1))["0"])
    # Nor on what else is made sparse.
    assert torch.equal(masks(sparsify(mlp(3), 0.5, include=["2"], seed=0))["2"], large["2"])


def test_without_a_seed_masks_follow_the_global_generator() -> None:
    drawn = []
    for seed in (3, 3, 4):
        model = mlp()
        torch.manual_seed(seed)
        drawn.append(masks(sparsify(model, 0.5))["0"])
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


def test_a_seed_leaves_the_global_generator_alone() -> None:
    model = gpt2()
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    densify(sparsify(model, 0.5, seed=0))
    assert torch.equal(torch.rand(3), expected)


def test_the_plans_seed_wins() -> None:
    plan = SparsityConfig(sparsity=0.5, seed=7)
    assert torch.equal(masks(sparsify(mlp(), plan=plan, seed=1))["0"], masks(sparsify(mlp(), 0.5, seed=7))["0"])


def test_a_plan_by_groups_with_a_backend() -> None:
    plan = SparsityConfig(sparsity=0.5, groups=[SparsityGroup("0", 0.75), SparsityGroup("6", 0.0)], backend="masked")
    model = sparsify(mlp(), plan=plan, seed=0)
    assert {name: layer.pattern.density for name, layer in sparse_layers(model)} == {"0": 0.25, "2": 0.5, "4": 0.5}
    assert {layer.backend for _, layer in sparse_layers(model)} == {"masked"}
    assert type(model[6]) is nn.Linear


def test_include_and_exclude() -> None:
    model = sparsify(gpt2(), 0.5, include=["*attn*", "*mlp*"], exclude=["*c_proj"], seed=0)
    assert {name.rpartition(".")[2] for name, _ in sparse_layers(model)} == {"c_attn", "c_fc"}


def test_sparsity_zero_changes_nothing() -> None:
    model = mlp()
    assert not list(sparse_layers(sparsify(model, 0.0)))


# -- hooks -----------------------------------------------------------------------------------------------------------


def test_hooks_follow_the_layer_and_their_handles_still_remove_them() -> None:
    model = mlp()
    plain = copy.deepcopy(model)
    seen: list[str] = []
    handles = [
        model[0].register_forward_hook(lambda module, inputs, output: output * 2),
        model[0].register_forward_pre_hook(lambda module, inputs, kwargs: seen.append("pre"), with_kwargs=True),
        model[0].register_full_backward_hook(lambda module, gradients, outputs: seen.append("backward")),
    ]
    sparsify(model, 0.5, seed=0)
    sparsify(plain, 0.5, seed=0)
    x = torch.randn(2, 16, requires_grad=True)
    for _ in range(2):
        seen.clear()
        torch.testing.assert_close(model[0](x), 2 * plain[0](x))
        model[0](x).sum().backward()
        assert seen == ["pre", "pre", "backward"]
        densify(model)
        densify(plain)
    for handle in handles:
        handle.remove()
    torch.testing.assert_close(model[0](x), plain[0](x))


# -- what is refused -------------------------------------------------------------------------------------------------


def _tied() -> nn.Module:
    model = mlp()
    model[4].weight = model[2].weight
    return model


def _used_twice() -> nn.Module:
    model = mlp()
    model[4] = model[2]
    return model


def _weight_norm() -> nn.Module:
    model = mlp()
    parametrizations.weight_norm(model[2])
    return model


@pytest.mark.parametrize(
    ("model", "call", "message"),
    [
        (_tied, {"sparsity": 0.5}, "2: its weight is shared with another module"),
        (_used_twice, {"sparsity": 0.5}, "2: its weight is shared with another module"),
        (_weight_norm, {"sparsity": 0.5}, r"2: its weight is computed \(weight norm, a parametrization\)"),
        (lambda: nn.Linear(2, 2), {"sparsity": 0.5}, "the model is itself a linear layer"),
        (mlp, {}, "exactly one of sparsity and plan"),
        (mlp, {"sparsity": 0.5, "plan": SparsityConfig()}, "exactly one of sparsity and plan"),
        (mlp, {"plan": SparsityConfig(), "include": ["*"]}, "with plan=, give include"),
        (mlp, {"plan": SparsityConfig(), "backend": "masked"}, "with plan=, give include"),
        (mlp, {"sparsity": 1.0}, r"sparsity=1.0 must be a number in \[0, 1\)"),
        (mlp, {"sparsity": 0.999}, "0: density=0.00.* leaves no weight at all in a 16x16 matrix"),
        (mlp, {"sparsity": 0.5, "backend": "mask"}, "backend='mask' is not one of"),
        (mlp, {"sparsity": 0.5, "pattern": "rand"}, "sparsity.pattern='rand' is not one of random"),
        (mlp, {"sparsity": 0.5, "include": ["*attn*"]}, r"include '\*attn\*' matches no linear layer"),
    ],
)
def test_what_cannot_be_made_sparse_is_named_and_unchanged(
    model: Callable[[], nn.Module], call: dict[str, Any], message: str
) -> None:
    made = model()
    with pytest.raises(UserError, match=message):
        sparsify(made, seed=0, **call)
    assert not list(sparse_layers(made))


def test_a_tied_head_stays_tied() -> None:
    model = sparsify(gpt2(), 0.5, seed=0)
    assert model.lm_head.weight is model.transformer.wte.weight
    with pytest.raises(UserError, match="lm_head: its weight is shared with another module"):
        sparsify(gpt2(), 0.5, exclude=[], seed=0)


def test_densify_keeps_a_layer_that_is_used_twice_one_layer() -> None:
    layer = SparseLinear(16, 16, density=0.5, seed=0)
    model = nn.Sequential(layer, nn.GELU(), layer)
    expected = run(model)
    densify(model)
    assert isinstance(model[0], nn.Linear)
    assert model[0] is model[2]
    torch.testing.assert_close(run(model), expected)


def test_densify_refuses_a_bare_layer_and_leaves_dense_models_alone() -> None:
    with pytest.raises(UserError, match=r"use layer.to_linear\(\)"):
        densify(SparseLinear(4, 4, density=0.5))
    model = mlp()
    layers = list(model)
    assert list(densify(model)) == layers
