"""Estimates of run time: predicted where this machine is calibrated, else from the speed of finished runs, or roughly.

A rough estimate is made from a matrix product that is timed here.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch
from rich.console import Console

from sparsetrain.cost.hardware import Machine
from sparsetrain.data import Corpora, DataConfig, prepare_corpora
from sparsetrain.errors import UserError
from sparsetrain.report.text import duration, si
from sparsetrain.runs.layout import RESULT
from sparsetrain.runs.result import load_result
from sparsetrain.stages.config import PretrainConfig, RunConfig
from sparsetrain.stages.plan import PlannedRun, plan_text
from sparsetrain.stages.plan_inputs import Inputs
from sparsetrain.stages.work import calibrated_on, predicted_on, this_machine
from sparsetrain.training.state import resolve_device

_WIDEST = 4096  # largest side of the timed matrix; larger products are no faster
HINT = "sparsetrain calibrate gives a time with a band"
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
        times: predicted times of the remaining points; None if this machine is not calibrated for all of them.
    """

    points: int
    done: int
    refused: int
    flops: float
    dense_flops: float
    rate: float
    measured: int
    times: Times | None = None

    def describe(self) -> str:
        """Return one line for the terminal."""
        left = self.points - self.done - self.refused
        counts = f"{self.points} point{'s' * (self.points != 1)}, {self.done} already finished, {left} to run"
        if self.refused:
            counts += f", {self.refused} that cannot run"
        if not left:
            return f"sweep: {counts}"
        work = f"{si(self.flops, 'FLOP')} by formula, {si(self.dense_flops, 'FLOP')} if computed densely"
        if self.times is not None:
            return f"sweep: {counts}: {work}; {self.times.describe(' in sequence')}"
        time_ = f"{duration(self.dense_flops / self.rate)} in sequence at {si(self.rate, 'FLOP/s')}"
        if self.measured:
            on = f"{self.measured} finished point{'s' * (self.measured != 1)}"
            return f"sweep: {counts}: {work}; about {time_}, measured on {on}"
        rough = f"very roughly {time_}, half the speed of a bare matrix product here"
        return f"sweep: {counts}: {work}; {rough}; {HINT}"


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
    times = _predicted(left)
    rate, measured = (0.0, 0) if times is not None else _rate(finished, [config for config, _ in left])
    flops, dense = sum(run.flops for _, run in left), sum(run.dense_flops for _, run in left)
    return SweepCost(total, done, refused, flops, dense, rate, measured, times)


@dataclass(frozen=True)
class Times:
    """Estimated run times.

    Args:
        seconds: time of each run; None if it is done or its length is unknown.
        basis: what the estimate is based on, to end a sentence with.
        bands: for each run the seconds between which 90 % of times are expected; empty if they are not known.
        phases: for each run the predicted seconds of each phase; empty if they are not known.
        hint: how to get a better estimate, or nothing.
    """

    seconds: Sequence[float | None]
    basis: str
    bands: Sequence[tuple[float, float] | None] = ()
    phases: Sequence[Sequence[float]] = ()
    hint: str = ""

    @property
    def remaining(self) -> float:
        """Total seconds of the runs that are not done, in sequence."""
        return sum(each for each in self.seconds if each is not None)

    def describe(self, what: str = "", run: int | None = None) -> str:
        """Return the time of a run, or of all, as a clause: with its band if that is known, and with its basis.

        Args:
            what: follows the time. run: index of a run; None is all that are not done.
        """
        seconds = self.remaining if run is None else self.seconds[run]
        assert seconds is not None
        band = ""
        if self.bands:
            known = [each for each in (self.bands if run is None else [self.bands[run]]) if each is not None]
            # Runs on one machine are too fast or too slow together.
            low, high = (sum(ends) for ends in zip(*known, strict=True))
            band = f" [{duration(low)} to {duration(high)}]"
        return f"about {duration(seconds)}{band}{what}, {self.basis}"


def estimate(planned: Sequence[tuple[RunConfig, PlannedRun]]) -> Times:
    """Return the estimated time of each planned run; for a stopped run, the time of its remaining steps.

    Args:
        planned: runs, each with a configuration that has its device and the width of its model.
    """
    if (found := _predicted(planned)) is not None:
        return found
    finished = [run for _, run in planned if run.done]
    open_ = [not run.done and bool(run.phases) for _, run in planned]
    left = [config for (config, _), wanted in zip(planned, open_, strict=True) if wanted]
    rate, measured = _rate(finished, left) if left else (0.0, 0)
    seconds = [
        run.dense_flops / rate * (1.0 - run.steps_done / run.steps) if wanted and rate else None
        for (_, run), wanted in zip(planned, open_, strict=True)
    ]
    runs = f"the {measured} finished runs here" if measured > 1 else "the finished run here"
    basis = f"as fast as {runs}" if measured else "very roughly, at half the speed of a matrix product"
    return Times(seconds, basis, hint="" if _calibrated() else HINT)


def _calibrated() -> Machine | None:
    try:
        return this_machine()
    except UserError:
        return None


def _predicted(planned: Sequence[tuple[RunConfig, PlannedRun]]) -> Times | None:
    """Return the predicted times of the training steps of planned runs; None if that of any run is not known."""
    machine = _calibrated()
    if machine is None:
        return None
    seconds: list[float | None] = []
    bands: list[tuple[float, float] | None] = []
    phases: list[list[float]] = []
    for config, run in planned:
        found, parts = None, []
        if run.work is not None and not run.done and run.steps_done < run.steps:
            found = predicted_on(machine, config, run.work.after(run.steps_done))
            if found is None:
                return None
            parts = [found.seconds]
            if len(run.phases) > 1 or run.steps_done:
                ends = [0, *accumulate(phase.steps for phase in run.phases)]
                whole = [predicted_on(machine, config, run.work.between(*borders)) for borders in pairwise(ends)]
                parts = [part.seconds for part in whole if part is not None]
        seconds.append(None if found is None else found.seconds)
        bands.append(None if found is None else found.band)
        phases.append(parts)
    if not any(seconds):
        return None
    return Times(seconds, f"90 % band, training steps alone, as calibrated on {calibrated_on(machine)}", bands, phases)


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
