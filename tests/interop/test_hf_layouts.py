"""Every layout of Hugging Face: what transformers itself loads and computes is what our model computes, and back."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig, PreTrainedModel

from sparsetrain.data import Tokenizer
from sparsetrain.errors import UserError
from sparsetrain.interop.fold import Plain, folded, unfolded
from sparsetrain.interop.hf import write_model
from sparsetrain.interop.hf_check import quiet
from sparsetrain.interop.hf_config import _DEFAULTS, layout_of, model_config_of
from sparsetrain.interop.hf_files import read_settings, weight_files
from sparsetrain.interop.hf_import import read_model, without_padding
from sparsetrain.interop.layouts import LAYOUTS, choose
from sparsetrain.interop.mask_file import read_masks
from sparsetrain.interop.tensors import masks_from_layout
from sparsetrain.models import ModelConfig, Transformer
from sparsetrain.parameterization import Parameterization
from sparsetrain.sparsity import SparsityPattern, densify, sparse_layers, sparsify
from sparsetrain.sparsity.patterns.files import load_masks

SHAPE = {"d_model": 48, "n_layers": 2, "n_heads": 3, "vocab_size": 261, "max_context": 48}
# Every multiplier differs from 1.
RULES = Parameterization.supar_completep(16, 1.0, 1, alpha=0.5, alpha_in=2.5, alpha_out=2.0)
LLAMA = {"positions": "rope", "norm": "rmsnorm", "mlp": "swiglu"}
BIG = 0.75
CASES: dict[str, tuple[str, dict[str, Any], float]] = {
    "learned": ("gpt2", {"positions": "learned", "bias": True}, BIG),
    "learned-untied": ("gpt2", {"positions": "learned", "tie_embeddings": False, "mlp": "gelu_tanh", "d_ff": 100}, 0.0),
    "none": ("gpt2", {"positions": "none", "bias": True}, 0.0),
    "llama": ("llama", {**LLAMA, "n_kv_heads": 1}, BIG),
    "llama-biases": ("llama", {**LLAMA, "bias": True, "tie_embeddings": False, "rope_base": 5000.0}, 0.0),
    "linear": ("llama", {**LLAMA, "positions_scale": 2.0}, 0.0),
    "ntk": ("llama", {**LLAMA, "positions_scale": 2.0, "rope_scaling": "ntk"}, 0.0),
    "yarn": ("llama", {**LLAMA, "positions_scale": 3.0, "rope_scaling": "yarn"}, 0.0),
    "dynamic": ("llama", {**LLAMA, "positions_scale": "dynamic", "rope_scaling": "ntk"}, 0.0),
    "alibi": ("mpt", {}, BIG),
    "alibi-narrow": ("mpt", {"d_ff": 100, "tie_embeddings": False}, BIG),
    "alibi-tanh": ("bloom", {"mlp": "gelu_tanh", "bias": True}, BIG),
    "alibi-tanh-untied": ("bloom", {"mlp": "gelu_tanh", "tie_embeddings": False}, 0.0),
    "partial": ("gpt_neox", {"positions": "rope", "bias": True, "rope_fraction": 0.5}, BIG),
    "whole-untied": ("gpt_neox", {"positions": "rope", "tie_embeddings": False}, 0.0),
    "grouped": ("starcoder2", {"positions": "rope", "n_kv_heads": 1, "mlp": "gelu_tanh", "bias": True}, BIG),
    "gated": ("stablelm", {"positions": "rope", "n_kv_heads": 1, "mlp": "swiglu", "rope_fraction": 0.5}, BIG),
}


def model_of(changes: dict[str, Any], sparsity: float, rules: Parameterization = RULES) -> Transformer:
    """A model whose biases and gains are not those of the beginning, and whose attention is not flat."""
    model = Transformer(ModelConfig(**(SHAPE | changes), sparsity=sparsity, seed=3), rules).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or name.endswith("bias"):
                parameter.add_(0.2 * torch.randn_like(parameter))
            else:
                parameter.mul_(4.0)
    return model.requires_grad_(False)


def tokens(length: int = 40) -> torch.Tensor:
    return torch.randint(0, SHAPE["vocab_size"], (2, length))


def load(directory: Path) -> PreTrainedModel:
    with quiet():
        return AutoModelForCausalLM.from_pretrained(directory).eval()


def logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        found = model(ids)
    found = found if isinstance(found, torch.Tensor) else found.logits
    assert found.std() > 0.1  # nearly constant logits would match trivially
    return found


def same(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def imported(directory: Path) -> Plain:
    settings = read_settings(directory)
    layout = layout_of(settings, "config.json")
    plain = read_model(directory, settings, weight_files(directory), layout)
    plain.masks = masks_from_layout(read_masks(directory, settings), layout, plain.config, "masks")
    return without_padding(plain, settings)


@pytest.mark.parametrize("case", CASES)
def test_transformers_computes_the_logits_of_an_exported_model_and_it_comes_back(case: str, tmp_path: Path) -> None:
    layout, changes, sparsity = CASES[case]
    model = model_of(changes, sparsity)
    tokenizer = Tokenizer.bytes().with_sentinels()
    found = write_model(model, tokenizer, tmp_path / "out", verify=case == "alibi")  # the test itself compares
    assert found.layout == layout
    ids = tokens(70 if case in ("dynamic", "yarn", "ntk", "linear", "alibi") else 40)
    theirs, expected = load(tmp_path / "out"), logits(model, ids)
    assert type(theirs).__name__ == LAYOUTS[layout].architecture
    same(logits(theirs, ids), expected)
    densify(theirs)  # where sparsetrain is imported, the loaded model has sparse layers
    same(logits(theirs, ids), expected)
    assert found.difference is None if case != "alibi" else 0.0 <= found.difference < 1e-5

    # Masks are [out, in] under the names of the modules, and the weights are zero exactly outside of them.
    assert (tmp_path / "out" / "masks.npz").exists() == (sparsity > 0)
    if sparsity:
        masks = load_masks(tmp_path / "out" / "masks.npz")
        for name, pattern in masks.items():
            weight = theirs.get_submodule(name).weight.detach()
            assert torch.equal((weight.T if layout == "gpt2" else weight) != 0, pattern.mask())
        section = AutoConfig.from_pretrained(tmp_path / "out").sparsity_config
        assert section["layers"].keys() == masks.keys()
        zeros = sum(int((parameter == 0).sum()) for parameter in theirs.parameters() if parameter.ndim == 2)
        total = sum(parameter.numel() for parameter in theirs.parameters())
        assert section["global_sparsity"] == pytest.approx(zeros / total, abs=1e-3)
        assert (found.parameters, found.nonzeros) == (total, total - round(section["global_sparsity"] * total))
        if "d_ff" not in changes:  # of the zeros that widen an MLP, `sparsify` would warn
            same(logits(sparsify(theirs, masks=masks), ids), expected)

    # AutoTokenizer reads the same ids, also where a text has the name of a special token.
    text = "A <|endoftext|> b\u00e9\n\n  c <|fim_prefix|>"
    theirs_too = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert theirs_too(text)["input_ids"] == tokenizer.encode(text)
    assert theirs_too.decode(theirs_too(text)["input_ids"]) == text
    assert (theirs_too.eos_token_id, theirs.generation_config.eos_token_id) == (tokenizer.eos_id, tokenizer.eos_id)

    back = imported(tmp_path / "out")
    ours = unfolded(back)
    same(logits(ours, ids), expected)
    kept = {name: layer.pattern for name, layer in sparse_layers(ours)}
    before = {name: layer.pattern for name, layer in sparse_layers(model)}
    assert kept.keys() == before.keys()
    assert all(kept[name].equals(pattern) for name, pattern in before.items())
    assert back.config.ffn_width == model.config.ffn_width


@pytest.mark.parametrize("tied", [True, False])
def test_folding_keeps_the_function_and_the_zeros(tied: bool) -> None:
    model = model_of({"tie_embeddings": tied, "bias": True}, 0.5)
    plain = folded(model)
    same(logits(unfolded(plain), ids := tokens()), logits(model, ids))
    for name, layer in sparse_layers(model):
        assert torch.equal(plain.tensors[f"{name}.weight"] != 0, layer.pattern.mask())
    assert len(plain.notes) == 4  # attention, branches, embeddings, logits


def test_a_model_without_multipliers_is_written_bit_for_bit(tmp_path: Path) -> None:
    model = model_of({}, 0.5, Parameterization.sp())
    found = write_model(model, Tokenizer.bytes(), tmp_path / "out", verify=False)
    theirs = load(tmp_path / "out")
    assert list(found.notes) == []
    assert torch.equal(theirs.transformer.wte.weight, model.embed.weight)
    dense = model.blocks[1].mlp.up
    assert torch.equal(theirs.transformer.blocks[1].ffn.up_proj.weight, dense.pattern.scatter(dense.values))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"norm": "rmsnorm", "positions": "learned"}, "positions=learned, norm=rmsnorm, .*: gpt2 needs norm=layernorm"),
        ({"bias": True}, "mpt needs bias=false; bloom needs mlp=gelu_tanh"),
        ({"mlp": "swiglu"}, "mpt needs mlp=gelu; bloom needs mlp=gelu_tanh; stablelm needs positions=rope"),
        ({"positions_scale": 2.0}, "mpt needs positions_scale=1"),
        ({"d_ff": 400}, "mpt needs d_ff of at most 192"),
        ({"n_kv_heads": 1}, "mpt needs n_kv_heads=3"),
    ],
)
def test_what_no_layout_holds_is_one_line(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        choose(ModelConfig(**(SHAPE | changes)))
    assert "\n" not in str(caught.value)


# Models of transformers themselves: their class and settings.
LINEAR = {"type": "linear", "factor": 2.0}
THEIRS: dict[str, dict[str, Any]] = {
    "gpt2": {"n_embd": 48, "n_layer": 2, "n_head": 3, "n_positions": 64, "scale_attn_by_inverse_layer_idx": True},
    "llama": {"intermediate_size": 80, "num_key_value_heads": 1, "rope_theta": 500000.0, "attention_bias": True},
    "mistral": {"intermediate_size": 80, "num_key_value_heads": 3, "sliding_window": None, "head_dim": 16},
    "qwen2": {"intermediate_size": 80, "num_key_value_heads": 1, "tie_word_embeddings": True},
    "mpt": {"d_model": 48, "n_layers": 2, "n_heads": 3, "max_seq_len": 64, "attn_config": {"softmax_scale": 0.1}},
    "bloom": {"n_layer": 2, "n_head": 3},
    "gpt_neox": {"intermediate_size": 80, "use_parallel_residual": False, "rotary_pct": 0.5},
    "starcoder2": {"intermediate_size": 80, "num_key_value_heads": 1, "rope_scaling": LINEAR},
    "stablelm": {"intermediate_size": 80, "num_key_value_heads": 3, "use_qkv_bias": True},
}
USUAL = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3, "max_position_embeddings": 64}


def config_of(kind: str) -> PreTrainedConfig:
    usual = {} if kind in ("gpt2", "mpt") else USUAL
    ends = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    return AutoConfig.for_model(kind, vocab_size=261, **ends, **usual, **copy.deepcopy(THEIRS[kind]))


def theirs_of(kind: str) -> PreTrainedModel:
    model = AutoModelForCausalLM.from_config(config_of(kind)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize("kind", THEIRS)
def test_a_model_of_transformers_is_read_and_written_with_its_logits(kind: str, tmp_path: Path) -> None:
    theirs = theirs_of(kind)
    with quiet():
        theirs.save_pretrained(tmp_path / "in", max_shard_size="40KB" if kind == "llama" else "1GB")
    ids = tokens()
    plain = imported(tmp_path / "in")
    model = unfolded(plain)
    same(logits(model, ids), expected := logits(theirs, ids))
    if kind == "stablelm":  # biases for queries, keys and values alone have no layout but this, which ours widens
        return
    write_model(model, Tokenizer.bytes(), tmp_path / "out", verify=False)
    again = load(tmp_path / "out")
    same(logits(again, ids), expected)
    if kind not in ("mistral", "qwen2"):
        assert type(again) is type(theirs)


def test_a_file_of_the_class_without_a_head_is_read(tmp_path: Path) -> None:
    """The hub has GPT-2 and Bloom so: no prefix, no head, and masks of attention as buffers."""
    model = model_of({"positions": "learned", "bias": True}, 0.0)
    write_model(model, Tokenizer.bytes(), tmp_path / "out", verify=False)
    place = tmp_path / "out" / "model.safetensors"
    tensors = {name.removeprefix("transformer."): tensor for name, tensor in load_file(place).items()}
    save_file(tensors | {"h.0.attn.bias": torch.ones(1, 1, 48, 48)}, place)
    same(logits(unfolded(imported(tmp_path / "out")), ids := tokens()), logits(model, ids))
    save_file(tensors | {"h.0.attn.q_norm.weight": torch.ones(48)}, place)
    with pytest.raises(UserError, match=r"the tensor 'transformer.h.0.attn.q_norm.weight' has no place"):
        imported(tmp_path / "out")
    del tensors["h.1.mlp.c_fc.weight"]
    save_file(tensors, place)
    with pytest.raises(UserError, match=r"the tensor transformer.h.1.mlp.c_fc.weight is missing"):
        imported(tmp_path / "out")


@pytest.mark.parametrize("kind", _DEFAULTS)
def test_what_a_file_leaves_out_means_what_transformers_takes(kind: str) -> None:
    usual = AutoConfig.for_model(kind).to_dict()
    legacy = {"rotary_pct": "partial_rotary_factor", "rotary_emb_base": "rope_theta", "partial_rotary_factor": None}
    for name, value in _DEFAULTS[kind].items():
        if name in legacy:
            assert usual["rope_parameters"][legacy[name] or name] == value
        elif name != "seq_length":  # which transformers does not know, since ALiBi has no longest sequence
            assert usual[name] == value, name


def settings_of(kind: str, **changes: Any) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(config_of(kind).to_json_string(use_diff=False))
    return content | changes


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("llama", {"model_type": "mamba"}, "model_type='mamba' is none of the classes that can be read: gpt2, llama"),
        ("llama", {"hidden_act": "relu"}, "hidden_act='relu' is none of the activations that can be read: silu, swish"),
        ("llama", {"head_dim": 32}, "head_dim=32: our heads have hidden_size / heads features"),
        ("llama", {"rope_parameters": {"rope_type": "llama3", "factor": 8.0}}, "rope_type='llama3' cannot be read"),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "of rope_type=dynamic only factor=1"),
        ("llama", {"rope_parameters": {"rope_type": "yarn", "factor": 2.0, "beta_fast": 16}}, "only beta_fast=32"),
        ("llama", {"quantization_config": {"bits": 4}}, "quantized weights are not read"),
        ("llama", {"num_hidden_layers": "2"}, "num_hidden_layers='2' must be a number"),
        ("llama", {"num_key_value_heads": 2}, "n_heads=3 is not divisible by n_kv_heads=2"),
        ("mistral", {"sliding_window": 16}, "sliding_window=16: our attention has no window"),
        ("gpt2", {"add_cross_attention": True}, "our transformers compute only add_cross_attention=False"),
        ("gpt_neox", {"use_parallel_residual": True}, "compute only use_parallel_residual=False"),
        ("mpt", {"attn_config": {"clip_qkv": 8.0}}, "attn_config.clip_qkv=8.0: our transformers compute only"),
        ("bloom", {"apply_residual_connection_post_layernorm": True}, "compute only apply_residual"),
    ],
)
def test_settings_that_our_models_lack_are_one_line(kind: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        model_config_of(settings_of(kind, **changes), "config.json")
    assert "\n" not in str(caught.value)


def test_masks_of_one_projection_leave_the_others_full() -> None:
    config = ModelConfig(**(SHAPE | LLAMA))
    keys = np.zeros((48, 48), dtype=bool)
    keys[0, 5] = True
    given = {"model.layers.0.self_attn.k_proj": SparsityPattern.from_mask(torch.from_numpy(keys))}
    found = masks_from_layout(given, LAYOUTS["llama"], config, "masks")["blocks.0.attn.qkv"].mask()
    assert (int(found[:48].sum()), int(found[48:96].sum()), int(found[96:].sum())) == (48 * 48, 1, 48 * 48)
    with pytest.raises(UserError, match="the mask 'lm_head' is of no matrix of a block"):
        masks_from_layout({"lm_head": given.popitem()[1]}, LAYOUTS["llama"], config, "masks")
