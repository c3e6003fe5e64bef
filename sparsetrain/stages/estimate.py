"""Estimates of run time, from the speed of finished runs, or roughly from a matrix product timed on this machine."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from rich.console import Console

from sparsetrain.data import Corpora, DataConfig, prepare_corpora
from sparsetrain.errors import UserError
from sparsetrain.report.text import duration, si
from sparsetrain.runs.layout import RESULT
from sparsetrain.runs.result import load_result
from sparsetrain.stages.config import PretrainConfig, RunConfig
from sparsetrain.stages.plan import PlannedRun, plan_text
from sparsetrain.stages.plan_inputs import Inputs
from sparsetrain.training.state import resolve_device

_WIDEST = 4096  # largest side of the timed matrix; larger products are no faster
_STEP_SHARE = 0.5  # rate of a small model's training step, relative to a bare matrix product


@dataclass(frozen=True)
class SweepCost:
    """The cost of a sweep.

    Args:
        points: total number of points.
        done: points already finished, diverged ones included.
        refused: points whose configuration cannot run.
        flops: training FLOPs of the remaining points by formula, for stored weights only.
        dense_flops: the same if computed densely, as the masked backend does.
        rate: dense FLOPs per second.
        measured: number of finished points that ``rate`` was measured on; 0 if a matrix product was timed instead.
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
        counts = f"{self.points} point{'s' * (self.points != 1)}, {self.done} already finished, {left} to run"
        if self.refused:
            counts += f", {self.refused} that cannot run"
        if not left:
            return f"sweep: {counts}"
        work = f"{si(self.flops, 'FLOP')} by formula, {si(self.dense_flops, 'FLOP')} if computed densely"
        time_ = f"{duration(self.dense_flops / self.rate)} in sequence at {si(self.rate, 'FLOP/s')}"
        if self.measured:
            on = f"{self.measured} finished point{'s' * (self.measured != 1)}"
            return f"sweep: {counts}: {work}; about {time_}, measured on {on}"
        return f"sweep: {counts}: {work}; very roughly {time_}, half the speed of a bare matrix product here"


def sweep_cost(points: Iterable[PretrainConfig | None], console: Console | None = None) -> SweepCost:
    """Return the cost of pre-training all ``points``; None stands for a point whose configuration was refused.

    This prepares the corpora, because the length of a run may depend on them.
    """
    inputs = Inputs(lambda data: _prepared(data, console))
    total = done = refused = 0
    left: list[tuple[RunConfig, PlannedRun]] = []
    finished: list[PlannedRun] = []
    for config in points:
        total += 1
        try:
            run = None if config is None else plan_text("pretrain", config, inputs)
        except UserError:  # the point itself raises it again and prints it
            run = None
        if run is None or config is None:
            refused += 1
            continue
        if (run.directory / RESULT).exists():
            done += 1
            finished.append(run)
        elif not (config.force or run.fits):
            refused += 1
        else:
            left.append((config, run))
    rate, measured = _rate(finished, [config for config, _ in left])
    flops, dense = sum(run.flops for _, run in left), sum(run.dense_flops for _, run in left)
    return SweepCost(total, done, refused, flops, dense, rate, measured)


@dataclass(frozen=True)
class Times:
    """Estimated run times.

    Args:
        seconds: time of each run; None if it is done or its length is unknown.
        basis: what the estimate is based on, to end a sentence with.
    """

    seconds: Sequence[float | None]
    basis: str

    @property
    def remaining(self) -> float:
        """Total seconds of the runs that are not done, in sequence."""
        return sum(each for each in self.seconds if each is not None)


def estimate(planned: Sequence[tuple[RunConfig, PlannedRun]]) -> Times:
    """Return the estimated time of each planned run; for a stopped run, the time of its remaining steps.

    Args:
        planned: runs, each with a configuration that has its device and the width of its model.
    """
    finished = [run for _, run in planned if run.done]
    open_ = [not run.done and bool(run.phases) for _, run in planned]
    left = [config for (config, _), wanted in zip(planned, open_, strict=True) if wanted]
    rate, measured = _rate(finished, left) if left else (0.0, 0)
    seconds = [
        run.dense_flops / rate * (1.0 - run.steps_done / run.steps) if wanted and rate else None
        for (_, run), wanted in zip(planned, open_, strict=True)
    ]
    runs = f"the {measured} finished runs here" if measured > 1 else "the finished run here"
    return Times(seconds, f"as fast as {runs}" if measured else "very roughly, at half the speed of a matrix product")


def _rate(finished: Iterable[PlannedRun], left: Sequence[RunConfig]) -> tuple[float, int]:
    """Return dense FLOPs per second and the number of finished runs measured; with 0 runs the rate is a guess."""
    flops = seconds = 0.0
    measured = 0
    for run in finished:
        result = load_result(run.directory / RESULT)
        if result.get("status") == "complete" and result.get("seconds"):
            measured += 1
            flops += run.dense_flops
            seconds += result["seconds"]
    if measured:
        return flops / seconds, measured
    widest = max(left, key=lambda config: int(config.model["d_model"]), default=None)
    return (0.0 if widest is None else _STEP_SHARE * _product_rate(widest)), 0


def _prepared(config: DataConfig, console: Console | None) -> tuple[str, Corpora | None]:
    corpora = prepare_corpora(config, progress=True, console=console)
    return corpora.key, corpora


def _product_rate(config: RunConfig) -> float:
    """Return the FLOP/s of multiplying one step's tokens with a matrix of the model, timed for 0.25 s."""
    device = resolve_device(config.device)
    width = min(_WIDEST, int(config.model["d_model"]))
    tokens = min(4096, config.budget.first_batch * config.data.context)
    x, w = torch.ones(tokens, width, device=device), torch.ones(4 * width, width, device=device)
    count, started = 0, time.monotonic()
    while (elapsed := time.monotonic() - started) < 0.25 or count < 2:
        (x @ w.t()).sum().item()  # waits for the device
        count += 1
    return count * 2.0 * tokens * 4 * width * width / elapsed
