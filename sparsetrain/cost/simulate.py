"""`simulate`: the time, memory, energy and price of a training step, or of a whole run, on a machine.

The operations of the step (`sparsetrain.cost.operations`) take seconds on the machine (`timing` for a single one,
`cluster` for several and for weights that stream). How far the answer can be trusted comes from the machine's file: the
spread of measured over predicted times, of which the band holds 90 %.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from sparsetrain.cost.blocks import Shape, shape_of_config, shape_of_model
from sparsetrain.cost.cluster.memory import check_fits
from sparsetrain.cost.cluster.parallelism import Parallelism
from sparsetrain.cost.cluster.schedule import VALUE_BYTES, cluster_terms
from sparsetrain.cost.flop_ledger import check_whole
from sparsetrain.cost.flops import Density
from sparsetrain.cost.hardware import Machine
from sparsetrain.cost.operations import INDEX_BYTES, OPTIMIZER, PRODUCTS, Operation, step_operations
from sparsetrain.cost.sizes import Sizes
from sparsetrain.cost.step_memory import backend_of, memory_of
from sparsetrain.cost.timing import AUTO, MASKED, Setting, Terms, counted_layers, step_terms, uses_zeros
from sparsetrain.errors import UserError
from sparsetrain.models.config import ModelConfig
from sparsetrain.sparsity.layers.linear import SparseLinear

NORMAL_90 = 1.6449  # standard deviations around the mean that hold 90 % of a normal distribution
_UNKNOWN_SPREAD = 0.3  # of a machine without measured steps
_GIB = 1 << 30


@dataclass(frozen=True)
class Estimate:
    """What a training step, or a run of ``steps`` such steps, takes on a machine.

    Args:
        machine: its name.
        seconds: predicted time.
        band: seconds between which 90 % of measured times lie, if they scatter as those did that the file knows.
        flops: matrix products on stored weights, attention in full; see `sparsetrain.flops`.
        bytes: moved by all operations, with the positions of nonzeros.
        peak_memory: bytes on the fullest device.
        energy: joules, at the machine's power; None if its file has none.
        cost: USD, at the machine's price; None if its file has none.
        terms: seconds by what they are spent on; they add up to ``seconds``.
        steps: training steps. tokens: of all steps. devices: machines.
        notes: sentences on what the machine cannot use and what is not known.
    """

    machine: str
    seconds: float
    band: tuple[float, float]
    flops: int
    bytes: int
    peak_memory: int
    energy: float | None
    cost: float | None
    terms: dict[str, float]
    steps: int
    tokens: int
    devices: int
    notes: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """Return every field, as a report stores them."""
        return asdict(self)

    def __add__(self, other: Estimate) -> Estimate:
        """Return the estimate of both in sequence on the same machine; the peak is the larger one."""
        added = {name: _sum(getattr(self, name), getattr(other, name)) for name in ("energy", "cost")}
        return Estimate(
            self.machine,
            self.seconds + other.seconds,
            (self.band[0] + other.band[0], self.band[1] + other.band[1]),
            self.flops + other.flops,
            self.bytes + other.bytes,
            max(self.peak_memory, other.peak_memory),
            added["energy"],
            added["cost"],
            {name: self.terms[name] + other.terms[name] for name in self.terms},
            self.steps + other.steps,
            self.tokens + other.tokens,
            self.devices,
            tuple(dict.fromkeys((*self.notes, *other.notes))),
        )

    def times(self, steps: int) -> Estimate:
        """Return the estimate of ``steps`` times as many steps."""
        return replace(
            self,
            seconds=self.seconds * steps,
            band=(self.band[0] * steps, self.band[1] * steps),
            flops=self.flops * steps,
            bytes=self.bytes * steps,
            energy=None if self.energy is None else self.energy * steps,
            cost=None if self.cost is None else self.cost * steps,
            terms={name: value * steps for name, value in self.terms.items()},
            steps=self.steps * steps,
            tokens=self.tokens * steps,
        )


def simulate(
    model: ModelConfig | nn.Module,
    machine: Machine | str | Path,
    context: int,
    batch: int,
    tokens: int | None = None,
    *,
    density: Density | None = None,
    dtype: str = "float32",
    backend: str | None = None,
    threads: int | None = None,
    parallelism: Parallelism | None = None,
) -> Estimate:
    """Return what a training step of ``batch`` sequences of ``context`` tokens takes on a machine.

    Args:
        model: a configuration, whose ``sparsity`` counts; a live model of the library with its nonzeros; or any other
            module, of which matrix products and optimizer are counted alone.
        machine: a `Machine`, the name of one, or a file. ``this`` is the machine at hand, after `calibrate`.
        context: tokens T of a sequence. batch: sequences B of a step, over all devices.
        tokens: of a whole run; None is a single step.
        density: stored fraction of the matrices of a configuration, as `sparsetrain.cost.flops.matrices` takes it.
        dtype: of weights and activations in products; weights are updated in float32 by AdamW.
        backend: of sparse layers, on a machine that has several; None is that of a live model, or ``auto``.
        threads: on a machine with curves over threads; None is torch's number.
        parallelism: how the step is divided among several machines; None is one machine.

    Raises:
        UserError: a number is out of range, the machine is unknown or lacks a rate for the dtype, the model does not
            fit, or the step cannot be divided like this.
    """
    for name, value in (("context", context), ("batch", batch)):
        check_whole(name, value, 1)
    if tokens is not None:
        check_whole("tokens", tokens, 1)
    if threads is not None:
        check_whole("threads", threads, 1)
    place = machine if isinstance(machine, Machine) else Machine.load(machine)
    chosen = (_backend_of(model) if backend is None else backend) or AUTO
    setting = Setting(dtype, chosen, threads=torch.get_num_threads() if threads is None else threads)
    if isinstance(model, ModelConfig):
        shape: Shape | None = shape_of_config(model, density)
    elif density is not None:
        raise UserError(f"density={density} is for a ModelConfig; a {type(model).__name__} has its own")
    else:
        shape = shape_of_model(model)
    if shape is None:
        assert isinstance(model, nn.Module)
        if parallelism is not None:
            raise UserError(f"parallelism needs a model of the library, not a {type(model).__name__}")
        operations, memory = _traced(model, context, batch), _traced_memory(model)
        alone = "Only matrix products and the optimizer are counted: the model is none of the library's."
        notes = (alone, *_unused(operations, place, setting))
        one = _estimate(place, step_terms(operations, place, setting), operations, memory, 1, notes)
        one = replace(one, tokens=context * batch)
    else:
        masked = chosen == MASKED
        if chosen == AUTO and isinstance(model, nn.Module):
            masked = backend_of(model, context * batch) == MASKED
        length = context + shape.prompt_tokens
        one = estimate_of(shape, place, length, batch, setting, parallelism, masked=masked)
        one = replace(one, tokens=context * batch)
    return one if tokens is None else one.times(math.ceil(tokens / (context * batch)))


def estimate_of(
    shape: Shape,
    machine: Machine,
    context: int,
    batch: int,
    setting: Setting,
    parallelism: Parallelism | None = None,
    *,
    masked: bool = False,
) -> Estimate:
    """Return what a step of a model's shape takes: `simulate` after its arguments were understood.

    Args:
        shape: the model, with its densities, its frozen parts and its soft prompt.
        machine: where the step runs.
        context: tokens of a sequence, with the soft prompt. batch: sequences.
        setting: how products are computed.
        parallelism: how the step is divided; None is one machine.
        masked: whether sparse layers hold dense matrices in memory.

    Raises:
        UserError: as `simulate` raises it.
    """
    sizes, divided = Sizes.of(shape.config), Parallelism() if parallelism is None else parallelism
    options: dict[str, Any] = {
        "value_bytes": VALUE_BYTES.get(setting.dtype, 4.0),
        "frozen": shape.frozen,
        "prompt_tokens": float(shape.prompt_tokens),
        "whole_logits": machine.roofline,
    }
    operations = step_operations(sizes, float(context), float(batch), shape.layers, **options)
    total, notes = _products(operations), _unused(operations, machine, setting)
    if notes:
        shape = replace(shape, layers=counted_layers(shape.layers, machine, setting))
        operations = step_operations(sizes, float(context), float(batch), shape.layers, **options)
    if parallelism is None and not machine.streamed:
        terms = step_terms(operations, machine, setting)
    else:
        terms = cluster_terms(sizes, float(context), float(batch), machine, divided, setting, shape.layers)
        if shape.frozen or any(group.frozen for group in shape.layers):
            notes += (f"On {machine.name} frozen weights take the time of trained ones.",)
    memory = _memory(shape, machine, context, batch, divided, setting, masked)
    devices = int(np.asarray(divided.devices).item())
    found = replace(_estimate(machine, terms, operations, memory, devices, notes), flops=total)
    return replace(found, tokens=context * batch)


def _estimate(
    machine: Machine,
    terms: Terms,
    operations: Sequence[Operation],
    memory: int,
    devices: int,
    notes: tuple[str, ...],
) -> Estimate:
    by_term = {name: float(value) for name, value in terms.as_dict().items()}
    seconds, factor = math.fsum(by_term.values()), band_factor(machine)
    if machine.spread is None:
        notes += (f"{machine.name} has no measured steps: the band is a guess.",)
    return Estimate(
        machine=machine.name,
        seconds=seconds,
        band=(seconds / factor, seconds * factor),
        flops=_products(operations),
        bytes=round(math.fsum(float(each.count * (each.bytes + each.index_bytes)) for each in operations)),
        peak_memory=memory,
        energy=None if machine.power is None else machine.power.value * devices * seconds,
        cost=None if machine.price is None else machine.price.value * devices * seconds / 3600.0,
        terms=by_term,
        steps=1,
        tokens=0,
        devices=devices,
        notes=notes,
    )


def _products(operations: Sequence[Operation]) -> int:
    """Return the FLOPs of the matrix products on stored weights."""
    return round(math.fsum(float(each.count * each.flops) for each in operations if each.kind in PRODUCTS))


def _unused(operations: Sequence[Operation], machine: Machine, setting: Setting) -> tuple[str, ...]:
    """Return the sentence about zeros that a machine cannot use, or nothing."""
    if uses_zeros(machine, setting) or not any(operation.is_sparse for operation in operations):
        return ()
    return (f"{machine.name} cannot skip single zeros: sparse matrices are counted as dense.",)


def band_factor(machine: Machine) -> float:
    """Return the factor by which the ends of the 90 % band of a machine's times lie below and above a prediction."""
    return math.exp(NORMAL_90 * (_UNKNOWN_SPREAD if machine.spread is None else machine.spread.value))


