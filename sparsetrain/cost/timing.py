"""The time of operations on a machine: a roofline over its memory levels, with what was measured in place of the roof.

An operation takes ``launch + max(work / (peak * efficiency), bytes / bandwidth)`` seconds; the larger one names the
term. On a calibrated machine the efficiency is that of whole operations, caches and all: their time is
``work / (peak * efficiency)``, divided among the terms in proportion to what each would take at the machine's peak.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from sparsetrain.cost.hardware import Machine
from sparsetrain.cost.operations import LINEAR, OPTIMIZER, PRODUCTS, Number, Operation
from sparsetrain.cost.sizes import Layers
from sparsetrain.errors import check_choice

DENSE, MASKED, CSR, BSR, AUTO = "dense", "masked", "csr", "bsr", "auto"
TWO_OF_FOUR = "2:4"
_BACKENDS = (MASKED, CSR, BSR, "triton", AUTO)
_TINY = 1e-300
_WHOLE = (DENSE, MASKED)  # implementations that compute with the zeros, too


@dataclass(frozen=True)
class Terms:
    """Seconds of a step by what they are spent on; they add up to ``total``.

    Args:
        compute: arithmetic. memory: moving weights and activations. index: reading the positions of nonzeros.
        optimizer: the update of weights. communication: between machines, as far as nothing hides it.
        overhead: launching operations, and waiting for other machines.
    """

    compute: Number = 0.0
    memory: Number = 0.0
    index: Number = 0.0
    optimizer: Number = 0.0
    communication: Number = 0.0
    overhead: Number = 0.0

    @property
    def total(self) -> Number:
        """The seconds of the step."""
        return self.compute + self.memory + self.index + self.optimizer + self.communication + self.overhead

    def as_dict(self) -> dict[str, Number]:
        """Return the terms by name, without their total."""
        return asdict(self)


@dataclass(frozen=True)
class Setting:
    """How a step is computed.

    Args:
        dtype: of weights and activations in products.
        backend: implementation of sparse products, on a machine with several; ``auto`` is the fastest one.
        block: side of the blocks that nonzeros lie in; 1 if they lie anywhere.
        two_of_four: whether at most two of four neighbouring weights of a row are nonzero.
        threads: on a machine with curves over threads.
    """

    dtype: str = "float32"
    backend: str = AUTO
    block: int = 1
    two_of_four: bool = False
    threads: int = 1


def step_terms(operations: Iterable[Operation], machine: Machine, setting: Setting) -> Terms:
    """Return the seconds of a step on one machine, by term.

    Args:
        operations: see `sparsetrain.cost.operations.step_operations`.
        machine: where the step runs.
        setting: how it is computed.

    Raises:
        UserError: the machine's file has no rate for the dtype, or no curve for the backend.
    """
    sums: dict[str, Number] = dict.fromkeys(Terms.__dataclass_fields__, 0.0)
    for operation in operations:
        if operation.kind in machine.included:
            continue
        for name, seconds in operation_terms(operation, machine, setting).items():
            sums[name] = sums[name] + operation.count * seconds
    return Terms(**sums)


def operation_terms(operation: Operation, machine: Machine, setting: Setting) -> dict[str, Number]:
    """Return the seconds of one execution of an operation by term; the arguments are those of `step_terms`."""
    launch: Number = 0.0 if machine.launch is None else machine.launch.value
    if operation.kind not in PRODUCTS:
        busy = _moved(operation, machine, setting)
        return {"optimizer" if operation.kind == OPTIMIZER else "memory": busy, "overhead": launch}
    first, *others = implementations(operation, machine, setting)
    best = _product(operation, machine, setting, first)
    for name in others:
        terms = _product(operation, machine, setting, name)
        best = _chosen(_total(terms) < _total(best), terms, best)
    if first != DENSE:  # of several configurations some may be dense
        best = _chosen(np.asarray(operation.index_bytes) > 0.0, best, _product(operation, machine, setting, DENSE))
    return {**best, "overhead": launch}


def _chosen(where: Any, these: dict[str, Number], others: dict[str, Number]) -> dict[str, Number]:
    return {term: np.where(where, these[term], others[term]) for term in these}


def implementations(operation: Operation, machine: Machine, setting: Setting) -> list[str]:
    """Return the implementations of a product among which the machine may choose.

    A machine without curves of backends that skips zeros may also compute them, if that takes less time.

    Raises:
        UserError: the backend of the setting is unknown, or the machine has curves for others.
    """
    if operation.kind != LINEAR or not operation.is_sparse:
        return [DENSE]
    known = [name for name in (MASKED, CSR, BSR) if machine.has_backend(operation.kind, name)]
    if not known:
        check_choice("sparsity.backend", setting.backend, _BACKENDS)
        if setting.backend == MASKED or not skips_zeros(machine, setting):
            return [DENSE]
        return [machine.skips, *([DENSE] if setting.backend == AUTO else [])]
    if setting.backend != AUTO:
        check_choice("sparsity.backend", setting.backend, [*known, AUTO])
        return [setting.backend]
    return [name for name in known if name != BSR or setting.block > 1]


def uses_zeros(machine: Machine, setting: Setting) -> bool:
    """Return whether zeros can save anything on a machine, in one of its implementations."""
    return skips_zeros(machine, setting) or any(machine.has_backend(LINEAR, name) for name in (CSR, BSR))


def counted_layers(layers: Sequence[Layers], machine: Machine, setting: Setting) -> list[Layers]:
    """Return layers as a machine computes and holds them: dense if it cannot use their zeros."""
    if uses_zeros(machine, setting):
        return list(layers)
    return [replace(group, densities={}) for group in layers]


def skips_zeros(machine: Machine, setting: Setting) -> bool:
    """Return whether the machine spends no time on the zeros of a sparse matrix."""
    return (
        machine.skips == "unstructured"
        or (machine.skips == TWO_OF_FOUR and setting.two_of_four)
        or (machine.skips == "block" and setting.block % machine.block == 0)
    )


def _product(operation: Operation, machine: Machine, setting: Setting, implementation: str) -> dict[str, Number]:
    """Return compute, memory and index seconds of a product."""
    whole = implementation in _WHOLE
    flops = operation.dense_flops if whole else operation.flops
    if implementation == TWO_OF_FOUR:  # two of four are computed even if fewer are nonzero
        flops = np.maximum(flops, 0.5 * operation.dense_flops)
    index: Number = 0.0 if implementation == DENSE else operation.index_bytes
    peak, bandwidth = machine.peak_rate(setting.dtype), _bandwidth(machine, operation.bytes + index)
    busy = flops / (peak * _efficiency(operation, machine, setting, implementation))
    moving, indexing = operation.bytes / bandwidth, index / bandwidth
    if machine.roofline:
        bound = busy >= moving + indexing
        return {
            "compute": np.where(bound, busy, 0.0),
            "memory": np.where(bound, 0.0, moving),
            "index": np.where(bound, 0.0, indexing),
        }
    ideal = flops / peak
    scale = busy / np.maximum(ideal + moving + indexing, _TINY)
    return {"compute": scale * ideal, "memory": scale * moving, "index": scale * indexing}


def _moved(operation: Operation, machine: Machine, setting: Setting) -> Number:
    """Return the seconds of an operation that is bound by memory."""
    bandwidth = _bandwidth(machine, operation.bytes) if machine.roofline else machine.memory[-1].bandwidth.value
    return operation.bytes / (bandwidth * _efficiency(operation, machine, setting, DENSE))


def _efficiency(operation: Operation, machine: Machine, setting: Setting, implementation: str) -> Number:
    curve = machine.curve_of(operation.curve or operation.kind, operation.phase, implementation, setting.dtype)
    if curve is None:
        return 1.0
    return curve.at({**operation.sizes, "threads": float(setting.threads)})


def _bandwidth(machine: Machine, working_set: Number) -> Number:
    """Return the bandwidth of the nearest memory level that holds the bytes of an operation."""
    *nearer, last = machine.memory
    bandwidth: Number = last.bandwidth.value
    for level in reversed(nearer):
        bandwidth = np.where(np.asarray(working_set) <= level.size.value, level.bandwidth.value, bandwidth)
    return bandwidth


def _total(terms: Mapping[str, Number]) -> Number:
    return sum(terms.values(), 0.0)
