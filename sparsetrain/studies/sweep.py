"""The results of a sweep: rows of its runs, optima and figures.

A point of a sweep is an ordinary pre-training run, whose directory is named after its configuration. A sweep that was
killed, or that is started again with more values, therefore skips finished points.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

from sparsetrain.errors import UserError
from sparsetrain.files import file_errors
from sparsetrain.report.run_files import COLUMNS, SweepRow, SweptConfig, SweptResult, read_table, table_cell
from sparsetrain.report.search import search_figure, search_knobs, search_sheet
from sparsetrain.report.sweep import (
    findings,
    lines_of,
    next_commands,
    optima_sheet,
    write_optima,
    write_rows,
)
from sparsetrain.report.sweep_plots import sweep_figure
from sparsetrain.report.tables import print_sheets
from sparsetrain.report.text import flatten
from sparsetrain.runs.identity import INCIDENTAL, described
from sparsetrain.runs.layout import CONFIG, RESULT
from sparsetrain.runs.recorded import read_recorded, renamed
from sparsetrain.runs.result import load_result
from sparsetrain.screen import say
from sparsetrain.settings import build
from sparsetrain.shapes import check
from sparsetrain.stages.config import PretrainConfig
from sparsetrain.stages.hidden import hidden_of_run, steps_of

# Settings that `COLUMNS` contain, or that follow from them.
_SAID = ("optimizer.lr", "seed", "model.d_model", "model.n_layers", "model.n_heads", "sparsity.sparsity", "corpus")
_REQUIRED = ("status", "tokens", "seconds", "precision", "flops", "run")  # of a table, with `COLUMNS`
# Of the hidden matrices; the first three are empty in rows of older tables, and the tokens follow from them.
_HIDDEN = ("weights", "nonzeros", "tau", "tokens_per_weight", "tokens_per_nonzero")
_REPORTED = "reported_loss"  # a column only if a run has such a loss
_LAST = (*_REQUIRED[:-1], *_HIDDEN, _REPORTED, "run")  # the columns after the varied settings
_TEXTS = ("parameterization", "commit", "status", "precision", "run")


@dataclass(frozen=True)
class SweepRows:
    """The finished runs of a sweep.

    Args:
        rows: one dict per run: `COLUMNS`, the ``varied`` settings, status, tokens, seconds, precision, FLOPs and run.
        varied: settings that differ between runs and have no column in `COLUMNS`.
        unfinished: directories of runs that are not done.
        directories: by the column ``run``, of the runs whose directories were read.
    """

    rows: list[dict[str, Any]]
    varied: list[str]
    unfinished: list[Path]
    directories: Mapping[str, Path] = field(default_factory=dict)


def read_sweep(places: Sequence[Path], apart: bool = False) -> SweepRows:
    """Return a row for each finished pre-training run in ``places``: run directories or their parents.

    A place may also be a ``results.csv`` written earlier; its rows also count when their run directories are gone.

    The column ``parameterization`` holds the scheme, followed by those of its settings that differ between the runs of
    that scheme. With ``apart`` it holds the scheme alone, and these settings get columns of their own.

    Args:
        apart: whether settings of the parameterization get columns of their own.

    Raises:
        UserError: a place holds no run, or no finished one; or a table lacks the column of a setting that varies.
    """
    tables = [place for place in places if place.suffix == ".csv"]
    done: dict[Path, tuple[dict[str, Any], dict[str, Any]]] = {}
    unfinished: list[Path] = []
    for directory in dict.fromkeys(found for place in places if place not in tables for found in _runs(place)):
        if not (directory / RESULT).exists():
            unfinished.append(directory)
            continue
        result = load_result(directory / RESULT)
        if result.get("stage") == "pretrain" and "imported" not in result:  # nothing trained an imported model here
            check(result, SweptResult, str(directory / RESULT))
            done[directory] = (_swept(directory), result)
    earlier = {row["run"]: (row, table) for table in tables for row in _table(table)}
    names = _run_names(list(done))
    for directory in done:
        earlier.pop(names[directory], None)
    if not done and not earlier:
        raise UserError(f"{', '.join(map(str, places))}: no finished pre-training run ({len(unfinished)} unfinished)")
    plain = _settings({directory: config for directory, (config, _) in done.items()})
    _leave_paths_out(plain)
    sections = {directory: config["parameterization"] for directory, (config, _) in done.items()}
    labels = {directory: section["scheme"] for directory, section in sections.items()} if apart else _labels(sections)
    varied = [
        name
        for name in dict.fromkeys(name for leaves in plain.values() for name in leaves)
        if name not in _SAID
        and name != "parameterization.scheme"
        and (apart or not name.startswith("parameterization."))
        and len({str(leaves.get(name)) for leaves in plain.values()}) > 1
    ]
    known = {*COLUMNS, *_LAST, *varied}
    varied += dict.fromkeys(name for row, _ in earlier.values() for name in row if name not in known)
    for row, table in earlier.values():
        missing = [name for name in varied if name not in row]
        if missing:
            raise UserError(f"{table} has no column {missing[0]}, which differs between the runs beside it")
    rows = []
    for directory, (_, result) in done.items():
        row = {name: result.get(name) for name in COLUMNS}
        row |= {"parameterization": labels[directory], "loss": result.get("loss_last")}
        row |= {name: plain[directory].get(name) for name in varied}
        row |= {name: result.get(name) for name in (*_LAST[:4], _REPORTED)}
        row |= {"flops": result["flops"]["total"], **_hidden(directory, result), "run": names[directory]}
        rows.append(check(row, SweepRow, str(directory / RESULT)))
    rows += [row for row, _ in earlier.values()]
    left_out = {_REPORTED} if all(row.get(_REPORTED) is None for row in rows) else set()
    order = [name for name in (*COLUMNS, *varied, *_LAST) if name not in left_out]
    rows = [{name: {**row, **_tokens_per(row)}.get(name) for name in order} for row in rows]
    rows.sort(key=lambda row: [_sortable(row[name]) for name in (*COLUMNS[:6], *varied)])
    return SweepRows(rows, varied, unfinished, {name: directory for directory, name in names.items()})


def _run_names(directories: Sequence[Path]) -> dict[Path, str]:
    """Return a name of each run that no other has: that of its directory, with as many of its parents as it takes."""
    alike: dict[str, list[Path]] = {}
    for directory in directories:
        alike.setdefault(directory.name, []).append(directory)
    names = {}
    for same in alike.values():
        parts = [directory.resolve().parts for directory in same]
        depth = 1
        while len({of[-depth:] for of in parts}) < len({*parts}):
            depth += 1
        names.update({directory: "/".join(of[-depth:]) for directory, of in zip(same, parts, strict=True)})
    return names


def _swept(directory: Path) -> dict[str, Any]:
    """Return all settings of a run, including ones added since then with their defaults, and its corpus."""
    config: dict[str, Any] = check(
        described(read_recorded(directory, PretrainConfig)), SweptConfig, str(directory / CONFIG)
    )
    return config


def _hidden(directory: Path, result: dict[str, Any]) -> dict[str, Any]:
    """Return the columns about the hidden matrices of a run; empty for one whose settings are no longer possible."""
    recorded = read_recorded(directory, PretrainConfig)
    empty = dict.fromkeys(_HIDDEN[:3])
    try:
        config = build(PretrainConfig, recorded.values)
        hidden = hidden_of_run(config)
        steps = result.get("steps") or steps_of(config)
        # Where the noise scale leads the batch, its settings do not say how much a token decays.
        known = config.optimizer.name == "adamw" and config.budget.led is None
        tau = hidden.tau(steps) if steps and known else math.inf
    except UserError:
        return empty
    nonzeros = None if hidden.resizes else hidden.nonzeros
    return {"weights": hidden.weights, "nonzeros": nonzeros, "tau": tau if math.isfinite(tau) else None}


def _tokens_per(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return the tokens that trained each hidden weight and each nonzero, as far as they are known."""
    tokens = row.get("tokens")
    known = {name: row.get(f"{name}s") for name in ("weight", "nonzero")}
    return {f"tokens_per_{name}": tokens / count if tokens and count else None for name, count in known.items()}


