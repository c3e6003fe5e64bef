"""Many configurations at once: seconds, FLOPs and memory of a step of each, and which of them no other one beats.

It is the arithmetic of `sparsetrain.simulate` over arrays, so that a search may look at some hundred thousand models a
second. A step is divided among devices by data parallelism; a device's share of the batch passes in as few
micro-batches as its memory allows.
"""

from __future__ import annotations

import bisect
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sparsetrain.cost.cluster.memory import cluster_memory
from sparsetrain.cost.cluster.parallelism import FULL, NONE, Parallelism
from sparsetrain.cost.cluster.schedule import cluster_terms
from sparsetrain.cost.hardware import Machine
from sparsetrain.cost.sizes import Layers, Sizes
from sparsetrain.cost.step_memory import bytes_of
from sparsetrain.cost.timing import Setting, counted_layers

Array = NDArray[np.float64]

_CHUNK = 16384  # configurations at a time, whose arrays the caches hold
_DIGITS = 9  # to which objectives are compared, so that no rounding error makes a configuration look better


@dataclass(frozen=True)
class Division:
    """What replicas share (``zero``) and compute again (``recompute``); see `Parallelism`."""

    zero: int = 0
    recompute: str = NONE

    def parallelism(self, devices: Any, micro_batch: Any) -> Parallelism:
        """Return how a step on ``devices`` replicas with micro-batches of ``micro_batch`` sequences is divided."""
        return Parallelism(data=devices, micro_batch=micro_batch, zero=self.zero, recompute=self.recompute)


DIVISIONS = (Division(), Division(zero=1), Division(zero=3, recompute=FULL))
"""From the least to the most that is done to save memory; a single device has the first one only."""


@dataclass(frozen=True)
class Candidates:
    """Configurations, each number an array ``[n]``.

    Args:
        sizes: the models; what is no array is the same for all.
        density: stored fraction of every hidden matrix, in (0, 1].
        context: tokens of a sequence.
        batch: sequences of a step over all devices, a multiple of ``devices``.
        devices: replicas.
    """

    sizes: Sizes
    density: Array
    context: float
    batch: Array
    devices: Array

    def __len__(self) -> int:
        return len(self.batch)

    def part(self, where: Any) -> Candidates:
        """Return the configurations at an index array, a mask or a slice."""
        sizes = {
            each.name: value[where]
            for each in fields(self.sizes)
            if isinstance(value := getattr(self.sizes, each.name), np.ndarray)
        }
        return replace(
            self,
            sizes=replace(self.sizes, **sizes),
            density=self.density[where],
            batch=self.batch[where],
            devices=self.devices[where],
        )

    @property
    def layers(self) -> list[Layers]:
        """The blocks, with the exact number of nonzeros of each matrix."""
        found = {
            name: np.round(self.density * (rows * columns)) / (rows * columns)
            for name, (rows, columns) in self.sizes.matrices().items()
        }
        return [Layers(self.sizes.layers, found)]

    @property
    def weights(self) -> Array:
        """Elements of the hidden matrices, zeros included."""
        return np.asarray(self.sizes.layers * sum(rows * columns for rows, columns in self.sizes.matrices().values()))

    @property
    def nonzeros(self) -> Array:
        """Stored weights of the hidden matrices."""
        matrices = self.sizes.matrices().values()
        return np.asarray(self.sizes.layers * sum(np.round(self.density * (rows * cols)) for rows, cols in matrices))

    @property
    def flops(self) -> Array:
        """FLOPs of a step as `sparsetrain.flops` totals them: 6 a nonzero and token, and 12 T^2 D a layer, sequence."""
        sizes, tokens = self.sizes, self.batch * self.context
        attention = 12.0 * self.context * sizes.width * sizes.layers
        return np.asarray(tokens * (6.0 * (self.nonzeros + sizes.vocabulary * sizes.width) + attention))


@dataclass(frozen=True)
class Predicted:
    """What a step of each configuration takes, ``[n]``.

    Args:
        seconds: time; infinite where the step does not fit.
        memory: bytes on the fullest device, as far as its memory has to hold them.
        room: bytes that the device has.
        micro_batch: sequences of a device's micro-batch.
        division: place in `DIVISIONS`; -1 where none fits.
    """

    seconds: Array
    memory: Array
    room: float
    micro_batch: Array
    division: NDArray[np.intp]

    @property
    def fits(self) -> NDArray[np.bool_]:
        """Whether the memory of a device is enough."""
        return self.division >= 0


def predict(candidates: Candidates, machine: Machine, setting: Setting) -> Predicted:
    """Return what a step of each configuration takes on a machine.

    Args:
        candidates: configurations. machine: each device. setting: how products are computed.

    Raises:
        UserError: a batch is no multiple of its devices, no link joins all of them, or the machine's file lacks a
            rate or a link.
    """
    room = (machine.memory[0] if machine.streamed else machine.memory[-1]).size.value
    parts = [
        _predict(candidates.part(slice(start, start + _CHUNK)), machine, setting, room)
        for start in range(0, len(candidates), _CHUNK)
    ]
    names = ("seconds", "memory", "micro_batch", "division")
    joined = {name: np.concatenate([getattr(part, name) for part in parts] or [np.zeros(0)]) for name in names}
    return Predicted(room=room, **joined)


