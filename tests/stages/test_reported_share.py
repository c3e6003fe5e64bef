"""The share of the validation text that only reported losses are over."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from sparsetrain.data import DataConfig, TokenFile, document_border, prepare_corpora, sequential_windows
from sparsetrain.errors import UserError
from sparsetrain.models import Transformer
from sparsetrain.optim import BudgetConfig
from sparsetrain.parameterization import Parameterization
from sparsetrain.stages import PretrainConfig, pretrain
from sparsetrain.stages.loaded import load
from sparsetrain.training.state import LoopConfig


def config(tmp_path: Path, documents: int = 60, **settings: object) -> PretrainConfig:
    text = tmp_path / "text.jsonl"
    lines = [f'{{"id": "{n}", "text": "{" ".join(str((n * k) % 97) for k in range(40))}"}}' for n in range(documents)]
    text.write_text("\n".join(lines))
    return PretrainConfig(
        model={"d_model": 16, "n_layers": 1, "n_heads": 2},
        data=DataConfig(name="file", path=str(text), tokenizer="bytes", context=16, validation_fraction=0.2),
        budget=BudgetConfig(steps=2, batch_size=4),
        loop=LoopConfig(eval_every=1, checkpoint_every=0),
        parameterization=Parameterization(base_width=16),
        run_dir=str(tmp_path / "run"),
        device="cpu",
        **settings,  # type: ignore[arg-type]
    )


def mean_loss(model: Transformer, ids: torch.Tensor) -> float:
    """Cross-entropy by torch over windows of 16 tokens, one at a time."""
    nats = count = 0.0
    for start in range(0, len(ids) - 1, 16):
        window = ids[start : start + 17]
        logits = model(window[None, :-1])[0]
        nats += torch.nn.functional.cross_entropy(logits, window[1:], reduction="sum").item()
        count += len(window) - 1
    return nats / count


def test_losses_are_over_two_parts_of_whole_documents(tmp_path: Path) -> None:
    settings = config(tmp_path, reported_share=0.4)
    result = pretrain(settings)
    corpus = next(iter(prepare_corpora(settings.data).values()))
    ids = corpus.validation.window(0, len(corpus.validation))
    border = next(n for n in range(math.floor(0.6 * len(ids)) + 1, len(ids)) if ids[n - 1] == corpus.tokenizer.eos_id)
    with torch.no_grad():
        model = load(Path(str(settings.run_dir))).model.eval()
        assert result["loss_last"] == pytest.approx(mean_loss(model, ids[:border]), rel=1e-5)
        assert result["reported_loss"] == pytest.approx(mean_loss(model, ids[border:]), rel=1e-5)
    assert [key for line in result.metrics for key in line if key == "reported_loss"] == ["reported_loss"]


def test_without_a_share_nothing_is_kept_back(tmp_path: Path) -> None:
    assert "reported_loss" not in pretrain(config(tmp_path))


@pytest.mark.parametrize("share", [-0.1, 1.0, math.nan])
def test_a_share_outside_its_range_is_refused(tmp_path: Path, share: float) -> None:
    with pytest.raises(UserError, match=r"reported_share=.* is outside \[0, 1\)"):
        config(tmp_path, reported_share=share)


def test_a_single_document_is_not_divided(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^reported_share=0.5: the validation text cannot be divided between two"):
        pretrain(config(tmp_path, documents=2, reported_share=0.5))


def test_a_border_is_where_a_document_begins(tmp_path: Path) -> None:
    path = tmp_path / "tokens"
    path.write_bytes(bytes([1, 0, 2, 0, 0, 0, 9, 0, 3, 0, 9, 0]))
    file = TokenFile(path, "uint16")
    assert [document_border(file, 9, share) for share in (0.9, 0.4, 0.3, 0.01)] == [4, 4, None, None]
    assert sequential_windows(file, 8, begin=4).tokens[0, :1].tolist() == [3]
