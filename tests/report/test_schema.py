"""A report is accepted, or refused with the path of the wrong field."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparsetrain.errors import UserError
from sparsetrain.report.schema import load_report, validate_report

Change = Callable[[dict[str, Any]], object]


def put(*keys: str | int, to: object) -> Change:
    """Return a change that sets the entry at ``keys``."""

    def change(content: Any) -> None:
        for key in keys[:-1]:
            content = content[key]
        content[keys[-1]] = to

    return change


def drop(*keys: str | int) -> Change:
    """Return a change that removes the entry at ``keys``."""

    def change(content: Any) -> None:
        for key in keys[:-1]:
            content = content[key]
        del content[keys[-1]]

    return change


def test_complete_report_is_accepted_unchanged(content: dict[str, Any]) -> None:
    assert validate_report(content) is content


@pytest.mark.parametrize(
    "change",
    [
        put("scratch", to=None),
        put("majority", to=None),
        put("commit", to=None),
        put("arms", 0, "finetune", to=None),
        put("arms", 0, "pretrain", "loss_last", to=None),
        put("arms", 0, "pretrain", "loss_last", to=float("nan")),
        put("arms", 0, "curves", "pretrain", 3, "loss", to=float("inf")),
        put("arms", 0, "something_newer", to={"a": 1}),
        put("machine", to="one line"),
        drop("arms", 0, "prompt"),
        drop("arms", 0, "curves"),
        drop("arms", 0, "flops"),
        drop("limits"),
        drop("task"),
    ],
)
def test_what_may_be_absent_or_null_is_accepted(content: dict[str, Any], change: Change) -> None:
    change(content)
    validate_report(content)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        (drop("arms"), "arms is missing"),
        (put("arms", to=[]), "arms="),
        (put("arms", 1, to="s50"), "arms[1]="),
        (put("arms", 1, "name", to="dense"), "arms[1].name='dense' is the name of an earlier arm"),
        (put("arms", 1, "name", to="  "), "arms[1].name="),
        (put("arms", 1, "name", to=7), "arms[1].name=7 must be text"),
        (put("arms", 1, "sparsity", to=1.5), "arms[1].sparsity=1.5 must be a number of at most 1"),
        (put("arms", 1, "density", to=True), "arms[1].density=True must be a number"),
        (put("arms", 0, "train_flops", to=-1.0), "arms[0].train_flops=-1.0 must be a number of at least 0"),
        (put("arms", 0, "train_flops", to=float("inf")), "arms[0].train_flops=inf must be a finite number"),
        (put("arms", 0, "flops", "head", to=1.0), "arms[0].flops adds up to"),
        (put("arms", 0, "flops", "total", to=1.0), "arms[0].flops adds up to"),
        (put("arms", 0, "flops", "head", to="much"), "arms[0].flops.head='much'"),
        (drop("arms", 0, "pretrain"), "arms[0].pretrain is missing"),
        (drop("arms", 0, "pretrain", "loss_last"), "arms[0].pretrain.loss_last is missing"),
        (put("arms", 0, "pretrain", "tokens", to=1.5), "arms[0].pretrain.tokens=1.5 must be a whole number"),
        (put("arms", 0, "pretrain", "bits_per_byte", to=-0.1), "arms[0].pretrain.bits_per_byte=-0.1"),
        (
            put("arms", 2, "finetune", "accuracy", to=72.0),
            "arms[2].finetune.accuracy=72.0 must be a number",
        ),
        (put("arms", 2, "finetune", "ci95", to=[0.1]), "arms[2].finetune.ci95=[0.1] must be a list of length"),
        (put("arms", 2, "finetune", "ci95", to=[0.1, "x"]), "arms[2].finetune.ci95[1]='x'"),
        (put("arms", 2, "finetune", "ci95", to=[0.9, 0.95]), "arms[2].finetune.ci95=[0.9, 0.95] does not hold"),
        (drop("arms", 2, "prompt", "n_test"), "arms[2].prompt.n_test is missing"),
        (put("arms", 2, "prompt", to=0.7), "arms[2].prompt=0.7 must be a mapping or null"),
        (put("arms", 2, "bytes", "index", to=-4), "arms[2].bytes.index=-4"),
        (put("arms", 2, "curves", "pretrain", to=3), "arms[2].curves.pretrain=3 must be a list"),
        (drop("arms", 2, "curves", "pretrain", 5, "tokens"), "arms[2].curves.pretrain[5].tokens is missing"),
        (put("arms", 2, "curves", "pretrain", 5, "loss", to="low"), "arms[2].curves.pretrain[5].loss='low'"),
        (put("scratch", to={"accuracy": 0.5}), "scratch.ci95 is missing"),
        (drop("scratch"), "scratch is missing"),
        (put("majority", to=35.5), "majority=35.5"),
        (put("seconds", to=None), "seconds=None"),
        (put("peak_rss_bytes", to="2 GiB"), "peak_rss_bytes='2 GiB'"),
        (put("commit", to=5), "commit=5 must be text or null"),
        (put("overlap_train_test", to=-1), "overlap_train_test=-1"),
        (put("limits", to="one"), "limits='one' must be a list"),
        (put("data", to=[]), "data=[] must be a mapping"),
    ],
)
def test_refusal_names_the_field(content: dict[str, Any], change: Change, field: str) -> None:
    change(content)
    with pytest.raises(UserError) as caught:
        validate_report(content)
    assert str(caught.value).startswith(f"report: {field}")
    assert "\n" not in str(caught.value)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@given(data=st.data())
def test_any_other_json_is_accepted_or_refused_in_one_line(report_json: str, data: st.DataObject) -> None:
    content = json.loads(report_json)
    target, key = content, data.draw(st.sampled_from(sorted(content)))
    while isinstance(target[key], dict | list) and target[key] and data.draw(st.booleans()):
        target = target[key]
        key = data.draw(st.sampled_from(sorted(target) if isinstance(target, dict) else range(len(target))))
    target[key] = data.draw(JSON)
    message = ""
    try:
        validate_report(content)
    except UserError as error:
        message = str(error)
    assert "\n" not in message


def test_file_is_read_back_as_written(content: dict[str, Any], report_json: str, tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    path.write_text(report_json)
    assert load_report(path) == content


@pytest.mark.parametrize("text", ["", "{", "[1, 2]", '{"arms": []}', "\x00"])
def test_broken_file_is_named(text: str, tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    path.write_text(text)
    with pytest.raises(UserError, match=r"report\.json"):
        load_report(path)


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cannot read .*report\.json: No such file"):
        load_report(tmp_path / "report.json")
