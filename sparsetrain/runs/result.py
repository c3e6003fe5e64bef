"""``result.json``: the result of a run that completed or diverged.

Unknown keys are allowed, so that older versions can read results of newer ones.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, NotRequired, TypedDict

from sparsetrain.files import write_json
from sparsetrain.reading import read_json
from sparsetrain.runs.layout import RESULT
from sparsetrain.shapes import Count, Fraction, NonNegative

MAX_BYTES = 16 << 20


class Masks(TypedDict):
    """Masks at the end of a run; ``layers`` holds the metrics of each layer."""

    rule: NotRequired[str]
    layers: NotRequired[dict[str, dict[str, float | None]]]


class CorpusRead(TypedDict):
    """The scores of one of several corpora, and the tokens and passes that a run read of it."""

    val_loss: NotRequired[float | None]
    bits_per_byte: NotRequired[float | None]
    tokens: NotRequired[Count | None]
    epochs: NotRequired[NonNegative | None]


class NoiseScale(TypedDict):
    """The gradient noise scale in sequences, with its 95 % interval; null where noise hides the gradient."""

    value: float | None
    low: float | None
    high: float | None
    layers: NotRequired[dict[str, NoiseScale]]


class Result(TypedDict):
    """``result.json`` of a stage. Losses are in nats; a loss is null if the run diverged before it was measured."""

    stage: NotRequired[str]
    status: NotRequired[str]
    message: NotRequired[str | None]
    parameterization: NotRequired[str | None]
    sparsity: NotRequired[Fraction | None]
    density: NotRequired[Fraction | None]
    lr: NotRequired[float | None]
    seed: NotRequired[int | None]
    steps: NotRequired[Count | None]
    tokens: NotRequired[Count | None]
    seconds: NotRequired[NonNegative | None]
    loss_first: NotRequired[float | None]
    loss_last: NotRequired[float | None]
    bits_per_byte: NotRequired[float | None]
    corpora: NotRequired[dict[str, CorpusRead] | None]
    task: NotRequired[str | None]
    n_test: NotRequired[Count | None]
    accuracy: NotRequired[Fraction | None]
    ci95: NotRequired[list[float] | None]
    macro_f1: NotRequired[Fraction | None]
    majority: NotRequired[Fraction | None]
    flops: NotRequired[dict[str, float] | None]
    masks: NotRequired[Masks | None]
    noise_scale: NotRequired[NoiseScale | None]
    noise_scale_all: NotRequired[NoiseScale | None]


def load_result(path: Path) -> dict[str, Any]:
    """Return the content of a ``result.json``.

    Raises:
        UserError: there is no such file, or a field has the wrong type; the message names the file and the field.
    """
    result: dict[str, Any] = read_json(path, Result, max_bytes=MAX_BYTES)
    return result


@dataclass(frozen=True)
class RunResult:
    """The result of a stage: its directory and the content of its ``result.json``."""

    directory: Path
    values: dict[str, Any]

    @property
    def complete(self) -> bool:
        return self.values.get("status") == "complete"

    def __getitem__(self, key: str) -> Any:
        return self.values[key]


def finished(directory: Path) -> RunResult | None:
    """Return the result of a finished run, or None if the run is not finished."""
    path = directory / RESULT
    return RunResult(directory, load_result(path)) if path.exists() else None


def finish(directory: Path, values: dict[str, Any]) -> RunResult:
    """Write ``result.json``, which marks the run as done."""
    write_json(directory / RESULT, values)
    return RunResult(directory, values)
