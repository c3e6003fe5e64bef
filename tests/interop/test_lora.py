"""LoRA adapters of peft on sparse layers. The oracle is the same adapter on the densified model."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from tiny_models import VOCAB, gpt2
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.pytorch_utils import Conv1D

import sparsetrain as st
from sparsetrain.sparsity.layers.surgery import sparse_layers

TOKENS = torch.arange(12)[None] % VOCAB
pytestmark = pytest.mark.filterwarnings(
    "ignore:.*is_gradient_checkpointing.*:FutureWarning", "ignore:fan_in_fan_out is set to False:UserWarning"
)


def llama() -> LlamaForCausalLM:
    size = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=VOCAB, **size)).eval()


def adapted(model: nn.Module, **options: Any) -> PeftModel:
    """Return the model with an adapter of random values that is no identity."""
    torch.manual_seed(1)
    options = {"r": 3, "target_modules": "all-linear", "init_lora_weights": False, **options}
    return get_peft_model(model, LoraConfig(**options))


def pair(make: Any, **options: Any) -> tuple[PeftModel, PeftModel]:
    """Return an adapted sparse model, and the same adapter on the same weights in dense layers."""
    sparse = st.sparsify(make(), 0.75, seed=0)
    dense = st.densify(copy.deepcopy(sparse))
    return adapted(sparse, **options), adapted(dense, **options)


def loss(model: nn.Module) -> Tensor:
    return model(TOKENS, labels=TOKENS).loss


@pytest.mark.parametrize("make", [gpt2, llama])
def test_logits_and_gradients_are_those_of_the_dense_model(make: Any) -> None:
    sparse, dense = pair(make)
    assert sum(isinstance(module, LoraLayer) for module in sparse.modules()) == (8 if make is gpt2 else 14)
    torch.testing.assert_close(sparse(TOKENS).logits, dense(TOKENS).logits, rtol=1e-5, atol=1e-6)
    loss(sparse).backward()
    loss(dense).backward()
    gradients = {name: p.grad for name, p in dense.named_parameters() if p.requires_grad}
    found = {name: p.grad for name, p in sparse.named_parameters() if p.requires_grad}
    assert found.keys() == gradients.keys()
    assert all("lora_" in name for name in found)
    for name, gradient in gradients.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("make", [gpt2, llama])
def test_training_leaves_the_base_alone_and_the_adapter_comes_back(make: Any, tmp_path: Path) -> None:
    base = st.sparsify(make(), 0.75, seed=0)
    base.save_pretrained(tmp_path / "base")
    before = copy.deepcopy(base.state_dict())
    model = adapted(base, init_lora_weights=True, lora_dropout=0.1)
    model.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    first = loss(model).item()
    for _ in range(5):
        loss(model).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss(model.eval()).item() < first
    model.save_pretrained(tmp_path / "adapter")
    with torch.no_grad():
        expected = model(TOKENS).logits
    fresh = type(base).from_pretrained(tmp_path / "base")
    for loaded in (
        PeftModel.from_pretrained(fresh, tmp_path / "adapter"),
        AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter"),
    ):
        with torch.no_grad():  # rounding differs from that of a product with a gradient
            assert torch.equal(loaded.eval()(TOKENS).logits, expected)
    bare = model.unload()
    assert (len(list(sparse_layers(bare))) == len(before) and False) or all(
        torch.equal(tensor, before[name]) for name, tensor in bare.state_dict().items()
    )


@pytest.mark.parametrize("make", [gpt2, llama])
def test_merging_makes_dense_layers_and_unmerging_brings_the_sparse_ones_back(make: Any) -> None:
    model, dense = pair(make)
    expected = model(TOKENS).logits
    before = {name: copy.deepcopy(layer.state_dict()) for name, layer in sparse_layers(model)}
    model.merge_adapter(safe_merge=True)
    assert not list(sparse_layers(model))
    torch.testing.assert_close(model(TOKENS).logits, expected, rtol=1e-5, atol=1e-6)
    with model.disable_adapter():
        model(TOKENS)  # peft unmerges now
    assert list(sparse_layers(model))
    model.merge_adapter()
    model.unmerge_adapter()
    after = {name: layer.state_dict() for name, layer in sparse_layers(model)}
    assert after.keys() == before.keys()
    assert all(torch.equal(tensor, before[name][key]) for name in after for key, tensor in after[name].items())
    merged, oracle = model.merge_and_unload(), dense.merge_and_unload()
    kinds = {type(module) for module in merged.modules()}
    assert (Conv1D if make is gpt2 else nn.Linear) in kinds
    state = oracle.state_dict()
    assert merged.state_dict().keys() == state.keys()
    for name, tensor in merged.state_dict().items():
        torch.testing.assert_close(tensor, state[name], rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.filterwarnings("ignore:Already following adapters were merged:UserWarning")
def test_two_adapters_merge_one_after_the_other() -> None:
    model, dense = pair(llama, lora_bias=False)
    for peft in (model, dense):
        torch.manual_seed(2)
        peft.add_adapter("other", LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False))
        peft.base_model.set_adapter(["default", "other"])
        peft.merge_adapter(["default"])
        peft.merge_adapter(["other"])
    torch.testing.assert_close(model(TOKENS).logits, dense(TOKENS).logits, rtol=1e-5, atol=1e-6)
    model.unmerge_adapter()
    assert len(list(sparse_layers(model))) == 14


def test_a_base_that_is_densified_inside_its_adapter_merges_too() -> None:
    model, dense = pair(gpt2)
    expected = dense(TOKENS).logits
    st.densify(model)
    before = copy.deepcopy(model.state_dict())
    torch.testing.assert_close(model(TOKENS).logits, expected, rtol=1e-5, atol=1e-6)
    model.merge_adapter()
    torch.testing.assert_close(model(TOKENS).logits, expected, rtol=1e-5, atol=1e-6)
    model.unmerge_adapter()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa' would change the weights of a sparse base layer"),
        ({"use_dora": True}, "Invalid or unsupported variant combination"),
    ],
)
def test_what_needs_the_weights_of_the_base_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        adapted(st.sparsify(llama(), 0.75, seed=0), **options)


def test_an_adapter_beside_the_model_leaves_masks_in_its_base(tmp_path: Path) -> None:
    """transformers' own `add_adapter` wraps the layers of the model in place."""
    model = st.sparsify(llama(), 0.75, seed=0)
    model.save_pretrained(tmp_path / "base")
    torch.manual_seed(1)
    model.add_adapter(LoraConfig(r=3, target_modules=["q_proj"], init_lora_weights=False))
    with torch.no_grad():
        expected = model(TOKENS).logits
    model.save_pretrained(tmp_path / "adapter")
    assert not (tmp_path / "adapter" / "masks.npz").exists()
    loaded = LlamaForCausalLM.from_pretrained(tmp_path / "base")
    loaded.load_adapter(str(tmp_path / "adapter"))
    with torch.no_grad():
        assert torch.equal(loaded(TOKENS).logits, expected)
