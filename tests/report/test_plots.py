"""Figures have the same bytes every time, show all data, and accept any name."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import matplotlib as mpl
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from sparsetrain.report import plots
from sparsetrain.report.plots import accuracy, bits_per_byte, loss_curves, moving_average, pictures, stacked, thin
from sparsetrain.report.schema import load_report, validate_report


def paths_in(svg: bytes) -> int:
    return sum(1 for node in ElementTree.fromstring(svg).iter() if node.tag.endswith("}path"))


def test_all_figures_are_drawn_in_reading_order(content: dict[str, Any]) -> None:
    found = pictures(validate_report(content))
    assert [p.name for p in found] == ["loss-pretrain", "bits-per-byte", "accuracy", "loss-finetune", "flops", "bytes"]
    for picture in found:
        assert paths_in(picture.svg) > 20
        assert len(picture.svg) < 300_000
        for arm in content["arms"]:
            assert arm["name"] in picture.alt


def test_same_report_gives_same_bytes_under_any_user_settings(content: dict[str, Any]) -> None:
    report = validate_report(content)
    first = pictures(report)
    with mpl.rc_context({"font.size": 30, "axes.grid": True, "svg.hashsalt": "other", "svg.fonttype": "none"}):
        before = mpl.rcParams["font.size"]
        second = pictures(report)
        assert mpl.rcParams["font.size"] == before
    assert first == second


def test_another_process_gives_the_same_bytes_without_pyplot(report_json: str, tmp_path: Path) -> None:
    source = tmp_path / "report.json"
    source.write_text(report_json)
    program = (
        "import sys, hashlib, pathlib; from sparsetrain.report.schema import load_report;"
        "from sparsetrain.report.plots import pictures;"
        "report = load_report(pathlib.Path(sys.argv[1]));"
        "print(hashlib.sha256(b''.join(p.svg for p in pictures(report))).hexdigest());"
        "print('matplotlib.pyplot' in sys.modules)"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "1"}
    command = [sys.executable, "-c", program, str(source)]
    shown = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    here = hashlib.sha256(b"".join(picture.svg for picture in pictures(load_report(source)))).hexdigest()
    assert shown.split() == [here, "False"]


def test_no_date_and_no_address_but_namespaces(content: dict[str, Any]) -> None:
    for picture in pictures(validate_report(content)):
        root = ElementTree.fromstring(picture.svg)
        assert not [node for node in root.iter() if node.tag.endswith("date")]
        references = [value for node in root.iter() for key, value in node.attrib.items() if key.endswith("href")]
        assert all(value.startswith("#") for value in references)


def test_figures_without_data_are_left_out(content: dict[str, Any]) -> None:
    for arm in content["arms"]:
        for key in ("curves", "finetune", "prompt", "bytes"):
            del arm[key]
    assert [picture.name for picture in pictures(validate_report(content))] == ["flops"]


def test_diverged_curve_is_drawn_up_to_where_it_diverged(content: dict[str, Any]) -> None:
    for arm in content["arms"]:
        for point in arm["curves"]["pretrain"][200:]:
            point["loss"] = float("nan")
    picture = loss_curves(validate_report(content), "pretrain")
    assert picture is not None
    for arm in content["arms"]:
        for point in arm["curves"]["pretrain"]:
            point["loss"] = float("nan")
            point["bits_per_byte"] = float("inf")
    report = validate_report(content)
    assert loss_curves(report, "pretrain") is None
    assert bits_per_byte(report) is None


@pytest.mark.parametrize("count", [1, 2, 9])
def test_any_number_of_arms_and_points(content: dict[str, Any], count: int) -> None:
    arm = content["arms"][0]
    arm["curves"] = {"pretrain": arm["curves"]["pretrain"][:1]}
    content["arms"] = [{**arm, "name": f"arm {i}"} for i in range(count)]
    report = validate_report(content)
    assert loss_curves(report, "pretrain") is not None
    assert accuracy(report) is not None
    assert stacked(report, "bytes") is not None


def test_arms_never_share_both_colour_and_marker() -> None:
    assert len({plots._look(index) for index in range(36)}) == 36


@settings(max_examples=5)
@given(name=st.text(min_size=1, max_size=60))
def test_any_name_can_be_drawn(report_json: str, name: str) -> None:
    content = json.loads(report_json)
    arm = content["arms"][0]
    arm["name"] = f"_${name}$"
    content["arms"] = [arm]
    arm["flops"] = {f"_{name}": arm["train_flops"]}
    arm["curves"]["pretrain"] = arm["curves"]["pretrain"][::100]
    for picture in pictures(validate_report(content)):
        ElementTree.fromstring(picture.svg)


@given(arrays(np.float64, st.integers(0, 200), elements=st.floats(-100, 100)))
def test_moving_average_matches_the_naive_one(values: np.ndarray) -> None:
    window = max(1, values.size // 20)
    naive = [values[max(0, i + 1 - window) : i + 1].mean() for i in range(values.size)]
    np.testing.assert_allclose(moving_average(values), naive, atol=1e-9)


@given(arrays(np.float64, st.integers(1, 3000), elements=st.floats(-100, 100)), st.integers(4, 400))
def test_thinned_curve_keeps_ends_extremes_and_order(values: np.ndarray, limit: int) -> None:
    x, y = thin(np.arange(values.size, dtype=float), values, limit)
    assert x.size <= limit + 2
    assert (y.min(), y.max()) == (values.min(), values.max())
    assert (x[0], x[-1]) == (0, values.size - 1)
    assert np.all(np.diff(x) > 0)
    np.testing.assert_array_equal(values[x.astype(int)], y)
