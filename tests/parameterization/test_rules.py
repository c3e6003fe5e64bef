"""The table of the parameterizations, row by row."""

from __future__ import annotations

from collections.abc import Callable
from math import sqrt
from typing import Any, NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparsetrain.errors import UserError
from sparsetrain.parameterization import Parameterization, Role, TensorTraits

P = Parameterization

# The tensor: m_d = 4, density 1/8 over base density 1/2, so m_rho = 1/4; 8 layers over 2, so m_L = 4; alpha = 1/2, so
# m_L^(alpha - 1) = m_L^-alpha = 1/2. Every multiplier is a power of two: the expected numbers are exact.
M_D, DENSITY, LAYERS = 4.0, 0.125, 8
SIGMA, ETA, LAMBDA, EPS = 0.5, 1.0, 0.5, 1.0
EMBEDDING_LR = 8.0


class Row(NamedTuple):
    """The settings that a scheme gives a tensor under its default rules."""

    std: float
    lr: float
    wd: float
    eps: float


OPTIONS: dict[str, Any] = {"embedding_lr_multiplier": EMBEDDING_LR}
SCHEMES: dict[str, Parameterization] = {
    "sp": P.sp(**OPTIONS),
    "mup": P.mup(64, **OPTIONS),
    "supar": P.supar(64, 0.5, **OPTIONS),
    "completep": P.completep(64, 2, alpha=0.5, **OPTIONS),
    "supar_completep": P.supar_completep(64, 0.5, 2, alpha=0.5, **OPTIONS),
}

DEEP = sqrt(2 * 8)  # L_ref = n_layers
BASE = sqrt(2 * 2)  # L_ref = base_layers
TABLE: dict[str, dict[Role, Row]] = {
    "sp": {
        Role.HIDDEN: Row(0.5, 1.0, 0.5, 1.0),
        Role.OUTPUT: Row(0.5 / DEEP, 1.0, 0.5, 1.0),
        Role.NORM: Row(0.0, 1.0, 0.0, 1.0),
        Role.BIAS: Row(0.0, 1.0, 0.0, 1.0),
    },
    "mup": {
        Role.HIDDEN: Row(0.25, 0.25, 2.0, 1.0),
        Role.OUTPUT: Row(0.25 / DEEP, 0.25, 2.0, 1.0),
        Role.NORM: Row(0.0, 1.0, 0.0, 1.0),
        Role.BIAS: Row(0.0, 1.0, 0.0, 1.0),
    },
    "supar": {  # m_d m_rho = 1
        Role.HIDDEN: Row(0.5, 1.0, 0.5, 1.0),
        Role.OUTPUT: Row(0.5 / DEEP, 1.0, 0.5, 1.0),
        Role.NORM: Row(0.0, 1.0, 0.0, 1.0),
        Role.BIAS: Row(0.0, 1.0, 0.0, 1.0),
    },
    "completep": {
        Role.HIDDEN: Row(0.25, 0.125, 2.0, 0.125),
        Role.OUTPUT: Row(0.25 / BASE, 0.125, 2.0, 0.125),
        Role.NORM: Row(0.0, 0.5, 0.0, 0.125),
        Role.BIAS: Row(0.0, 0.5, 0.0, 0.125),
    },
    "supar_completep": {
        Role.HIDDEN: Row(0.5, 0.5, 0.5, 0.125),
        Role.OUTPUT: Row(0.5 / BASE, 0.5, 0.5, 0.125),
        Role.NORM: Row(0.0, 0.5, 0.0, 0.125),
        Role.BIAS: Row(0.0, 0.5, 0.0, 0.125),
    },
}
# Outside the blocks no scheme scales anything.
OUTSIDE: dict[Role, Row] = {
    Role.EMBEDDING: Row(0.5, 8.0, 0.5, 1.0),
    Role.POSITION: Row(0.5, 8.0, 0.5, 1.0),
    Role.FINAL_NORM: Row(0.0, 1.0, 0.0, 1.0),
    Role.FINAL_BIAS: Row(0.0, 1.0, 0.0, 1.0),
    Role.HEAD: Row(0.5, 1.0, 0.5, 1.0),
    Role.PROMPT: Row(0.5, 1.0, 0.0, 1.0),
    Role.KEEP: Row(0.0, 1.0, 0.0, 1.0),
}


def traits(role: Role) -> TensorTraits:
    return TensorTraits(role, M_D, DENSITY if role in (Role.HIDDEN, Role.OUTPUT) else 1.0)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("role", Role)
