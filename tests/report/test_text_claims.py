"""The claims that tables of text stages support, against SciPy's paired tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import scipy.stats
from tests.helpers.claims import unsupported
from tests.helpers.text_claims import claims_of_text
from tests.helpers.text_tables import position_rows, probe_rows, text_rows, write_tables


def test_claims_of_text_are_those_of_paired_tests(tmp_path: Path) -> None:
    """Beside SciPy's intervals, those that the same numbers give unpaired, or of other pairs, are no claims."""
    write_tables(tmp_path)
    found = claims_of_text(tmp_path)

    def seeds(rows: list[dict[str, Any]], key: str, **wanted: Any) -> list[float]:
        return [row[key] for row in rows if all(row[name] == value for name, value in wanted.items())]

    def interval(values: list[float], factor: float = 1.0) -> str:
        low, high = scipy.stats.t.interval(0.95, len(values) - 1, np.mean(values), scipy.stats.sem(values))
        return f"{factor * np.mean(values):+.4f} [{factor * low:.4f}, {factor * high:.4f}]"

    def percent(one: list[float], other: list[float]) -> str:
        low, high = scipy.stats.ttest_rel(np.log(one), np.log(other)).confidence_interval(0.95)
        middle, low, high = (100 * np.expm1(end) for end in (np.mean(np.log(one) - np.log(other)), low, high))
        return f"{middle:+.3f} % [{low:.3f}, {high:.3f}]"

    def points(one: list[float], other: list[float]) -> str:
        return interval([a - b for a, b in zip(one, other, strict=True)], 100.0).replace(" [", " points [")

    code = {
        arm: seeds(text_rows(), "bits_per_byte_code", arm=arm, stage="evaluate")
        for arm in ("dense_two_phase", "dense_prose", "sparse-0.75_two_phase", "sparse-0.75_prose")
    }
    two_phase, prose, sparse_two_phase, sparse_prose = code.values()
    here: dict[str, Any] = {"arm": "dense_prose", "scale": 1, "length": 512}
    at = {
        name: seeds(position_rows(), "loss", **(here | other))
        for name, other in {"": {}, "2": {"scale": 2}, "64": {"length": 64}, "both": {"scale": 2, "length": 64}}.items()
    }
    right = [seeds(probe_rows(), "accuracy", arm=arm, size=256) for arm in ("dense_two_phase", "dense_prose")]
    supported = [interval(prose), percent(prose, two_phase), percent(sparse_prose, prose)]
    supported += [interval(at[""]), percent(at[""], at["2"]), percent(at["64"], at[""]), points(*right)]
    assert unsupported(", ".join(supported), found) == []
    other = [percent(sparse_two_phase, prose), percent(at[""], at["both"]), points(right[0][::-1], right[1])]
    assert unsupported(", ".join(other), found) == other
