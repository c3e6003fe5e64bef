"""A calibration that takes a second: small grids, few steps, and a cache of its own for the file."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

import pytest

from sparsetrain.bench import calibrate as calibration
from sparsetrain.bench import calibration_cells, validate
from sparsetrain.bench.steps import StepCase
from sparsetrain.models import ModelConfig

SMALL = {
    "WIDTHS": (32, 64),
    "TOKENS": (32, 64),
    "DENSITIES": (0.5, 0.25),
    "CONTEXTS": (32, 64),
    "HEAD_WIDTHS": (16,),
    "ELEMENTS": (1 << 12, 1 << 13),
    "VOCABULARIES": (64, 128),
    "HEAD_INPUTS": (32, 64),
    "PARAMETERS": (1 << 10, 1 << 12),
}


def small_cases() -> Iterator[StepCase]:
    for number in itertools.count():
        model = ModelConfig(d_model=32, n_layers=1 + number % 2, n_heads=2, vocab_size=64, max_context=32, seed=0)
        yield StepCase(model, 0.5 * (number % 2), "csr" if number % 2 else "auto", 32, 1 + number % 3)


def make_small(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Make calibrations small until the end of a test."""
    for name, value in SMALL.items():
        monkeypatch.setattr(calibration_cells, name, value)
    monkeypatch.setattr(calibration, "LEAST_SECONDS", 0.0)
    monkeypatch.setattr(calibration, "_ROUNDS", 1)
    monkeypatch.setattr(calibration, "_LEAST_CALL", 0.0)
    monkeypatch.setattr(calibration, "_LEAST_STEPS", 3)
    monkeypatch.setattr(calibration, "step_cases", small_cases)
    monkeypatch.setattr(validate, "held_out", small_cases)
    monkeypatch.setattr("sparsetrain.bench.steps._LEAST_SECONDS", 0.0)
    # Not the whole cache, which has the compiled kernels.
    monkeypatch.setattr("sparsetrain.cost.hardware.cache_directory", lambda: tmp_path / "cache")
