"""Validation of a calibrated machine: whole training steps that nothing was fitted to, predicted and measured."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from sparsetrain import seeds
from sparsetrain.bench.machine import with_threads
from sparsetrain.bench.steps import StepCase, step_seconds
from sparsetrain.cost.hardware import Machine
from sparsetrain.cost.simulate import NORMAL_90, simulate
from sparsetrain.models import ModelConfig

# Widths that no fitted step and no timed operation has.
_WIDTHS, _HEADS = (80, 192, 320, 384, 448, 640), (16, 32, 64)
_MOST_FLOPS = 6e10


@dataclass(frozen=True)
class Validated:
    """A step that was predicted and measured, and the same step with dense matrices.

    Args:
        case: the step; sparse.
        threads: of torch.
        measured, predicted: seconds of the sparse step.
        dense_measured, dense_predicted: seconds of the dense step.
    """

    case: StepCase
    threads: int
    measured: float
    predicted: float
    dense_measured: float
    dense_predicted: float

    def as_dict(self) -> dict[str, Any]:
        """Return the row as a sheet has it."""
        model = self.case.model
        return {
            "d_model": model.d_model,
            "n_layers": model.n_layers,
            "vocab_size": model.vocab_size,
            "mlp": model.mlp,
            "norm": model.norm,
            "positions": model.positions,
            "bias": model.bias,
            "context": self.case.context,
            "batch": self.case.batch,
            "sparsity": self.case.sparsity,
            "backend": self.case.backend,
            "dtype": self.case.dtype,
            "threads": self.threads,
            "measured": self.measured,
            "predicted": self.predicted,
            "dense_measured": self.dense_measured,
            "dense_predicted": self.dense_predicted,
        }


def held_out() -> Iterator[StepCase]:
    """Yield sparse steps in a fixed order; none has the width of a fitted step or of a timed operation."""
    generator = seeds.generator(1, "validation", "cases")

    def pick(options: Sequence[Any]) -> Any:
        return options[int(torch.randint(len(options), (), generator=generator))]

    while True:
        width, d_head, context = pick(_WIDTHS), pick(_HEADS), pick((64, 128, 256, 512))
        batch = max(1, pick((128, 256, 512, 1024, 2048)) // context)
        sparsity, backend = pick((0.5, 0.75, 0.75, 0.9, 0.95)), pick(("auto", "csr", "masked"))
        layers, vocabulary = pick((1, 2, 4, 6)), pick((256, 1024, 4096))
        mlp, norm = pick(("gelu", "swiglu")), pick(("layernorm", "rmsnorm"))
        positions, bias = pick(("alibi", "rope", "learned")), pick((True, False))
        if width % d_head:
            continue
        model = ModelConfig(
            d_model=width,
            n_layers=layers,
            n_heads=width // d_head,
            vocab_size=vocabulary,
            max_context=context,
            mlp=mlp,
            norm=norm,
            positions=positions,
            bias=bias,
            seed=0,
        )
        case = StepCase(model, sparsity, backend, context, batch)
        if case.dense_flops < _MOST_FLOPS:
            yield case


def validate(
    machine: Machine,
    threads: Sequence[int],
    dtypes: Sequence[str],
    count: int,
    show: Callable[[int], None] | None = None,
) -> list[Validated]:
    """Return ``count`` held-out steps, each with its dense twin, measured after they were predicted.

    Args:
        machine: calibrated here.
        threads, dtypes: numbers of threads and types of products, which take turns.
        count: of sparse steps.
        show: called with the number of steps that are done.
    """
    found, turns = [], list(itertools.product(dtypes, threads))
    for number, case in zip(range(count), held_out(), strict=False):
        dtype, wanted = turns[number % len(turns)]
        with with_threads(wanted):
            found.append(_validated(machine, replace(case, dtype=dtype), wanted))
        if show is not None:
            show(number + 1)
    return found


def _validated(machine: Machine, case: StepCase, threads: int) -> Validated:
    dense = replace(case, sparsity=0.0, backend="auto")
    predicted = [
        simulate(
            replace(one.model, sparsity=one.sparsity),
            machine,
            one.context,
            one.batch,
            dtype=one.dtype,
            backend=one.backend,
            threads=threads,
        ).seconds
        for one in (case, dense)
    ]
    measured = [step_seconds(one.work()) for one in (case, dense)]
    return Validated(case, threads, measured[0], predicted[0], measured[1], predicted[1])


@dataclass(frozen=True)
class Errors:
    """How predictions differ from measurements.

    Args:
        count: of steps.
        median, ninetieth: of ``|predicted / measured - 1|``, and its 90th percentile.
        bias: median of ``predicted / measured - 1``; above 0 predicts more time than was measured.
        inside: steps whose measured time lies in the band of 90 %.
    """

    count: int
    median: float
    ninetieth: float
    bias: float
    inside: int

    @classmethod
    def of(cls, predicted: Sequence[float], measured: Sequence[float], spread: float) -> Errors:
        """Return the errors of predictions with a spread of the logarithm."""
        ratio = np.asarray(predicted) / np.asarray(measured)
        error = np.abs(ratio - 1.0)
        inside = np.abs(np.log(ratio)) <= NORMAL_90 * spread
        return cls(
            len(ratio),
            float(np.median(error)),
            float(np.quantile(error, 0.9)),
            float(np.median(ratio) - 1.0),
            int(inside.sum()),
        )


def errors(rows: Sequence[Validated], machine: Machine) -> dict[str, Errors]:
    """Return the errors of all steps, of the sparse and of the dense ones, and of the ratios of sparse to dense.

    With several types of products, each type has its own.
    """
    spread = 0.0 if machine.spread is None else machine.spread.value
    found = {}
    dtypes = list(dict.fromkeys(row.case.dtype for row in rows))
    for dtype in dtypes:
        prefix = f"{dtype}, " if len(dtypes) > 1 else ""
        chosen = [row for row in rows if row.case.dtype == dtype]
        sparse = [row.predicted for row in chosen], [row.measured for row in chosen]
        dense = [row.dense_predicted for row in chosen], [row.dense_measured for row in chosen]
        ratios = [
            [a / b for a, b in zip(these, those, strict=True)] for these, those in zip(sparse, dense, strict=True)
        ]
        found[f"{prefix}all steps"] = Errors.of(sparse[0] + dense[0], sparse[1] + dense[1], spread)
        found[f"{prefix}sparse"] = Errors.of(*sparse, spread)
        found[f"{prefix}dense"] = Errors.of(*dense, spread)
        found[f"{prefix}sparse over dense"] = Errors.of(ratios[0], ratios[1], spread)
    return found
