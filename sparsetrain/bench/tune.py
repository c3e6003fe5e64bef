"""Measurement of the crossover table: from which sparsity each sparse backend is faster than dense on this machine."""

from __future__ import annotations

import itertools
import math
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table

from sparsetrain.bench.crossover import (
    DECODING_SIDES,
    FEW_TOKENS,
    SIDES,
    TOKENS,
    measurable,
    measure,
    measure_decoding,
    tuned,
)
from sparsetrain.cache import check_room
from sparsetrain.errors import UserError
from sparsetrain.machine import core_count
from sparsetrain.runs.provenance import machine
from sparsetrain.screen import say
from sparsetrain.sparsity.backends.auto import DECODING, Crossover, save, table_name
from sparsetrain.sparsity.backends.few_tokens import MOST
from sparsetrain.stages.memory import check_footprint, footprint_of, memory_errors


@dataclass
class TuneConfig:
    """Measure from which sparsity the sparse kernels are faster than dense ones; ``backend=auto`` uses the result.

    Runs that have started keep their backends.

    Args:
        threads: thread counts to measure; null for one thread and all cores.
        sides: sizes of the square layers to time, multiples of 16 from 32 on.
        tokens: numbers of input rows to time; of those up to 48, products without gradients too, as in decoding.
        repeats: number of timings; the median counts.
        force: run even if the estimated memory exceeds the free memory; the option ``--force`` sets it.
    """

    threads: list[int] | None = None
    sides: list[int] | None = None
    tokens: list[int] | None = None
    repeats: int = 5
    force: bool = False

    def __post_init__(self) -> None:
        for name in ("threads", "sides", "tokens"):
            given = getattr(self, name)
            if given is not None and (not given or min(given) < 1 or sorted(set(given)) != given):
                raise UserError(f"{name}={given} must be increasing numbers from 1 on")
        multiple = math.lcm(*itertools.chain(*tuned().values()))
        if any(side % multiple or side == multiple for side in self.sides or []):
            raise UserError(f"sides={self.sides} must be multiples of {multiple} above {multiple}, as blocks need")
        if self.repeats < 1:
            raise UserError(f"repeats={self.repeats} must be at least 1")


def tune(config: TuneConfig, console: Console | None = None) -> Path:
    """Measure the crossover table of this machine, save it in the cache, print it and return its path."""
    console = console or Console()
    threads = config.threads or sorted({1, core_count()})
    side, rows = max(config.sides or SIDES), max(config.tokens or TOKENS)
    # The densest layer timed has nearly all its weights, and dense computation expands them into a second matrix.
    needed = footprint_of({"the layer": 2 * side**2 * 4, "inputs and gradients": 2 * rows * side * 4})
    check_footprint(needed, f"a layer of sides={side} with tokens={rows}", config.force)
    with memory_errors("this measurement"):
        return _tune(config, threads, console)


def _tune(config: TuneConfig, threads: list[int], console: Console) -> Path:
    check_room()  # a measurement takes up to an hour, so a full disk must show before it
    started = time.monotonic()
    columns = (TextColumn("{task.description}"), BarColumn(16), TextColumn("{task.completed}/{task.total} cases"))
    with Progress(*columns, TimeRemainingColumn(), console=console, transient=True) as progress:
        tables: dict[str, Crossover] = {}
        for name, dtype in measurable():
            task = progress.add_task(f"{table_name(name, dtype)} against dense", total=None)

            def update(done: int, total: int, task: TaskID = task) -> None:
                progress.update(task, completed=done, total=total)

            tables[table_name(name, dtype)] = measure(
                name, threads, dtype, config.sides or SIDES, config.tokens or TOKENS, config.repeats, update
            )
        if few := [rows for rows in config.tokens or FEW_TOKENS if rows <= MOST]:
            task = progress.add_task(f"{DECODING} against dense", total=None)
            tables[DECODING] = measure_decoding(
                threads,
                config.sides or DECODING_SIDES,
                few,
                config.repeats,
                lambda done, total: progress.update(task, completed=done, total=total),
            )
    path = save(tables, {"machine": machine(torch.device("cpu"))})
    for name, table in tables.items():
        for index, count in enumerate(threads):
            console.print(_shown(name, table, index, count))
    say(console, f"measured in {time.monotonic() - started:.0f} s; saved in {path}")
    return path


def _shown(name: str, table: Crossover, index: int, threads: int) -> Table:
    backend, *kind = name.split()
    block = "x".join(map(str, tuned()[backend]))
    shown = Table(
        title=", ".join([f"{backend} {block}", *kind, f"threads: {threads}"]),
        caption="faster from this sparsity on",
    )
    shown.add_column("side", justify="right")
    for tokens in table.tokens:
        shown.add_column(f"{tokens} tokens", justify="right")
    for side, row in zip(table.sides, table.density[index], strict=True):
        shown.add_row(str(side), *("never" if density == 0 else f"{1 - density:.0%}" for density in row))
    return shown
