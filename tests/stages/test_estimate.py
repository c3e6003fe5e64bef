"""Estimates of a sweep before it starts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from sparsetrain.cli.resolve import load
from sparsetrain.cost.flops import training_flops_per_token
from sparsetrain.data import prepare_corpora
from sparsetrain.stages import estimate, pretrain
from sparsetrain.stages.config import model_config
from sparsetrain.stages.estimate import sweep_cost


def tiny(notes: Path, *more: str) -> Any:
    words = [
        *("model=tiny", "parameterization.base_width=16", f"data.path={notes}", "data.tokenizer=bytes"),
        *("data.context=32", "budget.batch_size=2", "budget.steps=3", "loop.eval_sequences=2"),
    ]
    return load("pretrain", [*words, *more])


def test_cost_counts_what_is_done_and_adds_the_formula_for_the_rest(
    notes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, screen: Console
) -> None:
    monkeypatch.chdir(tmp_path)
    configs = [tiny(notes, f"sparsity.sparsity={sparsity}") for sparsity in (0.0, 0.5, 0.75)]
    prepared: list[Any] = []
    monkeypatch.setattr(
        estimate, "prepare_corpora", lambda *words, **more: (prepared.append(words), prepare_corpora(*words, **more))[1]
    )
    before = sweep_cost([*configs, None], screen)
    assert len(prepared) == 1  # three points share one text
    shape = model_config(configs[0].model, 257)
    tokens = 3 * 2 * 32
    formula = [tokens * training_flops_per_token(shape, density, 32).total for density in (1.0, 0.5, 0.25)]
    assert (before.points, before.done, before.refused, before.measured) == (4, 0, 1, 0)
    assert before.flops == pytest.approx(sum(formula))
    assert before.dense_flops == pytest.approx(3 * formula[0])
    assert "4 points, 0 already finished, 3 to run, 1 that cannot run" in before.describe()
    assert "very roughly" in before.describe()
    result = pretrain(configs[1], screen)
    after = sweep_cost([*configs, None], screen)
    assert (after.done, after.measured) == (1, 1)
    assert after.flops == pytest.approx(formula[0] + formula[2])
    assert after.rate == pytest.approx(formula[0] / result["seconds"])
    assert "measured on 1 finished point" in after.describe()
    assert sweep_cost([configs[1]], screen).describe() == "sweep: 1 point, 1 already finished, 0 to run"
