"""Settings computed from others: sizes against arithmetic, random-search draws against scipy's distribution."""

from __future__ import annotations

import math

import pytest
import scipy.stats

from sparsetrain.cli.multirun import points, with_sweep
from sparsetrain.cli.resolve import load
from sparsetrain.data import Tokenizer
from sparsetrain.errors import UserError
from sparsetrain.optim import Budget, RunSchedule
from sparsetrain.runs.identity import digest
from sparsetrain.runs.origin import Origin
from sparsetrain.stages.config import identify


def drawn(number: int) -> tuple[float, ...]:
    config = load("pretrain", ["experiment=base_tuning", f"draw={number}"])
    rules = config.parameterization
    return (
        config.optimizer.lr,
        config.model["init_std"],
        rules.alpha_in,
        rules.alpha_out,
        rules.embedding_lr_multiplier,
    )


def test_draws_are_functions_of_the_number_alone() -> None:
    assert drawn(3) == drawn(3)
    assert len({drawn(number) for number in range(4)}) == 4
    # Fixed values: a search that is extended later must keep its points.
    assert drawn(0) == (0.0106, 0.0974, 3.06, 1.25, 3.93)


def test_draws_are_log_uniform() -> None:
    from omegaconf import OmegaConf

    from sparsetrain.cli.resolvers import draw

    values = [draw("lr", 1e-4, 1e-1, _root_=OmegaConf.create({"draw": number})) for number in range(400)]
    shares = [(math.log(value) - math.log(1e-4)) / math.log(1e3) for value in values]
    assert scipy.stats.kstest(shares, "uniform").pvalue > 0.01
    other = [draw("init", 1e-4, 1e-1, _root_=OmegaConf.create({"draw": number})) for number in range(400)]
    assert abs(scipy.stats.spearmanr(values, other).statistic) < 0.15


def test_the_number_of_a_draw_is_no_part_of_the_run() -> None:
    a = load("pretrain", ["experiment=base_tuning", "draw=1"])
    b = load("pretrain", ["experiment=base_tuning", "draw=2", f"optimizer.lr={a.optimizer.lr}"])
    origin = Origin("corpus", None, Tokenizer.bytes(), set())
    assert digest(identify("pretrain", a, origin)) != digest(identify("pretrain", b, origin))
    b.parameterization, b.model = a.parameterization, a.model
    assert digest(identify("pretrain", a, origin)) == digest(identify("pretrain", b, origin))


@pytest.mark.parametrize(("width", "sparsity", "heads"), [(128, 0.0, 4), (256, 0.75, 8), (512, 0.9375, 16)])
def test_iso_parameter_points_have_the_weights_of_the_dense_base(width: int, sparsity: float, heads: int) -> None:
    config = load("pretrain", ["experiment=supar_iso_parameter", f"model.d_model={width}"])
    assert (config.sparsity.sparsity, config.model["n_heads"]) == (sparsity, heads)


def test_width_and_sparsity_follow_the_depth_in_the_product_experiment() -> None:
    found = [load("pretrain", ["experiment=supar_completep", f"model.n_layers={layers}"]) for layers in (2, 4, 8)]
    assert [(c.model["d_model"], c.model["n_heads"], c.sparsity.sparsity) for c in found] == [
        (128, 4, 0.0),
        (256, 8, 0.75),
        (512, 16, 0.9375),
    ]


def test_the_recipe_of_btlm_has_the_published_phases() -> None:
    full = ["model=btlm-3b", "parameterization=mup", "data.context=2048", "budget.batch_size=1920"]
    config = load("pretrain", [*full, "recipe=btlm", "budget.steps=159636"])
    budget = Budget.of(config.budget, config.data.context)
    # Steps, context and sequences a step from Cerebras' params_btlm_2p7b_2k.yaml and _8k.yaml.
    found = [(phase.steps, phase.context, phase.batch_size) for phase in budget.phases]
    assert found == [(119727, 2048, 1920), (39909, 8192, 480)]
    rate = RunSchedule(config.schedule, budget, config.optimizer)
    assert rate.factor(159635) * config.optimizer.lr == pytest.approx(1.0138e-4, rel=2e-3)
    model = config.model
    assert (model["mlp"], model["positions"], model["max_context"], model["d_ff"]) == ("swiglu", "alibi", 8192, None)
    small = load("pretrain", ["model=demo", "recipe=btlm"])
    assert [phase.context for phase in small.budget.phases] == [None, 512]
    assert small.parameterization.base_width == 128


@pytest.mark.parametrize("scheme", ["mup", "supar", "completep", "supar_completep"])
def test_a_model_narrower_than_the_tuned_one_is_its_own_base(scheme: str) -> None:
    widths = {
        width: load("pretrain", [f"parameterization={scheme}", f"model.d_model={width}"]).parameterization.base_width
        for width in (64, 128, 256)
    }
    assert widths == {64: 64, 128: 128, 256: 128}


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["experiment=base_tuning", "draw=null"], ["draw=None", "0 or more"]),
        (["experiment=supar_iso_parameter", "model.d_model=64"], ["model.d_model=64", "128"]),
        (["experiment=supar_lr_transfer", "model.d_model=200"], ["model.d_model=200", "head width 32"]),
        (["optimizer.lr=${draw:lr,1,0.5}", "draw=0"], ["draw:lr,1,0.5", "0 < LOW < HIGH"]),
        (["recipe=btlm", "budget.batch_size=6"], ["budget.phases[1].batch_size", "budget.batch_size=6", "4 divides"]),
        (["data.context=${longer:0}"], ["longer:0", "at least 1"]),
    ],
)
def test_what_does_not_follow_is_one_line(overrides: list[str], words: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        load("pretrain", overrides)
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value)


def test_a_sweep_takes_its_values_from_the_experiment_unless_the_command_line_has_others() -> None:
    words = with_sweep("pretrain", ["experiment=supar_lr_transfer", "optimizer.lr=0.25,0.5"])
    swept = dict(word.split("=", 1) for word in words)
    assert swept["parameterization"] == "sp,supar"
    assert swept["optimizer.lr"] == "0.25,0.5"
    assert words.count("optimizer.lr=0.25,0.5") == 1
    assert swept["hydra.sweeper.params"] == "null"
    assert with_sweep("pretrain", ["seed=0,1"]) == ["seed=0,1"]
    # Even if every value is replaced, Hydra must not see those of the experiment.
    replaced = with_sweep("pretrain", ["experiment=base_tuning", "draw=range(64,66)"])
    assert replaced == ["experiment=base_tuning", "draw=range(64,66)", "hydra.sweeper.params=null"]


def test_points_of_a_sweep_are_its_product_and_a_refused_one_is_none() -> None:
    words = with_sweep("pretrain", ["experiment=supar_lr_transfer", "optimizer.lr=0.25,0.5", "sparsity.sparsity=0,2"])
    found = list(points("pretrain", words))
    assert len(found) == 8
    kept = [(c.parameterization.scheme, c.sparsity.sparsity, c.optimizer.lr) for c in found if c is not None]
    assert kept == [("sp", 0.0, 0.25), ("sp", 0.0, 0.5), ("supar", 0.0, 0.25), ("supar", 0.0, 0.5)]
