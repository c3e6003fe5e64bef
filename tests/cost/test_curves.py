"""Units of machine files, and efficiency curves against SciPy's interpolation."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.interpolate import RegularGridInterpolator

from sparsetrain.cost import units
from sparsetrain.cost.curves import Curve
from sparsetrain.errors import UserError

AXES = {"width": (64.0, 256.0, 1024.0), "tokens": (32.0, 512.0), "density": (0.05, 0.25, 1.0)}
VALUES = np.random.default_rng(0).uniform(0.05, 0.9, (3, 2, 3))


@pytest.mark.parametrize(
    ("text", "unit", "value"),
    [
        ("3.35 TB/s", units.BANDWIDTH, 3.35e12),
        ("400 Gbit/s", units.BANDWIDTH, 5e10),
        ("80 GiB", units.SIZE, 80 * 2**30),
        ("1e3 GFLOP/s", units.FLOP_RATE, 1e12),
        ("5us", units.TIME, 5e-6),
        ("0.7 kW", units.POWER, 700.0),
        ("0 USD/h", units.PRICE, 0.0),
    ],
)
def test_quantities_in_base_units(text: str, unit: str, value: float) -> None:
    assert units.parse(text, unit, "x") == pytest.approx(value, rel=1e-12)


@pytest.mark.parametrize(
    ("text", "unit", "message"),
    [
        ("80 GX", units.SIZE, "x='80 GX' has the unknown unit 'GX': give a number and one of B, kB"),
        ("-2 USD/h", units.PRICE, "x='-2 USD/h' is not a positive quantity"),
        ("nan B", units.SIZE, "x='nan B' is not a positive quantity"),
        ("0 B", units.SIZE, "must be a finite number above 0"),
        ("1e999 B", units.SIZE, "must be a finite number above 0"),
        ("1.2.3 B", units.SIZE, "is not a positive quantity"),
    ],
)
def test_what_is_no_quantity_is_one_line(text: str, unit: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as raised:
        units.parse(text, unit, "x")
    assert "\n" not in str(raised.value)


@given(st.floats(1.0, 1e5), st.floats(1.0, 1e5), st.floats(1e-3, 1.0))
def test_a_curve_interpolates_logarithms_as_scipy_does(width: float, tokens: float, density: float) -> None:
    curve = Curve(AXES, VALUES)
    places = [np.log(axis) for axis in AXES.values()]
    oracle = RegularGridInterpolator(places, np.log(VALUES))
    inside = [
        np.clip(np.log(value), axis[0], axis[-1]) for value, axis in zip((width, tokens, density), places, strict=True)
    ]
    expected = np.exp(oracle([inside])[0])
    got = curve.at({"width": width, "tokens": tokens, "density": density, "unused": 1.0})
    assert float(got) == pytest.approx(float(expected), rel=1e-9)


def test_arrays_of_places_broadcast() -> None:
    curve = Curve(AXES, VALUES)
    widths = np.geomspace(10.0, 5000.0, 7)
    got = curve.at({"width": widths, "tokens": 100.0, "density": 0.3})
    assert got == pytest.approx([float(curve.at({"width": w, "tokens": 100.0, "density": 0.3})) for w in widths])


@pytest.mark.parametrize(
    ("axes", "values", "message"),
    [
        ({"width": (1.0, 2.0)}, np.ones(3), r"a curve over width has values of the shape \[3\] instead of \[2\]"),
        ({"width": (2.0, 1.0)}, np.ones(2), "the places of width in a curve do not increase"),
        ({"width": (1.0, 2.0)}, np.array([1.0, -1.0]), "an efficiency must be a finite number above 0"),
        ({"width": (1.0, 2.0)}, np.array([1.0, np.nan]), "an efficiency must be a finite number above 0"),
    ],
)
def test_a_broken_curve_is_refused(axes: dict[str, tuple[float, ...]], values: np.ndarray, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Curve(axes, values)


def test_a_curve_asked_without_a_size_says_which() -> None:
    with pytest.raises(UserError, match="was asked without density"):
        Curve(AXES, VALUES).at({"width": 1.0, "tokens": 1.0})
