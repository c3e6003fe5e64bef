"""Settings that a stage inherits from the run that it starts from, and settings that it refuses."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from sparsetrain.cli.resolve import load
from sparsetrain.errors import UserError
from sparsetrain.settings import build
from sparsetrain.stages import (
    FinetuneConfig,
    PretrainConfig,
    PromptConfig,
    RunResult,
    finetune,
    pretrain,
    prompt,
)

Configure = Callable[..., Any]


# Settings that the command line inherits from init_from.


@pytest.fixture
def inherit(sparse: RunResult) -> Callable[..., Any]:
    def inherit(verb: str, *overrides: str) -> Any:
        return load(verb, [f"init_from={sparse.directory}", *overrides])

    return inherit


def test_a_stage_takes_over_model_masks_rules_and_data(inherit: Callable[..., Any], sparse: RunResult) -> None:
    config = inherit("finetune", "data.context=48", "parameterization.wd_rule=coupled")
    saved = sparse["config"]
    assert config.model == saved["model"]
    assert config.sparsity.sparsity == 0.75
    assert (config.parameterization.base_width, config.parameterization.wd_rule) == (16, "coupled")
    assert (config.data.path, config.data.context) == (saved["data"]["path"], 48)
    # A chosen scheme has the base of the run's model and not of the model that the files name.
    assert inherit("finetune", "parameterization=mup").parameterization.base_width == 32
    more = inherit("pretrain", f"data.path={saved['data']['path']}")
    assert more.data.tokenizer_path == str(sparse.directory / "tokenizer.json")
    assert more.data.context == 128  # pre-training does not inherit data


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.d_model=64", r"another shape: model\.d_model=64 \(there: 32\)"),
        ("model=demo", r"another shape: model\.d_model=128 \(there: 32\)"),
        ("sparsity.sparsity=0.5", r"another shape: sparsity\.sparsity=0\.5 \(there: 0\.75\)"),
    ],
)
def test_another_shape_than_the_checkpoint_has_is_named(
    inherit: Callable[..., Any], override: str, message: str
) -> None:
    with pytest.raises(UserError, match=message) as caught:
        inherit("finetune", override)
    assert "\n" not in str(caught.value)


def test_repeating_what_the_checkpoint_has_is_fine(inherit: Callable[..., Any]) -> None:
    assert inherit("finetune", "model.d_model=32", "sparsity.sparsity=0.75").model["d_model"] == 32


def test_init_from_a_missing_place_or_one_without_a_run_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="init_from=nowhere: no such run directory"):
        load("finetune", ["init_from=nowhere"])
    with pytest.raises(UserError, match=r"is not a run directory: it has no config\.yaml"):
        load("finetune", [f"init_from={tmp_path}"])
    (tmp_path / "config.yaml").write_text("a: [")
    with pytest.raises(UserError, match=r"config\.yaml cannot be read") as caught:
        load("finetune", [f"init_from={tmp_path}"])
    assert "\n" not in str(caught.value)
    (tmp_path / "config.yaml").write_text("- a\n")
    with pytest.raises(UserError, match="holds no configuration"):
        load("finetune", [f"init_from={tmp_path}"])


def test_init_from_a_run_without_a_checkpoint_is_named(
    sparse: RunResult, configure: Configure, tmp_path: Path, screen: Console
) -> None:
    shutil.rmtree(sparse.directory / "checkpoints")
    with pytest.raises(UserError, match="holds no checkpoint"):
        finetune(configure(FinetuneConfig, run_dir=tmp_path / "x", init_from=sparse.directory), screen)
    assert not (tmp_path / "x").exists()


def test_prompting_needs_a_model(configure: Configure, screen: Console) -> None:
    with pytest.raises(UserError, match="init_from is missing"):
        prompt(configure(PromptConfig), screen)


def test_finetuning_from_scratch_takes_the_sparsity_section(
    configure: Configure, tmp_path: Path, screen: Console
) -> None:
    result = finetune(configure(FinetuneConfig, run_dir=tmp_path / "run", mode="sparse"), screen)
    assert (result["init_from"], result["density"]) == (None, 0.25)


def test_a_model_with_another_vocabulary_than_its_text_is_refused(
    configure: Configure, tmp_path: Path, screen: Console
) -> None:
    with pytest.raises(UserError, match=r"model\.vocab_size=100 is smaller than the tokenizer's 257"):
        pretrain(configure(PretrainConfig, {"model.vocab_size": 100}, run_dir=tmp_path / "x"), screen)
    result = pretrain(
        configure(PretrainConfig, {"model.vocab_size": 300, "budget.steps": 1}, run_dir=tmp_path / "x"), screen
    )
    assert result["model"]["vocab_size"] == 300


def test_strict_sections_name_the_wrong_key_and_the_missing_one(notes: Path) -> None:
    with pytest.raises(UserError, match=r"optimizer\.lrr is no setting \(did you mean 'lr'\?\)"):
        build(PretrainConfig, {"optimizer": {"lrr": 1}})
    with pytest.raises(UserError, match=r"sparsity\.groups\[0\]\.sparsity is missing"):
        build(PretrainConfig, {"sparsity": {"groups": [{"match": "*"}]}})
