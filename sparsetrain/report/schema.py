"""The content of a pipeline's ``report.json``, and its validation.

The tables, figures and pages of this package rely on a `Report` that `validate_report` accepted. Unknown keys are
allowed everywhere, so that an older version can read a newer file.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, NotRequired, TypedDict

from msgspec import Meta

from sparsetrain.errors import UserError
from sparsetrain.reading import read_json
from sparsetrain.runs.result import Adaptation, BagOfWords, Confusion, LabelScore, OverlapText, Prediction
from sparsetrain.shapes import Count, Fraction, NonNegative, check

STAGES: tuple[Literal["finetune"], Literal["prompt"]] = ("finetune", "prompt")
"""Stages that end in an accuracy, in the order in which they run."""

_LOSSES: tuple[Literal["loss_first"], Literal["loss_last"], Literal["bits_per_byte"]]
_LOSSES = ("loss_first", "loss_last", "bits_per_byte")


class Point(TypedDict):
    """One step of a training curve; ``val_loss`` and ``bits_per_byte`` exist only at evaluations.

    The losses of a diverged run may be infinite or NaN, and its curve ends there.
    """

    step: Count
    tokens: Count
    loss: NotRequired[float | None]
    lr: NotRequired[float | None]
    val_loss: NotRequired[float | None]
    bits_per_byte: NotRequired[float | None]
    noise_scale: NotRequired[float | None]
    noise_scale_low: NotRequired[float | None]
    noise_scale_high: NotRequired[float | None]


class CorpusEnd(TypedDict):
    """The scores of one of several corpora at the end of a stage."""

    val_loss: float | None
    bits_per_byte: float | None


class TextEnd(TypedDict):
    """The end of a stage of text: its loss in nats per token, and its scores of each of several corpora."""

    loss_last: float | None
    bits_per_byte: float | None
    tokens: NotRequired[Count | None]
    corpora: NotRequired[dict[str, CorpusEnd]]


class Pretraining(TypedDict):
    """Losses in nats per token, and bits per byte of the validation text at the end; null or not finite if diverged."""

    tokens: Count
    loss_first: float | None
    loss_last: float | None
    bits_per_byte: float | None
    corpora: NotRequired[dict[str, CorpusEnd]]


Interval = Annotated[list[Fraction], Meta(min_length=2, max_length=2)]


class Baseline(TypedDict):
    """The result of the task without pre-training; accuracies are fractions, and ``ci95`` is ``[low, high]``."""

    accuracy: Fraction
    ci95: Interval


class Scored(Baseline):
    """A result on a labelled test set."""

    task: str
    n_test: Count
    macro_f1: NotRequired[Fraction | None]


class MaskEnd(TypedDict):
    """The evolution rule, and statistics of the final masks over all sparse layers."""

    rule: str
    density: Fraction
    target_density: Fraction
    itop_rate: Fraction
    mask_overlap: Fraction
    dead_rows: NotRequired[Count]


class StageEnd(TypedDict):
    """The part of a stage's result that sections read."""

    accuracy: NotRequired[Fraction | None]
    per_label: NotRequired[dict[str, LabelScore] | None]
    confusion: NotRequired[Confusion | None]
    bag_of_words: NotRequired[BagOfWords | None]
    overlap_text: NotRequired[OverlapText | None]
    adaptation: NotRequired[Adaptation | None]
    step_seconds: NotRequired[NonNegative | None]
    predicted: NotRequired[Prediction | None]


class Arm(TypedDict):
    """One sparsity of the pipeline.

    ``train_flops`` follows the formula of `sparsetrain.cost.flops`. ``flops`` has its terms, which add up to it, and
    possibly their sum as ``total``. ``bytes`` and ``seconds`` are measured. ``texts`` has the stages of text by name.
    """

    name: str
    sparsity: Fraction
    density: Fraction
    train_flops: NonNegative
    pretrain: Pretraining
    finetune: NotRequired[Scored | None]
    prompt: NotRequired[Scored | None]
    curves: NotRequired[dict[str, list[Point]]]
    flops: NotRequired[dict[str, NonNegative]]
    bytes: NotRequired[dict[str, NonNegative]]
    seconds: NotRequired[dict[str, NonNegative]]
    masks: NotRequired[MaskEnd]
    stages: NotRequired[dict[str, StageEnd]]
    texts: NotRequired[dict[str, TextEnd]]


class Report(TypedDict):
    """A whole pipeline; ``scratch``, ``majority``, ``bag_of_words`` and ``commit`` are null if they do not exist."""

    arms: Annotated[list[Arm], Meta(min_length=1)]
    scratch: Baseline | None
    majority: Fraction | None
    bag_of_words: NotRequired[BagOfWords | None]
    peak_rss_bytes: NonNegative
    seconds: NonNegative
    commit: str | None
    overlap_train_test: Count
    command: NotRequired[str]
    machine: NotRequired[str | dict[str, Any]]
    task: NotRequired[str | dict[str, Any]]
    model: NotRequired[dict[str, Any]]
    data: NotRequired[dict[str, Any]]
    settings: NotRequired[dict[str, Any]]
    limits: NotRequired[list[str]]
    once: NotRequired[dict[str, StageEnd]]


def load_report(path: Path) -> Report:
    """Read and check a ``report.json``.

    Raises:
        UserError: the file does not exist, or is no JSON or no report; the message names the file and the field.
    """
    return validate_report(read_json(path, finite=False), str(path))


def validate_report(content: object, where: str = "report") -> Report:
    """Return ``content`` unchanged if it is a valid `Report`.

    Args:
        content: a JSON value.
        where: begins the error's line.

    Raises:
        UserError: a field is missing, of a wrong type or out of range, two arms have one name, an interval does not
            contain its accuracy, or FLOP terms do not add up. The message begins with ``where`` and the path of the
            field, such as ``arms[1].finetune.ci95``.
    """
    report: Report = check(content, Report, where)
    names: set[str] = set()
    for index, arm in enumerate(report["arms"]):
        path = f"{where}: arms[{index}]"
        if not arm["name"].strip():
            raise UserError(f"{path}.name={arm['name']!r} must not be blank")
        if arm["name"] in names:
            raise UserError(f"{path}.name={arm['name']!r} is the name of an earlier arm; names must differ")
        names.add(arm["name"])
        for key in _LOSSES:
            if (arm["pretrain"][key] or 0.0) < 0:
                raise UserError(f"{path}.pretrain.{key}={arm['pretrain'][key]} must be at least 0")
        for stage in STAGES:
            if (scored := arm.get(stage)) is not None:
                _check_interval(scored, f"{path}.{stage}")
        if "flops" in arm:
            summed = sum(terms(arm["flops"]).values())
            for value in (summed, arm["flops"].get("total", summed)):
                if not math.isclose(value, arm["train_flops"], rel_tol=1e-6):
                    flops = f"{arm['train_flops']:.6g}"
                    raise UserError(f"{path}.flops adds up to {value:.6g}; train_flops={flops} must be the same")
    if (scratch := report["scratch"]) is not None:
        _check_interval(scratch, f"{where}: scratch")
    return report


def terms(group: Mapping[str, float]) -> dict[str, float]:
    """Return the entries of ``flops`` or ``bytes`` without their total."""
    return {name: value for name, value in group.items() if name != "total"}


def _check_interval(result: Baseline, path: str) -> None:
    low, high = result["ci95"]
    slack = 1e-9
    if not low - slack <= result["accuracy"] <= high + slack:
        raise UserError(f"{path}.ci95=[{low}, {high}] does not hold accuracy={result['accuracy']}")