def _predict(candidates: Candidates, machine: Machine, setting: Setting, room: float) -> Predicted:
    count = len(candidates)
    seconds, memory, division = np.full(count, np.inf), np.full(count, np.inf), np.full(count, -1, dtype=np.intp)
    micro = candidates.batch / candidates.devices
    for index, divided in enumerate(DIVISIONS):
        places = np.flatnonzero((division < 0) & ((candidates.devices > 1) | (index == 0)))
        if not len(places):
            continue
        these = candidates.part(places)
        held, passed = _smallest_passes(these, machine, setting, divided, room)
        better = held < memory[places]
        memory[places[better]], micro[places[better]] = held[better], passed[better]
        fitting = held <= room
        done = places[fitting]
        division[done] = index
        if not len(done):
            continue
        these = these.part(fitting)
        terms = cluster_terms(
            these.sizes,
            these.context,
            these.batch,
            machine,
            divided.parallelism(these.devices, micro[done]),
            setting,
            counted_layers(these.layers, machine, setting),
        )
        seconds[done] = terms.total
    return Predicted(seconds, memory, room, micro, division)


def _smallest_passes(
    candidates: Candidates, machine: Machine, setting: Setting, divided: Division, room: float
) -> tuple[Array, Array]:
    """Return the bytes of each step and the largest micro-batch that fits, among halves of a device's share.

    What fits with no micro-batch has the bytes of a single sequence.
    """
    micro = candidates.batch / candidates.devices
    held = np.full(len(candidates), np.inf)
    places = np.arange(len(candidates))
    while len(places):
        held[places] = _held(candidates.part(places), micro[places], machine, setting, divided)
        places = places[(held[places] > room) & (micro[places] > 1.0)]
        even = np.mod(micro[places], 2.0) == 0.0
        micro[places] = np.where(even, micro[places] / 2.0, 1.0)
    return held, micro


def _held(candidates: Candidates, micro: Array, machine: Machine, setting: Setting, divided: Division) -> Array:
    """Return the bytes of each step: as the allocator has them for one device in float32, else in closed form."""
    sizes, context = candidates.sizes, candidates.context
    layers = counted_layers(candidates.layers, machine, setting)
    parallelism = divided.parallelism(candidates.devices, micro)
    found = cluster_memory(sizes, context, candidates.batch, parallelism, setting, layers)
    if machine.streamed:  # the wafer has the activations, and another device the rest
        return np.asarray(found.activations + found.working)
    held = np.asarray(found.total)
    if setting.dtype != "float32":
        return held
    alone = bytes_of(sizes, layers, context, micro, False, float(setting.threads))["peak"]
    return np.where(candidates.devices > 1, held, alone)


def pareto(objectives: Array) -> NDArray[np.bool_]:
    """Return which rows no other row beats: as small in every column, and smaller in one.

    Args:
        objectives: ``[n, 3]``, compared to nine significant digits. Equal rows are kept together. A row with an
            infinite number is never kept; rows with NaN in the last column are compared among themselves.
    """
    kept = np.zeros(len(objectives), dtype=bool)
    compared = rounded(objectives)
    unknown = np.isnan(compared[:, 2])
    for group in (np.flatnonzero(unknown), np.flatnonzero(~unknown)):
        rows = np.where(np.isnan(compared[group]), 0.0, compared[group])
        finite = np.isfinite(rows).all(axis=1)
        kept[group[finite]] = _pareto(rows[finite])
    return kept


def _pareto(rows: Array) -> NDArray[np.bool_]:
    """Go through the rows by the first column, with the stairs of the other two of all rows before."""
    kept = np.zeros(len(rows), dtype=bool)
    firsts: list[float] = []  # rising, and seconds falling
    seconds: list[float] = []
    previous: tuple[float, ...] | None = None
    last = False
    for place in np.lexsort(rows.T[::-1]):
        row = tuple(float(value) for value in rows[place])
        if row == previous:
            kept[place] = last
            continue
        previous = row
        _, x, y = row
        at = bisect.bisect_right(firsts, x)
        last = at == 0 or seconds[at - 1] > y
        kept[place] = last
        if last:
            start = bisect.bisect_left(firsts, x)
            stop = start
            while stop < len(firsts) and seconds[stop] >= y:
                stop += 1
            firsts[start:stop], seconds[start:stop] = [x], [y]
    return kept


def rounded(values: Array) -> Array:
    """Return values to nine significant digits, as `pareto` compares them."""
    usable = np.isfinite(values) & (values != 0.0)
    exponent = np.floor(np.log10(np.abs(np.where(usable, values, 1.0))))
    scale = np.power(10.0, _DIGITS - 1 - exponent)
    return np.where(usable, np.round(np.where(usable, values, 0.0) * scale) / scale, values)
