"""What `plan_of` returns: planned runs and their phases."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from sparsetrain.cost.footprint import Footprint, Workload
from sparsetrain.cost.run_time import RunWork
from sparsetrain.runs.origin import Origin
from sparsetrain.stages.hidden import Hidden
from sparsetrain.stages.text import Reading


@dataclass(frozen=True)
class PlannedPhase:
    """A phase of a run.

    Args:
        tokens: tokens that the model reads in it.
        rates: lowest and highest base learning rate.
        densities: density of the hidden matrices at its first and at its last step.
        flops: training FLOPs by formula.
    """

    steps: int
    tokens: int
    rates: tuple[float, float]
    densities: tuple[float, float]
    context: int
    batch_size: int
    flops: float
    reads: Mapping[str, Reading] = field(default_factory=dict)  # of each of several corpora


@dataclass(frozen=True)
class PlannedRun:
    """What a run would do.

    Args:
        name: arm and name of a pipeline's stage, or the verb.
        directory: the run directory.
        status: ``done``, ``stopped at step N`` or ``new``.
        steps_done: that N, or 0.
        phases: empty if the length of the run is not known yet.
        workload: what it holds in memory.
        fits: whether that much memory is available.
        dense_flops: FLOPs of the same training computed densely.
        origin: text, tokenizer and weights that it starts from; None if its text is not prepared yet.
        final_densities: density of each sparse layer at its end; None if unknown.
        curves: the settings of the optimizer that change, by name, at steps from the first to the last.
        hidden: its hidden matrices, for a pre-training; None for a task.
        notes: sentences about what is unknown.
        trains: whether it trains; an evaluation does not.
        work: what its time follows from; None if its length is not known yet.
    """

    name: str
    directory: Path
    status: str
    steps_done: int = 0
    phases: Sequence[PlannedPhase] = ()
    workload: Workload | None = None
    fits: bool = True
    dense_flops: float = 0.0
    origin: Origin | None = None
    final_densities: Mapping[str, float] | None = None
    curves: Mapping[str, Sequence[float]] = field(default_factory=dict)
    hidden: Hidden | None = None
    notes: Sequence[str] = field(default_factory=list)
    trains: bool = True
    work: RunWork | None = None

    @property
    def done(self) -> bool:
        return self.status.startswith("done")

    @property
    def steps(self) -> int:
        return sum(phase.steps for phase in self.phases)

    @property
    def tokens(self) -> int:
        return sum(phase.tokens for phase in self.phases)

    @property
    def flops(self) -> float:
        return sum(phase.flops for phase in self.phases)

    @property
    def memory(self) -> Footprint | None:
        """The estimated peak memory."""
        return None if self.workload is None else self.workload.footprint()


@dataclass(frozen=True)
class Plan:
    """The runs of a configuration: a single run, or all stages of a pipeline.

    Args:
        directory: directory of the pipeline; None for a single run.
        status: progress of the pipeline.
    """

    runs: Sequence[PlannedRun]
    directory: Path | None = None
    status: str = ""
    notes: Sequence[str] = ()
