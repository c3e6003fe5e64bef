"""Which layer is how sparse: globs, groups, and the ones that match nothing."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from sparsetrain.errors import UserError
from sparsetrain.sparsity import SparsityConfig, SparsityGroup, allocate

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
            r"sparsity group '\*attn\*' applies to no layer \(earlier groups take all that it matches\)",
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
