"""The fields that tables read from the files of runs, the content of a ``bench.json``, and their checks.

Unknown keys are allowed everywhere, so that a newer run can be read by an older reader.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, NotRequired, TypedDict

from msgspec import Meta

from sparsetrain.errors import UserError
from sparsetrain.reading import read_csv
from sparsetrain.report.contenders import DECODING
from sparsetrain.shapes import Count, Fraction, NonNegative, Positive

# The first columns of every table of an experiment; a row is a run.
COLUMNS = ("parameterization", "sparsity", "width", "depth", "lr", "seed", "steps", "loss", "commit")
FORMER_COLUMNS = {"train_flops": "flops"}  # older names of columns

Seconds = Annotated[float, Meta(ge=1e-12, le=1e9)]
Loss = Annotated[float, Meta(ge=-1e30, le=1e30)]
Flops = NonNegative
Setting = Loss | str | None
_WHOLE, _DECIMAL = re.compile(r"-?[0-9]{1,300}"), re.compile(r"-?[0-9]+(\.[0-9]+)?(e[+-]?[0-9]+)?", re.IGNORECASE)


class Total(TypedDict):
    total: float


class SweptResult(TypedDict):
    """The fields of a run's result that a sweep needs, in addition to those of every result."""

    flops: Total


class CorpusScore(TypedDict):
    """What a stage scored on one of its corpora; pre-training calls its loss ``val_loss``."""

    val_loss: NotRequired[Loss | None]
    loss: NotRequired[Loss | None]
    bits_per_byte: NotRequired[Loss | None]


class PositionRow(TypedDict):
    """A loss in nats per token at a length in tokens; ``scale`` says how positions were stretched for it."""

    length: Positive
    loss: Loss | None
    corpus: NotRequired[str | None]
    scale: NotRequired[Setting]
    standard_error: NotRequired[NonNegative | None]


class ProbeRow(TypedDict):
    """The share of ``n`` probes of a kind and a size that were answered correctly."""

    kind: str
    accuracy: Fraction | None
    size: NotRequired[Setting]
    scale: NotRequired[Setting]
    n: NotRequired[Count | None]


class ArmResult(TypedDict):
    """The fields of a stage's result that a table of arms needs, in addition to those of every result."""

    seed: int
    flops: NotRequired[Total | None]
    ci95: NotRequired[tuple[Fraction, Fraction] | None]
    model: NotRequired[dict[str, Any]]
    corpora: NotRequired[dict[str, CorpusScore] | None]


class Scheme(TypedDict):
    scheme: str


class SweptConfig(TypedDict):
    """The fields of a run's configuration that a sweep needs."""

    parameterization: Scheme
    model: NotRequired[dict[str, Any]]
    sparsity: NotRequired[dict[str, Any]]
    optimizer: NotRequired[dict[str, Any]]
    schedule: NotRequired[dict[str, Any]]


class TableRow(TypedDict):
    """The columns of every table of an experiment; the loss of a diverged run is null."""

    parameterization: str
    sparsity: Fraction
    width: Positive
    depth: Positive
    lr: float
    seed: int
    steps: Count | None
    loss: Loss | None
    commit: str | None
    tokens: Count | None


class SweepRow(TableRow):
    """A row of a sweep's table.

    ``weights`` and ``nonzeros`` count the hidden matrices, and ``tau`` is theirs. ``reported_loss`` is over text on
    which nothing was chosen.
    """

    status: str
    seconds: float | None
    precision: str | None
    flops: float | None
    reported_loss: NotRequired[Loss | None]
    weights: NotRequired[Count | None]
    nonzeros: NotRequired[Count | None]
    tokens_per_weight: NotRequired[NonNegative | None]
    tokens_per_nonzero: NotRequired[NonNegative | None]
    tau: NotRequired[Annotated[float, Meta(gt=0.0, le=1e300)] | None]
    run: str


class Contender(TypedDict):
    """Times of a contender in a cell of a bench, in seconds, one entry per round."""

    forward_seconds: list[Seconds]
    step_seconds: NotRequired[list[Seconds] | None]
    stored_weights: Count
    note: str
    state_bytes_per_weight: NotRequired[NonNegative | None]
    peak_activation_bytes: NotRequired[Count | None]
    bytes: NotRequired[Positive | None]


