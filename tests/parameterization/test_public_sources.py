"""Each switch against the public source that it reproduces, in the notation of that source.

The tables are those of the papers and of the authors' published code: SμPar (arXiv 2405.15743, branch `supar` of
nanoGPT-mup) and CompleteP (arXiv 2505.01618, Table 1, branch `completep`). If a paper's table and its code differ, both
are rows here, and the switches choose between them.
"""

from __future__ import annotations

from math import sqrt

import pytest

from sparsetrain.parameterization import Parameterization, Role, TensorTraits

P = Parameterization
SIGMA, ETA, LAMBDA, EPS = 0.073, 1.2e-2, 0.1, 1e-8
BASE_WIDTH, BASE_LAYERS = 256, 2


@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.875])
@pytest.mark.parametrize("width", [256, 2048])
def test_supar_with_coupled_decay_equals_the_public_supar_code(width: int, sparsity: float) -> None:
    rules = P.supar(BASE_WIDTH, 1.0, wd_rule="coupled", eps_rule="fixed")
    m_d, m_rho, layers = width / BASE_WIDTH, 1 - sparsity, 12
    hidden, output = (TensorTraits(role, m_d, m_rho) for role in (Role.HIDDEN, Role.OUTPUT))
    # c_attn and c_fc, then both c_proj.
    assert rules.init_std(hidden, SIGMA, layers) ** 2 == pytest.approx(SIGMA**2 / (m_d * m_rho))
    assert rules.init_std(output, SIGMA, layers) ** 2 == pytest.approx(SIGMA**2 / (2 * layers * m_d * m_rho))
    for matrix in (hidden, output):
        assert rules.learning_rate(matrix, ETA, layers) == pytest.approx(ETA / (m_d * m_rho))
        assert rules.weight_decay(matrix, LAMBDA) == LAMBDA
        assert rules.epsilon(matrix, EPS, layers) == EPS
    for role in (Role.EMBEDDING, Role.POSITION, Role.HEAD):
        other = TensorTraits(role, m_d)
        assert rules.init_std(other, SIGMA, layers) == SIGMA
        assert (rules.learning_rate(other, ETA, layers), rules.weight_decay(other, LAMBDA)) == (ETA, LAMBDA)
    for role in (Role.NORM, Role.BIAS, Role.FINAL_NORM, Role.FINAL_BIAS):
        assert rules.learning_rate(TensorTraits(role, m_d), ETA, layers) == ETA
    assert rules.attention_multiplier(32) == 1 / 32
    assert rules.logit_multiplier(m_d) == 1 / m_d
    # By default the decay per step no longer grows with sparsity: lambda m_d m_rho.
    assert P.supar(BASE_WIDTH).weight_decay(hidden, LAMBDA) == pytest.approx(LAMBDA * m_d * m_rho)


@pytest.mark.parametrize("alpha", [0.5, 1.0])
@pytest.mark.parametrize("layers", [2, 64])
def test_completep_with_width_decay_equals_table_1_of_the_paper(layers: int, alpha: float) -> None:
    rules = P.completep(BASE_WIDTH, BASE_LAYERS, alpha, wd_rule="width", output_rule="plain")
    m_d, m_l = 8.0, layers / BASE_LAYERS
    for role in (Role.HIDDEN, Role.OUTPUT):
        matrix = TensorTraits(role, m_d)
        assert rules.init_std(matrix, SIGMA, layers) ** 2 == pytest.approx(SIGMA**2 / m_d)
        assert rules.learning_rate(matrix, ETA, layers) == pytest.approx(ETA / m_d * m_l ** (alpha - 1))
        assert rules.weight_decay(matrix, LAMBDA) == LAMBDA * m_d
    for role in (Role.NORM, Role.BIAS):
        assert rules.learning_rate(TensorTraits(role, m_d), ETA, layers) == pytest.approx(ETA * m_l ** (alpha - 1))
    for role in (Role.HIDDEN, Role.OUTPUT, Role.NORM, Role.BIAS):
        assert rules.epsilon(TensorTraits(role, m_d), EPS, layers) == pytest.approx(EPS / m_d * m_l**-alpha)
    for role in (Role.EMBEDDING, Role.FINAL_NORM, Role.HEAD):
        outside = TensorTraits(role, m_d)
        assert (rules.learning_rate(outside, ETA, layers), rules.epsilon(outside, EPS, layers)) == (ETA, EPS)
    assert rules.residual_multiplier(layers) == pytest.approx(m_l**-alpha)
    assert rules.attention_multiplier(64) == 1 / 64


def test_eps_everywhere_equals_the_public_completep_code() -> None:
    rules = P.completep(BASE_WIDTH, BASE_LAYERS, eps_rule="everywhere")
    assert {rules.epsilon(TensorTraits(role, 8.0), 1e-12, 64) for role in Role} == {1e-12 / 8 / 32}


def test_mup_with_coupled_decay_and_fixed_eps_equals_the_public_mup_code() -> None:
    rules = P.mup(BASE_WIDTH, wd_rule="coupled")
    matrix = TensorTraits(Role.HIDDEN, 4.0)
    assert (rules.weight_decay(matrix, LAMBDA), rules.epsilon(matrix, EPS, 9)) == (LAMBDA, EPS)
    # The paper's table gives the same column lambda m_d and eps / m_d.
    table = P.mup(BASE_WIDTH, wd_rule="width", eps_rule="table")
    assert (table.weight_decay(matrix, LAMBDA), table.epsilon(matrix, EPS, 9)) == (LAMBDA * 4, EPS / 4)


def test_the_sp_column_shrinks_output_projections_by_the_root_of_twice_the_depth() -> None:
    # nanoGPT: 0.02 / sqrt(2 L) on both c_proj, one learning rate, one decay on 2-D tensors.
    rules, layers = P.sp(), 12
    assert rules.init_std(TensorTraits(Role.OUTPUT, 8.0, 0.25), 0.02, layers) == 0.02 / sqrt(24)
    assert rules.init_std(TensorTraits(Role.HIDDEN, 8.0, 0.25), 0.02, layers) == 0.02
    assert {rules.learning_rate(TensorTraits(role, 8.0), ETA, layers) for role in Role} == {ETA}
    assert rules.attention_multiplier(64) == 1 / 8
