"""Sweeps: what one costs before it starts, and the rows of its runs when it is done.

A point of a sweep is an ordinary pre-training run in a directory named by its configuration, so that a sweep which was
killed, or is given again with more values, skips what is done.
"""

from __future__ import annotations

import functools
import math
import re
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from sparsetrain.cost.flops import training_flops_per_token
from sparsetrain.data import Corpus, prepare
from sparsetrain.errors import UserError
from sparsetrain.files import file_errors
from sparsetrain.reading import read_csv
from sparsetrain.report.run_files import SweepRow, SweptConfig, SweptResult, load_result
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
from sparsetrain.report.text import duration, flatten, si
from sparsetrain.screen import say
from sparsetrain.shapes import check
from sparsetrain.stages.config import INCIDENTAL, PretrainConfig, as_plain, model_config, total_steps
from sparsetrain.stages.memory import memory_fits
from sparsetrain.stages.pretrain import memory_of, run_directory
from sparsetrain.stages.run import COLUMNS, CONFIG, RESULT, Origin, read_config
from sparsetrain.training.state import resolve_device

# What `COLUMNS` already say, or follows from them.
_SAID = ("optimizer.lr", "seed", "model.d_model", "model.n_layers", "model.n_heads", "sparsity.sparsity", "corpus")
_LAST = ("status", "tokens", "seconds", "precision", "train_flops", "run")  # columns of a row after those that vary
_WIDEST = 4096  # of the matrix whose product is timed: a wider one is no faster
_TEXTS = ("parameterization", "commit", "status", "precision", "run")
_WHOLE, _DECIMAL = re.compile(r"-?[0-9]{1,300}"), re.compile(r"-?[0-9]+(\.[0-9]+)?(e[+-]?[0-9]+)?", re.IGNORECASE)
_STEP_SHARE = 0.5  # of a bare matrix product's rate that a whole training step of a small model reaches


@dataclass(frozen=True)
class SweepCost:
    """What a sweep takes.

    Args:
        points: in all. done: finished before, diverged ones among them. refused: whose configuration cannot run.
        flops: training FLOPs of the rest by the formula, counting stored weights only.
        dense_flops: of the rest, computed densely, as the masked backend does.
        rate: dense FLOPs per second. measured: on how many finished points; 0 for a guess from a matrix product.
    """

    points: int
    done: int
    refused: int
    flops: float
    dense_flops: float
    rate: float
    measured: int

    def describe(self) -> str:
        """Return one line for the terminal."""
        left = self.points - self.done - self.refused
        counts = f"{self.points} point{'s' * (self.points != 1)}, {self.done} finished before, {left} to run"
        if self.refused:
            counts += f", {self.refused} that cannot run"
        if not left:
            return f"sweep: {counts}"
        work = f"{si(self.flops, 'FLOP')} by the formula, {si(self.dense_flops, 'FLOP')} if done densely"
        time_ = f"{duration(self.dense_flops / self.rate)} one after the other at {si(self.rate, 'FLOP/s')}"
        if self.measured:
            return f"sweep: {counts}: {work}; about {time_}, as the {self.measured} finished ones"
        return f"sweep: {counts}: {work}; very roughly {time_}, half of what a bare matrix product reaches here"


def sweep_cost(points: Iterable[PretrainConfig | None], console: Console | None = None) -> SweepCost:
    """Return what pre-training all ``points`` takes; None is a point whose configuration was refused.

    The corpora are prepared, because they are part of what names a run.
    """
    corpora: dict[str, Corpus | None] = {}
    total = done = refused = measured = 0
    flops = dense = done_flops = done_seconds = 0.0
    largest: PretrainConfig | None = None
    for config in points:
        total += 1
        corpus = None if config is None else _corpus(config, corpora, console)
        if config is None or corpus is None:
            refused += 1
            continue
        try:
            directory = run_directory("pretrain", config, Origin.of_corpus(corpus, config.init_from))
            sparse_flops, dense_flops = _training_flops(config, corpus)
        except UserError:
            refused += 1
            continue
        if (directory / RESULT).exists():
            done += 1
            result = load_result(directory / RESULT)
            if result.get("status") == "complete" and result.get("seconds"):
                measured += 1
                done_flops += dense_flops
                done_seconds += result["seconds"]
            continue
        if not _fits(config, corpus):
            refused += 1
            continue
        flops, dense = flops + sparse_flops, dense + dense_flops
        if largest is None or config.model["d_model"] > largest.model["d_model"]:
            largest = config
    rate = 0.0
    if measured:
        rate = done_flops / done_seconds
    elif largest is not None:
        rate = _STEP_SHARE * _product_rate(largest)
    return SweepCost(total, done, refused, flops, dense, rate, measured)


def _fits(config: PretrainConfig, corpus: Corpus) -> bool:
    try:
        return config.force or memory_fits(memory_of(config, corpus)[0], resolve_device(config.device))
    except UserError:
        return False  # the point itself will say why


def _corpus(config: PretrainConfig, corpora: dict[str, Corpus | None], console: Console | None) -> Corpus | None:
    key = str({name: value for name, value in as_plain(config)["data"].items() if name != "context"})
    if key not in corpora:
        try:
            corpora[key] = prepare(config.data, progress=True, console=console)
        except UserError:
            corpora[key] = None  # the point itself will say why
    return corpora[key]