class Bandwidth(TypedDict):
    """A plain read of memory: its bytes, and its seconds in each round."""

    bytes: Positive
    seconds: list[Seconds]


class Profile(TypedDict):
    """Shares of the time of the reference model's dense step."""

    linear_share: Fraction
    update_share: Fraction
    hidden_share: Fraction


class Cell(TypedDict):
    """Contenders that were timed in turns. The features are null for a whole model, the sparsity for a dense model."""

    part: str
    threads: Positive
    tokens: Positive
    in_features: Positive | None
    out_features: Positive | None
    sparsity: Annotated[float, Meta(ge=0.0, le=1.0 - 1e-6)] | None
    results: dict[str, Contender]
    profile: NotRequired[Profile]
    bandwidth: NotRequired[Bandwidth]
    new_tokens: NotRequired[Positive]


class Machine(TypedDict):
    """The machine on which a bench ran."""

    processor: str
    family: str
    cores: Positive
    vector_flags: list[str]
    native_bf16: bool
    caches: dict[str, str]
    versions: dict[str, str]


class Bench(TypedDict):
    """The content of ``bench.json``."""

    format: int
    machine: Machine
    commit: str | None
    cells: dict[str, Cell]


def moments_of(result: Mapping[str, Any]) -> dict[str, dict[str, CorpusScore]]:
    """Return what a stage's checked result scored on each corpus: before an adaptation, initialised, and at the end.

    Only an adaptation has scores at the first two moments. At its end they are of the same text as before it.
    """
    moments = ("before", "initialised", "after")
    found: dict[str, dict[str, Any]] = {moment: {} for moment in moments}
    for name, entry in ((result.get("adaptation") or {}).get("corpora") or {}).items():
        for moment in moments:
            found[moment][name] = {key: entry[key][moment] for key in ("val_loss", "bits_per_byte")}
    texts = {entry["corpus"]: entry for entry in result.get("texts") or []}
    several = texts if len(texts) > 1 else {}
    found["after"] = {**(result.get("corpora") or {}), **several, **found["after"]}
    return found


def read_table(path: Path) -> list[dict[str, str]]:
    """Return the cells of each row of an experiment's table, under the present names of its columns.

    Raises:
        UserError: see `read_csv`.
    """
    return [{FORMER_COLUMNS.get(name, name): text for name, text in cells.items()} for cells in read_csv(path)]


def table_cell(text: str) -> int | float | str | None:
    """Return the value of a cell of a ``results.csv``: a number, None for an empty cell, or text."""
    if not text:
        return None
    if _WHOLE.fullmatch(text):
        return int(text)
    return float(text) if _DECIMAL.fullmatch(text) and math.isfinite(float(text)) else text


def check_times(cells: dict[str, Cell], dense: str) -> None:
    """Raise `UserError` unless each cell has a contender ``dense`` for comparison and each contender has times.

    Only a cell of the reference model may have no sparsity.
    """
    for name, cell in cells.items():
        if cell["sparsity"] is None and cell["part"] != "reference":
            raise UserError(f"cells[{name!r:.60}].sparsity is null in the part {cell['part']!r:.60}")
        if cell["part"] in DECODING and not ("bandwidth" in cell and cell["bandwidth"]["seconds"]):
            raise UserError(f"cells[{name!r:.60}] has no bandwidth, which bounds the part {cell['part']!r}")
        if cell["part"] == "generation" and "new_tokens" not in cell:
            raise UserError(f"cells[{name!r:.60}] has no new_tokens, by which a generation is counted")
        results = cell["results"]
        if dense not in results:
            raise UserError(f"cells[{name!r:.60}].results has no {dense!r}, the baseline of the others")
        for contender, result in results.items():
            timed = result["forward_seconds"], result.get("step_seconds")
            if not timed[0] or (timed[1] and not results[dense].get("step_seconds")):
                raise UserError(f"cells[{name!r:.60}].results[{contender!r:.60}] has no times, or dense has none")
