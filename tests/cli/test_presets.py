"""The models of ``conf/`` have the shapes, sizes and FLOPs of the papers."""

from __future__ import annotations

from typing import Any

import pytest
import yaml

from sparsetrain.cli.compose import config_directory, options
from sparsetrain.cost.flops import parameter_count, training_flops_per_token
from sparsetrain.stages.config import model_config

CONF = config_directory()


def preset(name: str) -> Any:
    values = yaml.safe_load((CONF / "model" / f"{name}.yaml").read_text())
    return model_config(values, 1)


def test_presets_are_those_of_the_documentation() -> None:
    small = {"tiny", "demo", "cerebras-111m"}
    assert set(options("model")) == small | {"mediswift-med", "mediswift-xl", "btlm-3b", "crystal"}


@pytest.mark.parametrize(
    ("name", "entry", "published"),
    [
        ("cerebras-111m", "total", 111_050_496),
        ("mediswift-med", "matrices", 301_989_888),
        ("mediswift-xl", "matrices", 1_207_959_552),
    ],
)
def test_parameter_counts_of_presets_match_the_published_ones(name: str, entry: str, published: int) -> None:
    assert getattr(parameter_count(preset(name)), entry) == published


def test_btlm_has_two_point_six_billion_parameters() -> None:
    assert 2.6e9 < parameter_count(preset("btlm-3b")).total < 2.7e9


def test_crystal_has_the_shape_and_the_initial_values_of_its_configuration() -> None:
    """LLM360/crystalcoder-train, pretrain/params/phase1/params.yaml: filter_size, and a and b of the initializers."""
    config = preset("crystal")
    assert config.ffn_width == 10922
    # The arithmetic of the configuration: 4 d^2 of attention, three matrices d x d_ff, biases, two norms, tied tokens.
    d, d_ff = 4096, 10922
    block = 4 * d * d + 4 * d + 3 * d * d_ff + 2 * d_ff + d + 4 * d
    assert parameter_count(config).total == 32 * block + 32032 * d + 2 * d
    assert (config.init_truncation, config.scale_glu_init) == (2.0, True)
    assert preset("btlm-3b").init_truncation == 2.0  # Model Zoo, params_btlm_2p7b_2k.yaml: std 0.073 within +-0.146


@pytest.mark.parametrize(("name", "ratio"), [("mediswift-med", 2.00), ("mediswift-xl", 2.49)])
def test_flop_ratios_of_75_percent_sparsity_match_the_paper(name: str, ratio: float) -> None:
    dense, sparse = (training_flops_per_token(preset(name), density, 2048).total for density in (1.0, 0.25))
    assert dense / sparse == pytest.approx(ratio, rel=0.01)
