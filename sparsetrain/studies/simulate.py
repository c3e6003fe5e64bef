"""``sparsetrain simulate``: what a run, or a grid of runs, takes in time, memory, energy and money on machines."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sparsetrain.cost.cluster.parallelism import NONE, RECOMPUTE, ZERO_STAGES, Parallelism
from sparsetrain.cost.cluster.schedule import VALUE_BYTES, cluster_terms
from sparsetrain.cost.flops import hidden_shapes, matrices
from sparsetrain.cost.hardware import Machine
from sparsetrain.cost.operations import step_operations
from sparsetrain.cost.run_flops import RunFlops, rule_of_length
from sparsetrain.cost.run_time import RunWork, predicted
from sparsetrain.cost.simulate import Estimate
from sparsetrain.cost.sizes import Layers, Sizes
from sparsetrain.cost.timing import Setting, counted_layers, step_terms
from sparsetrain.errors import UserError, check_choice
from sparsetrain.files import typed_path
from sparsetrain.models import ModelConfig
from sparsetrain.report.simulation import show_simulation, write_simulation
from sparsetrain.report.text import flatten
from sparsetrain.runs.origin import run_tokenizer
from sparsetrain.scaling.law import Law, LossLaw
from sparsetrain.sparsity.evolution.managed import allocated_densities
from sparsetrain.sparsity.evolution.rules import Static
from sparsetrain.stages.config import PretrainConfig, as_plain, model_config
from sparsetrain.stages.masks import sparsity_section
from sparsetrain.stages.plan import vocabulary
from sparsetrain.stages.plan_inputs import Inputs
from sparsetrain.stages.predicted import work_of
from sparsetrain.stages.pretrain import budget_of
from sparsetrain.stages.text import Text
from sparsetrain.stages.work import work_on_text
from sparsetrain.studies.suggest import chosen_law

FORMATS, EQUAL = ("text", "json"), ("tokens", "flops", "loss")
SPARSITIES = np.round(np.linspace(0.0, 0.99, 100), 2)  # among which the break-even sparsity is looked for


@dataclass
class ParallelConfig:
    """How a step is divided among machines; `sparsetrain.cost.cluster.Parallelism` explains the fields.

    Args:
        data: replicas. tensor: machines that share every matrix. pipeline: stages of blocks.
        interleave: chunks of blocks in each stage.
        micro_batch: sequences of a forward pass; null is a replica's whole share.
        sequence: whether tensor parallelism divides what stands between the products, too.
        zero: what replicas share: 1 moments, 2 also gradients, 3 also weights.
        recompute: activations that the backward pass computes again: none, selective or full.
    """

    data: int = 1
    tensor: int = 1
    pipeline: int = 1
    interleave: int = 1
    micro_batch: int | None = None
    sequence: bool = False
    zero: int = 0
    recompute: str = NONE

    def __post_init__(self) -> None:
        check_choice("recompute", self.recompute, RECOMPUTE)
        if self.zero not in ZERO_STAGES:
            raise UserError(f"zero={self.zero} is not one of {', '.join(map(str, ZERO_STAGES))}")

    def build(self) -> Parallelism | None:
        """Return the division, or None for a single machine without recomputation."""
        if self == ParallelConfig():
            return None
        micro = None if self.micro_batch is None else float(self.micro_batch)
        return Parallelism(
            float(self.data),
            float(self.tensor),
            float(self.pipeline),
            float(self.interleave),
            micro,
            self.sequence,
            self.zero,
            self.recompute,
        )


@dataclass
class SimulateConfig(PretrainConfig):
    """Predict time, memory, energy and price of a pre-training on machines; nothing is trained.

    Lists with commas (``sparsity.sparsity=0,0.5,0.75``) become rows of one table. ``init_from=RUN`` predicts what that
    run would have taken elsewhere.

    Args:
        machine: a machine or a list: a shipped name, ``this`` after `sparsetrain calibrate`, or a YAML file.
        dtype: of products: float32, bfloat16, float16 or float8, as the machine has it; null is that of
            ``loop.precision``.
        parallelism: how the step is divided among several machines.
        equal: what all rows have in common: ``tokens``, ``flops`` or ``loss`` of the first row. The tokens of the other
            rows follow from it; ``loss`` needs ``laws``.
        laws: a law of loss from `sparsetrain fit law=loss`, or a list of laws at several sparsities, of which
            the nearest counts; it adds a column.
        format: ``text`` or ``json``.
        out: a directory for ``simulation.json``, ``results.csv`` and ``figure.png``.

    Raises:
        UserError: a setting is out of range.
    """

    machine: Any = field(default="this", metadata={"type": "text or list of texts"})
    dtype: str | None = None
    parallelism: ParallelConfig = field(default_factory=ParallelConfig)
    equal: str = "tokens"
    laws: Any = field(default=None, metadata={"type": "path, list of paths or null"})
    format: str = "text"
    out: str | None = None

    def __post_init__(self) -> None:
        if self.dtype is not None:
            check_choice("dtype", self.dtype, VALUE_BYTES)
        check_choice("equal", self.equal, EQUAL)
        check_choice("format", self.format, FORMATS)
        if self.equal == "loss" and self.laws is None:
            raise UserError("equal=loss needs laws=FILE, a law of sparsetrain fit law=loss")
        if self.laws is not None and not all(isinstance(file, str) for file in self.law_files):
            raise UserError(f"laws={self.laws!r:.60} must be a file of sparsetrain fit, or a list of files")
        if not self.machines or not all(isinstance(name, str) for name in self.machines):
            raise UserError(f"machine={self.machine!r:.60} must be the name of a machine, or a list of names")
        if self.budget.open and self.budget.phases is None:
            self.budget = replace(self.budget, steps=1)  # without a length it is a step that is predicted
        super().__post_init__()

    @property
    def law_files(self) -> list[str]:
        """The files of laws."""
        return [self.laws] if isinstance(self.laws, str) else list(self.laws or [])

    @property
    def machines(self) -> list[str]:
        """The names of the machines."""
        return [self.machine] if isinstance(self.machine, str) else list(self.machine or [])


@dataclass(frozen=True)
class Simulated:
    """A row: a configuration on a machine.

    Args:
        settings: the settings that differ between the rows, by name.
        sparsity: of the hidden matrices at the start, in [0, 1).
        estimate: of a run, or of a step if the run has no length.
        step: seconds of its first step.
        nonzeros: stored weights of the hidden matrices at the start.
        loss: predicted by a law, in its unit; None without one.
        refused: why there is no estimate.
    """

    settings: Mapping[str, Any]
    machine: str
    sparsity: float
    estimate: Estimate | None = None
    step: float | None = None
    nonzeros: float | None = None
    loss: float | None = None
    refused: str = ""

    def as_dict(self) -> dict[str, Any]:
        """Return the row as JSON has it."""
        estimate = None if self.estimate is None else self.estimate.as_dict()
        return {**vars(self), "settings": dict(self.settings), "estimate": estimate}


def simulate_runs(configs: Sequence[SimulateConfig]) -> None:
    """Print what the configurations take on their machines, as one table or as JSON.

    Raises:
        UserError: no row can be simulated, or a file cannot be written.
    """
    first = configs[0]
    out = None if first.out is None else typed_path(first.out, "out")
    inputs = Inputs()
    models = [_model(config, inputs) for config in configs]
    machines = [Machine.load(name) for name in first.machines]
    rows = list(_rows(configs, models, machines))
    if all(row.estimate is None for row in rows):
        raise UserError(rows[0].refused)
    content = {"rows": [row.as_dict() for row in rows], "break_even": _break_even(first, models[0], machines)}
    if out is not None:
        write_simulation(content, out)
    if first.format == "json":
        print(json.dumps(content, indent=2, allow_nan=False))
    else:
        show_simulation(content)
    sys.stdout.flush()


def _rows(
    configs: Sequence[SimulateConfig], models: Sequence[ModelConfig], machines: Sequence[Machine]
) -> Iterator[Simulated]:
    different = _differences(configs)
    laws = [_loss_law(path) for path in configs[0].law_files]
    for machine in machines:
        base: Estimate | None = None
        goal: float | None = None
        for config, model, settings in zip(configs, models, different, strict=True):
            try:
                found = _row(config, model, machine, settings, laws, base, goal)
            except UserError as error:
                whole, nonzeros = _hidden(config, model)
                yield Simulated(settings, machine.name, 1.0 - nonzeros / whole, refused=str(error))
                continue
            base, goal = base or found.estimate, goal or found.loss
            yield found


def _row(
    config: SimulateConfig,
    model: ModelConfig,
    machine: Machine,
    settings: Mapping[str, Any],
    laws: Sequence[LossLaw],
    base: Estimate | None,
    goal: float | None,
) -> Simulated:
    whole, nonzeros = _hidden(config, model)
    law, warnings = chosen_law(laws, "loss", round(1.0 - nonzeros / whole, 3))
    assert law is None or isinstance(law, LossLaw)
    counted = nonzeros if law is not None and "nonzero" in law.inputs[0].unit else whole

    def run(tokens: int | None = None) -> Estimate:
        return predicted(_work(config, model, tokens), machine, config.parallelism.build())

    estimate = run()
    if base is not None and config.equal == "flops":
        estimate = run(max(1, round(estimate.tokens * base.flops / estimate.flops)))
    if law is not None and goal is not None and config.equal == "loss":
        estimate = run(_tokens_to(law, counted, goal))
    loss = None if law is None else float(law(counted, float(estimate.tokens)))
    if law is not None:
        estimate = replace(estimate, notes=(*estimate.notes, *warnings))
    step = estimate.seconds / estimate.steps
    return Simulated(settings, machine.name, 1.0 - nonzeros / whole, estimate, step, nonzeros, loss)


def _work(config: SimulateConfig, model: ModelConfig, tokens: int | None) -> RunWork:
    """Return the steps of a configuration, or the steps of a finished run; ``tokens`` replaces the length."""
    if config.init_from is not None and tokens is None:
        work = work_of(Path(config.init_from))
    else:
        if tokens is not None:
            shorter = replace(config.budget, steps=None, epochs=None, flops=None, tokens=tokens)
            config = replace(config, budget=shorter)
        _, corpora = Inputs().corpora(config.data) if config.budget.epochs is not None else ("", None)
        if corpora is None and config.budget.epochs is not None:
            raise UserError("budget.epochs: the text is not prepared yet; give budget.tokens or budget.steps")
        budget = budget_of(config, model, None if corpora is None else Text(corpora, config).samples_per_epoch)
        section = sparsity_section(config, budget)
        rule = rule_of_length(section, budget.total_steps)
        densities = allocated_densities(hidden_shapes(model), section, rule)
        work = work_on_text(config, RunFlops(model, densities, rule, budget, config.loop.micro_batch_of))
    return work if config.dtype is None else replace(work, dtype=config.dtype)


def _tokens_to(law: LossLaw, parameters: float, loss: float) -> int:
    """Return the tokens at which a law reaches a loss.

    Raises:
        UserError: it never does.
    """
    p = law.parameters
    left = loss - p["floor"] - p["a"] / parameters ** p["alpha"]
    if left <= 0.0:
        raise UserError(f"equal=loss: by the law, {parameters:.3g} parameters reach the loss {loss:.4g} with no tokens")
    return max(1, round((p["b"] / left) ** (1.0 / p["beta"])))


def _loss_law(path: str) -> LossLaw:
    law = Law.load(typed_path(path, "laws"))
    if not isinstance(law, LossLaw):
        raise UserError(f"laws={path} is no law of loss; sparsetrain fit law=loss makes one")
    return law


def _model(config: SimulateConfig, inputs: Inputs) -> ModelConfig:
    if config.init_from is not None and config.model.get("vocab_size") is None:
        return model_config(config.model, run_tokenizer(Path(config.init_from)).vocab_size)
    return model_config(config.model, vocabulary(config, inputs.corpora(config.data)[1]))


def _hidden(config: SimulateConfig, model: ModelConfig) -> tuple[float, float]:
    """Return the elements of the hidden matrices, and the stored ones at the start."""
    densities = {}
    if config.sparsity.is_sparse:
        densities = dict(allocated_densities(hidden_shapes(model), config.sparsity, Static())(0))
    hidden = matrices(model, densities or 1.0)
    return float(sum(matrix.numel for matrix in hidden)), float(sum(matrix.nnz for matrix in hidden))


def _differences(configs: Sequence[SimulateConfig]) -> list[dict[str, Any]]:
    """Return the settings of each configuration that differ among them, by name."""
    plain = [dict(flatten(as_plain(config))) for config in configs]
    names = [name for name in plain[0] if len({each.get(name) for each in plain}) > 1]
    return [{name: each.get(name) for name in names} for each in plain]


def _break_even(config: SimulateConfig, model: ModelConfig, machines: Sequence[Machine]) -> dict[str, float | None]:
    """Return by machine the sparsity from which on a step takes 1 % less time than the dense one; None if never."""
    sizes, context = Sizes.of(model), float(config.data.context)
    batch = float(max(size for _, size in config.budget.batch_sizes()))
    layers = [Layers(sizes.layers, dict.fromkeys(sizes.matrices(), 1.0 - SPARSITIES))]
    threads = config.threads or torch.get_num_threads()
    dtype = _work(config, model, None).dtype
    setting = Setting(dtype, config.sparsity.backend, threads=threads)
    division = config.parallelism.build()
    found: dict[str, float | None] = {}
    for machine in machines:
        counted = counted_layers(layers, machine, setting)
        if division is None and not machine.streamed:
            operations = step_operations(sizes, context, batch, counted, value_bytes=VALUE_BYTES[dtype])
            terms = step_terms(operations, machine, setting)
        else:
            terms = cluster_terms(sizes, context, batch, machine, division or Parallelism(), setting, counted)
        seconds = np.asarray(terms.total)
        saves = np.broadcast_to(seconds < 0.99 * seconds.flat[0], SPARSITIES.shape)
        slower = np.flatnonzero(~saves)
        last = int(slower[-1]) if len(slower) else -1
        found[machine.name] = None if last + 1 >= len(SPARSITIES) else float(SPARSITIES[last + 1])
    return found
