"""Measures, on this machine, from which sparsity on each sparse backend is the faster one."""

from __future__ import annotations

import itertools
import math
import os
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table

from sparsetrain.bench.crossover import BLOCKS, DTYPES, SIDES, TOKENS, measure
from sparsetrain.cache import check_room
from sparsetrain.errors import UserError
from sparsetrain.runs.provenance import machine
from sparsetrain.screen import say
from sparsetrain.sparsity.backends.auto import Crossover, save, table_name
from sparsetrain.stages.memory import check_footprint, footprint_of, memory_errors


@dataclass
class TuneConfig:
    """Measure when a layer is computed by its nonzeros, and when densely; ``backend=auto`` goes by it from then on.

    Runs that were begun keep the backends that they were begun with.

    Args:
        threads: numbers of threads to measure with; null for one and all cores.
        sides: square layers of these sizes, multiples of 16 from 32 on. tokens: rows of their inputs.
        repeats: timings of which the median counts.
        force: go on although the memory that this needs, as estimated, is not there. ``--force`` says the same.
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
                raise UserError(f"{name}={given} must be numbers from 1 on, each larger than the one before")
        unit = math.lcm(*itertools.chain(*BLOCKS.values()))
        if any(side % unit or side == unit for side in self.sides or []):
            raise UserError(f"sides={self.sides} must be multiples of {unit}, the blocks of bsr, and more than one")
        if self.repeats < 1:
            raise UserError(f"repeats={self.repeats} must be at least 1")


def tune(config: TuneConfig, console: Console | None = None) -> Path:
    """Measure the crossover table of this machine, save it in the cache and print it; return its path."""
    console = console or Console()
    threads = config.threads or sorted({1, os.cpu_count() or 1})
    side, rows = max(config.sides or SIDES), max(config.tokens or TOKENS)
    # The densest of the layers that are timed has nearly all of its weights, and computing densely spreads them.
    needed = footprint_of({"the layer": 2 * side**2 * 4, "inputs and gradients": 2 * rows * side * 4})
    check_footprint(needed, f"a layer of sides={side} with tokens={rows}", config.force)
    with memory_errors("this measurement"):
        return _tune(config, threads, console)


def _tune(config: TuneConfig, threads: list[int], console: Console) -> Path:
    check_room()  # it would be a pity to find out after an hour
    started = time.monotonic()
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total} cells"))
    with Progress(*columns, TimeRemainingColumn(), console=console, transient=True) as progress:
        tables: dict[str, Crossover] = {}
        for name, dtype in itertools.product(BLOCKS, DTYPES):
            task = progress.add_task(f"{table_name(name, dtype)} against dense", total=None)

            def update(done: int, total: int, task: TaskID = task) -> None:
                progress.update(task, completed=done, total=total)

            tables[table_name(name, dtype)] = measure(
                name, threads, dtype, config.sides or SIDES, config.tokens or TOKENS, config.repeats, update
            )
    path = save(tables, {"machine": machine(torch.device("cpu"))})
    for name, table in tables.items():
        for index, count in enumerate(threads):
            console.print(_shown(name, table, index, count))
    say(console, f"measured in {time.monotonic() - started:.0f} s; saved in {path}")
    return path


def _shown(name: str, table: Crossover, index: int, threads: int) -> Table:
    backend, *kind = name.split()
    block = "x".join(map(str, BLOCKS[backend]))
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
