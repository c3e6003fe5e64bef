"""Losses by position over the same targets, against passes cut by hand and a language whose losses are known."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparsetrain.data import Batch
from sparsetrain.data.tokens import TokenFile
from sparsetrain.errors import UserError
from sparsetrain.models import ModelConfig, Transformer
from sparsetrain.training.position_losses import position_losses


def written(path: Path, tokens: Any) -> TokenFile:
    np.asarray(tokens, dtype="<u2").tofile(path)
    return TokenFile(path, "uint16")


def test_every_length_predicts_the_same_targets(tmp_path: Path) -> None:
    text = written(tmp_path / "text", range(1000))
    seen: dict[int, list[int]] = {}

    def losses(batch: Batch) -> Tensor:
        assert torch.equal(batch.targets[:, -4:], batch.tokens[:, -4:] + 1)
        counted = batch.targets[batch.targets >= 0]
        seen.setdefault(batch.tokens.shape[1], []).extend(counted.tolist())
        return batch.targets.clamp_min(0).double()

    found = position_losses(nn.Identity(), losses, text, [4, 60, 200], width=4, blocks=50, batch_size=7)
    assert set(seen) == {4, 60, 200}
    assert seen[4] == seen[60] == seen[200]
    assert len(set(seen[4])) == 50 * 4
    assert found.loss(4) == found.loss(200) == np.mean(seen[4])
    assert found.difference(60, 4) == (0.0, 0.0)
    alone = position_losses(nn.Identity(), losses, text, [200], width=4, blocks=10**6)
    assert alone.blocks.shape == (1, 200)  # tokens 197 to 996, the first to which 200 tokens lead


def test_losses_are_those_of_passes_that_end_with_the_targets(tmp_path: Path) -> None:
    config = ModelConfig(16, 1, 2, 50, max_context=16, positions_scale="dynamic", seed=0)
    model = Transformer(config).train()
    tokens = torch.randint(0, 50, (90,), generator=torch.Generator().manual_seed(0))
    text = written(tmp_path / "text", tokens)
    found = position_losses(
        model, lambda batch: model.token_losses(batch.tokens, batch.targets), text, [8, 40], width=8, blocks=3
    )
    assert model.training
    for row, length in enumerate((8, 40)):
        for block, end in enumerate((40, 56, 72)):  # three of the seven blocks, evenly
            logits = model.eval()(tokens[end - length : end][None])[0, -8:].detach()
            expected = F.cross_entropy(logits, tokens[end - 7 : end + 1])
            assert found.blocks[row, block] == pytest.approx(float(expected), rel=1e-5)
    paired = found.blocks[1] - found.blocks[0]
    assert found.difference(40, 8) == pytest.approx((paired.mean(), paired.std(ddof=1) / math.sqrt(3)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lengths": [3]}, r"lengths=\[3\] must be at least width=4"),
        ({"lengths": []}, r"lengths=\[\] must be"),
        ({"width": 0}, "width=0"),
        ({"blocks": 0}, "blocks=0"),
        ({"lengths": [100]}, "text holds 100 tokens; passes of 100 need 101"),
    ],
)
def test_what_cannot_be_measured_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    text = written(tmp_path / "text", range(100))
    with pytest.raises(UserError, match=message):
        position_losses(nn.Identity(), lambda batch: batch.tokens, text, **{"lengths": [8], "width": 4, **changes})


def test_a_length_that_was_not_evaluated_is_named(tmp_path: Path) -> None:
    text = written(tmp_path / "text", range(100))
    found = position_losses(nn.Identity(), lambda batch: batch.tokens.double(), text, [8], width=4, blocks=1)
    assert math.isnan(found.difference(8, 8)[1])
    with pytest.raises(UserError, match="length=9 was not evaluated; there are 8"):
        found.loss(9)
