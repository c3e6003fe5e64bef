"""Experts that a module holds in one tensor: sparse layers inside, the same function outside."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from sparsetrain.sparsity import SET, MaskManager, RigL, SparseLinear, densify, sparse_layers, sparsify

TINY: dict[str, Any] = {
    "vocab_size": 37,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
MODELS: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 3},
    "qwen3_moe": {"num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 24},
    "gpt_oss": {"num_local_experts": 3, "num_experts_per_tok": 2, "head_dim": 8},
}


def make(kind: str) -> Any:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **(TINY | MODELS[kind]))).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def tokens() -> Tensor:
    return torch.randint(3, 37, (2, 9), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
def test_logits_and_gradients_are_those_of_the_masked_dense_model(kind: str, implementation: str) -> None:
    """Whichever way transformers multiplies by the experts; the eager one calls the sparse layers themselves."""
    dense = make(kind)
    model = sparsify(copy.deepcopy(dense), 0.6, seed=0)
    layers = {name: layer for name, layer in sparse_layers(model) if "_layers." in name}
    assert len(layers) == 6
    with torch.no_grad():
        for name, layer in sparse_layers(model):
            mask = layer.pattern.mask()
            weight, transposed = weight_of(dense, name)
            weight.mul_(mask.t() if transposed else mask)
    called: list[str] = []
    for name, layer in layers.items():
        layer.register_forward_hook(lambda *_, name=name: called.append(name))
    for one in (dense, model):
        one.set_experts_implementation(implementation)
    ours, theirs = model(tokens()).logits, dense(tokens()).logits
    torch.testing.assert_close(ours, theirs)
    assert bool(called) == (implementation == "eager")
    ours.square().mean().backward()
    theirs.square().mean().backward()
    for name, layer in layers.items():
        weight, transposed = weight_of(dense, name, gradient=True)
        expected = layer.pattern.gather(weight.t() if transposed else weight)
        found = torch.zeros_like(expected) if layer.values.grad is None else layer.values.grad
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-7)


def weight_of(model: nn.Module, name: str, gradient: bool = False) -> tuple[Tensor, bool]:
    """The matrix that a sparse layer of that name replaced, and whether it is stored transposed."""
    if "_layers." not in name:
        return model.get_submodule(name).weight, False
    path, _, index = name.rpartition("_layers.")
    holder, _, leaf = path.rpartition(".")
    stack = getattr(model.get_submodule(holder), leaf)
    return (stack.grad if gradient else stack)[int(index)], model.get_submodule(holder).is_transposed


@pytest.mark.parametrize("kind", MODELS)
def test_the_tensors_come_back(kind: str, tmp_path: Path) -> None:
    """Classes, order of tensors and logits are those of before, and what is saved loads as the same."""
    model = make(kind)
    classes, names = [type(module) for module in model.modules()], list(model.state_dict())
    expected = sparsify(model, 0.6, seed=0)(tokens()).logits
    densify(model)
    assert [type(module) for module in model.modules()] == classes
    assert list(model.state_dict()) == names
    torch.testing.assert_close(model(tokens()).logits, expected)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path).eval()
    torch.testing.assert_close(loaded(tokens()).logits, expected)


def test_state_copies_and_pickles_of_a_sparse_model() -> None:
    """Values load into a model of another seed; a copy and a pickle compute the same and are independent."""
    one, other = sparsify(make("mixtral"), 0.6, seed=0), sparsify(make("mixtral"), 0.6, seed=1)
    expected = one(tokens()).logits
    other.load_state_dict(one.state_dict())
    for model in (other, copy.deepcopy(one), pickle.loads(pickle.dumps(one))):
        torch.testing.assert_close(model(tokens()).logits, expected)
        with torch.no_grad():
            for _, layer in sparse_layers(model):
                layer.values.zero_()
        torch.testing.assert_close(one(tokens()).logits, expected)


class Experts(nn.Module):
    """A stack of matrices that a loop, a batched product, or something else entirely reads."""

    def __init__(self, count: int = 3, rows: int = 24, columns: int = 16) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(count, rows, columns))
        self.bias = nn.Parameter(torch.randn(count, rows))

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([F.linear(x, self.weight[i], self.bias[i]) for i in range(len(self.weight))])


class Holder(nn.Module):
    """A model with experts."""

    def __init__(self) -> None:
        super().__init__()
        self.moe = Experts()

    def forward(self, x: Tensor) -> Tensor:
        return self.moe(x)


def test_the_attribute_reads_like_the_dense_tensor() -> None:
    """Sizes, arithmetic, indexing, batched products and comparisons are those of the stacked matrices."""
    model = sparsify(Holder(), 0.75, seed=0)
    experts = model.moe
    layers = [layer for _, layer in sparse_layers(model)]
    dense = torch.stack([layer.dense_weight() for layer in layers])
    weight = experts.weight
    assert isinstance(weight, Tensor)
    assert isinstance(experts, Experts)
    assert (weight.shape, weight.dtype, weight.numel(), len(weight), weight.ndim) == (
        *(dense.shape, dense.dtype),
        1152,
        3,
        3,
    )
    assert int((weight == 0).sum()) == round(0.75 * 1152)
    x = torch.randn(3, 5, 16)
    for read in (
        lambda w: w + 1,
        lambda w: w[torch.tensor([2, 0])],
        lambda w: w[:, 3:5],
        lambda w: w[torch.tensor(1)] * 2,
        lambda w: torch.bmm(x, w.transpose(1, 2)),
        lambda w: torch.einsum("etk,eok->eto", x, w),
        lambda w: F.linear(x, w[-1]),
        lambda w: x @ w[0].t(),
        lambda w: w.detach().clone(),
        lambda w: torch.stack(list(w)),
    ):
        torch.testing.assert_close(read(experts.weight), read(dense))
    experts.weight.square().sum().backward()
    assert all(torch.allclose(layer.values.grad, 2 * layer.values) for layer in layers if layer.values.grad is not None)
    assert all(layer.values.grad is not None for layer in layers)


@pytest.mark.parametrize("rule", [SET(sparsity=0.5, every=1), RigL(sparsity=0.5, every=1)])
def test_masks_of_experts_evolve(rule: Any) -> None:
    """Each expert is a managed layer, and its dense gradient is seen."""
    model = Holder()
    manager = MaskManager(model, rule, seed=0)
    assert list(manager.layers) == [f"moe.weight_layers.{i}" for i in range(3)]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(3):
        model(torch.randn(4, 16)).square().mean().backward()
        optimizer.step()
        manager.step(optimizer)
        optimizer.zero_grad()
    assert all(row.overlap < 1.0 for row in manager.report())


def test_some_experts_alone_and_compiled() -> None:
    """Experts that were not chosen stay dense layers; a compiler sees the dense tensor."""
    model = Holder()
    plain = copy.deepcopy(model)
    sparsify(model, 0.5, include=["*.1"], seed=0)
    kinds = [type(layer) for layer in model.moe.weight_layers]
    assert kinds == [nn.Linear, SparseLinear, nn.Linear]
    x = torch.randn(4, 16)
    torch.testing.assert_close(model(x)[0], plain(x)[0])
    assert not torch.allclose(model(x)[1], plain(x)[1])
    torch.testing.assert_close(torch.compile(model, backend="eager")(x), model(x))
    assert not any("layers" in name for name, _ in densify(model).named_parameters())


def test_a_stack_of_something_else_is_left_alone() -> None:
    """Three dimensions alone do not make experts: the module's name or class must speak of them."""

    class Other(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.fc = nn.Parameter(torch.randn(3, 4, 4)), nn.Linear(64, 64)

    model = sparsify(nn.ModuleDict({"other": Other()}), 0.5, exclude=["other.weight"], seed=0)
    assert [name for name, _ in sparse_layers(model)] == ["other.fc"]
