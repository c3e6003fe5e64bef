"""Which layer is how sparse: globs, groups, and the ones that match nothing."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparsetrain.cost.flops import matrices, training_flops_per_token
from sparsetrain.errors import UserError
from sparsetrain.models.config import ModelConfig
from sparsetrain.sparsity import EvolutionConfig, SparsityConfig, SparsityGroup, allocate, allocate_densities

NAMES = ["embed_in", "blocks.0.attn.qkv", "blocks.0.mlp.up", "blocks.1.attn.qkv", "blocks.1.mlp.up", "lm_head"]
HIDDEN = NAMES[1:5]


def groups(*pairs: tuple[str, float]) -> list[SparsityGroup]:
    return [SparsityGroup(match, sparsity) for match, sparsity in pairs]


def test_by_default_everything_but_heads_and_embeddings() -> None:
    assert allocate(NAMES, SparsityConfig(sparsity=0.75)) == dict.fromkeys(HIDDEN, 0.75)


def test_sparsity_zero_makes_nothing_sparse() -> None:
    assert allocate(NAMES, SparsityConfig()) == {}
    assert allocate([], SparsityConfig()) == {}


def test_first_matching_group_wins() -> None:
    plan = SparsityConfig(sparsity=0.5, groups=groups(("blocks.0.*", 0.9), ("*attn*", 0.25)))
    assert allocate(NAMES, plan) == {
        "blocks.0.attn.qkv": 0.9,
        "blocks.0.mlp.up": 0.9,
        "blocks.1.attn.qkv": 0.25,
        "blocks.1.mlp.up": 0.5,
    }


def test_a_group_of_sparsity_zero_keeps_its_layers_dense() -> None:
    plan = SparsityConfig(sparsity=0.5, groups=groups(("*attn*", 0.0)))
    assert list(allocate(NAMES, plan)) == ["blocks.0.mlp.up", "blocks.1.mlp.up"]


def test_include_and_exclude_are_globs_over_the_whole_name() -> None:
    plan = SparsityConfig(sparsity=0.5, include=["blocks.1.*", "*_head"], exclude=["*qkv"])
    assert list(allocate(NAMES, plan)) == ["blocks.1.mlp.up", "lm_head"]


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (
            lambda: SparsityConfig(groups=groups(("*atn*", 0.5))),
            r"sparsity group '\*atn\*' applies to no layer; layers: blocks.0.attn.qkv",
        ),
        (
            lambda: SparsityConfig(groups=groups(("*", 0.5), ("*attn*", 0.9))),
            r"sparsity group '\*attn\*' applies to no layer \(earlier groups take all layers that it matches\)",
        ),
        (lambda: SparsityConfig(groups=groups(("lm_head", 0.5))), "sparsity group 'lm_head' applies to no layer; "),
        (
            lambda: SparsityConfig(sparsity=0.5, include=["*attn*", "*mpl*"]),
            r"sparsity include '\*mpl\*' matches no linear layer; layers: embed_in, .*, lm_head$",
        ),
        (lambda: SparsityConfig(sparsity=0.5, exclude=["*"]), r"no linear layer matches include=\['\*'\] and not excl"),
        (lambda: SparsityConfig(sparsity=1.0), r"sparsity=1.0 must be a number in \[0, 1\)"),
        (lambda: SparsityConfig(groups=groups(("*", 1.5))), r"sparsity of group '\*'=1.5 must be"),
        (lambda: SparsityConfig(pattern="blok"), "sparsity.pattern='blok' is not one of random"),
    ],
)
def test_a_plan_that_cannot_be_meant_is_refused(plan: Callable[[], SparsityConfig], message: str) -> None:
    with pytest.raises(UserError, match=message):
        allocate(NAMES, plan())


def test_a_model_without_linear_layers_is_named() -> None:
    with pytest.raises(UserError, match=r"'\*' matches no linear layer; layers: none"):
        allocate([], SparsityConfig(sparsity=0.5))


# Densities: exact totals.

SHAPES = {"a": (64, 64), "b": (256, 64), "c": (64, 256), "d": (8, 8), "lm_head": (100, 64)}


def counts(plan: SparsityConfig, **budget: Any) -> dict[str, int]:
    densities = allocate_densities(SHAPES, plan, **budget)
    return {name: round(density * math.prod(SHAPES[name])) for name, density in densities.items()}


@pytest.mark.parametrize("sparsity", [0.0, 0.1, 0.3, 0.5, 0.75, 0.9, 0.95, 0.99])
def test_erk_has_the_exact_total_and_its_densities_follow_the_shape(sparsity: float) -> None:
    plan = SparsityConfig(sparsity=sparsity, allocation="erk")
    found = counts(plan)
    numel = {name: math.prod(SHAPES[name]) for name in found}
    assert "lm_head" not in found
    assert sum(found.values()) == round((1 - sparsity) * sum(numel.values()))
    raw = {name: sum(SHAPES[name]) / numel[name] for name in found}
    open_layers = [name for name in found if found[name] < numel[name]]
    scale = sum(found[name] for name in open_layers) / max(1.0, sum(raw[name] * numel[name] for name in open_layers))
    # One scale for all that are not clipped, to the rounding of one weight; what is clipped would exceed its layer.
    for name in open_layers:
        assert abs(found[name] - scale * raw[name] * numel[name]) <= 1.0
    for name in set(found) - set(open_layers):
        assert not open_layers or scale * raw[name] > 0.99


def test_erk_matches_the_paper_for_an_mlp() -> None:
    # RigL, appendix: 1 - (n_in + n_out) / (n_in n_out), scaled. 784-300-100-10 at 90 %: the last layer is dense.
    shapes = {"1": (300, 784), "2": (100, 300), "3": (10, 100)}
    densities = allocate_densities(shapes, SparsityConfig(sparsity=0.9, allocation="erk"))
    assert densities["3"] == 1.0
    assert densities["2"] / densities["1"] == pytest.approx((400 / 30000) / (1084 / 235200), rel=1e-3)


def test_groups_and_dense_exceptions_are_outside_of_the_budget() -> None:
    plan = SparsityConfig(sparsity=0.9, allocation="erk", groups=groups(("b", 0.5), ("d", 0.0)))
    found = counts(plan)
    assert found["b"] == round(0.5 * 256 * 64)
    assert found["d"] == 64
    assert found["a"] + found["c"] == round(0.1 * (64 * 64 + 64 * 256))


@pytest.mark.parametrize("allocation", ["uniform", "erk"])
def test_a_budget_of_weights_is_met_to_the_element(allocation: str) -> None:
    plan = SparsityConfig(nnz=7001, allocation=allocation, groups=groups(("c", 0.75)))
    found = counts(plan)
    assert found["c"] == 4096
    assert sum(found.values()) == 7001


def test_a_budget_of_flops_is_met_to_within_one_weight() -> None:
    # A layer that is used three times a token costs three times as much; 6 FLOPs a weight and use.
    weights = {"a": 6.0, "b": 18.0, "c": 6.0, "d": 6.0, "lm_head": 6.0}
    for allocation in ("uniform", "erk"):
        found = counts(SparsityConfig(sparsity=0.5, allocation=allocation), budget=200_000.0, weights=weights)
        spent = sum(weights[name] * count for name, count in found.items())
        assert 200_000 - 6 < spent <= 200_000


def test_flops_of_a_transformer_meet_a_budget() -> None:
    config = ModelConfig(d_model=64, n_layers=2, n_heads=2, vocab_size=100)
    shapes = {matrix.name: (matrix.out_features, matrix.in_features) for matrix in matrices(config)}
    dense = training_flops_per_token(config, 1.0).sparse_linears
    plan = SparsityConfig(allocation="erk", sparsity=0.9)
    densities = allocate_densities(shapes, plan, budget=dense / 4, weights=dict.fromkeys(shapes, 6.0))
    assert training_flops_per_token(config, densities).sparse_linears == pytest.approx(dense / 4, abs=6.0)


@given(
    sizes=st.lists(st.tuples(st.integers(1, 40), st.integers(1, 40)), min_size=1, max_size=6),
    sparsity=st.floats(0.0, 0.999),
    allocation=st.sampled_from(["uniform", "erk"]),
)
def test_totals_are_exact_for_any_shapes(sizes: list[tuple[int, int]], sparsity: float, allocation: str) -> None:
    shapes = {f"l{index}": size for index, size in enumerate(sizes)}
    numel = sum(math.prod(size) for size in sizes)
    target = round((1 - sparsity) * numel)
    plan = SparsityConfig(nnz=max(1, target), allocation=allocation)
    if max(1, target) < len(sizes):
        with pytest.raises(UserError, match="one weight a layer"):
            allocate_densities(shapes, plan)
        return
    target = max(1, target)
    densities = allocate_densities(shapes, plan)
    found = {name: round(densities[name] * math.prod(shapes[name])) for name in shapes}
    assert sum(found.values()) == target
    assert all(1 <= found[name] <= math.prod(shapes[name]) for name in shapes)


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (lambda: SparsityConfig(nnz=0), "sparsity.nnz=0 must be at least 1"),
        (lambda: SparsityConfig(nnz=5, sparsity=0.5), "give one of them"),
        (lambda: SparsityConfig(sparsity=0.5, allocation="ekr"), r"sparsity.allocation='ekr' .*did you mean 'erk'"),
        (lambda: SparsityConfig(sparsity=0.5, pattern="block", block=[0, 1]), r"sparsity.block=\[0, 1\] must be two"),
        (lambda: SparsityConfig(sparsity=0.5, block=[4, 4]), r"sparsity.block=\[4, 4\] is an option of block"),
        (
            lambda: SparsityConfig(sparsity=0.5, pattern="nm", evolution=EvolutionConfig(rule="set")),
            "sparsity.pattern='nm' would not outlast the first update of rule=set",
        ),
    ],
)
def test_a_plan_out_of_range_is_named(plan: Callable[[], SparsityConfig], message: str) -> None:
    with pytest.raises(UserError, match=message):
        plan()


def test_a_budget_out_of_reach_is_named() -> None:
    with pytest.raises(UserError, match=r"a budget of 3 for 4 layers is out of reach; it must lie between 4 .* 36928"):
        allocate_densities(SHAPES, SparsityConfig(nnz=3))
    with pytest.raises(UserError, match="out of reach"):
        allocate_densities(SHAPES, SparsityConfig(nnz=10**7))