def _backend_of(model: Any) -> str | None:
    """Return the backend that all sparse layers of a live model have, or None."""
    if not isinstance(model, nn.Module):
        return None
    found = {module.backend for module in model.modules() if isinstance(module, SparseLinear)}
    return found.pop() if len(found) == 1 else None


def _memory(
    shape: Shape, machine: Machine, context: int, batch: int, divided: Parallelism, setting: Setting, masked: bool
) -> int:
    """Return the bytes of a step at its peak.

    Raises:
        UserError: the machine has less; the line says how much is missing and what would fit.
    """
    if setting.dtype != "float32" or float(divided.devices) > 1 or machine.streamed:
        sizes = Sizes.of(shape.config)
        held = check_fits(sizes, float(context), float(batch), machine, divided, setting, shape.layers)
        return round(float(held.total))

    def peak(sequences: int) -> int:
        return memory_of(shape, float(context), float(sequences), masked, float(setting.threads)).peak

    needed, room = peak(batch), machine.memory[-1].size.value
    if needed > room:
        fitting = next((count for count in _halves(batch) if peak(count) <= room), None)
        advice = f"a batch of {fitting} would fit" if fitting else "no batch would fit"
        raise UserError(
            f"the step needs {needed / _GIB:.1f} GiB, and {machine.name} has {room / _GIB:.1f} GiB: "
            f"{(needed - room) / _GIB:.1f} GiB are missing; {advice}"
        )
    return needed


