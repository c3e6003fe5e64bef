"""Comparison of arms: read the stages of pipelines, runs whose masks evolve, and earlier tables, into one table."""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypedDict

from rich.console import Console

from sparsetrain.cost.flops import training_flops_per_token
from sparsetrain.errors import UserError
from sparsetrain.files import file_errors, write_text
from sparsetrain.models.config import ModelConfig
from sparsetrain.report import arms as tables
from sparsetrain.report.arms import MASK_COLUMNS, PRETRAIN, STAGE_COLUMNS, WAYS, Arms, Course, Row
from sparsetrain.report.arms_plots import arms_figure
from sparsetrain.report.bars import bars, bars_sheet, markdown, verdicts
from sparsetrain.report.run_files import COLUMNS, ArmResult
from sparsetrain.report.tables import print_sheets
from sparsetrain.runs.identity import differences
from sparsetrain.runs.layout import CONFIG, METRICS, RESULT
from sparsetrain.runs.metrics import read_metrics
from sparsetrain.runs.recorded import read_recorded
from sparsetrain.runs.result import load_result
from sparsetrain.screen import say
from sparsetrain.settings import build
from sparsetrain.shapes import Positive, check
from sparsetrain.sparsity.evolution.base import RULES
from sparsetrain.stages.config import PretrainConfig, RunConfig
from sparsetrain.stages.pipeline_config import PipelineConfig

_DEPTH = 3  # a stage of a pipeline lies three levels below: pipeline, arm, stage


class _Data(TypedDict):
    context: Positive


class _PretrainConfig(TypedDict):
    data: _Data


class _Evolution(TypedDict):
    rule: str


class _Sparsity(TypedDict):
    evolution: _Evolution


class _MaskConfig(TypedDict):
    sparsity: _Sparsity


def load_arms(places: Sequence[Path]) -> tuple[Arms, list[Path]]:
    """Return the table of all finished runs in ``places``, and the directories of the unfinished ones.

    A place is a run directory, a pipeline, a directory of runs or pipelines, or a ``results.csv`` written earlier. The
    rows of a ``results.csv`` also count when their run directories are gone. A stage of a pipeline lies in
    ``PIPELINE/ARM/STAGE`` and is named by that directory, without the prefix of its task, as in ``pubmedqa-finetune``.

    Raises:
        UserError: no run is finished; pipelines differ in more than the seed; runs differ in more than the seed and
            the evolution of masks; or the tables cannot be joined, see `sparsetrain.report.arms.join`.
    """
    earlier = [tables.read_arms(place) for place in places if place.suffix == ".csv"]
    stages: list[Arms] = []
    runs: list[Arms] = []
    unfinished: list[Path] = []
    for directory in dict.fromkeys(found for place in places if place.suffix != ".csv" for found in _runs(place)):
        if not (directory / RESULT).exists():
            unfinished.append(directory)
            continue
        result = load_result(directory / RESULT)
        kind = result.get("stage")
        if kind == "pipeline":
            continue
        check(result, ArmResult, str(directory / RESULT))
        if _in_pipeline(directory, result):
            stages.append(_stage(directory, result))
        elif kind == PRETRAIN:
            runs.append(_run_of_masks(directory, result))
    if not stages and not runs and not earlier:
        raise UserError(f"{', '.join(map(str, places))}: no finished run ({len(unfinished)} unfinished)")
    _check_pipelines(stages)
    _check_runs(runs)
    runs.sort(key=lambda table: _place_of(table.rows[0]))
    measured = [*stages, *runs]
    keys = {key for table in measured for key in table.identities()}
    for index, table in enumerate(earlier):
        kept = [row for key, row in zip(table.identities(), table.rows, strict=True) if key not in keys]
        earlier[index] = replace(table, rows=kept)
    return tables.join([*measured, *earlier]), unfinished


