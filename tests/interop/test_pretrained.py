"""`save_pretrained` and `from_pretrained` keep masks. The oracles are plain transformers and the densified model."""

from __future__ import annotations

import copy
import inspect
import json
from pathlib import Path

import pytest
import safetensors.torch
import torch
from tiny_models import VOCAB, gpt2
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
)

import sparsetrain as st
from sparsetrain.sparsity.layers.dense_state import dense_state
from sparsetrain.sparsity.layers.surgery import sparse_layers

TOKENS = torch.arange(12)[None] % VOCAB
TINY = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}


def llama() -> LlamaForCausalLM:
    return LlamaForCausalLM(LlamaConfig(**TINY)).eval()


def mixtral() -> MixtralForCausalLM:
    return MixtralForCausalLM(MixtralConfig(**TINY, num_local_experts=3)).eval()


def same(one: nn.Module, other: nn.Module) -> bool:
    first, second = one.state_dict(), other.state_dict()
    return list(first) == list(second) and all(torch.equal(first[key], second[key]) for key in first)


def by_transformers_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give transformers its own methods back, as in a program that does not import sparsetrain."""
    for name in ("save_pretrained", "from_pretrained"):
        wrapped = getattr(PreTrainedModel, name)
        own = getattr(wrapped, "__func__", wrapped).__wrapped__
        assert own.__module__ == "transformers.modeling_utils"
        assert "_keeps_masks" not in vars(own)
        monkeypatch.setattr(PreTrainedModel, name, classmethod(own) if name == "from_pretrained" else own)


@pytest.mark.parametrize("make", [gpt2, llama, mixtral])
def test_a_directory_gives_back_masks_and_values(make: type, tmp_path: Path) -> None:
    model = st.sparsify(make(), 0.75, seed=0)
    _, layer = next(sparse_layers(model))
    with torch.no_grad():
        layer.values[:7] = 0.0  # as weights that have just grown: the file of weights does not tell them from the mask
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert same(model, loaded)
    assert torch.equal(model(TOKENS).logits, loaded(TOKENS).logits)
    section = json.loads((tmp_path / "config.json").read_text())["sparsity_config"]
    assert set(section["layers"]) == {name for name, _ in sparse_layers(model)}
    dense = st.densify(copy.deepcopy(model))
    zeros = sum(int((parameter == 0).sum()) for parameter in dense.parameters() if parameter.ndim > 1) - 7
    assert section["global_sparsity"] * sum(p.numel() for p in dense.parameters()) == pytest.approx(zeros)


@pytest.mark.parametrize("make", [gpt2, mixtral])
def test_what_is_written_is_the_densified_model(make: type, tmp_path: Path) -> None:
    model = st.sparsify(make(), 0.75, seed=0)
    model.save_pretrained(tmp_path / "sparse")
    st.densify(copy.deepcopy(model)).save_pretrained(tmp_path / "dense")
    sparse, dense = (safetensors.torch.load_file(tmp_path / name / "model.safetensors") for name in ("sparse", "dense"))
    assert sparse.keys() == dense.keys()
    assert all(torch.equal(sparse[key], dense[key]) for key in dense)


def test_plain_transformers_loads_a_dense_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = st.sparsify(gpt2(), 0.75, seed=0)
    model.save_pretrained(tmp_path / "sparse")
    by_transformers_alone(monkeypatch)
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "sparse")
    assert not list(sparse_layers(dense))
    torch.testing.assert_close(dense(TOKENS).logits, model(TOKENS).logits, rtol=1e-5, atol=1e-5)
    dense.save_pretrained(tmp_path / "dense")  # keeps sparsity_config, and knows nothing of the file
    monkeypatch.undo()
    with pytest.warns(UserWarning, match="the model stays dense"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "dense")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_and_shards(dtype: torch.dtype, tmp_path: Path) -> None:
    model = st.sparsify(gpt2(), 0.5, seed=0).to(dtype)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.dtype == dtype
    assert same(model, loaded)


def test_a_headless_model_and_back(tmp_path: Path) -> None:
    model = st.sparsify(gpt2(), 0.75, seed=0)
    model.save_pretrained(tmp_path / "lm")
    headless = AutoModel.from_pretrained(tmp_path / "lm")
    assert same(headless, model.transformer)
    headless.save_pretrained(tmp_path / "base")
    again, info = AutoModelForCausalLM.from_pretrained(tmp_path / "base", output_loading_info=True)
    assert same(again, model)
    assert not info["mismatched_keys"]


def test_blocks_stay_blocks(tmp_path: Path) -> None:
    model = st.sparsify(llama(), plan=st.SparsityConfig(0.5, pattern="block", block=(4, 4)), seed=0)
    model.save_pretrained(tmp_path)
    loaded = LlamaForCausalLM.from_pretrained(tmp_path)
    assert [layer.pattern.block for _, layer in sparse_layers(loaded)] == [(4, 4)] * 14
    assert same(model, loaded)


def test_a_given_state_is_what_is_written(tmp_path: Path) -> None:
    model = st.sparsify(gpt2(), 0.75, seed=0)
    state = {key: value * 2 if key.endswith("values") else value for key, value in model.state_dict().items()}
    model.save_pretrained(tmp_path, state_dict=state)
    loaded = GPT2LMHeadModel.from_pretrained(tmp_path)
    for (_, one), (_, other) in zip(sparse_layers(model), sparse_layers(loaded), strict=True):
        assert torch.equal(one.values * 2, other.values)


def test_a_densified_model_leaves_no_mask_behind(tmp_path: Path) -> None:
    st.sparsify(gpt2(), 0.75, seed=0).save_pretrained(tmp_path)
    model = st.densify(GPT2LMHeadModel.from_pretrained(tmp_path))
    model.save_pretrained(tmp_path)
    assert not (tmp_path / "masks.npz").exists()
    assert "sparsity_config" not in json.loads((tmp_path / "config.json").read_text())
    assert not list(sparse_layers(GPT2LMHeadModel.from_pretrained(tmp_path)))


def damaged(directory: Path, what: str) -> None:
    if what == "missing":
        (directory / "masks.npz").unlink()
        return
    path = directory / "model.safetensors"
    weights = safetensors.torch.load_file(path)
    safetensors.torch.save_file(
        {name: tensor + 1.0 for name, tensor in weights.items()}, path, metadata={"format": "pt"}
    )


@pytest.mark.parametrize(
    ("what", "message"),
    [("missing", "config.json names masks.npz, which is not there"), ("weights", "has weights outside its mask")],
)
def test_a_model_whose_masks_are_lost_stays_dense_and_says_so(what: str, message: str, tmp_path: Path) -> None:
    st.sparsify(gpt2(), 0.75, seed=0).save_pretrained(tmp_path)
    damaged(tmp_path, what)
    with pytest.warns(UserWarning, match=f"the model stays dense, .*{message}"):
        loaded = GPT2LMHeadModel.from_pretrained(tmp_path)
    assert not list(sparse_layers(loaded))


def test_dense_models_are_left_alone(tmp_path: Path) -> None:
    assert PreTrainedModel.save_pretrained.__doc__
    assert "state_dict" in inspect.signature(PreTrainedModel.save_pretrained).parameters
    model = gpt2()
    model.save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
    ]
    assert same(model, GPT2LMHeadModel.from_pretrained(tmp_path))


# -- the state of the dense model, and back ------------------------------------------------------------------------


class Attention(nn.Module):
    """Torch's attention, whose projections are rows of one matrix unless keys have another width."""

    def __init__(self, width: int | None) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 2, kdim=width, vdim=width)


