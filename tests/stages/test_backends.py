"""The backend of each layer is chosen when a run starts, saved with the run, and kept on a resume."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from sparsetrain.errors import UserError
from sparsetrain.models import ModelConfig, Transformer
from sparsetrain.sparsity import SparsityConfig, SparsityGroup, sparse_layers
from sparsetrain.sparsity.backends import auto
from sparsetrain.sparsity.backends.auto import Crossover
from sparsetrain.stages import PretrainConfig, pretrain
from sparsetrain.stages.backends import backends, settle_backends
from sparsetrain.training.loop import Trainer


@pytest.fixture(autouse=True)
def _table(monkeypatch: pytest.MonkeyPatch) -> None:
    """A crossover table that chooses csr up to density 0.3."""
    monkeypatch.setitem(auto._tables, "csr", Crossover([64], [64], [1], [[[0.3]]]))


def model_of(sparsity: float = 0.75, backend: str = "auto") -> Transformer:
    plan = SparsityConfig(sparsity=sparsity, groups=[SparsityGroup("*mlp.down", 0.5)], backend=backend)
    return Transformer(ModelConfig(d_model=32, n_layers=1, n_heads=2, vocab_size=32, seed=0), plan=plan)


def chosen(model: Transformer) -> dict[str, str]:
    return {name: layer.backend for name, layer in sparse_layers(model)}


def test_layers_may_have_different_backends_and_the_file_says_which(tmp_path: Path) -> None:
    model = model_of()
    settle_backends(model, tmp_path, 128, None)
    saved = json.loads((tmp_path / "backends.json").read_text())
    assert saved == chosen(model)
    assert saved["blocks.0.mlp.down"] == "masked"
    assert saved["blocks.0.mlp.up"] == "csr"
    assert backends(model) == "csr (3 layers), masked (1 layers)"


def test_a_saved_choice_stays_whatever_the_table_says_now(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = model_of(), model_of()
    settle_backends(first, tmp_path, 128, None)
    monkeypatch.setitem(auto._tables, "csr", Crossover([64], [64], [1], [[[0.0]]]))
    settle_backends(second, tmp_path, 128, None)
    assert chosen(second) == chosen(first)


def test_a_density_that_will_change_is_weighed_by_its_mean(tmp_path: Path) -> None:
    model = model_of()
    settle_backends(model, tmp_path, 128, None, {"blocks.0.mlp.up": 0.6, "blocks.0.mlp.down": 0.2})
    assert chosen(model)["blocks.0.mlp.up"] == "masked"
    assert chosen(model)["blocks.0.mlp.down"] == "csr"
    assert chosen(model)["blocks.0.attn.qkv"] == "csr"


def test_a_backend_that_is_asked_for_is_taken_and_a_missing_one_is_named(tmp_path: Path) -> None:
    model = model_of(backend="masked")
    settle_backends(model, tmp_path, 128, None)
    assert set(chosen(model).values()) == {"masked"}
    assert backends(model) == "masked"
    (tmp_path / "backends.json").write_text(json.dumps({"blocks.0.mlp.up": "wafer"}))
    with pytest.raises(UserError, match=r"backends.json: blocks.0.mlp.up='wafer' is not one of .*delete the file"):
        settle_backends(model_of(), tmp_path, 128, None)


def test_a_dense_model_has_no_file(tmp_path: Path) -> None:
    model = Transformer(ModelConfig(d_model=32, n_layers=1, n_heads=2, vocab_size=32, seed=0))
    settle_backends(model, tmp_path, 128, None)
    assert list(tmp_path.iterdir()) == []
    assert backends(model) == "dense"


def test_a_run_on_csr_resumes_to_the_same_bits_with_another_table(
    configure: Callable[..., Any], tmp_path: Path, screen: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = configure(PretrainConfig, run_dir=tmp_path / "whole")
    result = pretrain(whole, screen)
    assert result["backend"] == "csr"

    class Stop(Exception):
        pass

    step = Trainer._step

    def stopping(self: Trainer, state: Any, clock: Any) -> Any:
        if state.step == 6:
            raise Stop
        return step(self, state, clock)

    monkeypatch.setattr(Trainer, "_step", stopping)
    broken = configure(PretrainConfig, run_dir=tmp_path / "broken")
    with pytest.raises(Stop):
        pretrain(broken, screen)
    monkeypatch.setattr(Trainer, "_step", step)
    monkeypatch.setitem(auto._tables, "csr", Crossover([64], [64], [1], [[[0.0]]]))
    pretrain(broken, screen)
    weights = [
        (tmp_path / run / "checkpoints/step-00000012/model.safetensors").read_bytes() for run in ("whole", "broken")
    ]
    assert weights[0] == weights[1]
