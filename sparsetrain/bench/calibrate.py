"""Calibration: this machine measured in a few minutes, so that the time of a training step can be predicted on it.

Single operations give the curves, whole training steps the factors between an operation alone and one inside a model;
`sparsetrain.cost.calibrated` puts both together.
"""

from __future__ import annotations

import itertools
import math
import os
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from sparsetrain import seeds
from sparsetrain.bench.calibration_cells import Cell, cells
from sparsetrain.bench.machine import with_threads
from sparsetrain.bench.steps import TORCH_TYPES, StepCase, step_seconds
from sparsetrain.bench.timing import interleaved
from sparsetrain.bench.validate import errors, validate
from sparsetrain.cache import check_room
from sparsetrain.cost.calibrated import Sample, Step, corrected, document
from sparsetrain.cost.hardware import THIS, Machine, calibrated_path
from sparsetrain.cost.operations import BACKWARD, FORWARD, UPDATE
from sparsetrain.cost.simulate import band_factor
from sparsetrain.cost.timing import Setting
from sparsetrain.errors import UserError, check_choice
from sparsetrain.files import typed_path
from sparsetrain.machine import available_cores, processor
from sparsetrain.models import ModelConfig
from sparsetrain.report.text import percent, si
from sparsetrain.report.validation import validation_lines, write_validation
from sparsetrain.screen import say

BACKENDS = ("csr", "masked")
LEAST_SECONDS = 20.0
_LEAST_STEPS = 6  # for each number of threads and type
_ROUNDS, _LEAST_CALL = 3, 0.004
_LEAST_FLOPS, _MOST_FLOPS = 1e8, 2.5e10  # of a whole step, so that many of them fit into the budget