def test_table_row_for_row(scheme: str, role: Role) -> None:
    rules, tensor = SCHEMES[scheme], traits(role)
    measured = Row(
        rules.init_std(tensor, SIGMA, LAYERS),
        rules.learning_rate(tensor, ETA, LAYERS),
        rules.weight_decay(tensor, LAMBDA),
        rules.epsilon(tensor, EPS, LAYERS),
    )
    assert measured == {**TABLE[scheme], **OUTSIDE}[role]


FACTORS = {  # scheme -> wd_rule -> factor of lambda for a matrix
    "sp": {"coupled": 1.0, "width": 1.0, "width_density": 1.0},
    "mup": {"coupled": 1.0, "width": 4.0, "width_density": 4.0},
    "supar": {"coupled": 1.0, "width": 4.0, "width_density": 1.0},
    "completep": {"coupled": 1.0, "width": 4.0, "width_density": 4.0},
    "supar_completep": {"coupled": 1.0, "width": 4.0, "width_density": 1.0},
}


def with_options(scheme: str, **options: Any) -> Parameterization:
    make: dict[str, Callable[..., Parameterization]] = {
        "sp": P.sp,
        "mup": lambda **o: P.mup(64, **o),
        "supar": lambda **o: P.supar(64, 0.5, **o),
        "completep": lambda **o: P.completep(64, 2, 0.5, **o),
        "supar_completep": lambda **o: P.supar_completep(64, 0.5, 2, 0.5, **o),
    }
    return make[scheme](**options)


@pytest.mark.parametrize("scheme", FACTORS)
@pytest.mark.parametrize("wd_rule", ["coupled", "width", "width_density"])
def test_weight_decay_rules(scheme: str, wd_rule: str) -> None:
    rules = with_options(scheme, wd_rule=wd_rule)
    for role in (Role.HIDDEN, Role.OUTPUT):
        assert rules.weight_decay(traits(role), LAMBDA) == LAMBDA * FACTORS[scheme][wd_rule]
    for role in (Role.EMBEDDING, Role.POSITION, Role.HEAD):
        assert rules.weight_decay(traits(role), LAMBDA) == LAMBDA
    for role in (Role.NORM, Role.BIAS, Role.FINAL_NORM, Role.FINAL_BIAS, Role.PROMPT):
        assert rules.weight_decay(traits(role), LAMBDA) == 0.0


@pytest.mark.parametrize(
    ("scheme", "fixed", "table"),
    [
        ("sp", 1.0, 1.0),
        ("mup", 1.0, 0.25),
        ("supar", 1.0, 0.25),
        ("completep", 1.0, 0.125),
        ("supar_completep", 1.0, 0.125),
    ],
)
def test_eps_rules(scheme: str, fixed: float, table: float) -> None:
    for role in Role:
        inside = role in (Role.HIDDEN, Role.OUTPUT, Role.NORM, Role.BIAS)
        assert with_options(scheme, eps_rule="fixed").epsilon(traits(role), EPS, LAYERS) == fixed
        assert with_options(scheme, eps_rule="table").epsilon(traits(role), EPS, LAYERS) == (table if inside else 1.0)


def test_default_rules_of_each_scheme() -> None:
    assert {name: (rules.wd_rule, rules.eps_rule) for name, rules in SCHEMES.items()} == {
        "sp": ("width_density", "fixed"),
        "mup": ("width_density", "fixed"),
        "supar": ("width_density", "fixed"),
        "completep": ("width_density", "table"),
        "supar_completep": ("width_density", "table"),
    }


@pytest.mark.parametrize(
    ("scheme", "residual", "logits", "scale"),
    [
        ("sp", 1.0, 3.0, 1 / 4),
        ("mup", 1.0, 0.75, 1 / 16),
        ("supar", 1.0, 0.75, 1 / 16),
        ("completep", 0.5, 0.75, 1 / 16),
        ("supar_completep", 0.5, 0.75, 1 / 16),
    ],
)
def test_forward_multipliers(scheme: str, residual: float, logits: float, scale: float) -> None:
    rules = with_options(scheme, alpha_in=2.0, alpha_out=3.0)
    assert rules.embedding_multiplier() == 2.0
    assert rules.residual_multiplier(LAYERS) == residual
    assert rules.logit_multiplier(M_D) == logits
    assert rules.attention_multiplier(16) == scale
    assert with_options(scheme, attention_scale="sqrt").attention_multiplier(16) == 1 / 4
    assert with_options(scheme, attention_scale="linear").attention_multiplier(16) == 1 / 16
    neutral = with_options(scheme)
    assert (neutral.embedding_multiplier(), neutral.logit_multiplier(1.0), neutral.residual_multiplier(2)) == (1, 1, 1)


