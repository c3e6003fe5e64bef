"""Directories of an earlier format, read with the names and defaults of today."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest

from sparsetrain.runs.identity import differences
from sparsetrain.runs.recorded import FORMAT, Recorded, modernise, renamed
from sparsetrain.stages import PretrainConfig
from sparsetrain.stages.config import RunConfig


@dataclass
class Length:
    steps: int | None = None
    tokens: int | None = None
    epochs: float | None = 3.0
    flops: float | None = None
    batch_size: int = 32


@dataclass
class Loop:
    accumulation: int = 1


@dataclass
class Curve:
    name: str = "cosine"


@dataclass
class Tuning:
    budget: Length = field(default_factory=Length)
    loop: Loop = field(default_factory=Loop)
    schedule: Curve = field(default_factory=Curve)


@dataclass
class Inner:
    rate: float = 0.5
    late: str = "as ever"


@dataclass
class Outer:
    inner: Inner = field(default_factory=Inner)
    late: int = 7


LENGTHS = ("steps", "tokens", "flops", "epochs")


@pytest.mark.parametrize("given_", [(9, None, None, 2.0), (None, 99, 1e9, 2.0), (None, None, 1e9, 2.0), (None,) * 4])
def test_old_keys_become_todays_and_only_the_length_that_counted_stays(given_: tuple[float | None, ...]) -> None:
    steps, tokens, flops, epochs = given_
    old = {
        "schedule": {"name": "linear_10x", "steps": steps, "tokens": tokens},
        "stage": {"batch_size": 8, "accumulation": 2, "epochs": epochs, "flops": flops},
    }
    counted = next((name for name, value in zip(LENGTHS, given_, strict=True) if value is not None), None)
    length = {name: value if name == counted else None for name, value in zip(LENGTHS, given_, strict=True)}
    new = {"schedule": {"name": "linear_10x"}, "loop": {"accumulation": 2}, "budget": {"batch_size": 8, **length}}
    assert modernise(old, Tuning) == new
    assert modernise(new, Tuning) == new
    assert modernise(new, Tuning, FORMAT) == new


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("schedule.steps", "budget.steps"),
        ("stage.epochs", "budget.epochs"),
        ("stage.batch_size", "budget.batch_size"),
        ("stage.accumulation", "loop.accumulation"),
        ("pipeline.finetune.stage.flops", "pipeline.finetune.budget.flops"),
        ("schedule.name", "schedule.name"),
        ("model.d_model", "model.d_model"),
        ("stage", "stage"),
    ],
)
def test_columns_of_older_tables_have_todays_names(old: str, new: str) -> None:
    assert renamed(old, Tuning) == new
    if "budget" not in RunConfig.__dataclass_fields__:
        assert renamed(old, PretrainConfig) == old


def test_defaults_of_an_older_format_and_settings_that_are_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sparsetrain.runs.recorded.DEFAULTS_OF_FORMAT", {1: {"inner.late": "before", "late": 1}})
    monkeypatch.setattr("sparsetrain.runs.recorded.REMOVED", {"inner.gone": 0, "old": None})
    old = {"inner": {"rate": 1.0, "gone": 0}, "late": 2, "old": 5}
    values = modernise(old, Outer)
    assert values == {"inner": {"rate": 1.0, "late": "before"}, "late": 2, "old": 5}
    assert modernise({"inner": {"rate": 1.0}}, Outer, FORMAT) == {"inner": {"rate": 1.0}}
    there = Recorded("pretrain", Outer, values, {})
    ours = Recorded("pretrain", Outer, {"inner": {"rate": 1.0}, "late": 2}, {})
    assert differences(ours, there) == ["inner.late=as ever (there: before)", "old=None (there: 5)"]