def step_cases() -> Iterator[StepCase]:
    """Yield whole steps over widths, depths, tokens, sparsities, backends and components, in a fixed order."""
    generator = seeds.generator(0, "calibration", "cases")

    def pick(options: Sequence[Any]) -> Any:
        return options[int(torch.randint(len(options), (), generator=generator))]

    while True:
        width, d_head = pick((96, 128, 192, 224, 256, 320, 384, 512, 576)), pick((16, 32))
        context = pick((48, 96, 192, 384))
        batch = max(1, pick((160, 384, 768, 1536, 3072)) // context)
        sparsity = pick((0.0, 0.0, 0.6, 0.8, 0.92))
        model = ModelConfig(
            d_model=width,
            n_layers=pick((1, 2, 3, 5, 7)),
            n_heads=width // d_head,
            vocab_size=pick((256, 768, 3072, 6144)),
            max_context=context,
            mlp=pick(("gelu", "swiglu")),
            norm=pick(("layernorm", "rmsnorm")),
            positions=pick(("alibi", "rope", "learned")),
            bias=pick((True, False)),
            seed=0,
        )
        backend = pick(("csr", "csr", "masked", "auto")) if sparsity else "auto"
        case = StepCase(model, sparsity, backend, context, batch)
        if _LEAST_FLOPS < case.dense_flops < _MOST_FLOPS:
            yield case


@dataclass
class CalibrateConfig:
    """Measure this machine, so that `simulate machine=this` predicts the time of training steps on it.

    Args:
        budget_seconds: about how long to measure, at least 20; more seconds narrow the band of predictions.
        threads: thread counts to measure; null for one thread and all cores.
        dtypes: types of products to measure: ``float32``, and ``bfloat16`` by autocast.
        validate: sparse steps, and as many dense ones, to predict and then measure afterwards; none was fitted.
        out: a directory for the ``results.csv`` and the ``figure.png`` of the validation.
    """

    budget_seconds: float = 120.0
    threads: list[int] | None = None
    dtypes: list[str] = field(default_factory=lambda: ["float32"])
    validate: int = 0
    out: str | None = None

    def __post_init__(self) -> None:
        if not (math.isfinite(self.budget_seconds) and self.budget_seconds >= LEAST_SECONDS):
            raise UserError(f"budget_seconds={self.budget_seconds} must be a number of at least {LEAST_SECONDS:g}")
        if self.validate < 0 or (self.out is not None and self.validate == 0):
            raise UserError(f"validate={self.validate} must be at least {int(self.out is not None)}")
        for dtype in self.dtypes:
            check_choice("dtypes", dtype, TORCH_TYPES)
        if "float32" not in self.dtypes:
            raise UserError(f"dtypes={self.dtypes} must have float32, which all other work is computed in")
        given = self.threads
        if given is not None and (not given or min(given) < 1 or sorted(set(given)) != given):
            raise UserError(f"threads={given} must be increasing numbers from 1 on")


def calibrate(
    budget_seconds: float = 120.0,
    threads: Sequence[int] | None = None,
    dtypes: Sequence[str] = ("float32",),
    console: Console | None = None,
) -> Machine:
    """Measure this machine and save it: see `sparsetrain.calibrate`. A console shows the progress."""
    config = CalibrateConfig(budget_seconds, None if threads is None else list(threads), list(dtypes))
    check_room()
    counts = config.threads or sorted({1, available_cores()})
    clock = _Clock(config.budget_seconds, console)
    with clock:
        samples = list(_samples(counts, config.dtypes, clock))
        steps = _steps(counts, config.dtypes, clock)
    now = datetime.now(UTC).date().isoformat()
    title = f"sparsetrain calibrate: {len(samples)} operations and {len(steps)} whole steps"
    title += f", threads {counts}, {' and '.join(config.dtypes)}"
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    with with_threads(counts[-1]):
        bandwidth = _bandwidth()
    content = document(samples, processor().label, title, now, memory, bandwidth)
    machine = Machine.from_document(corrected(content, steps), THIS, "the calibration")
    machine.save(calibrated_path())
    return machine


def calibrate_this(config: CalibrateConfig) -> None:
    """Measure this machine, and print what was found and where it is kept."""
    console = Console()
    machine = calibrate(config.budget_seconds, config.threads, config.dtypes, console)
    peak, bandwidth = machine.peak_rate("float32"), machine.memory[-1].bandwidth.value
    say(console, f"{machine.label}: {si(peak, 'FLOP/s')} in float32, {si(bandwidth, 'B/s')} of memory")
    say(console, f"90 % of step times are expected within {percent(band_factor(machine) - 1.0, 0)} of a prediction")
    say(console, f"saved in {calibrated_path()}; sparsetrain simulate machine=this uses it")
    if config.validate:
        _validate(machine, config, console)


def _validate(machine: Machine, config: CalibrateConfig, console: Console) -> None:
    """Measure steps that were not fitted; print how predictions differ from them, and write what was found."""
    out = None if config.out is None else typed_path(config.out, "out")
    columns = (TextColumn("held-out steps"), BarColumn(), TextColumn("{task.completed}/{task.total}"))
    with Progress(*columns, TimeRemainingColumn(), console=console, transient=True, auto_refresh=False) as bar:
        task = bar.add_task("", total=config.validate)
        counts = config.threads or sorted({1, available_cores()})
        rows = validate(
            machine, counts, config.dtypes, config.validate, lambda done: bar.update(task, completed=done, refresh=True)
        )
    found = {name: vars(each) for name, each in errors(rows, machine).items()}
    for line in validation_lines(found):
        say(console, line)
    if out is not None:
        assert machine.spread is not None
        write_validation([row.as_dict() for row in rows], found, machine.label, machine.spread.value, out)
        say(console, f"written: {out}")


@dataclass
class _Clock:
    """The budget, and its progress bar."""

    budget: float
    console: Console | None
    started: float = field(default_factory=time.monotonic)

    def __enter__(self) -> _Clock:
        columns = (TextColumn("{task.description}"), BarColumn(24), TextColumn("{task.percentage:.0f} %"))
        self._bar = Progress(
            *columns,
            TimeRemainingColumn(),
            console=self.console,
            transient=True,
            disable=self.console is None,
            auto_refresh=False,  # its thread would take time from what is measured
        )
        self._bar.__enter__()
        self._task = self._bar.add_task("single operations", total=self.budget)
        return self

    def __exit__(self, *exception: Any) -> None:
        self._bar.__exit__(*exception)

    @property
    def spent(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self.started

    def show(self, doing: str) -> None:
        """Show what is being measured."""
        self._bar.update(self._task, description=doing, completed=min(self.spent, self.budget), refresh=True)


def _samples(counts: Sequence[int], dtypes: Sequence[str], clock: _Clock) -> Iterator[Sample]:
    """Yield single operations, measured with each number of threads and in each type."""
    for count, dtype in itertools.product(counts, dtypes):
        with with_threads(count):
            for group in cells(BACKENDS, dtype):
                yield from _timed(group, count, dtype)
                clock.show(f"single operations, threads: {count}")


def _timed(group: list[Cell], threads: int, dtype: str) -> Iterator[Sample]:
    times = interleaved({index: cell.make() for index, cell in enumerate(group)}, _ROUNDS, _LEAST_CALL)
    for index, cell in enumerate(group):
        forward = statistics.median(times[index].forward)
        if UPDATE in cell.operations:
            yield Sample(cell.operations[UPDATE], cell.implementation, threads, forward, dtype)
            continue
        backward = max(statistics.median(times[index].step) - forward, 0.05 * forward)
        yield Sample(cell.operations[FORWARD], cell.implementation, threads, forward, dtype)
        yield Sample(cell.operations[BACKWARD], cell.implementation, threads, backward, dtype)


def _steps(counts: Sequence[int], dtypes: Sequence[str], clock: _Clock) -> list[Step]:
    """Return whole steps, measured in turns for each number of threads and type until the budget is spent."""
    measured: list[Step] = []
    turns = list(itertools.product(dtypes, counts))
    for number, drawn in enumerate(step_cases()):
        dtype, count = turns[number % len(turns)]
        if number >= _LEAST_STEPS * len(turns) and clock.spent > clock.budget:
            break
        case = replace(drawn, dtype=dtype)
        with with_threads(count):
            setting = Setting(dtype, case.backend, threads=count)
            measured.append(Step(case.operations(), setting, step_seconds(case.work())))
        clock.show(f"whole steps, threads: {count}")
    return measured


def _bandwidth() -> float:
    """Return the bytes/s of adding two arrays of 128 MiB into a third."""
    first, second = torch.ones(1 << 25), torch.ones(1 << 25)
    result = torch.empty_like(first)
    best = math.inf
    for _ in range(4):
        start = time.perf_counter()
        torch.add(first, second, out=result)
        best = min(best, time.perf_counter() - start)
    return 3.0 * 4.0 * first.numel() / best
