"""The coordinate check on real text: train one model per point, then write a table, a figure and a verdict."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, TypedDict

import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor

from sparsetrain.data import Corpora, PackedSamples, prepare_corpora
from sparsetrain.errors import UserError, check_choice
from sparsetrain.files import file_errors, write_text
from sparsetrain.optim import build_optimizer
from sparsetrain.parameterization import Coordinate, Parameterization, Spread, Trial, param_groups, spreads
from sparsetrain.parameterization.coordinates import LOSS, check_values, losses_fall, read_coordinates
from sparsetrain.parameterization.rules import SCHEMES
from sparsetrain.reading import read_json_lines
from sparsetrain.report.coordinates import coordinates_figure, coordinates_sheets
from sparsetrain.report.run_files import COLUMNS
from sparsetrain.report.tables import print_sheets
from sparsetrain.report.text import duration
from sparsetrain.runs.claim import claimed
from sparsetrain.runs.identity import run_place
from sparsetrain.runs.origin import Origin
from sparsetrain.runs.provenance import commit, machine
from sparsetrain.runs.result import RunResult, finish
from sparsetrain.screen import say
from sparsetrain.seeds import derive_seed
from sparsetrain.shapes import Count
from sparsetrain.stages.config import RunConfig, identify, model_config
from sparsetrain.stages.memory import check_memory, memory_errors, training_workload
from sparsetrain.stages.stage import build_model
from sparsetrain.stages.stopwatch import Stopwatch
from sparsetrain.training.state import resolve_device

AXES = ("sparsity", "width", "depth")
QUANTITIES = ("activation", "update")  # these must keep their scale on every axis
TRIALS, TABLE, RESULTS, FIGURE = "trials.jsonl", "coordinates.csv", "results.csv", "figure.png"


class _Row(TypedDict):
    """A `Coordinate` in a line of ``trials.jsonl``; its RMS is infinite if the trial diverged."""

    scheme: str
    value: float
    seed: int
    kind: str
    quantity: str
    step: Count
    rms: float


_Trial = tuple[tuple[str, float, int], list[_Row]]


@dataclass
class CheckSection:
    """The axis and the values of the check, and the criterion for keeping the scale.

    Args:
        axis: ``sparsity`` of every hidden matrix, ``width`` (d_model, with the d_head of the model section), or
            ``depth``.
        values: at least two values on that axis.
        schemes: parameterizations to compare, with the base of the parameterization section.
        seeds: number of seeds; each draws its own weights, masks and batches.
        steps: optimizer steps at a constant learning rate.
        limit: a scheme passes if the max/min ratio of activation and update RMS is at most this for all kinds of layer.
    """

    axis: str = "sparsity"
    values: list[float] = field(default_factory=lambda: [0.0, 0.5, 0.75, 0.875, 0.9375])
    schemes: list[str] = field(default_factory=lambda: ["sp", "mup", "supar"])
    seeds: int = 5
    steps: int = 10
    limit: float = 2.0

    def __post_init__(self) -> None:
        check_choice("check.axis", self.axis, AXES)
        for scheme in self.schemes:
            check_choice("check.schemes", scheme, SCHEMES)
        if not self.schemes or len(set(self.schemes)) < len(self.schemes):
            raise UserError(f"check.schemes={self.schemes} must name at least one scheme, and no scheme twice")
        for name in ("seeds", "steps"):
            if getattr(self, name) < 1:
                raise UserError(f"check.{name}={getattr(self, name)} must be at least 1")
        if not self.limit >= 1.0:
            raise UserError(f"check.limit={self.limit} must be at least 1: it limits a ratio of largest to smallest")
        for value in self.values:
            if self.axis == "sparsity":
                if not 0.0 <= value < 1.0:
                    raise UserError(f"check.values={self.values}: a sparsity lies in [0, 1)")
            elif value != int(value) or value < 1:
                raise UserError(f"check.values={self.values}: a {self.axis} is a whole number, at least 1")
        check_values(self.on_axis(), "check.values")

    def on_axis(self) -> list[float]:
        """Return the values to fit slopes against: densities if the axis is sparsity."""
        return [1.0 - value for value in self.values] if self.axis == "sparsity" else list(self.values)


@dataclass
class CoordinatesConfig(RunConfig):
    """Check that activations and updates keep their scale across sparsity, width or depth, for several schemes.

    Each point trains a fresh model for ``check.steps`` steps of ``budget.batch_size`` samples at the constant learning
    rate ``optimizer.lr``. The check ignores ``schedule``, ``loop`` and the rest of ``budget``. For SP it also ignores
    the multipliers alpha_in and alpha_out.
    """

    check: CheckSection = field(default_factory=CheckSection)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.init_from is not None:
            raise UserError(f"init_from={self.init_from}: a coordinate check starts from fresh models")
        for value in self.check.values:
            self.point(value, 0)
        for scheme in self.check.schemes:
            self.rules(scheme).check_optimizer(self.optimizer.name)

    def rules(self, scheme: str) -> Parameterization:
        """Return the rules of ``scheme`` with the base and the options of the parameterization section."""
        section = self.parameterization
        base_layers = section.base_layers
        if base_layers is None:
            base_layers = int(min(self.check.values)) if self.check.axis == "depth" else self.model["n_layers"]
        if scheme == "sp":
            section = replace(section, alpha_in=1.0, alpha_out=1.0)
        eps_rule = section.eps_rule if scheme == section.scheme else "auto"
        return replace(section, scheme=scheme, base_layers=base_layers, eps_rule=eps_rule)

    def point(self, value: float, seed: int) -> RunConfig:
        """Return the configuration of the run at one value of the axis."""
        shape, sparsity = dict(self.model), self.sparsity
        if self.check.axis == "sparsity":
            sparsity = replace(sparsity, sparsity=value)
        elif self.check.axis == "depth":
            shape["n_layers"] = int(value)
        else:
            d_head = model_config(shape, 1).d_head
            if int(value) % d_head:
                raise UserError(f"check.values={self.check.values}: a width must be a multiple of d_head={d_head}")
            shape |= {"d_model": int(value), "n_heads": int(value) // d_head}
        values = {entry.name: getattr(self, entry.name) for entry in fields(RunConfig)}
        return RunConfig(**{**values, "model": shape, "sparsity": sparsity, "seed": seed})


def coord_check(config: CoordinatesConfig, console: Console | None = None) -> RunResult:
    """Run the check, or resume it; print its table and write its figure.

    Returns:
        The run directory and the content of ``result.json``: the worst ratio and slope of each scheme, whether the
        losses fell, and ``holds``, which is true if they fell and no ratio exceeds the limit.

    Raises:
        UserError: the input cannot be used.
    """
    console = console or Console()
    corpora = prepare_corpora(config.data, progress=True, console=console)
    origin = Origin.of_corpora(corpora)
    directory = _directory(config, origin)
    with claimed(directory, identify("coord-check", config, origin), origin) as done:
        if done is None:
            _check_memory(config, corpora.tokenizer.vocab_size)
        with memory_errors("this check"):
            rows = _read_all(config, corpora, directory, console)
        found = spreads(rows)
        axis = "density" if config.check.axis == "sparsity" else config.check.axis
        print_sheets(coordinates_sheets(found, axis), console)
        verdicts = judge(config.check, rows, found)
        for scheme, verdict in verdicts.items():
            say(console, f"{scheme}: {verdict['text']}")
        if done is not None:
            return done
        _write_table(rows, directory / TABLE)
        _write_results(config, rows, directory / RESULTS)
        coordinates_figure(found, axis, directory / FIGURE)
        return finish(
            directory,
            {
                "stage": "coord-check",
                "status": "complete",
                "axis": axis,
                "schemes": verdicts,
                "machine": machine(resolve_device(config.device)),
                "commit": commit(),
            },
        )


def _check_memory(config: CoordinatesConfig, vocab_size: int) -> None:
    """Raise `UserError` if one point does not fit into memory, since the verdict needs all points."""
    batch_size, context = config.budget.first_batch, config.data.context
    for value in config.check.values:
        point = config.point(value, config.seed)
        model = model_config(point.model, vocab_size)
        point = replace(point, loop=replace(point.loop, accumulation=1, micro_batch=None))
        workload = training_workload(
            point, model, point.sparsity, batch_size=batch_size, context=context, whole_logits=True
        )
        what = (
            f"the point {value:g} of check.values with budget.batch_size={batch_size}, data.context={context}, "
            f"model.d_model={model.d_model} and model.n_layers={model.n_layers}"
        )
        knobs = {"batch_size": "budget.batch_size", "context": "data.context"}
        if config.check.axis != "width":
            knobs["d_model"] = "model.d_model"
        if config.check.axis != "depth":
            knobs["n_layers"] = "model.n_layers"
        check_memory(workload, what, knobs, resolve_device(config.device), config.force)


def judge(check: CheckSection, rows: Sequence[Coordinate], found: Sequence[Spread]) -> dict[str, Any]:
    """Return, for each scheme, its worst activation or update ratio and whether it keeps the scale."""
    falls = losses_fall(rows)
    verdicts = {}
    for scheme in check.schemes:
        worst = max((s for s in found if s.scheme == scheme and s.quantity in QUANTITIES), key=lambda s: s.ratio)
        rising = [value for (name, value), fell in falls.items() if name == scheme and not fell]
        holds = worst.ratio <= check.limit and not rising
        text = f"worst max/min {worst.ratio:.2f} ({worst.quantity} of {worst.kind}, slope {worst.slope:+.2f})"
        text += f": {'keeps' if worst.ratio <= check.limit else 'does not keep'} its scale (limit {check.limit:g})"
        if rising:
            text += f"; the loss did not fall at {', '.join(f'{value:g}' for value in rising)}: lower optimizer.lr"
        verdicts[scheme] = {
            "holds": holds,
            "ratio": worst.ratio if math.isfinite(worst.ratio) else None,
            "slope": worst.slope if math.isfinite(worst.slope) else None,
            "kind": worst.kind,
            "quantity": worst.quantity,
            "losses_fall": not rising,
            "text": text,
        }
    return verdicts


def _directory(config: CoordinatesConfig, origin: Origin) -> Path:
    if config.run_dir is not None:
        return Path(config.run_dir)
    run = identify("coord-check", config, origin)
    return run_place(Path(config.runs_dir), f"coord-check-{config.check.axis}-", run, origin)


def _read_all(config: CoordinatesConfig, corpora: Corpora, directory: Path, console: Console) -> list[Coordinate]:
    """Return the coordinates of all trials; those of trials that finished earlier are read from the directory."""
    path = directory / TRIALS
    have = _finished_trials(path)
    wanted = [
        (scheme, value, seed)
        for seed in range(config.seed, config.seed + config.check.seeds)
        for scheme in config.check.schemes
        for value in config.check.values
    ]
    rows: list[Coordinate] = []
    clock = Stopwatch()
    for number, key in enumerate(wanted):
        trial_rows = have.get(key)
        if trial_rows is None:
            trial_rows = _read_one(config, corpora, *key)
            with file_errors(directory), path.open("a", encoding="utf-8") as stream:
                # One write per trial, so that a kill leaves whole lines and at most one partial last line.
                stream.write(json.dumps([list(key), [asdict(row) for row in trial_rows]]) + "\n")
            scheme, value, seed = key
            seconds = duration(clock.seconds())
            axis = config.check.axis
            say(console, f"coord-check {number + 1}/{len(wanted)}  {scheme} {axis} {value:g} seed {seed}  {seconds}")
        rows += trial_rows
    return rows


def _finished_trials(path: Path) -> dict[tuple[str, float, int], list[Coordinate]]:
    """Return the coordinates of finished trials by (scheme, value, seed), and drop a partial last line.

    Raises:
        UserError: a line is not a trial.
    """
    if not path.exists():
        return {}
    trials = read_json_lines(path, _Trial, finite=False, cut=True)
    write_text(path, "".join(f"{json.dumps(trial)}\n" for trial in trials))
    names = [entry.name for entry in fields(Coordinate)]
    return {
        (scheme, float(value), seed): [Coordinate(**{name: row[name] for name in names}) for row in rows]
        for (scheme, value, seed), rows in trials
    }


def _read_one(config: CoordinatesConfig, corpora: Corpora, scheme: str, value: float, seed: int) -> list[Coordinate]:
    point = replace(config.point(value, seed), parameterization=config.rules(scheme))
    device = resolve_device(config.device)
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    model = build_model(point, corpora.tokenizer.vocab_size, device)
    opt, batch = config.optimizer, config.budget.first_batch
    groups = param_groups(model, point.parameterization, opt.lr, opt.weight_decay, opt.eps)
    samples = PackedSamples(corpora.only.train, config.data.context, derive_seed(seed, "coord-check"), "pretrain")

    def loss(step: int) -> Tensor:
        # Not `model.loss`: it never calls the head as a module, so no hook would see the logits.
        data = samples.batch(step * batch, batch).to(device)
        return F.cross_entropy(model(data.tokens).flatten(0, 1), data.targets.flatten())

    readings = read_coordinates(Trial(model, build_optimizer(groups, opt), loss), config.check.steps)
    on_axis = dict(zip(config.check.values, config.check.on_axis(), strict=True))
    return [Coordinate(scheme, on_axis[value], seed, **vars(reading)) for reading in readings]


def _write_table(rows: Sequence[Coordinate], path: Path) -> None:
    with file_errors(path.parent), path.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow([entry.name for entry in fields(Coordinate)])
        for row in rows:
            writer.writerow([*list(asdict(row).values())[:-1], f"{row.rms:.6g}"])


def _write_results(config: CoordinatesConfig, rows: Sequence[Coordinate], path: Path) -> None:
    """Write one row per trial in the columns that all experiments share: loss and RMS after the last step."""
    steps, now = config.check.steps, commit()
    on_axis = dict(zip(config.check.on_axis(), config.check.values, strict=True))
    table: dict[tuple[str, float, int], dict[str, Any]] = {}
    for row in rows:
        if row.step < steps:
            continue
        key = (row.scheme, row.value, row.seed)
        if key not in table:
            point = config.point(on_axis[row.value], row.seed)
            shape = (point.sparsity.sparsity, point.model["d_model"], point.model["n_layers"])
            values = (row.scheme, *shape, config.optimizer.lr, row.seed, steps, None, now)
            table[key] = dict(zip(COLUMNS, values, strict=True))
        name = "loss" if row.kind == LOSS else f"{row.quantity} {row.kind}"
        table[key][name] = f"{row.rms:.6g}"
    columns = dict.fromkeys(name for line in table.values() for name in line)
    with file_errors(path.parent), path.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, list(columns), lineterminator="\n")
        writer.writeheader()
        writer.writerows(table.values())
