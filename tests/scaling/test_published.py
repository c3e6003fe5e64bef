"""Published laws against the figures that their paper and its users report."""

from __future__ import annotations

import math

import numpy as np
import pytest

import sparsetrain as st
from sparsetrain.errors import UserError
from sparsetrain.scaling.loss_law import losses
from sparsetrain.scaling.published import chinchilla


def test_the_best_timescale_is_the_published_one() -> None:
    for ratio, tau in ((20, 0.224), (80, 0.108), (200, 0.066), (320, 0.052), (1280, 0.025)):
        assert round(st.tau_opt(ratio), 3) == tau
    assert st.tau_opt.range == (20, 1280)
    assert st.tau_opt(241) == pytest.approx(0.060, abs=5e-4)  # BTLM's tokens per parameter
    assert "2505.13738" in st.tau_opt.source


def test_the_best_batch_is_the_published_one_in_tokens() -> None:
    assert round(st.batch_opt(12.1e9) / 2048) == 223


def test_weight_decay_follows_from_the_best_timescale() -> None:
    """Linear in the batch at a fixed number of tokens: half the steps need twice the weight decay."""
    tokens, lr = 12.1e9, 0.016
    decays = [st.weight_decay_for(st.tau_opt(20), lr, round(tokens / batch)) for batch in (2**19, 2**20)]
    assert decays[1] / decays[0] == pytest.approx(2.0, rel=1e-3)


@pytest.mark.parametrize("x", [0, -1, math.nan, math.inf])
def test_what_no_law_takes_is_refused(x: float) -> None:
    with pytest.raises(UserError, match=r"tokens_per_parameter=.* must be above 0 and finite"):
        st.tau_opt(x)


def test_the_loss_of_chinchilla_is_the_replicated_one() -> None:
    """At 5.76e23 FLOPs the refit has its optimum near 20 tokens per parameter, as arXiv 2404.10102 says."""
    parameters = np.geomspace(1e9, 1e12, 4000)
    found = losses(chinchilla, parameters, 5.76e23 / (6.0 * parameters))
    best = parameters[np.argmin(found)]
    assert 15.0 < 5.76e23 / (6.0 * best**2) < 30.0
    assert found[0] == pytest.approx(chinchilla(parameters[0], 5.76e23 / (6.0 * parameters[0])), rel=1e-12)
    assert chinchilla.sparsity == 0.0
