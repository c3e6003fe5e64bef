"""Every kind of training against the losses and masks on file: see ``record.py``, which makes them."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import record

GOLDEN = json.loads(Path(__file__).with_name("golden.json").read_text())


def apart(ours: Any, theirs: Any, path: str = "") -> list[str]:
    """Return where numbers differ by more than other processors make them: 1e-4 of a loss, one example of a score."""
    if isinstance(theirs, dict):
        if ours.keys() != theirs.keys():
            return [f"{path}: {sorted(ours)} instead of {sorted(theirs)}"]
        return [line for key in theirs for line in apart(ours[key], theirs[key], f"{path} {key}")]
    if not isinstance(theirs, str):
        return [] if ours == theirs else [f"{path}: {ours} instead of {theirs}"]
    found, expected = float.fromhex(ours), float.fromhex(theirs)
    example = 0.3 if "val_" in path else 0.05
    limit = example if "accuracy" in path or "f1" in path else 1e-4 * abs(expected)
    return [] if math.isclose(found, expected, rel_tol=0.0, abs_tol=limit) else [f"{path}: {found} not {expected}"]


@pytest.mark.parametrize("root", record.ROOTS)
def test_losses_and_masks_are_those_on_file(root: str, tmp_path: Path) -> None:
    found = record.train(record.chain(root), tmp_path)
    same_host = record.host() == GOLDEN["host"]
    for name, ours in found.items():
        theirs = GOLDEN["runs"][name]
        exact = {"masks", "weights"}
        assert apart(*({k: v for k, v in run.items() if k not in exact} for run in (ours, theirs)), name) == []
        if same_host or name not in record.RANKED:
            assert ours["masks"] == theirs["masks"], name


def test_the_comparison_sees_what_it_should() -> None:
    one = {"loss": {"1": (5.0).hex()}, "result": {"accuracy": (0.5).hex()}, "flops": 10}
    assert apart(one, one) == []
    assert apart({**one, "loss": {"1": (5.0004).hex()}}, one) == []
    assert apart({**one, "loss": {"1": (5.0006).hex()}}, one) == [" loss 1: 5.0006 not 5.0"]
    assert apart({**one, "loss": {}}, one) == [" loss: [] instead of ['1']"]
    assert apart({**one, "result": {"accuracy": (0.6).hex()}}, one) == [" result accuracy: 0.6 not 0.5"]
    assert apart({**one, "flops": 11}, one) == [" flops: 11 instead of 10"]
    assert set(GOLDEN["runs"]) == set(record.RUNS)