@pytest.mark.parametrize("make", [lambda: Attention(None), lambda: Attention(8), mixtral, gpt2])
def test_the_dense_state_is_that_of_densify_and_loads_back(make: type) -> None:
    model = st.sparsify(make(), 0.5, seed=0)
    expected = st.densify(copy.deepcopy(model)).state_dict()
    found = dense_state(model)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    before, found = copy.deepcopy(model.state_dict()), copy.deepcopy(found)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    model.load_state_dict(found)
    assert all(torch.equal(before[key], tensor) for key, tensor in model.state_dict().items())


def test_dense_weights_outside_a_mask_are_refused() -> None:
    model = st.sparsify(GPT2LMHeadModel(GPT2Config(vocab_size=9, n_embd=16, n_layer=1, n_head=1)), 0.5, seed=0)
    other = GPT2LMHeadModel(model.config).state_dict()
    with pytest.raises(RuntimeError, match=r"c_attn: weight is dense and has 384 weights outside the mask"):
        model.load_state_dict(other, strict=False)
    with pytest.raises(RuntimeError, match=r"c_fc: weight has shape \(8, 16\); the layer needs \(64, 16\)"):
        model.load_state_dict({"transformer.h.0.mlp.c_fc.weight": torch.zeros(16, 8)}, strict=False)
