"""Directories of quantized models: equal logits bit for bit, and damage in any file is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

import sparsetrain as st
from sparsetrain.errors import UserError
from sparsetrain.runs.manifest import canonical, seal


def model_of(**options: Any) -> st.Transformer:
    shape: dict[str, Any] = {"d_model": 32, "n_layers": 2, "n_heads": 2, "vocab_size": 101, "seed": 0}
    return st.Transformer(st.ModelConfig(**shape | options), st.Parameterization.completep(16, 1, alpha_in=3.0))


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    st.save_quantized(st.quantize(model_of(sparsity=0.75)), tmp_path / "q")
    return tmp_path / "q"


@pytest.mark.parametrize(
    ("options", "bits"),
    [
        ({}, 4),
        ({"sparsity": 0.75, "bias": True, "mlp": "swiglu", "n_kv_heads": 1, "positions": "rope"}, 4),
        ({"sparsity": 0.5, "tie_embeddings": False, "positions": "learned", "max_context": 12, "norm": "rmsnorm"}, 8),
    ],
)
def test_a_loaded_model_is_equal_bit_for_bit(options: dict[str, Any], bits: int, tmp_path: Path) -> None:
    model = st.quantize(model_of(**options), bits, group=48)
    tokens = torch.randint(0, 101, (2, 9), generator=torch.Generator().manual_seed(0))
    st.save_quantized(model, tmp_path / "q")
    loaded = st.load_quantized(tmp_path / "q")
    with torch.no_grad():
        assert torch.equal(loaded(tokens), model(tokens))
        assert torch.equal(loaded(tokens[:, :-1], tokens[:, 1:]), model(tokens[:, :-1], tokens[:, 1:]))
    assert loaded.config == model.config
    assert not loaded.training
    before, after = model.state_dict(), loaded.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) and before[name].dtype == after[name].dtype for name in before)
    assert (loaded.head.matrix is loaded.embed.matrix) == model.config.tie_embeddings
    # safetensors' own reader: the file has one copy of what is tied, and hardly more than these bytes.
    with safe_open(tmp_path / "q" / "model.safetensors", "pt") as file:
        stored = sum(file.get_tensor(name).nbytes for name in file.keys())  # noqa: SIM118 - it is no mapping
    held = {tensor.data_ptr(): tensor.nbytes for tensor in before.values()}
    assert stored == sum(held.values())


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "manifest.json"])
def test_a_damaged_file_is_refused(saved: Path, name: str) -> None:
    content = bytearray((saved / name).read_bytes())
    content[len(content) // 2] ^= 1
    (saved / name).write_bytes(content)
    with pytest.raises(UserError, match=r"q is refused: \w+\.\w+ "):
        st.load_quantized(saved)
    (saved / name).unlink()
    with pytest.raises(UserError, match=rf"q is refused: {name} is missing"):
        st.load_quantized(saved)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 2}, "it has format 2, but this version reads format 1"),
        ({"layers": {}}, "do not fit together"),
        ({"model": {"d_model": 32}}, "do not fit together"),
        ({"multipliers": {}}, "multipliers.attention is missing"),
        ({"layers": {"head": {"kind": 1}}}, "config.json: layers"),
    ],
)
def test_a_document_of_another_kind_is_refused(saved: Path, change: dict[str, Any], message: str) -> None:
    document = json.loads((saved / "config.json").read_bytes())
    (saved / "config.json").write_bytes(canonical(document | change))
    seal(saved, 0, ["config.json", "model.safetensors"])
    with pytest.raises(UserError, match=message):
        st.load_quantized(saved)


def test_an_index_beyond_the_matrix_is_refused(saved: Path) -> None:
    document = json.loads((saved / "config.json").read_bytes())
    layer = document["layers"]["blocks.0.mlp.up"]
    layer["shape"] = [layer["shape"][0] // 2, layer["shape"][1]]
    (saved / "config.json").write_bytes(canonical(document))
    seal(saved, 0, ["config.json", "model.safetensors"])
    with pytest.raises(UserError, match=r"blocks\.0\.mlp\.up: the index leads beyond a matrix of 64 x 32"):
        st.load_quantized(saved)


def test_what_cannot_be_saved_or_loaded_is_one_line(saved: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="q exists already"):
        st.save_quantized(st.quantize(model_of()), saved)
    with pytest.raises(UserError, match=r"only a sparsetrain\.Transformer"):
        st.save_quantized(model_of(), tmp_path / "other")
    with pytest.raises(UserError, match="no such directory"):
        st.load_quantized(tmp_path / "other")
    assert [path.name for path in tmp_path.iterdir()] == ["q"]