@pytest.mark.parametrize("scheme", ["mup", "supar", "completep", "supar_completep"])
@given(m_d=st.floats(0.1, 100), density=st.floats(0.01, 1), layers=st.integers(1, 64), alpha=st.floats(0.5, 1))
def test_decay_per_step_does_not_depend_on_width_or_density(
    scheme: str, m_d: float, density: float, layers: int, alpha: float
) -> None:
    # lr * wd = eta lambda m_L^(alpha - 1): eta lambda itself at alpha = 1 and without depth rules.
    make = {
        "mup": lambda: P.mup(64),
        "supar": lambda: P.supar(64, 0.5),
        "completep": lambda: P.completep(64, 2, alpha),
        "supar_completep": lambda: P.supar_completep(64, 0.5, 2, alpha),
    }
    rules = make[scheme]()
    tensor = TensorTraits(Role.HIDDEN, m_d, density)
    product = rules.learning_rate(tensor, 0.01, layers) * rules.weight_decay(tensor, 0.1)
    m_l = layers / 2 if "completep" in scheme else 1.0
    assert product == pytest.approx(0.001 * m_l ** (alpha - 1), rel=1e-12)


@pytest.mark.parametrize(
    ("special", "general"),
    [
        (P.sp(), P.mup(64)),
        (P.mup(64), P.supar(64)),
        (P.mup(64, eps_rule="table"), P.completep(64, LAYERS)),
        (P.sp(eps_rule="table"), P.supar_completep(64, 1.0, LAYERS)),
        (P.supar(64, eps_rule="table"), P.supar_completep(64, 1.0, LAYERS)),
    ],
    ids=lambda rules: rules.scheme,
)
@pytest.mark.parametrize("role", Role)
def test_limits_are_equal_to_the_last_bit(special: Parameterization, general: Parameterization, role: Role) -> None:
    # At ratios of 1 the general scheme equals the special one; m_d and density stay free if both schemes use them.
    widths = (1.0,) if special.scheme == "sp" else (1.0, 3.0)
    densities = (1.0, 0.3) if special.uses_density == general.uses_density else (1.0,)
    for tensor in [TensorTraits(role, m_d, density) for m_d in widths for density in densities]:
        for method, base in (("init_std", 0.02), ("learning_rate", 3e-3), ("epsilon", 1e-8)):
            assert getattr(special, method)(tensor, base, LAYERS) == getattr(general, method)(tensor, base, LAYERS)
        assert special.weight_decay(tensor, 0.1) == general.weight_decay(tensor, 0.1)
        assert special.logit_multiplier(tensor.m_d) == general.logit_multiplier(tensor.m_d)
    assert special.residual_multiplier(LAYERS) == general.residual_multiplier(LAYERS)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: P("mupp", 64), r"parameterization='mupp' is not one of .* \(did you mean 'mup'\?\)"),
        (lambda: P("mup"), "parameterization mup: base_width=None must be at least 1"),
        (lambda: P.mup(0), "base_width=0 must be at least 1"),
        (lambda: P.mup(-4), "parameterization.base_width=-4 must be above 0"),
        (lambda: P.completep(64, 0), "parameterization completep: base_layers=0 must be at least 1"),
        (lambda: P.supar(64, 0.0), r"parameterization.base_density=0.0 must lie in \(0, 1\]"),
        (lambda: P.supar(64, 1.5), "base_density=1.5"),
        (lambda: P.completep(64, 2, alpha=0.4), r"parameterization.alpha=0.4 must lie in \[0.5, 1\]"),
        (lambda: P.mup(64, alpha_in=0.0), "parameterization.alpha_in=0.0 must be above 0"),
        (lambda: P.mup(64, alpha_out=float("nan")), "parameterization.alpha_out=nan must be above 0"),
        (lambda: P.sp(embedding_lr_multiplier=-1.0), "embedding_lr_multiplier=-1.0 must be above 0"),
        (lambda: P.sp(attention_scale="linaer"), "attention_scale='linaer' is not one of .*'linear'"),
        (lambda: P.sp(wd_rule="widht"), "wd_rule='widht' is not one of .*'width'"),
        (lambda: P.sp(eps_rule="tabel"), "eps_rule='tabel' is not one of .*'table'"),
    ],
)
def test_values_out_of_range_are_named(make: Callable[[], Parameterization], message: str) -> None:
    with pytest.raises(UserError, match=message):
        make()
