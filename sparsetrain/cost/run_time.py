"""The time of a whole run on a machine: the steps of its stretches, each as `simulate` predicts it.

What differs from steps of one batch is added to their estimate, or taken away: several micro-batches with one update of
the weights, and updates of masks. Evaluations, checkpoints and the preparation of data are not part of it.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from sparsetrain.cost.blocks import Shape, shape_of_config
from sparsetrain.cost.cluster.parallelism import Parallelism
from sparsetrain.cost.cluster.schedule import VALUE_BYTES
from sparsetrain.cost.extras import DENSE_GRADIENT, update_operations
from sparsetrain.cost.hardware import Machine
from sparsetrain.cost.operations import BACKWARD, LINEAR, OPTIMIZER, PRODUCTS, Operation, step_operations
from sparsetrain.cost.run_flops import Stretch
from sparsetrain.cost.simulate import Estimate, estimate_of
from sparsetrain.cost.sizes import Sizes
from sparsetrain.cost.timing import AUTO, MASKED, Setting, step_terms
from sparsetrain.errors import UserError
from sparsetrain.models.config import ModelConfig


@dataclass(frozen=True)
class RunWork:
    """The facts about a run that its time depends on.

    Args:
        model: shapes and components.
        stretches: its steps, in order; a context includes the soft prompt.
        grows_by_gradient: whether updates of the masks need dense gradients.
        trained: beginnings of the names of parameters with a gradient; None is every one.
        prompt_tokens: learned vectors of a soft prompt, among the tokens of each context.
        dtype: of products. backend: of sparse layers; None is the fastest. threads: None is torch's number.
        notes: sentences on what the prediction leaves out.
    """

    model: ModelConfig
    stretches: Sequence[Stretch]
    grows_by_gradient: bool = False
    trained: Collection[str] | None = None
    prompt_tokens: int = 0
    dtype: str = "float32"
    backend: str | None = None
    threads: int | None = None
    notes: tuple[str, ...] = field(default=())

    @property
    def steps(self) -> int:
        return sum(stretch.steps for stretch in self.stretches)

    def between(self, first: int, end: int) -> RunWork:
        """Return steps ``first`` to ``end - 1``. An update of the masks belongs to the step that it follows."""
        parts, begin = [], 0
        for stretch in self.stretches:
            stop = begin + stretch.steps
            steps = min(end, stop) - max(first, begin)
            if steps > 0:
                parts.append(replace(stretch, steps=steps, updates=stretch.updates if end >= stop else 0))
            begin = stop
        return replace(self, stretches=parts)

    def after(self, steps: int) -> RunWork:
        """Return what is left after ``steps`` steps."""
        return self.between(steps, self.steps)


def predicted(work: RunWork, machine: Machine, parallelism: Parallelism | None = None) -> Estimate:
    """Return what the training steps of a run take on a machine, or divided among several.

    The rate at which masks are compared is that of the main memory, unless the machine's file has a curve
    ``mask update``.

    Raises:
        UserError: the run has no step, it does not fit, it cannot be divided like this, or the machine lacks a rate for
            its dtype or backend.
    """
    parts: dict[tuple[Any, ...], tuple[Stretch, int, int]] = {}
    for stretch in work.stretches:
        key = (stretch.context, stretch.batch_size, stretch.micro_batch, *stretch.densities.items())
        first, steps, updates = parts.get(key, (stretch, 0, 0))
        parts[key] = (first, steps + stretch.steps, updates + stretch.updates)
    total: Estimate | None = None
    for stretch, steps, updates in parts.values():
        step = _Step(work, stretch, machine, parallelism)
        part = step.estimate().times(steps)
        if updates:
            part = step.with_updates(part, updates)
        total = part if total is None else total + part
    if total is None:
        raise UserError("a run without steps has no time")
    return replace(total, notes=tuple(dict.fromkeys((*total.notes, *work.notes))))


class _Step:
    """A step of a stretch on a machine."""

    def __init__(
        self, work: RunWork, stretch: Stretch, machine: Machine, parallelism: Parallelism | None = None
    ) -> None:
        self.work, self.stretch, self.machine, self.parallelism = work, stretch, machine, parallelism
        threads = torch.get_num_threads() if work.threads is None else work.threads
        self.setting = Setting(work.dtype, work.backend or AUTO, threads=threads)
        self.sizes, self.value_bytes = Sizes.of(work.model), VALUE_BYTES.get(work.dtype, 4.0)
        # Weights that stream to a machine would stream for every micro-batch, so it takes the batch at once.
        whole = machine.streamed or parallelism is not None  # which has micro-batches of its own
        self.sequences = stretch.batch_size if whole else stretch.micro_batch

    def estimate(self) -> Estimate:
        """Return the step without an update of the masks."""
        stretch, shape = self.stretch, self._shape()
        masked = self.work.backend == MASKED
        found = estimate_of(
            shape, self.machine, stretch.context, self.sequences, self.setting, self.parallelism, masked=masked
        )
        passes = stretch.batch_size // self.sequences
        if passes > 1:
            update = [each for each in self._operations(shape) if each.kind == OPTIMIZER]
            found = self._changed(found.times(passes), taken=update, times=passes - 1)
        return replace(found, steps=1, tokens=stretch.context * stretch.batch_size)

    def with_updates(self, part: Estimate, updates: int) -> Estimate:
        """Return the estimate of steps of which some end with an update of the masks."""
        ranked = float(self.sequences * self.stretch.context)
        added = [
            # The dense gradient is a product of dense matrices.
            replace(each, kind=LINEAR, phase=BACKWARD) if each.kind == DENSE_GRADIENT else each
            for each in update_operations(
                self.sizes, self._shape().layers, ranked, self.work.grows_by_gradient, self.value_bytes
            )
        ]
        return replace(self._changed(part, added=added, times=updates), flops=part.flops)

    def _shape(self) -> Shape:
        work = self.work
        density = self.stretch.densities or 1.0
        return shape_of_config(work.model, density, trained=work.trained, prompt_tokens=work.prompt_tokens)

    def _operations(self, shape: Shape) -> list[Operation]:
        return step_operations(
            self.sizes,
            float(self.stretch.context),
            float(self.sequences),
            shape.layers,
            value_bytes=self.value_bytes,
            frozen=shape.frozen,
            prompt_tokens=float(shape.prompt_tokens),
        )

    def _changed(
        self, found: Estimate, added: Sequence[Operation] = (), taken: Sequence[Operation] = (), times: int = 1
    ) -> Estimate:
        """Return an estimate with operations added and taken away ``times`` times."""
        more, less = (step_terms(each, self.machine, self.setting).as_dict() for each in (added, taken))
        terms = {name: max(0.0, old + times * float(more[name] - less[name])) for name, old in found.terms.items()}
        seconds = math.fsum(terms.values())
        scale = seconds / found.seconds
        return replace(
            found,
            seconds=seconds,
            band=(found.band[0] * scale, found.band[1] * scale),
            flops=found.flops + times * round(_products(added) - _products(taken)),
            bytes=found.bytes + times * round(_moved(added) - _moved(taken)),
            energy=None if found.energy is None else found.energy * scale,
            cost=None if found.cost is None else found.cost * scale,
            terms=terms,
        )


def _products(operations: Sequence[Operation]) -> float:
    return math.fsum(float(each.count * each.flops) for each in operations if each.kind in PRODUCTS)


def _moved(operations: Sequence[Operation]) -> float:
    return math.fsum(float(each.count * (each.bytes + each.index_bytes)) for each in operations)
