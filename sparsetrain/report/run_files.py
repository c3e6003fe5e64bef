"""What the files of a run and of a bench hold, as far as this package shows it, and the check that they do.

Unknown keys are allowed everywhere, so that a newer run can be read by an older reader.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, NotRequired, TypedDict

from sparsetrain.errors import UserError
from sparsetrain.reading import read_json
from sparsetrain.shapes import Count, Fraction, Positive, Range

MAX_BYTES = 16 << 20
Seconds = Annotated[float, Range(1e-12, 1e9)]


class Masks(TypedDict):
    """Masks at the end of a run; ``layers`` has the numbers of each layer."""

    rule: NotRequired[str]
    layers: NotRequired[dict[str, dict[str, float | None]]]


class Result(TypedDict):
    """``result.json`` of a stage; losses in nats, null where a run diverged before there was one."""

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
    seconds: NotRequired[Annotated[float, Range(0)] | None]
    loss_first: NotRequired[float | None]
    loss_last: NotRequired[float | None]
    bits_per_byte: NotRequired[float | None]
    task: NotRequired[str | None]
    n_test: NotRequired[Count | None]
    accuracy: NotRequired[Fraction | None]
    ci95: NotRequired[list[float] | None]
    macro_f1: NotRequired[Fraction | None]
    majority: NotRequired[Fraction | None]
    flops: NotRequired[dict[str, float] | None]
    masks: NotRequired[Masks | None]


class Total(TypedDict):
    total: float


class SweptResult(TypedDict):
    """What a sweep needs of a run's result beside what every result holds."""

    flops: Total


class Scheme(TypedDict):
    scheme: str


class SweptConfig(TypedDict):
    """What a sweep needs of a run's configuration."""

    parameterization: Scheme
    model: NotRequired[dict[str, Any]]
    sparsity: NotRequired[dict[str, Any]]
    optimizer: NotRequired[dict[str, Any]]
    schedule: NotRequired[dict[str, Any]]


class SweepRow(TypedDict):
    """A row of a table; a diverged run has no loss."""

    parameterization: str
    sparsity: Fraction
    width: Positive
    depth: Positive
    lr: float
    seed: int
    steps: Count | None
    loss: Annotated[float, Range(-1e30, 1e30)] | None
    commit: str | None
    status: str
    tokens: Count | None
    seconds: float | None
    precision: str | None
    train_flops: float | None
    run: str


class Contender(TypedDict):
    """Times of a contender in a cell of a bench, an entry a round."""

    forward_seconds: list[Seconds]
    step_seconds: NotRequired[list[Seconds] | None]
    stored_weights: Count
    note: str
    state_bytes_per_weight: NotRequired[Annotated[float, Range(0)] | None]
    peak_activation_bytes: NotRequired[Count | None]


class Profile(TypedDict):
    """Where a dense step of the reference model spends its time."""

    linear_share: Fraction
    update_share: Fraction
    hidden_share: Fraction


class Cell(TypedDict):
    """Contenders that were timed in turns; sides are null for a whole model, sparsity for a dense one."""

    part: str
    threads: Positive
    tokens: Positive
    in_features: Positive | None
    out_features: Positive | None
    sparsity: Annotated[float, Range(0.0, 1.0 - 1e-6)] | None
    results: dict[str, Contender]
    profile: NotRequired[Profile]


class Machine(TypedDict):
    """What a bench was measured on."""

    processor: str
    family: str
    cores: Positive
    vector_flags: list[str]
    native_bf16: bool
    caches: dict[str, str]
    versions: dict[str, str]


class Bench(TypedDict):
    """``bench.json``."""

    format: int
    machine: Machine
    commit: str | None
    cells: dict[str, Cell]


def load_result(path: Path) -> dict[str, Any]:
    """Return the content of a ``result.json``.

    Raises:
        UserError: no such file, or one that holds something else; the message names the file and the field.
    """
    result: dict[str, Any] = read_json(path, Result, max_bytes=MAX_BYTES)
    return result


def check_times(cells: dict[str, Cell], dense: str) -> None:
    """Raise `UserError` unless each cell has a ``dense`` contender to compare with, and each contender a time.

    A cell without a sparsity is one of the reference model.
    """
    for name, cell in cells.items():
        if cell["sparsity"] is None and cell["part"] != "reference":
            raise UserError(f"cells[{name!r:.60}].sparsity is null in the part {cell['part']!r:.60}")
        results = cell["results"]
        if dense not in results:
            raise UserError(f"cells[{name!r:.60}].results has no {dense!r}, which the others are compared with")
        for contender, result in results.items():
            timed = result["forward_seconds"], result.get("step_seconds")
            if not timed[0] or (timed[1] and not results[dense].get("step_seconds")):
                raise UserError(f"cells[{name!r:.60}].results[{contender!r:.60}] has no times, or dense has none")
