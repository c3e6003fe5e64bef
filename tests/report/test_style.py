"""The colours of page and figures, by the formulas of WCAG 2 and of Machado et al. (2009)."""

from __future__ import annotations

import re
from itertools import combinations

import matplotlib as mpl
import numpy as np
import pytest
from matplotlib import style

from sparsetrain.report.html import THEMED
from sparsetrain.report.plots import SERIES
from sparsetrain.report.registry import TEMPLATES

PARTS = (TEMPLATES / "page.css").read_text("utf-8").split("@media")
LIGHT, DARK = (dict(re.findall(r"--([a-z0-9-]+): (#[0-9a-f]{6})", part)) for part in PARTS[:2])

SIMULATED = {
    "normal": [[1, 0, 0], [0, 1, 0], [0, 0, 1]],
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "tritanopia": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
}
"""Linear sRGB as seen with each deficiency at full severity."""

TO_XYZ = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])


def linear(colour: str) -> np.ndarray:
    parts = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    return np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4)


def contrast(first: str, second: str) -> float:
    bright, dim = sorted(((TO_XYZ @ linear(colour))[1] for colour in (first, second)), reverse=True)
    return float((bright + 0.05) / (dim + 0.05))


def lab(rgb: np.ndarray) -> np.ndarray:
    x, y, z = (
        np.cbrt(v) if v > 0.008856 else 7.787 * v + 16 / 116
        for v in TO_XYZ @ rgb.clip(0, 1) / np.array([0.9505, 1.0, 1.089])
    )
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


@pytest.mark.parametrize("theme", [LIGHT, DARK], ids=["light", "dark"])
@pytest.mark.parametrize("ground", ["page", "card"])
def test_contrast_meets_wcag(theme: dict[str, str], ground: str) -> None:
    assert contrast(theme["ink"], theme[ground]) >= 7
    assert contrast(theme["ink"], theme["caution"]) >= 7
    assert contrast(theme["muted"], theme[ground]) >= 4.5
    assert all(contrast(theme[f"series-{i}"], theme[ground]) >= 3 for i in range(6))


@pytest.mark.parametrize("theme", [LIGHT, DARK], ids=["light", "dark"])
@pytest.mark.parametrize("vision", SIMULATED)
def test_series_stay_apart_in_every_vision(theme: dict[str, str], vision: str) -> None:
    seen = [lab(np.array(SIMULATED[vision]) @ linear(theme[f"series-{i}"])) for i in range(6)]
    assert min(np.linalg.norm(first - second) for first, second in combinations(seen, 2)) > 12


def test_figures_are_drawn_in_the_light_theme() -> None:
    assert {name: LIGHT[name] for name in THEMED} == THEMED


def test_other_figures_can_be_drawn_in_the_style_of_a_report() -> None:
    with style.context("sparsetrain.report.sparsetrain"):
        assert mpl.rcParams["text.color"] == THEMED["ink"]
        assert [entry["color"] for entry in mpl.rcParams["axes.prop_cycle"]] == list(SERIES)
