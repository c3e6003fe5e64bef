"""``result.json``: the result of a run that completed or diverged.

Unknown keys are allowed, so that older versions can read results of newer ones.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NotRequired, TypedDict

from msgspec import Meta

from sparsetrain.files import write_json
from sparsetrain.reading import read_json
from sparsetrain.runs.layout import METRICS, RESULT
from sparsetrain.runs.metrics import read_metrics
from sparsetrain.shapes import Count, Fraction, NonNegative, Positive

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


class TextRow(TypedDict):
    """Loss of a corpus in nats per token and in bits per byte, over ``tokens`` targets in windows of ``context``."""

    corpus: str
    context: Positive
    loss: float
    bits_per_byte: float
    tokens: Count


class PositionRow(TypedDict):
    """Loss of the same targets at the end of passes of ``length`` tokens, and its difference to the trained length.

    Losses are in nats. The errors are standard errors over blocks of targets, null for a single block; the difference
    is paired. ``scale`` is a factor of the positions, or ``dynamic``.
    """

    corpus: str
    scale: str
    length: Positive
    loss: float
    standard_error: float | None
    difference: float
    difference_error: float | None


class ProbeRow(TypedDict):
    """Share of ``n`` probes of ``size`` bytes answered rightly, with its Wilson interval of 95 %.

    ``tokens`` are those of the longest probe, and ``chance`` is what guessing gives. The accuracy is null where it was
    not measured, and ``why`` says why.
    """

    kind: str
    size: Positive
    tokens: Positive
    scale: str
    n: Count
    accuracy: Fraction | None
    ci_low: Fraction | None
    ci_high: Fraction | None
    chance: Fraction
    why: str


class OldNew(TypedDict):
    """A number under the old and the new tokenizer, or over old and new rows; null if there are none."""

    old: float | None
    new: float | None


class Moments(TypedDict):
    """A number of the model before an adaptation, after its extension, and after its training."""

    before: float
    initialised: float
    after: float


class AdaptedCorpus(TypedDict):
    """What an adaptation changed for a corpus, on ``bytes`` bytes of its validation text."""

    bytes: Count
    tokens_per_byte: OldNew
    tokens_per_word: OldNew
    val_loss: Moments
    bits_per_byte: Moments


class RowNorms(TypedDict):
    """Mean norms of rows, by the name of the matrix."""

    initialised: dict[str, OldNew]
    after: dict[str, OldNew]


class Adaptation(TypedDict):
    """What an adaptation gained and forgot; ``forgetting`` is in bits per byte of the corpus ``first``."""

    first: str
    forgetting: float | None
    new_tokens: Count
    new_rows: Count
    new_blocks: Count
    row_norms: RowNorms
    corpora: dict[str, AdaptedCorpus]
    origin: dict[str, dict[str, float]]


class Prediction(TypedDict):
    """Predicted seconds of the training steps on the machine of the run, and the band that holds 90 % of times.

    ``machine`` is its label, and ``calibrated`` the date of its calibration.
    """

    machine: str
    calibrated: str
    seconds: NonNegative
    band: Annotated[list[NonNegative], Meta(min_length=2, max_length=2)]
    notes: NotRequired[list[str]]


class LabelScore(TypedDict):
    """Scores of one label over ``n`` test examples that have it."""

    precision: Fraction
    recall: Fraction
    f1: Fraction
    n: Count


class Confusion(TypedDict):
    """Counts of test examples.

    A row is a true label and a column a predicted one. For several labels there is, for each label,
    ``[[true negatives, false positives], [false negatives, true positives]]``.
    """

    labels: list[str]
    counts: list[list[Count | list[Count]]]


class BagOfWords(TypedDict):
    """What counting words gives on the same test examples, see `sparsetrain.training.bag_of_words`."""

    accuracy: Fraction
    ci95: NotRequired[list[float]]
    macro_f1: NotRequired[Fraction]
    micro_f1: NotRequired[Fraction]
    n_train: NotRequired[Count]
    validation_accuracy: NotRequired[Fraction]
    ngrams: NotRequired[Positive]
    smoothing: NotRequired[NonNegative]


class OverlapText(TypedDict):
    """How many of the ``compared`` test rows stand in the training text; ``rows`` is null where ``why`` says so."""

    rows: Count | None
    compared: NotRequired[Count]
    words: NotRequired[Positive]
    why: NotRequired[str]


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
    step_seconds: NotRequired[NonNegative | None]
    predicted: NotRequired[Prediction | None]
    loss_first: NotRequired[float | None]
    loss_last: NotRequired[float | None]
    bits_per_byte: NotRequired[float | None]
    reported_loss: NotRequired[float | None]
    reported_bits_per_byte: NotRequired[float | None]
    corpora: NotRequired[dict[str, CorpusRead] | None]
    task: NotRequired[str | None]
    n_test: NotRequired[Count | None]
    accuracy: NotRequired[Fraction | None]
    ci95: NotRequired[list[float] | None]
    macro_f1: NotRequired[Fraction | None]
    majority: NotRequired[Fraction | None]
    validation_accuracy: NotRequired[Fraction | None]
    kind: NotRequired[str | None]
    micro_f1: NotRequired[Fraction | None]
    token_f1: NotRequired[Fraction | None]
    per_label: NotRequired[dict[str, LabelScore] | None]
    confusion: NotRequired[Confusion | None]
    bag_of_words: NotRequired[BagOfWords | None]
    overlap_text: NotRequired[OverlapText | None]
    flops: NotRequired[dict[str, float] | None]
    masks: NotRequired[Masks | None]
    adaptation: NotRequired[Adaptation | None]
    noise_scale: NotRequired[NoiseScale | None]
    noise_scale_all: NotRequired[NoiseScale | None]
    trained_length: NotRequired[Positive]
    texts: NotRequired[list[TextRow]]
    positions: NotRequired[list[PositionRow]]
    probes: NotRequired[list[ProbeRow]]


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
    def metrics(self) -> list[dict[str, Any]]:
        """The lines of ``metrics.jsonl``: step, loss, learning rate and more; an evaluation has none."""
        path = self.directory / METRICS
        return [dict(record) for record in read_metrics(path)] if path.exists() else []

    @property
    def complete(self) -> bool:
        return self.values.get("status") == "complete"

    def __getitem__(self, key: str) -> Any:
        return self.values[key]

    def __contains__(self, key: object) -> bool:
        return key in self.values


def finished(directory: Path) -> RunResult | None:
    """Return the result of a finished run, or None if the run is not finished."""
    path = directory / RESULT
    return RunResult(directory, load_result(path)) if path.exists() else None


def finish(directory: Path, values: dict[str, Any]) -> RunResult:
    """Write ``result.json``, which marks the run as done."""
    write_json(directory / RESULT, values)
    return RunResult(directory, values)
