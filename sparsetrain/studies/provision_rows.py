"""The rows of ``sparsetrain provision``: numbers, hyperparameters, the command, and a sentence on why."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from sparsetrain.cost.search import DIVISIONS
from sparsetrain.cost.simulate import band_factor
from sparsetrain.models import matrix_traits
from sparsetrain.models.config import ModelConfig
from sparsetrain.optim import BudgetConfig
from sparsetrain.report.text import si, tick
from sparsetrain.scaling.law import Interval, Law
from sparsetrain.stages.hidden import hidden_of_run
from sparsetrain.studies.provision_search import Place, Search
from sparsetrain.studies.suggest import SuggestConfig, decay_of

_FEW = 5e-5  # nats, below which two losses look the same
_SAME = 5e-3  # by which two times or costs may differ to be called the same
_APART = 1.2  # how many times as many weights a neighbouring model has


@dataclass(frozen=True)
class Row:
    """A training that no other one beats in loss, time and cost together.

    Args:
        machine, devices, dtype: where it runs, and in what.
        zero, recompute, micro_batch: how a step is divided; see `Parallelism`.
        model: the fields of ``model`` that differ between candidates. sparsity: of its hidden matrices.
        weights, nonzeros: of the hidden matrices. parameters: what the law of loss counts.
        tokens, steps, batch_size: of the run; the last in sequences.
        tokens_per_parameter: tokens by stored weight of the hidden matrices.
        seconds, band: of the run, and between which 90 % of measured times lie.
        cost, energy: USD and joules; None where the machine's file does not say.
        flops: matrix products on nonzeros, of the run.
        peak_memory, room: bytes of a step on the fullest device, and bytes that the device has.
        loss, loss_interval: by the law, with its 95 % interval where that is known.
        inside: whether the law was fitted at such sizes and lengths; None where that is not known.
        spend: share of the budget.
        learning_rate, init_std, weight_decay: base values; ``hidden_``, those of hidden matrices.
        tau: timescale of AdamW.
        binds: what keeps the model from being larger: the budget, ``memory`` or ``tokens``.
        why: a sentence.
        command: that runs it.
    """

    machine: str
    devices: int
    dtype: str
    zero: int
    recompute: str
    micro_batch: int
    model: dict[str, int]
    sparsity: float
    weights: int
    nonzeros: int
    parameters: int
    tokens: int
    steps: int
    batch_size: int
    tokens_per_parameter: float
    seconds: float
    band: Interval
    cost: float | None
    energy: float | None
    flops: float
    peak_memory: int
    room: int
    loss: float
    loss_interval: Interval | None
    inside: bool | None
    spend: float
    learning_rate: float
    hidden_learning_rate: float
    init_std: float
    hidden_init_std: float
    weight_decay: float
    hidden_weight_decay: float
    tau: float
    binds: str
    why: str
    command: str


def numbers(found: Search, place: Place) -> dict[str, Any]:
    """Return the fields of a `Row` that follow from the search alone."""
    c, s, p, b, k = place
    group, shape, law = found.groups[c], found.shapes[s], found.laws[p]
    steps, batch = int(found.steps[place]), found.batches[b]
    tokens, seconds = steps * batch * found.context, steps * float(found.seconds[c, s, p, b])
    counted, divided = float(found.parameters[s, p]), DIVISIONS[int(found.division[c, s, p, b])]
    machine, factor = group.machine, band_factor(group.machine)
    return {
        "machine": machine.name,
        "devices": group.devices,
        "dtype": group.setting.dtype,
        "zero": divided.zero,
        "recompute": divided.recompute,
        "micro_batch": int(found.micro[c, s, p, b]),
        "model": {name: getattr(shape, name) for name in _changed(found)},
        "sparsity": found.sparsities[p],
        "weights": round(float(found.weights[s, p])),
        "nonzeros": round(float(found.nonzeros[s, p])),
        "parameters": round(counted),
        "tokens": tokens,
        "steps": steps,
        "batch_size": batch,
        "tokens_per_parameter": tokens / float(found.nonzeros[s, p]),
        "seconds": seconds,
        "band": (seconds / factor, seconds * factor),
        "cost": None if machine.price is None else seconds * group.dollars,
        "energy": None if machine.power is None else machine.power.value * group.devices * seconds,
        "flops": steps * float(found.flops[s, p, b]),
        "peak_memory": round(float(found.memory[c, s, p, b])),
        "room": round(found.rooms[c]),
        "loss": law(counted, tokens),
        "loss_interval": law.predict_interval(counted, tokens),
        "inside": law.inside(counted, tokens),
        "spend": found.shares[k],
    }


def row_of(found: Search, place: Place, laws: Sequence[Law]) -> tuple[Row, list[str]]:
    """Return the row of a candidate, and warnings about its hyperparameters.

    Raises:
        UserError: the laws say no usable weight decay.
    """
    values = numbers(found, place)
    config = _run(found, place, values)
    hidden = hidden_of_run(config)
    tau, decay = decay_of(config, laws, hidden, values["tokens"], values["steps"])
    shape, density = found.shapes[place[1]], 1.0 - values["sparsity"]
    names = [f"blocks.{layer}.{name}" for layer in range(shape.n_layers) for name in _matrices(shape)]
    traits = matrix_traits(shape, config.parameterization, dict.fromkeys(names, density))
    std = config.parameterization.init_std(traits["blocks.0.mlp.up"], shape.init_std, shape.n_layers)
    base = float(decay.value)
    binds, why = _why(found, place)
    overrides = [
        *(f"model.{name}={value}" for name, value in {**values["model"], **_family(found, shape)}.items()),
        f"data.context={found.context}",
        f"sparsity.sparsity={values['sparsity']:g}",
        f"budget.tokens={values['tokens']}",
        f"budget.batch_size={values['batch_size']}",
        *([f"loop.micro_batch={values['micro_batch']}"] if _accumulates(values) else []),
        f"optimizer.lr={config.optimizer.lr:.6g}",
        f"optimizer.weight_decay={base:.6g}",
    ]
    row = Row(
        **values,
        learning_rate=config.optimizer.lr,
        hidden_learning_rate=hidden.lr,
        init_std=shape.init_std,
        hidden_init_std=std,
        weight_decay=base,
        hidden_weight_decay=base * hidden.decay_factor,
        tau=float(tau.value),
        binds=binds,
        why=why,
        command=" ".join(["sparsetrain pretrain", *map(shlex.quote, overrides)]),
    )
    return row, [f"timescale: {warning}" for warning in tau.warnings]


def _accumulates(values: dict[str, Any]) -> bool:
    return bool(values["devices"] == 1 and values["micro_batch"] < values["batch_size"])


def _matrices(shape: ModelConfig) -> list[str]:
    return ["attn.qkv", "attn.out", *(["mlp.gate"] if shape.mlp == "swiglu" else []), "mlp.up", "mlp.down"]


def _changed(found: Search) -> list[str]:
    """Return the fields of the model that a command has to set."""
    first = found.shapes[0]
    names = ["d_model", "n_layers", "n_heads"]
    return [*names, *(name for name in ("n_kv_heads", "d_ff") if getattr(first, name) is not None)]


def _family(found: Search, shape: ModelConfig) -> dict[str, Any]:
    """Return the fields that all models share, as far as a command has to set them."""
    family: dict[str, Any] = {"max_context": shape.max_context, "init_std": shape.init_std}
    if found.config.model.get("vocab_size"):
        family["vocab_size"] = shape.vocab_size
    for each in fields(ModelConfig):
        value = getattr(shape, each.name)
        if each.name not in (*_changed(found), *family, "vocab_size", "sparsity", "seed") and value != each.default:
            family[each.name] = str(value).lower() if isinstance(value, bool) else value
    return family


def _run(found: Search, place: Place, values: dict[str, Any]) -> SuggestConfig:
    """Return the settings of a candidate's pre-training, as `suggest` takes them."""
    config, shape = found.config, found.shapes[place[1]]
    kept = {each.name: getattr(config, each.name) for each in fields(SuggestConfig)}
    section = {each.name: getattr(config.sparsity, each.name) for each in fields(config.sparsity)}
    kept |= {
        "model": {**config.model, **values["model"], "vocab_size": shape.vocab_size},
        "sparsity": type(config.sparsity)(**{**section, "sparsity": values["sparsity"]}),
        "budget": BudgetConfig(tokens=values["tokens"], batch_size=values["batch_size"]),
        "laws": None,
        "flops": None,
    }
    return SuggestConfig(**kept)


