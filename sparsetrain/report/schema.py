"""What ``report.json`` of a pipeline holds, and the check that a file really holds it.

The tables, figures and pages of this package take a `Report` that `validate_report` has accepted, and trust
it. Unknown keys are allowed everywhere, so that a newer run can be read by an older reader.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NotRequired, TypedDict, cast

from sparsetrain.errors import UserError
from sparsetrain.reading import read_json

STAGES: tuple[Literal["finetune"], Literal["prompt"]] = ("finetune", "prompt")
"""Stages that end in an accuracy, in the order in which they run."""


class Point(TypedDict):
    """One step of a training curve; ``val_loss`` and ``bits_per_byte`` only where the model was evaluated."""

    step: int
    tokens: int
    loss: NotRequired[float]
    lr: NotRequired[float]
    val_loss: NotRequired[float]
    bits_per_byte: NotRequired[float]


class Pretraining(TypedDict):
    """Losses in nats per token; ``bits_per_byte`` of the validation text at the end. Null or not finite: diverged."""

    tokens: int
    loss_first: float | None
    loss_last: float | None
    bits_per_byte: float | None


class Scored(TypedDict):
    """A result on a labelled test set; accuracies are fractions, ``ci95`` is ``[low, high]``."""

    task: str
    n_test: int
    accuracy: float
    ci95: list[float]
    macro_f1: float


class Baseline(TypedDict):
    """The same task learned without pre-training."""

    accuracy: float
    ci95: list[float]


class Arm(TypedDict):
    """One sparsity of the pipeline.

    ``masks`` says how masks that changed ended: the rule, and numbers over all sparse layers.
    ``train_flops`` is computed by the formula of `sparsetrain.cost.flops`; ``flops`` splits it into terms
    that add up to it (with their sum as ``total``, if given). ``bytes`` and ``seconds`` are measured.
    """

    name: str
    sparsity: float
    density: float
    train_flops: float
    pretrain: Pretraining
    finetune: NotRequired[Scored | None]
    prompt: NotRequired[Scored | None]
    curves: NotRequired[dict[str, list[Point]]]
    flops: NotRequired[dict[str, float]]
    bytes: NotRequired[dict[str, float]]
    seconds: NotRequired[dict[str, float]]
    masks: NotRequired[dict[str, Any]]


class Report(TypedDict):
    """A whole pipeline. ``scratch``, ``majority`` and ``commit`` are null where there is none."""

    arms: list[Arm]
    scratch: Baseline | None
    majority: float | None
    peak_rss_bytes: int
    seconds: float
    commit: str | None
    overlap_train_test: int
    command: NotRequired[str]
    machine: NotRequired[str | dict[str, Any]]
    task: NotRequired[str | dict[str, Any]]
    model: NotRequired[dict[str, Any]]
    data: NotRequired[dict[str, Any]]
    settings: NotRequired[dict[str, Any]]
    limits: NotRequired[list[str]]


def load_report(path: Path) -> Report:
    """Read and check a ``report.json``.

    Raises:
        UserError: no such file, no JSON, or not a report; the message names the file and the field.
    """
    content = read_json(path, finite=False)
    try:
        return validate_report(content)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def validate_report(content: object) -> Report:
    """Return ``content`` as a `Report` if it is one.

    Raises:
        UserError: a missing field, a wrong type, a number out of range, two arms of one name, an interval that does
            not hold its accuracy, or FLOP terms that do not add up; the message begins with the path of the field, such
            as ``arms[1].finetune.ci95``.
    """
    report = _mapping(content, "report")
    arms = _required(report, "arms", "")
    if not isinstance(arms, list) or not arms:
        raise UserError(f"arms={arms!r:.60} must be a list with at least one arm")
    names: set[str] = set()
    for index, arm in enumerate(arms):
        _check_arm(arm, f"arms[{index}]")
        if arm["name"] in names:
            raise UserError(f"arms[{index}].name={arm['name']!r} is the name of an earlier arm; names must differ")
        names.add(arm["name"])
    scratch = _required(report, "scratch", "")
    if scratch is not None:
        _check_accuracy(_mapping(scratch, "scratch"), "scratch")
    if _required(report, "majority", "") is not None:
        _number(report, "majority", "", low=0.0, high=1.0)
    for key in ("peak_rss_bytes", "seconds"):
        _number(report, key, "", low=0.0)
    _integer(report, "overlap_train_test", "")
    if _required(report, "commit", "") is not None:
        _text(report, "commit", "")
    if "command" in report:
        _text(report, "command", "")
    for key in ("model", "data", "settings"):
        if key in report:
            _mapping(report[key], key)
    for key in ("task", "machine"):
        if key in report and not isinstance(report[key], str):
            _mapping(report[key], key)
    limits = report.get("limits", [])
    if not isinstance(limits, list) or not all(isinstance(sentence, str) for sentence in limits):
        raise UserError(f"limits={limits!r:.60} must be a list of sentences")
    return cast(Report, report)


def _check_arm(content: object, path: str) -> None:
    arm = _mapping(content, path)
    if not _text(arm, "name", path).strip():
        raise UserError(f"{path}.name={arm['name']!r} must not be blank")
    _number(arm, "sparsity", path, low=0.0, high=1.0)
    _number(arm, "density", path, low=0.0, high=1.0)
    flops = _number(arm, "train_flops", path, low=0.0)
    pretrain = _mapping(_required(arm, "pretrain", path), f"{path}.pretrain")
    _integer(pretrain, "tokens", f"{path}.pretrain")
    for key in ("loss_first", "loss_last", "bits_per_byte"):
        if _required(pretrain, key, f"{path}.pretrain") is not None:
            _number(pretrain, key, f"{path}.pretrain", low=0.0, finite=False)
    for stage in STAGES:
        if arm.get(stage) is not None:
            _check_scored(_mapping(arm[stage], f"{path}.{stage}"), f"{path}.{stage}")
    for key in ("flops", "bytes", "seconds"):
        if key in arm:
            group = _mapping(arm[key], f"{path}.{key}")
            for name in group:
                _number(group, name, f"{path}.{key}", low=0.0)
    if "flops" in arm:
        summed = sum(terms(arm["flops"]).values())
        for value in (summed, arm["flops"].get("total", summed)):
            if not math.isclose(value, flops, rel_tol=1e-6):
                raise UserError(f"{path}.flops adds up to {value:.6g}; train_flops={flops:.6g} must be the same")
    if "masks" in arm:
        group = _mapping(arm["masks"], f"{path}.masks")
        _text(group, "rule", f"{path}.masks")
        for name in ("density", "target_density", "itop_rate", "mask_overlap"):
            _number(group, name, f"{path}.masks", low=0.0, high=1.0)
    curves = _mapping(arm.get("curves", {}), f"{path}.curves")
    for name, points in curves.items():
        if not isinstance(points, list):
            raise UserError(f"{path}.curves.{name}={points!r:.60} must be a list of points")
        for index, point in enumerate(points):
            _check_point(point, f"{path}.curves.{name}[{index}]")


def terms(group: Mapping[str, float]) -> dict[str, float]:
    """Return the entries of ``flops`` or ``bytes`` without their total."""
    return {name: value for name, value in group.items() if name != "total"}


def _check_point(content: object, path: str) -> None:
    point = _mapping(content, path)
    _integer(point, "step", path)
    _integer(point, "tokens", path)
    for key in ("loss", "lr", "val_loss", "bits_per_byte"):
        if point.get(key) is not None:
            # A diverged run is a result: its losses may be infinite or not a number, and its curve ends there.
            _number(point, key, path, finite=False)


def _check_scored(scored: Mapping[str, Any], path: str) -> None:
    _text(scored, "task", path)
    _integer(scored, "n_test", path)
    _number(scored, "macro_f1", path, low=0.0, high=1.0)
    _check_accuracy(scored, path)


def _check_accuracy(scored: Mapping[str, Any], path: str) -> None:
    accuracy = _number(scored, "accuracy", path, low=0.0, high=1.0)
    interval = _required(scored, "ci95", path)
    if not isinstance(interval, list | tuple) or len(interval) != 2:
        raise UserError(f"{path}.ci95={interval!r:.60} must be [low, high]")
    ends = dict(enumerate(interval))
    low, high = (_number(ends, end, f"{path}.ci95", low=0.0, high=1.0) for end in (0, 1))
    slack = 1e-9
    if not low - slack <= accuracy <= high + slack:
        raise UserError(f"{path}.ci95=[{low}, {high}] does not hold accuracy={accuracy}")


def _mapping(value: object, path: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise UserError(f"{path}={value!r:.60} must be a mapping")
    return value


def _required(mapping: Mapping[Any, Any], key: Any, path: str) -> Any:
    if key not in mapping:
        raise UserError(f"{_join(path, key)} is missing")
    return mapping[key]


def _text(mapping: Mapping[str, Any], key: str, path: str) -> str:
    value = _required(mapping, key, path)
    if not isinstance(value, str):
        raise UserError(f"{_join(path, key)}={value!r:.60} must be text")
    return value


def _number(
    mapping: Mapping[Any, Any],
    key: Any,
    path: str,
    low: float = -math.inf,
    high: float = math.inf,
    *,
    finite: bool = True,
) -> float:
    value = _required(mapping, key, path)
    if isinstance(value, bool) or not isinstance(value, int | float) or (finite and not math.isfinite(value)):
        raise UserError(f"{_join(path, key)}={value!r:.60} must be a {'finite ' if finite else ''}number")
    if math.isfinite(value) and not low <= value <= high:
        allowed = f"lie in [{low:g}, {high:g}]" if high < math.inf else f"be at least {low:g}"
        raise UserError(f"{_join(path, key)}={value} must {allowed}")
    return float(value)


def _integer(mapping: Mapping[str, Any], key: str, path: str) -> int:
    value = _required(mapping, key, path)
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise UserError(f"{_join(path, key)}={value!r:.60} must be a whole number of at least 0")
    return value


def _join(path: str, key: object) -> str:
    if isinstance(key, int):
        return f"{path}[{key}]"
    return f"{path}.{key}" if path else str(key)