def _training_flops(config: PretrainConfig, corpus: Corpus) -> tuple[float, float]:
    """Return FLOPs of a run by its stored weights, and computed densely. With groups both are the dense number."""
    model, context = model_config(config.model, corpus.tokenizer.vocab_size), config.data.context
    steps = total_steps(config, max(1, len(corpus.train) // context))
    tokens = steps * config.stage.batch_size * context
    dense = training_flops_per_token(model, 1.0, context).total * tokens
    if config.sparsity.groups:
        return dense, dense
    return training_flops_per_token(model, 1.0 - config.sparsity.sparsity, context).total * tokens, dense


def _product_rate(config: PretrainConfig) -> float:
    """Return FLOPs per second of the product of one step's tokens with a matrix of the model, over a quarter second."""
    device = resolve_device(config.device)
    width = min(_WIDEST, int(config.model["d_model"]))
    tokens = min(4096, config.stage.batch_size * config.data.context)
    x, w = torch.ones(tokens, width, device=device), torch.ones(4 * width, width, device=device)
    count, started = 0, time.monotonic()
    while (elapsed := time.monotonic() - started) < 0.25 or count < 2:
        (x @ w.t()).sum().item()  # waits for the device
        count += 1
    return count * 2.0 * tokens * 4 * width * width / elapsed


# What the runs of a sweep say.


@dataclass(frozen=True)
class SweepRows:
    """The finished runs of a sweep.

    Args:
        rows: `COLUMNS`, what else varies, then status, tokens, train_flops, seconds, precision and run.
        varied: names of the settings that vary and have no column of their own in `COLUMNS`.
        unfinished: directories of runs that are not done.
    """

    rows: list[dict[str, Any]]
    varied: list[str]
    unfinished: list[Path]


def collect(places: Sequence[Path], apart: bool = False) -> SweepRows:
    """Return a row for every finished pre-training run in ``places``: run directories, or directories of those.

    A place may also be a ``results.csv`` that was collected before: its rows stand for runs whose directories are gone.

    The column ``parameterization`` is the scheme, with those of its settings that differ between runs of that scheme;
    or, with ``apart``, the scheme alone, and such settings have columns of their own.

    Raises:
        UserError: a place that holds no run, or none that is finished; a table without a column that varies.
    """
    tables = [place for place in places if place.suffix == ".csv"]
    done: dict[Path, tuple[dict[str, Any], dict[str, Any]]] = {}
    unfinished: list[Path] = []
    for directory in dict.fromkeys(found for place in places if place not in tables for found in _runs(place)):
        if not (directory / RESULT).exists():
            unfinished.append(directory)
            continue
        result = load_result(directory / RESULT)
        if result.get("stage") == "pretrain":
            check(result, SweptResult, str(directory / RESULT))
            config = check(read_config(directory), SweptConfig, str(directory / CONFIG))
            done[directory] = (config, result)
    earlier = {row["run"]: (row, table) for table in tables for row in _table(table)}
    for directory in done:
        earlier.pop(directory.name, None)
    if not done and not earlier:
        raise UserError(f"{', '.join(map(str, places))}: no finished pre-training run ({len(unfinished)} unfinished)")
    plain = {directory: dict(_leaves(config)) for directory, (config, _) in done.items()}
    sections = {directory: config["parameterization"] for directory, (config, _) in done.items()}
    labels = {directory: section["scheme"] for directory, section in sections.items()} if apart else _labels(sections)
    varied = [
        name
        for name in next(iter(plain.values()), {})
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
        row |= {name: result.get(name) for name in _LAST[:4]}
        row |= {"train_flops": result["flops"]["total"], "run": directory.name}
        rows.append(check(row, SweepRow, str(directory / RESULT)))
    order = (*COLUMNS, *varied, *_LAST)
    rows += [{name: row[name] for name in order} for row, _ in earlier.values()]
    rows.sort(key=lambda row: [_sortable(row[name]) for name in (*COLUMNS[:6], *varied)])
    return SweepRows(rows, varied, unfinished)


def _table(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a ``results.csv`` that `collect` made, numbers as numbers.

    Raises:
        UserError: no CSV, a missing column, or a cell that is not what its column holds; it is named with its row.
    """
    rows = []
    for number, cells in enumerate(read_csv(path), start=1):
        missing = [name for name in (*COLUMNS, *_LAST) if name not in cells]
        if missing:
            raise UserError(f"{path} is no table of a sweep: it has no column {missing[0]}")
        row = {name: (text or None) if name in _TEXTS else _cell(text) for name, text in cells.items()}
        rows.append(check(row, SweepRow, f"{path}, row {number}"))
    if not rows:
        raise UserError(f"{path} has no row")
    return rows


def _cell(text: str) -> Any:
    """Return what `write_rows` wrote: a number as that, nothing as None."""
    if not text:
        return None
    if _WHOLE.fullmatch(text):
        return int(text)
    return float(text) if _DECIMAL.fullmatch(text) and math.isfinite(float(text)) else text


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


def _leaves(config: dict[str, Any]) -> Iterable[tuple[str, Any]]:
    """Yield dotted names and values of what a run depends on."""
    for name, text in flatten(config):
        if not set(name.split(".")) & set(INCIDENTAL):
            yield name, _value(config, name.split("."), text)


def _value(config: Any, path: Sequence[str], text: str) -> Any:
    for part in path:
        if not isinstance(config, dict) or part not in config:
            return text
        config = config[part]
    return config if isinstance(config, int | float | str) or config is None else text


def _labels(sections: dict[Path, dict[str, Any]]) -> dict[Path, str]:
    """Return the scheme of each run, and in brackets what differs between runs of that scheme."""
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
    """Print what the runs of a sweep say, and write their tables and figure to ``out``.

    Args:
        x: the swept column, ``lr`` or a setting such as ``model.init_std``.
        seeds: how many are wanted around each minimum, for the commands of what to run next.
        search: rank the points of a random search by their loss instead of drawing curves.

    Raises:
        UserError: see `collect` and `report.sweep.lines_of`.
    """
    console = console or Console()
    found = collect(places, apart=search)
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
            tell("to run next, each line at the end of the sweep's command:")
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
