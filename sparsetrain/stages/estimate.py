"""How long runs will take: by the rate of those that are finished, else roughly by that of a matrix product here."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from rich.console import Console

from sparsetrain.data import Corpus, DataConfig, prepare
from sparsetrain.errors import UserError
from sparsetrain.report.text import duration, si
from sparsetrain.runs.layout import RESULT
from sparsetrain.runs.result import load_result
from sparsetrain.stages.config import PretrainConfig, RunConfig
from sparsetrain.stages.plan import PlannedRun, plan_text
from sparsetrain.stages.plan_inputs import Inputs
from sparsetrain.training.state import resolve_device

_WIDEST = 4096  # of the matrix whose product is timed: a wider one is no faster
_STEP_SHARE = 0.5  # of a bare matrix product's rate that a whole training step of a small model reaches


@dataclass(frozen=True)
class SweepCost:
    """What a sweep takes.

    Args:
        points: total. done: already finished, diverged ones included. refused: whose configuration cannot run.
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

    The corpora are prepared, because the length of a run may depend on them.
    """
    inputs = Inputs(lambda data: _prepared(data, console))
    total = done = refused = 0
    left: list[tuple[RunConfig, PlannedRun]] = []
    finished: list[PlannedRun] = []
    for config in points:
        total += 1
        try:
            run = None if config is None else plan_text("pretrain", config, inputs)
        except UserError:  # the point itself will say why
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
    """How long runs will take.

    Args:
        seconds: of each; None for one that is done or whose length is open.
        basis: what the numbers rest on, as a part of a sentence.
    """

    seconds: Sequence[float | None]
    basis: str

    @property
    def left(self) -> float:
        """Seconds of all that is left, one after the other."""
        return sum(each for each in self.seconds if each is not None)


def estimate(planned: Sequence[tuple[RunConfig, PlannedRun]]) -> Times:
    """Return how long planned runs will take; of one that was stopped, the rest counts.

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
    return Times(seconds, f"as {runs}" if measured else "very roughly, at half the rate of a bare matrix product here")


def _rate(finished: Iterable[PlannedRun], left: Sequence[RunConfig]) -> tuple[float, int]:
    """Return dense FLOPs per second, and on how many finished runs they were measured; without any, a guess."""
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


def _prepared(config: DataConfig, console: Console | None) -> tuple[str, Corpus | None]:
    corpus = prepare(config, progress=True, console=console)
    return corpus.directory.name, corpus


def _product_rate(config: RunConfig) -> float:
    """Return FLOPs per second of the product of one step's tokens with a matrix of the model, over a quarter second."""
    device = resolve_device(config.device)
    width = min(_WIDEST, int(config.model["d_model"]))
    tokens = min(4096, config.budget.batch_size * config.data.context)
    x, w = torch.ones(tokens, width, device=device), torch.ones(4 * width, width, device=device)
    count, started = 0, time.monotonic()
    while (elapsed := time.monotonic() - started) < 0.25 or count < 2:
        (x @ w.t()).sum().item()  # waits for the device
        count += 1
    return count * 2.0 * tokens * 4 * width * width / elapsed
