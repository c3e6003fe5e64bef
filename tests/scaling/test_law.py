"""Laws: files that come back the same, ranges, intervals against finite differences, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

import sparsetrain as st
from sparsetrain.errors import UserError
from sparsetrain.scaling.critical import fit_critical_batch
from sparsetrain.scaling.law import Law
from sparsetrain.scaling.loss_law import fit_loss_law

X = np.array([2.0, 5.0, 10.0, 20.0])


def noisy(seed: int = 0) -> Law:
    rng = np.random.default_rng(seed)
    return st.fit_power_law(X, 2.0 * X**-0.5 * np.exp(rng.normal(0.0, 0.1, 4)))


def all_forms() -> list[tuple[Law, tuple[float, ...]]]:
    n, d = (grid.ravel() for grid in np.meshgrid([1e5, 2e5, 4e5], [1e6, 3e6, 9e6]))
    losses = 1.5 + 300.0 / n**0.4 + 500.0 / d**0.4
    losses *= np.exp(np.random.default_rng(0).normal(0.0, 1e-3, 9))
    batches = np.array([1e3, 4e3, 1.6e4, 6.4e4])
    tokens = 1e6 * (1 + batches / 1e4) * np.array([1.01, 0.99, 1.02, 0.98])
    return [
        (noisy(), (40.0,)),
        (fit_loss_law(n, d, losses, samples=20), (3e5, 2e6)),
        (fit_critical_batch(batches, tokens), (2e3,)),
    ]


def test_a_law_comes_back_from_its_file(tmp_path: Path) -> None:
    for law, x in [*all_forms(), (st.tau_opt, (80.0,))]:
        path = tmp_path / "law.yaml"
        law.save(path)
        back = st.Law.load(path)
        assert type(back) is type(law)
        assert (back(*x), back.ranges, back.source, back.kind) == (law(*x), law.ranges, law.source, law.kind)
        assert back.predict_interval(*x) == law.predict_interval(*x)
        for name in law.PARAMETERS:
            assert back.interval(0.8, name) == law.interval(0.8, name)


def test_intervals_of_predictions_follow_from_the_covariance_by_finite_differences() -> None:
    for law, x in all_forms():
        vector, steps = law._vector(), 1e-6
        gradient = []
        for place in range(len(vector)):
            step = np.zeros(len(vector))
            step[place] = steps * max(1.0, abs(vector[place]))
            up, down = (np.log(law._value(vector + sign * step, *x)) for sign in (1, -1))
            gradient.append((up - down) / (2 * step[place]))
        spread = np.sqrt(np.array(gradient) @ np.array(law.covariance) @ np.array(gradient))
        low, high = law.predict_interval(*x)
        quantile = law._quantile(0.95)
        assert np.log(high / low) == pytest.approx(2 * quantile * spread, rel=1e-4)
        assert low < law(*x) < high


def test_a_published_law_has_the_interval_that_its_paper_reports() -> None:
    assert st.tau_opt.interval(0.8) == (-0.529, -0.507)
    assert st.tau_opt.interval(0.95) is None
    assert st.tau_opt.predict_interval(40.0) is None


def test_a_law_knows_where_it_was_fitted() -> None:
    assert [st.tau_opt.inside(x) for x in (19.9, 20, 1280, 1281)] == [False, True, True, False]
    assert st.batch_opt.inside(1e9) is None
    assert st.tau_opt(2.0) > st.tau_opt(20.0)  # outside it extrapolates


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": 2}, "format=2 must be"),
        ({"form": "line"}, "form='line' must be one of power, loss, hyperbola"),
        ({"kind": "best"}, "kind='best' must be"),
        ({"parameters": {"coefficient": 1.0}}, "parameters must be coefficient, exponent"),
        ({"parameters": {"coefficient": -1.0, "exponent": 1.0}}, "parameters.coefficient=-1.0 must be above 0"),
        ({"parameters": {"coefficient": "x", "exponent": 1.0}}, "parameters.coefficient='x' must be a number"),
        ({"covariance": [[1.0]]}, "covariance must have 2 rows of 2 numbers"),
        ({"covariance": [[1.0, 0.0], [0.0, -1.0]]}, "no variance in it may be negative"),
        ({"freedom": None}, "freedom is null"),
        ({"ranges": [[2.0, 1.0]]}, "must each begin with the smaller number"),
        ({"inputs": []}, "has 1 inputs, each with a range"),
        ({"sparsity": 2.0}, "sparsity=2.0 must be"),
        ({"source": None}, "source=None must be text"),
    ],
)
def test_a_file_that_holds_no_law_is_named(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = tmp_path / "law.yaml"
    noisy().save(path)
    path.write_text(yaml.safe_dump({**yaml.safe_load(path.read_text()), **changes}))
    with pytest.raises(UserError) as raised:
        st.Law.load(path)
    assert message in str(raised.value)
    assert str(path) in str(raised.value)
    assert "\n" not in str(raised.value)


def test_what_no_law_takes_is_refused() -> None:
    law = noisy()
    for call, message in (
        (lambda: law.interval(1.0), "level=1.0 must lie in"),
        (lambda: law.interval(of="slope"), "of='slope' is not one of coefficient, exponent"),
        (lambda: law.inside(-1.0), "x=-1.0 must be above 0"),
        (lambda: law(1.0, 2.0), "the law takes x; 2 numbers were given"),
    ):
        with pytest.raises(UserError, match=message):
            call()
