"""ModelConfig: derived sizes, and a one-line error for each invalid setting."""

from __future__ import annotations

from typing import Any

import pytest
from omegaconf import OmegaConf

from sparsetrain.errors import UserError
from sparsetrain.models import ModelConfig

SHAPE: dict[str, Any] = {"d_model": 64, "n_layers": 2, "n_heads": 4, "vocab_size": 100}


def test_defaults_are_the_documented_ones() -> None:
    config = ModelConfig(**SHAPE)
    assert (config.max_context, config.mlp, config.norm, config.bias) == (2048, "gelu", "layernorm", False)
    assert (config.positions, config.tie_embeddings, config.init_std) == ("alibi", True, 0.02)
    assert (config.sparsity, config.sparsity_pattern, config.seed, config.dropout) == (0.0, "random", None, 0.0)
    assert (config.init_truncation, config.scale_glu_init) == (None, True)
    assert (config.kv_heads, config.d_head) == (4, 16)


@pytest.mark.parametrize(
    ("options", "width"),
    [({}, 256), ({"mlp": "swiglu"}, 170), ({"d_ff": 99}, 99), ({"mlp": "swiglu", "d_ff": 99}, 99)],
)
def test_ffn_width(options: dict[str, Any], width: int) -> None:
    assert ModelConfig(**SHAPE, **options).ffn_width == width


def test_swiglu_width_of_btlm() -> None:
    config = ModelConfig(d_model=2560, n_layers=32, n_heads=32, vocab_size=50257, mlp="swiglu")
    assert config.ffn_width == 6826


@pytest.mark.parametrize(
    ("options", "base", "expected"),
    [
        ({}, 16, (4.0, 4.0)),
        ({"mlp": "swiglu"}, 16, (4.0, 170 / 42)),  # floor at both widths
        ({"d_ff": 100}, 16, (4.0, 4.0)),  # a configured width scales in proportion
        ({"mlp": "swiglu"}, 64, (1.0, 1.0)),
    ],
)
def test_width_multipliers(options: dict[str, Any], base: int, expected: tuple[float, float]) -> None:
    assert ModelConfig(**SHAPE, **options).width_multipliers(base) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"d_model": 0}, "d_model=0 is not a positive integer"),
        ({"n_layers": 1.5}, "n_layers=1.5 is not a positive integer"),
        ({"vocab_size": True}, "vocab_size=True is not a positive integer"),
        ({"d_ff": -1}, "d_ff=-1 is not a positive integer"),
        ({"d_model": 66}, "d_model=66 is not divisible by n_heads=4"),
        ({"init_truncation": 0.4}, "init_truncation=0.4 is not at least 0.5, or null"),
        ({"init_truncation": float("nan")}, "init_truncation=nan is not a finite number"),
        ({"scale_glu_init": 1}, "scale_glu_init=1 is not true or false"),
        ({"scale_glu_init": False}, "scale_glu_init=False: only mlp='swiglu' has a gate, and mlp is 'gelu'"),
        ({"n_kv_heads": 3}, "n_heads=4 is not divisible by n_kv_heads=3"),
        ({"mlp": "swiglo"}, "mlp='swiglo' is not one of gelu, gelu_tanh, swiglu \\(did you mean 'swiglu'\\?\\)"),
        ({"norm": "rms"}, "norm='rms' is not one of layernorm, rmsnorm"),
        ({"positions": "roped"}, "did you mean 'rope'"),
        ({"sparsity_pattern": "randum"}, "did you mean 'random'"),
        ({"d_model": 12, "positions": "rope"}, "is odd"),
        ({"sparsity": 1.0}, "sparsity=1.0 is not in \\[0, 1\\)"),
        ({"sparsity": "0.5"}, "sparsity='0.5' is not a finite number"),
        ({"dropout": -0.1}, "dropout=-0.1 is not in \\[0, 1\\)"),
        ({"init_std": 0.0}, "init_std=0.0 is not positive"),
        ({"norm_eps": float("nan")}, "norm_eps=nan is not a finite number"),
        ({"bias": "no"}, "bias='no' is not true or false"),
        ({"seed": -1}, "seed=-1 is not a non-negative integer or null"),
    ],
)
def test_bad_fields_are_named_in_one_line(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as raised:
        ModelConfig(**{**SHAPE, **options})
    assert "\n" not in str(raised.value)


def test_is_a_structured_config() -> None:
    node = OmegaConf.merge(OmegaConf.structured(ModelConfig), SHAPE, {"positions": "rope"})
    assert OmegaConf.to_object(node) == ModelConfig(**SHAPE, positions="rope")