def _halves(batch: int) -> list[int]:
    found = []
    while batch > 1:
        batch //= 2
        found.append(batch)
    return found


def _traced(model: nn.Module, context: int, batch: int) -> list[Operation]:
    """Return the products of a module, as its trace shows them, and its update."""
    from sparsetrain.cost.ledger import Pass
    from sparsetrain.cost.trace import trace

    tokens = float(context * batch)
    found = []
    for entry in trace(model, Pass(context, batch), None).entries:
        if entry.kind not in PRODUCTS:
            continue
        products = 2.0 if entry.phase == "backward" else 1.0
        weights, stored = (each / (2.0 * products * tokens) for each in (entry.dense_flops, entry.flops))
        positions = INDEX_BYTES * stored if entry.flops < entry.dense_flops else 0.0
        sizes = {"width": math.sqrt(max(1.0, weights)), "tokens": tokens, "density": entry.flops / entry.dense_flops}
        sizes |= {"context": float(context), "d_head": 64.0, "vocabulary": sizes["width"], "features": sizes["width"]}
        found.append(
            Operation(
                entry.kind,
                entry.phase,
                entry.module,
                float(entry.flops),
                float(entry.dense_flops),
                float(entry.bytes),
                positions,
                sizes,
            )
        )
    trained = float(sum(p.numel() for p in model.parameters() if p.requires_grad))
    update = Operation(OPTIMIZER, "update", "", 14.0 * trained, 14.0 * trained, 28.0 * trained)
    return [*found, replace(update, sizes={"elements": max(1.0, trained)})]


def _traced_memory(model: nn.Module) -> int:
    """Return the bytes of weights, gradients and moments; what autograd saves is not known."""
    return sum(p.numel() * p.element_size() * (4 if p.requires_grad else 1) for p in model.parameters())


def _sum(first: float | None, second: float | None) -> float | None:
    return None if first is None or second is None else first + second