def _runs(place: Path) -> list[Path]:
    """Return the run directories below a place, sorted by name, without the directories of the pipelines themselves."""
    place = Path(os.path.normpath(place))
    found = {path.parent for depth in range(_DEPTH + 1) for path in place.glob("*/" * depth + CONFIG)}
    if not found:
        raise UserError(f"{place} holds no run: neither it nor a directory below it has a {CONFIG}")
    pipelines = {directory for directory in found if next(directory.glob(f"*/*/{CONFIG}"), None) is not None}
    return sorted(found - pipelines)


def _home(directory: Path) -> Path:
    """Return the pipeline directory of a stage; the path stays relative if the given path is long enough."""
    near = directory.parent.parent
    return near if near.name not in ("", "..") else _absolute(directory).parent.parent


def _absolute(directory: Path) -> Path:
    return Path(os.path.abspath(directory))


def _in_pipeline(directory: Path, result: Row) -> bool:
    """Whether a run is a stage of a pipeline: it lies in a pipeline's directory, or its directory is named like one."""
    return (_home(directory) / CONFIG).exists() or _stage_name(directory, result) in (PRETRAIN, *WAYS)


def _stage_name(directory: Path, result: Row) -> str:
    return _absolute(directory).name.removeprefix(f"{result.get('task')}-")


def _row(result: Row, columns: Sequence[str], **known: Any) -> Row:
    """Return the columns that tables of stages and tables of masks have in common."""
    row = {name: result.get(name) for name in (*COLUMNS, *columns)}
    return row | {"loss": result.get("loss_last"), "train_flops": (result.get("flops") or {}).get("total")} | known


def _stage(directory: Path, result: Row) -> Arms:
    name = _stage_name(directory, result)
    low, high = result.get("ci95") or (None, None)
    row = _row(
        result,
        STAGE_COLUMNS,
        arm=_absolute(directory).parent.name.removeprefix(f"{result.get('task')}-"),
        stage=name,
        task=result.get("task"),
        ci_low=low,
        ci_high=high,
        flop_ratio_formula=_formula(directory, result) if name == PRETRAIN else None,
    )
    check(row, tables.StageRow, str(directory / RESULT))
    return Arms([row], (*COLUMNS, *STAGE_COLUMNS), str(directory))


def _formula(directory: Path, result: Row) -> float | None:
    """Return F(0) / F(s), the FLOPs of the dense over those of the sparse model, by formula from the sparsity s."""
    if not result.get("model") or result.get("sparsity") is None:
        return None
    settings = {key: value for key, value in result["model"].items() if key != "sparsity"}
    model = build(ModelConfig, settings, f"{directory / RESULT}: model.")
    context = check(read_recorded(directory, RunConfig).values, _PretrainConfig, str(directory / CONFIG))["data"][
        "context"
    ]
    dense, sparse = (training_flops_per_token(model, 1.0 - s, context).total for s in (0.0, result["sparsity"]))
    return dense / sparse


def _run_of_masks(directory: Path, result: Row) -> Arms:
    config = check(read_recorded(directory, RunConfig).values, _MaskConfig, str(directory / CONFIG))
    masks = result.get("masks") or {}
    row = _row(
        result,
        MASK_COLUMNS,
        rule=_rule(config),
        itop_rate=masks.get("itop_rate"),
        mask_overlap=masks.get("mask_overlap"),
        dead_rows=int(sum(layer.get("dead_rows") or 0 for layer in masks.get("layers", {}).values())),
    )
    check(row, tables.MaskRow, str(directory / RESULT))
    course = {(row["rule"], row["seed"]): _course(directory, row)} if (directory / METRICS).exists() else {}
    return Arms([row], (*COLUMNS, *MASK_COLUMNS), str(directory), course)


def _rule(config: Row) -> str:
    """Return the rule of evolution, or ``vspdf`` if the phases of the budget set densities."""
    phases = (config.get("budget") or {}).get("phases") or []
    changes = any(phase.get("density") is not None for phase in phases)
    return "vspdf" if changes else str(config["sparsity"]["evolution"]["rule"])