def shape_label(shape: ModelConfig) -> str:
    """Return width x depth."""
    return f"{shape.d_model}x{shape.n_layers}"


def _why(found: Search, place: Place) -> tuple[str, str]:
    """Return what keeps the model from being larger, and a sentence about the choice and its neighbours."""
    c, s, p, _, k = place
    kind, loss = found.config.kind, float(found.loss[place])
    best = found.loss.min(axis=3)  # over batches: [C, S, P, K]
    of_shapes, over_shapes = best[c, :, p, k], best.min(axis=1)
    sizes = found.weights[:, p] / found.weights[s, p]
    larger, smaller = np.flatnonzero(sizes > _APART), np.flatnonzero(sizes < 1.0 / _APART)
    binds, parts = kind, []
    if not len(larger):
        binds = "grid"
        parts.append("no larger model is in the grid")
    elif np.isfinite(of_shapes[larger := larger[sizes[larger] <= sizes[larger].min() * _APART**2]]).any():
        shape = int(larger[np.argmin(of_shapes[larger])])
        batch = int(np.argmin(found.loss[c, shape, p, :, k]))
        fewer = _tokens(found, (c, shape, p, batch, k)) / _tokens(found, place) - 1.0
        said = f"{shape_label(found.shapes[shape])} would {_change(of_shapes[shape] - loss)}"
        parts.append(f"{said} with {abs(fewer):.0%} {'fewer' if fewer < 0.0 else 'more'} tokens")
    elif not found.fits[c, larger, p].any():
        binds = "memory"
        lacking = float(found.memory[c, larger, p].min()) - found.rooms[c]
        parts.append(f"{shape_label(found.shapes[int(larger[0])])} lacks {lacking / 2**30:.3g} GiB of it")
    else:
        binds = "tokens"
        least = f"{found.config.tokens_per_parameter:g} tokens a weight, or too few steps"
        parts.append(f"{shape_label(found.shapes[int(larger[0])])} would have fewer than {least}")
    if len(smaller) and np.isfinite(of_shapes[smaller]).any():
        shape = int(smaller[np.argmin(of_shapes[smaller])])
        parts.append(f"{shape_label(found.shapes[shape])} would {_change(of_shapes[shape] - loss)}")
    for other in (p - 1, p + 1):
        if 0 <= other < len(found.sparsities) and np.isfinite(over_shapes[c, other, k]):
            said = f"sparsity {found.sparsities[other]:g} would"
            parts.append(f"{said} {_change(over_shapes[c, other, k] - loss)}")
    parts += [*_other_machines(found, place), *_other_budget(found, place, over_shapes.min(axis=1))]
    named = {"memory": "Memory", "tokens": "The least length", "grid": "The grid", "hours": "Time", "money": "Money"}
    what = f"{named[binds]} binds" if binds in named else "FLOPs bind"
    return binds, f"{what}: {'; '.join(parts)}."


