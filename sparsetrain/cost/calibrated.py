"""A machine's file from measured times: efficiency curves of single operations, corrected by whole training steps.

Single operations are timed alone, with their operands in a cache and nothing before or after them. Inside a model they
take longer. So the curves keep their shapes, and a few factors, one for each group of operations, and a time for each
call are fitted to whole steps by non-negative least squares of relative errors, held near 1 by a weak prior.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import nnls

from sparsetrain.cost.hardware import Machine
from sparsetrain.cost.operations import (
    ATTENTION,
    HEAD,
    LINEAR,
    OPTIMIZER,
    PRODUCTS,
    SOFTMAX,
    Operation,
)
from sparsetrain.cost.timing import DENSE, Setting, operation_terms
from sparsetrain.errors import UserError

AXES: dict[str, tuple[str, ...]] = {
    LINEAR: ("width", "tokens"),
    ATTENTION: ("context", "d_head"),
    HEAD: ("vocabulary", "features", "tokens"),
}
_OTHER = ("elements",)
_RISING = (
    "width",
    "tokens",
    "density",
    "context",
    "vocabulary",
    "features",
    "elements",
)  # time never falls along these
# Standard deviations of the factors of the groups before any step is seen. That of the optimizer stands for all work in
# proportion to the weights: in a model their gradients are new memory in each step, and they are in no near cache.
_SCALES = (0.25, 0.4, 0.4, 0.4, 2.0)
_NOISE = 0.03  # relative standard deviation of a measured step
FLOAT = "float32"
_DRIFT = 0.05  # relative standard deviation of a machine's own speed between a calibration and a later step


@dataclass(frozen=True)
class Sample:
    """The measured seconds of one operation, with ``threads`` threads, by ``implementation``, in ``dtype``."""

    operation: Operation
    implementation: str
    threads: int
    seconds: float
    dtype: str = FLOAT

    @property
    def work(self) -> float:
        """FLOPs of a product, bytes of any other operation."""
        operation = self.operation
        if operation.kind not in PRODUCTS:
            return float(operation.bytes)
        return float(operation.dense_flops if self.implementation in (DENSE, "masked") else operation.flops)

    @property
    def key(self) -> str:
        """The name of its curve."""
        operation = self.operation
        prefix = "" if self.dtype == FLOAT else f"{self.dtype}."
        if operation.kind == LINEAR:
            return f"{prefix}{LINEAR}.{self.implementation}.{operation.phase}"
        return f"{prefix}{operation.curve or operation.kind}.{operation.phase}"


@dataclass(frozen=True)
class Step:
    """The measured seconds of a whole training step, and its operations."""

    operations: Sequence[Operation]
    setting: Setting
    seconds: float


def document(
    samples: Iterable[Sample], label: str, source: str, date: str, memory: int, bandwidth: float
) -> dict[str, Any]:
    """Return a machine's file with the curves of single operations.

    Args:
        samples: on a full grid of each curve's axes.
        label: the processor.
        source, date: of the measurement.
        memory: bytes of the machine.
        bandwidth: bytes/s of a pass over more memory than the caches hold.

    Raises:
        UserError: an operation was not measured at each place of the grid.
    """
    by_key: dict[str, list[Sample]] = {}
    for sample in samples:
        by_key.setdefault(sample.key, []).append(sample)
    peaks: dict[str, float] = {}
    for key, group in by_key.items():
        if key.endswith(f"{LINEAR}.{DENSE}.forward"):
            peaks[group[0].dtype] = max(one.work / one.seconds for one in group)
    if FLOAT not in peaks:
        raise UserError("a calibration needs dense products in float32")
    fact = {"kind": "measured", "source": "calibration"}
    return {
        "label": label,
        "sources": {"calibration": {"title": source, "date": date}},
        "peak": {dtype: {"value": f"{peak / 1e9:.6g} GFLOP/s", **fact} for dtype, peak in peaks.items()},
        "memory": [
            {
                "name": "main memory",
                "size": {"value": f"{memory} B", **fact},
                "bandwidth": {"value": f"{bandwidth / 1e9:.6g} GB/s", **fact},
            }
        ],
        "zeros": {"skips": "unstructured", **fact},
        "roofline": False,
        # The head's measured time contains the softmax.
        "included": [SOFTMAX],
        "efficiency": {
            key: {**_curve(group, peaks[group[0].dtype], bandwidth), **fact} for key, group in sorted(by_key.items())
        },
    }


def _curve(samples: list[Sample], peak: float, bandwidth: float) -> dict[str, Any]:
    key, kind = samples[0].key, samples[0].operation.kind
    names = [*AXES.get(kind, _OTHER), "threads"]
    if kind == LINEAR and samples[0].implementation != DENSE:
        names.insert(2, "density")
    placed = [{**sample.operation.sizes, "threads": float(sample.threads)} for sample in samples]
    axes = {name: sorted({float(sizes[name]) for sizes in placed}) for name in names}
    grid = np.full([len(places) for places in axes.values()], np.nan)
    works = grid.copy()
    for sample, sizes in zip(samples, placed, strict=True):
        index = tuple(axes[name].index(float(sizes[name])) for name in names)
        grid[index], works[index] = sample.seconds, sample.work
    if np.isnan(grid).any():
        raise UserError(f"the calibration of {key} lacks {int(np.isnan(grid).sum())} of {grid.size} places")
    for position, name in enumerate(names):
        if name in _RISING:
            grid = np.maximum.accumulate(grid, axis=position)
    best = peak if kind in PRODUCTS else bandwidth
    values = works / (best * grid)
    return {"axes": axes, "values": [[*map(float, row)] for row in values] if values.ndim == 2 else values.tolist()}


GROUPS = ("dense products", "sparse products", "attention", "everything else", "optimizer")


def group_of(operation: Operation) -> int:
    """Return the index in `GROUPS` of an operation."""
    if operation.kind == LINEAR:
        return 1 if operation.is_sparse else 0
    if operation.kind == HEAD:
        return 0
    return {ATTENTION: 2, OPTIMIZER: 4}.get(operation.kind, 3)


def features(step: Step, machine: Machine) -> NDArray[np.float64]:
    """Return the predicted seconds of a step by group, and its number of calls."""
    sums = np.zeros(len(GROUPS) + 1)
    bare = replace(machine, launch=None)
    for operation in step.operations:
        if operation.kind in machine.included:
            continue
        seconds = sum(operation_terms(operation, bare, step.setting).values())
        sums[group_of(operation)] += float(operation.count) * float(seconds)
        sums[-1] += float(operation.count)
    return sums


def corrected(content: Mapping[str, Any], steps: Sequence[Step]) -> dict[str, Any]:
    """Return a machine's file whose curves and launch time agree with whole steps, and that knows their spread.

    Args:
        content: of `document`. steps: at each number of threads of the curves, at least five.
    """
    machine = Machine.from_document(content, "this", "calibration")
    places = sorted({(step.setting.dtype, step.setting.threads) for step in steps})
    groups = len(GROUPS)
    table = np.zeros((len(steps), len(places) * groups + 1))
    for row, step in zip(table, steps, strict=True):
        at = places.index((step.setting.dtype, step.setting.threads)) * groups
        *row[at : at + groups], row[-1] = features(step, machine)
    seconds = np.array([step.seconds for step in steps])
    solution = _fit(table, seconds)
    factors = {place: solution[index * groups : (index + 1) * groups] for index, place in enumerate(places)}
    # Each step by a fit to the others, so that the spread is that of steps which were not seen.
    residuals = []
    for index in range(len(steps)):
        others = np.arange(len(steps)) != index
        residuals.append(np.log(seconds[index] / (table[index] @ _fit(table[others], seconds[others]))))
    result = dict(content)
    fact = {"kind": "measured", "source": "calibration"}
    launch = max(float(solution[-1]), 1e-9)
    result["launch"] = {"value": f"{launch * 1e6:.6g} us", **fact}
    curves = content["efficiency"]
    result["efficiency"] = {}
    for dtype in dict.fromkeys(dtype for dtype, _ in factors):
        of_type = {threads: solution for (name, threads), solution in factors.items() if name == dtype}
        prefix = "" if dtype == FLOAT else f"{dtype}."
        for key, entry in curves.items():
            if key.split(".")[0] not in content["peak"]:  # a curve of float32, which another type may have of its own
                own = curves.get(prefix + key, entry)
                result["efficiency"][prefix + key] = _scaled(key, own, of_type)
    spread = float(np.sqrt(np.mean(np.square(residuals)) + _DRIFT**2))
    result["spread"] = {"value": round(spread, 4), **fact}
    return result


def _fit(table: NDArray[np.float64], seconds: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the factors of the columns of predicted seconds, and the seconds of a call, by their relative errors.

    Args:
        table: ``[steps, places * groups + 1]``; the last column has the number of calls.
        seconds: measured, ``[steps]``.
    """
    relative = table / seconds[:, None]
    count = table.shape[1] - 1
    weights = _NOISE / np.tile(_SCALES, count // len(_SCALES))
    prior = np.hstack([np.diag(weights), np.zeros((count, 1))])
    rows = np.vstack([relative, prior])
    wanted = np.concatenate([np.ones(len(seconds)), weights])
    # Columns are scaled so that the seconds of a call do not drown among factors near 1.
    scale = np.maximum(np.abs(rows).max(axis=0), 1e-300)
    return nnls(rows / scale, wanted)[0] / scale


def _scaled(key: str, entry: Mapping[str, Any], factors: Mapping[int, NDArray[np.float64]]) -> dict[str, Any]:
    kind, implementation = key.split(".")[0], key.split(".")[1]
    group = {LINEAR: 0 if implementation == DENSE else 1, HEAD: 0, ATTENTION: 2, OPTIMIZER: 4}.get(kind, 3)
    axes, values = entry["axes"], np.asarray(entry["values"])
    for index, count in enumerate(axes["threads"]):  # the last axis
        if int(count) in factors:
            values[..., index] = values[..., index] / max(factors[int(count)][group], 0.05)
    return {**entry, "values": values.tolist()}