def _course(directory: Path, row: Row) -> Course:
    records = read_metrics(directory / METRICS) if row["steps"] else []
    return [
        (record["step"] / row["steps"], record["density"], record["itop_rate"])
        for record in records
        if record.get("itop_rate") is not None and record.get("density") is not None
    ]


def _place_of(row: Row) -> tuple[int, str, int]:
    rule = row["rule"]
    names = RULES.names()
    return names.index(rule) if rule in names else len(names), rule, row["seed"]


def _check_pipelines(stages: Sequence[Arms]) -> None:
    """Raise `UserError` if pipelines differ in more than the seed, because their results must not be averaged.

    A stage that lies in no pipeline is compared with the same stage of the other seeds.
    """
    first: dict[tuple[Any, ...], Path] = {}
    for table in stages:
        directory = Path(table.where)
        whole = (_home(directory) / CONFIG).exists()
        compared = _home(directory) if whole else directory
        other = first.setdefault(() if whole else table.identities()[0][:-1], compared)
        if compared != other:
            _compare(compared, other, ("seed=", "source="), "the seed")


def _check_runs(runs: Sequence[Arms]) -> None:
    """Raise `UserError` if runs differ in more than the seed and the evolution of masks."""
    for table in runs[1:]:
        _compare(
            Path(table.where), Path(runs[0].where), ("seed=", "sparsity.evolution.", "budget.phases="), "seed and masks"
        )


def _schema(directory: Path) -> type:
    """Return the dataclass of the settings of a run or of a pipeline."""
    return PipelineConfig if read_recorded(directory, RunConfig).kind == "pipeline" else PretrainConfig


def _compare(one: Path, other: Path, allowed: tuple[str, ...], names: str) -> None:
    ours, theirs = (read_recorded(place, _schema(place)) for place in (one, other))
    found = differences(ours, theirs)
    changed = [text for text in found if not text.startswith(allowed)]
    if changed:
        raise UserError(f"{one} and {other} differ in more than {names}: {changed[0]}")


def show_arms(places: Sequence[Path], out: Path | None, console: Console | None = None) -> None:
    """Print the comparison of arms (means, intervals, and verdicts or bars); write its files to ``out``.

    Raises:
        UserError: see `load_arms`.
    """
    console = console or Console()
    tell = functools.partial(say, console)
    table, unfinished = load_arms(places)
    tell(f"{len(table.rows)} finished runs, {len(unfinished)} unfinished")
    entries = [] if table.of_masks else bars(table.rows)
    if table.of_masks:
        print_sheets([tables.mask_means(table.rows)], console)
        for rule, text in verdicts(table.rows).items():
            tell(f"{rule:8} {text}")
    else:
        shown = [tables.means(table.rows), tables.differences(table.rows, with_tasks=not entries), bars_sheet(entries)]
        print_sheets([sheet for sheet in shown if sheet.rows], console)
    if out is None:
        return
    with file_errors(out):
        out.mkdir(parents=True, exist_ok=True)
    table.write(out / "results.csv")
    if entries:
        write_text(out / "bars.md", markdown(entries))
    arms_figure(table, out / "figure.png")
    written = ["results.csv", *(["bars.md"] if entries else []), "figure.png"]
    tell(f"written: {', '.join(written)} in {out}")


def shows_arms(place: Path) -> bool:
    """Whether a place is a table or a directory of several runs, rather than one run, pipeline or bench."""
    alone = (place / CONFIG, place / RESULT, place / METRICS, place / "report.json", place / "bench.json")
    if place.suffix == ".csv":
        return True
    inside = next(place.glob(f"*/{CONFIG}"), None) or next(place.glob(f"*/*/*/{CONFIG}"), None)
    return inside is not None and not any(path.exists() for path in alone)
