"""The gradient noise scale against gradients whose noise scale is known."""

from __future__ import annotations

import math

import numpy as np
import pytest

import sparsetrain as st
from sparsetrain.errors import UserError

SIZE, BATCH, SIGMA = 40, 8, 0.7


def norms(steps: int, seed: int, signal: float = 0.15) -> tuple[np.ndarray, np.ndarray, float]:
    """Return the mean squared norms of single gradients and of their means, by step, and the true noise scale."""
    draw = np.random.default_rng(seed)
    gradient = np.full(SIZE, signal)
    examples = gradient + SIGMA * draw.standard_normal((steps, BATCH, SIZE))
    small = np.square(examples).sum(-1).mean(-1)
    big = np.square(examples.mean(1)).sum(-1)
    return small, big, SIZE * SIGMA**2 / float(gradient @ gradient)


def scale_of(small: np.ndarray, big: np.ndarray, decay: float) -> st.NoiseScale:
    scale = st.NoiseScale(decay)
    for one, other in zip(small, big, strict=True):
        scale.update(one, other, big=BATCH)
    return scale


def test_both_averages_are_unbiased() -> None:
    small, big, _ = norms(20_000, 0)
    scale = scale_of(small, big, 1.0)
    signal, noise = SIZE * 0.15**2, SIZE * SIGMA**2
    by_step = np.array([[scale_of(small[i : i + 1], big[i : i + 1], 0.9).signal for i in range(2000)]])
    assert abs(scale.signal - signal) < 2 * by_step.std() / math.sqrt(20_000)
    assert scale.noise == pytest.approx(noise, rel=0.01)


@pytest.mark.parametrize("decay", [1.0, 0.97])
def test_the_interval_covers_the_truth(decay: float) -> None:
    inside, values = 0, []
    for seed in range(500):
        small, big, truth = norms(60, seed)
        scale = scale_of(small, big, decay)
        low, high = scale.interval(0.95)
        assert low <= scale.value <= high
        inside += low <= truth <= high
        values.append(scale.value)
    assert 0.92 <= inside / 500 <= 0.98
    assert np.median(values) == pytest.approx(truth, rel=0.1)


def test_a_gradient_that_may_be_zero_has_no_upper_end() -> None:
    small, big, _ = norms(20, 3, signal=1e-6)
    low, high = scale_of(small, big, 1.0).interval()
    assert high == math.inf
    assert low > 1  # it is known that the noise scale is large


def test_without_noise_it_is_zero() -> None:
    scale = st.NoiseScale()
    for norm in (1.0, 2.0, 1.5):
        scale.update(norm, norm, big=4)
    assert scale.value == 0.0
    assert scale.interval() == (0.0, 0.0)


def test_larger_small_batches_estimate_the_same() -> None:
    draw = np.random.default_rng(1)
    scale, pairs = st.NoiseScale(1.0), st.NoiseScale(1.0)
    for _ in range(3000):
        examples = 0.3 + draw.standard_normal((8, 20))
        big = np.square(examples.mean(0)).sum()
        scale.update(np.square(examples).sum(1).mean(), big, big=8)
        pairs.update(np.square(examples.reshape(4, 2, 20).mean(1)).sum(1).mean(), big, small=2, big=8)
    assert pairs.value == pytest.approx(scale.value, rel=0.05) == pytest.approx(20 / (20 * 0.09), rel=0.05)


def test_it_goes_on_from_its_state() -> None:
    small, big, _ = norms(30, 5)
    whole, first, second = scale_of(small, big, 0.9), scale_of(small[:12], big[:12], 0.9), st.NoiseScale()
    second.load_state_dict(first.state_dict())
    for one, other in zip(small[12:], big[12:], strict=True):
        second.update(one, other, big=BATCH)
    assert (second.value, second.interval()) == (whole.value, whole.interval())
    with pytest.raises(UserError, match="no state of a noise scale: it has w"):
        second.load_state_dict({"w": 1.0})


def test_before_the_second_step_nothing_is_known() -> None:
    scale = st.NoiseScale()
    assert math.isnan(scale.value)
    assert scale.interval() == (0.0, math.inf)
    scale.update(2.0, 1.0, big=4)
    assert scale.interval() == (0.0, math.inf)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mean_squared_small": 1.0, "squared_big": 1.0}, "small=1, big=None: the big batch must have more examples"),
        ({"mean_squared_small": 1.0, "squared_big": 1.0, "big": 1}, "small=1, big=1"),
        ({"mean_squared_small": math.nan, "squared_big": 1.0, "big": 2}, "mean_squared_small=nan must be"),
        ({"mean_squared_small": 1.0, "squared_big": -1.0, "big": 2}, "squared_big=-1.0 must be"),
    ],
)
def test_bad_norms_are_refused(arguments: dict[str, float], message: str) -> None:
    with pytest.raises(UserError, match=message):
        st.NoiseScale().update(**arguments)  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"decay=1\.5"):
        st.NoiseScale(1.5)
    with pytest.raises(UserError, match="level=1"):
        st.NoiseScale().interval(1)