def _other_machines(found: Search, place: Place) -> Iterator[str]:
    """Yield what the machines with the nearest loss would change for the same share of the budget."""
    c, *_, k = place
    shape = found.loss.shape
    flat = found.loss[..., k].reshape(shape[0], -1)
    lowest = flat.min(axis=1)
    lowest[c] = np.inf
    near = np.where(np.isfinite(lowest), np.abs(lowest - found.loss[place]), np.inf)
    if not np.isfinite(near).any():
        return
    other = int(np.argmin(near))
    at = tuple(int(index) for index in np.unravel_index(int(np.argmin(flat[other])), shape[1:4]))
    objectives = found.objectives.reshape(*shape, 3)
    here, there = objectives[place], objectives[(other, *at, k)]
    change = _change(float(lowest[other] - found.loss[place]))
    ratios = [_times(there[1] / here[1], "time")]
    if np.isfinite(there[2]) and np.isfinite(here[2]):
        ratios.append(_times(there[2] / here[2], "cost"))
    yield f"{found.groups[other].label} would {change} at {' and '.join(ratios)}"


def _other_budget(found: Search, place: Place, lowest: Any) -> Iterator[str]:
    """Yield what more or less of the budget would change; ``lowest [C, K]`` are losses."""
    c, *_, k = place
    other = k + 1 if k + 1 < len(found.shares) else k - 1
    if other >= 0 and np.isfinite(lowest[c, other]):
        times = found.shares[other] / found.shares[k]
        change = _change(float(lowest[c, other] - found.loss[place]))
        yield f"{times:.3g} times the {found.config.kind} would {change}"


def _tokens(found: Search, place: Place) -> float:
    return float(found.steps[place]) * found.batches[place[3]] * found.context


def _times(ratio: float, what: str) -> str:
    return f"the same {what}" if abs(ratio - 1.0) < _SAME else f"{ratio:.3g} times the {what}"


def _change(difference: float) -> str:
    if abs(difference) < _FEW:
        return "keep the loss"
    return f"{'lose' if difference > 0.0 else 'gain'} {abs(difference):.3g}"


def count(value: float) -> str:
    """Return a number with a decimal prefix, such as ``12.3B`` for tokens and weights."""
    shown = tick(si(value, ""))
    return shown.replace(" ", "").replace("G", "B")


def hours(seconds: float) -> str:
    """Return a time in the unit that reads best."""
    for size, unit in ((86400.0, "d"), (3600.0, "h"), (60.0, "min")):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds:.3g} s"


def shown(rows: Sequence[Row]) -> Iterator[str]:
    """Yield the table, no line longer than 100 columns, and what belongs to each row below it."""
    titles = ("", "machines", "model", "sparse", "tokens", "steps", "batch", "time", "cost", "memory", "loss")
    cells = [titles]
    for index, row in enumerate(rows, 1):
        cells.append(
            (
                f"{index}",
                f"{row.devices} x {row.machine}"[:24],
                f"{row.model['d_model']}x{row.model['n_layers']}",
                f"{row.sparsity:g}",
                count(row.tokens),
                count(row.steps),
                f"{row.batch_size}",
                hours(row.seconds),
                "-" if row.cost is None else f"${row.cost:,.4g}",
                f"{row.peak_memory / 2**30:.3g} GiB",
                f"{row.loss:.4f}{'' if row.inside else '*'}",
            )
        )
    widths = [max(len(line[column]) for line in cells) for column in range(len(titles))]
    for line in cells:
        pairs = list(zip(line, widths, strict=True))
        yield "  ".join(
            cell.ljust(width) if place in (1, 2) else cell.rjust(width) for place, (cell, width) in enumerate(pairs)
        ).rstrip()
    if any(not row.inside for row in rows):
        yield "* an extrapolation: the law was not fitted at such sizes and lengths, or these are unknown"
