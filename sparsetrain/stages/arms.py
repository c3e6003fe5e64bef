"""Comparison of arms: read the stages of pipelines, runs whose masks evolve, and earlier tables, into one table."""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console

from sparsetrain.errors import UserError
from sparsetrain.files import file_errors, write_text
from sparsetrain.report import arms as tables
from sparsetrain.report import arms_sheets as sheets
from sparsetrain.report.arms import PRETRAIN, WAYS, Arms, Row
from sparsetrain.report.arms_plots import arms_figure
from sparsetrain.report.bars import bars, bars_sheet, markdown, verdicts
from sparsetrain.report.measured import KINDS, POSITIONS, measured_sheet, write_measured
from sparsetrain.report.pairs import check_base
from sparsetrain.report.run_files import ArmResult
from sparsetrain.report.tables import print_sheets
from sparsetrain.report.text_plots import positions_figure
from sparsetrain.runs.identity import differences
from sparsetrain.runs.layout import CONFIG, METRICS, RESULT
from sparsetrain.runs.recorded import read_recorded
from sparsetrain.runs.result import load_result
from sparsetrain.screen import say
from sparsetrain.settings import build
from sparsetrain.shapes import check
from sparsetrain.sparsity.evolution.base import RULES
from sparsetrain.stages.arm_rows import absolute, mask_table, stage_name, stage_table
from sparsetrain.stages.config import PretrainConfig, RunConfig
from sparsetrain.stages.pipeline_config import PipelineConfig

_DEPTH = 3  # a stage of a pipeline lies three levels below: pipeline, arm, stage


def load_arms(places: Sequence[Path]) -> tuple[Arms, list[Path], list[Path]]:
    """Return the table of all finished runs in ``places``, the unfinished ones, and those that it does not compare.

    The last are finished runs outside of a pipeline that are no pre-trainings.

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
    left_out: list[Path] = []
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
            stages.append(stage_table(directory, result))
        elif kind == PRETRAIN:
            runs.append(mask_table(directory, result))
        else:
            left_out.append(directory)
    if not stages and not runs and not earlier:
        other = f" besides {_said(left_out)}" if left_out else ""
        raise UserError(f"{', '.join(map(str, places))}: no finished run{other} ({len(unfinished)} unfinished)")
    _check_pipelines(stages)
    _check_runs(runs)
    stages = _in_order(stages)
    runs.sort(key=lambda table: _place_of(table.rows[0]))
    measured = [*stages, *runs]
    keys = {key for table in measured for key in table.identities()}
    for index, table in enumerate(earlier):
        kept = [row for key, row in zip(table.identities(), table.rows, strict=True) if key not in keys]
        # The rows of evaluations are joined in this order, so that those of a directory count before a table's.
        earlier[index] = replace(table, rows=kept)
    return tables.join([*measured, *earlier]), unfinished, left_out


def _said(left_out: Sequence[Path]) -> str:
    are = "is" if len(left_out) == 1 else "are"
    return (
        f"{len(left_out)} that {are} neither a pre-training nor a stage of a pipeline (report {left_out[0]} shows one)"
    )


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
    return near if near.name not in ("", "..") else absolute(directory).parent.parent


def _in_pipeline(directory: Path, result: Row) -> bool:
    """Whether a run is a stage of a pipeline: it lies in a pipeline's directory, or its directory is named like one."""
    return (_home(directory) / CONFIG).exists() or stage_name(directory, result) in (PRETRAIN, *WAYS)


def _in_order(stages: Sequence[Arms]) -> list[Arms]:
    """Return the stages of each pipeline in the order of its arms and, in an arm, in running order, where known."""
    orders = {home: _orders(home) for home in dict.fromkeys(_home(Path(table.where)) for table in stages)}
    places = {home: place for place, home in enumerate(orders)}

    def place(table: Arms) -> tuple[int, ...]:
        home, row = _home(Path(table.where)), table.rows[0]
        known = zip((row["arm"], row["stage"]), orders[home], strict=True)
        return places[home], *(names.index(name) if name in names else len(names) for name, names in known)

    return sorted(stages, key=place)


def _orders(home: Path) -> tuple[list[str], list[str]]:
    """Return the names of a pipeline's arms and stages in order; empty if its settings are no longer possible."""
    if not (home / CONFIG).exists():
        return [], []
    try:
        config = build(PipelineConfig, read_recorded(home, PipelineConfig).values)
    except UserError:
        return [], []
    return [arm.name for arm in config.arms], [entry.name for entry in config.stages]


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


def show_arms(
    places: Sequence[Path], out: Path | None, console: Console | None = None, base: str | None = None
) -> None:
    """Print the comparison of arms (means, intervals, and verdicts or bars); write its files to ``out``.

    Args:
        base: the arm to compare the others with; without it, see `sparsetrain.report.pairs.comparisons`.

    Raises:
        UserError: see `load_arms`; or ``base`` is no arm, or the table is one of masks.
    """
    console = console or Console()
    tell = functools.partial(say, console)
    table, unfinished, left_out = load_arms(places)
    if not table.of_masks:
        check_base(base, table.rows)
    elif base is not None:
        raise UserError(f"--base={base}: a table of masks compares every rule with static")
    tell(f"{len(table.rows)} finished runs, {len(unfinished)} unfinished")
    if left_out:
        tell(f"not compared: {_said(left_out)}")
    # The bars are about tasks.
    entries = bars(table.rows) if not table.of_masks and tables.tasks(table.rows) else []
    arms = [] if table.of_masks else tables.arm_names(table.rows)
    further = [(kind, rows) for kind in KINDS if (rows := table.measured.get(kind.name))]
    if table.of_masks:
        print_sheets([sheets.mask_means(table.rows)], console)
        for rule, text in verdicts(table.rows).items():
            tell(f"{rule:8} {text}")
    else:
        shown = [
            sheets.means(table.rows),
            sheets.adaptations(table.rows),
            sheets.differences(table.rows, not entries, base),
            bars_sheet(entries),
            *(measured_sheet(kind, rows, arms) for kind, rows in further),
        ]
        print_sheets([sheet for sheet in shown if sheet.rows], console)
    if out is None:
        return
    with file_errors(out):
        out.mkdir(parents=True, exist_ok=True)
    table.write(out / "results.csv")
    if entries:
        write_text(out / "bars.md", markdown(entries))
    for kind, rows in further:
        write_measured(kind, rows, out / kind.file)
    arms_figure(table, out / "figure.png")
    written = ["results.csv", *(["bars.md"] if entries else []), *(kind.file for kind, _ in further), "figure.png"]
    if rows := table.measured.get(POSITIONS.name):
        positions_figure(rows, arms, out / "positions.png")
        written.append("positions.png")
    tell(f"written: {', '.join(written)} in {out}")


def shows_arms(place: Path) -> bool:
    """Whether a place is a table or a directory of several runs, rather than one run, pipeline or bench."""
    alone = (place / CONFIG, place / RESULT, place / METRICS, place / "report.json", place / "bench.json")
    if place.suffix == ".csv":
        return True
    inside = next(place.glob(f"*/{CONFIG}"), None) or next(place.glob(f"*/*/*/{CONFIG}"), None)
    return inside is not None and not any(path.exists() for path in alone)