def _leave_paths_out(plain: dict[Path, dict[str, Any]]) -> None:
    """Remove the settings of the text if all runs have the same corpus: its path may differ, its content does not."""
    if len({leaves.get("corpus") for leaves in plain.values()}) == 1:
        for leaves in plain.values():
            for name in [name for name in leaves if name.startswith("data.") and name != "data.context"]:
                del leaves[name]


def _table(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a ``results.csv`` that `read_sweep` wrote, with numbers parsed.

    Raises:
        UserError: the file is no CSV, lacks a column, or a cell has the wrong type; the message gives its row.
    """
    rows = []
    for number, cells in enumerate(read_table(path), start=1):
        missing = [name for name in (*COLUMNS, *_REQUIRED) if name not in cells]
        if missing:
            raise UserError(f"{path} is not the table of a sweep: it has no column {missing[0]}")
        row = {
            renamed(name, PretrainConfig): (text or None) if name in _TEXTS else table_cell(text)
            for name, text in cells.items()
        }
        rows.append(check(row, SweepRow, f"{path}, row {number}"))
    if not rows:
        raise UserError(f"{path} has no row")
    return rows


def _sortable(value: Any) -> tuple[int, float, str]:
    number = isinstance(value, int | float)
    return (0, float(value), "") if number else (1, 0.0, str(value))


def _runs(place: Path) -> list[Path]:
    if (place / CONFIG).exists():
        return [place]
    found = sorted(path.parent for path in place.glob(f"*/{CONFIG}"))
    if not found:
        raise UserError(f"{place} holds no run: neither {CONFIG} nor */{CONFIG} is there")
    return found


def _settings(configs: dict[Path, dict[str, Any]]) -> dict[Path, dict[str, Any]]:
    """Return the settings of each run by dotted name.

    One that is a value in some runs and a section in others, such as a batch size that is a ramp, is one setting in
    all of them, and a section is then written in command-line syntax.
    """
    plain = {directory: dict(_leaves(config)) for directory, config in configs.items()}
    names = {name for leaves in plain.values() for name in leaves}
    mixed = {name for name in names if any(other.startswith(f"{name}.") for other in names)}
    for directory, leaves in plain.items():
        for name in mixed - leaves.keys():
            inner = [other for other in leaves if other.startswith(f"{name}.")]
            if inner:
                leaves[name] = _value(configs[directory], name.split("."), "")
            for other in inner:
                del leaves[other]
    return plain


def _leaves(config: dict[str, Any]) -> Iterable[tuple[str, Any]]:
    """Yield the dotted name and the value of each setting that can change the result of a run."""
    for name, text in flatten(config):
        if not set(name.split(".")) & set(INCIDENTAL):
            yield name, _value(config, name.split("."), text)


def _value(config: Any, path: Sequence[str], text: str) -> Any:
    for part in path:
        if not isinstance(config, dict) or part not in config:
            return text
        config = config[part]
    if isinstance(config, dict) or (
        isinstance(config, list) and (not config or any(isinstance(item, dict) for item in config))
    ):
        return _listed(config)
    return config if isinstance(config, int | float | str) or config is None else text


def _listed(value: Any) -> str:
    """Return a list of sections, such as phases, in command-line syntax without null values."""
    if isinstance(value, dict):
        return f"{{{', '.join(f'{name}: {_listed(item)}' for name, item in value.items() if item is not None)}}}"
    return f"[{', '.join(map(_listed, value))}]" if isinstance(value, list) else str(value)


def _labels(sections: dict[Path, dict[str, Any]]) -> dict[Path, str]:
    """Return the scheme of each run, with the settings that differ between runs of that scheme in brackets."""
    labels = {}
    for directory, section in sections.items():
        alike = [other for other in sections.values() if other["scheme"] == section["scheme"]]
        differing = [key for key in section if any(other.get(key) != section[key] for other in alike)]
        options = " ".join(f"{key}={section[key]}" for key in differing)
        labels[directory] = f"{section['scheme']} ({options})" if options else section["scheme"]
    return labels


def show_sweep(
    places: Sequence[Path], x: str, out: Path | None, seeds: int, search: bool, console: Console | None = None
) -> None:
    """Print the results of a sweep, and write its tables and figure to ``out``.

    Args:
        x: the swept column, ``lr`` or a setting such as ``model.init_std``.
        seeds: number of seeds wanted around each minimum; it determines the suggested commands.
        search: rank the points of a random search by loss instead of drawing curves.

    Raises:
        UserError: see `read_sweep` and `report.sweep.lines_of`.
    """
    console = console or Console()
    found = read_sweep(places, apart=search)
    x = "lr" if x == "optimizer.lr" else x
    tell = functools.partial(say, console)
    diverged = sum(row["status"] == "diverged" for row in found.rows)
    tell(f"{len(found.rows)} finished runs, {diverged} of them diverged; {len(found.unfinished)} unfinished")
    if search:
        knobs = search_knobs(found.rows, ["lr", *found.varied])
        print_sheets([search_sheet(found.rows, knobs)], console)
    else:
        extra = [name for name in found.varied if name != x]
        lines = lines_of(found.rows, x, extra)
        print_sheets([optima_sheet(lines, x, extra)], console)
        for sentence in findings(lines, extra):
            tell(f"- {sentence}")
        commands = next_commands(lines, x, extra, range(seeds))
        if commands:
            tell("to run next: append each line to the command of the sweep")
        for command in commands:
            tell(f"  {command}")
    if out is None:
        return
    with file_errors(out):
        out.mkdir(parents=True, exist_ok=True)
    write_rows(found.rows, out / "results.csv")
    if search:
        search_figure(found.rows, knobs, out / "figure.png")
    else:
        write_optima(lines, out / "optima.csv", extra)
        sweep_figure(lines, x, out / "figure.png", extra)
    tell(f"written: {', '.join(sorted(path.name for path in out.glob('*.[cp][sn][vg]')))} in {out}")
