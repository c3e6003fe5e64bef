"""Whole training steps to be timed: a model, its sparsity and backend, and the tokens of the step."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from sparsetrain import seeds
from sparsetrain.bench.timing import Work
from sparsetrain.cost.operations import Operation, step_operations
from sparsetrain.cost.sizes import Layers, Sizes
from sparsetrain.models import ModelConfig, Transformer
from sparsetrain.sparsity import SparsityConfig

_LEAST_CALLS, _LEAST_SECONDS = 3, 0.5


@dataclass(frozen=True)
class StepCase:
    """A training step of ``batch`` sequences: loss, gradients, and the update by fused AdamW."""

    model: ModelConfig
    sparsity: float
    backend: str
    context: int
    batch: int

    def operations(self) -> Sequence[Operation]:
        """Return its operations."""
        sizes = Sizes.of(self.model)
        densities = dict.fromkeys(sizes.matrices(), 1.0 - self.sparsity) if self.sparsity else {}
        return step_operations(sizes, float(self.context), float(self.batch), [Layers(sizes.layers, densities)])

    @property
    def dense_flops(self) -> float:
        """FLOPs if no zero is skipped."""
        return sum(float(each.dense_flops * each.count) for each in self.operations())

    def work(self) -> Work:
        """Return the step, with random tokens."""
        model = Transformer(self.model, plan=SparsityConfig(sparsity=self.sparsity, backend=self.backend))
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
        generator = seeds.generator(0, "calibration", "tokens")
        drawn = torch.randint(self.model.vocab_size, (self.batch, self.context + 1), generator=generator)
        tokens, targets = drawn[:, :-1].contiguous(), drawn[:, 1:].contiguous()

        def backward(loss: torch.Tensor) -> None:
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        return Work(lambda: model.loss(tokens, targets), backward)


def step_seconds(work: Work, least: float = _LEAST_SECONDS) -> float:
    """Return the median seconds of a step over at least three calls and ``least`` seconds, after two warm-up calls."""
    spent: list[float] = []
    for number in range(1 << 20):
        start = time.perf_counter()
        loss = work.forward()
        if work.backward is not None:
            work.backward(loss)
        if number >= 2:  # the first calls compile kernels and make the optimizer's state
            spent.append(time.perf_counter() - start)
        if len(spent) >= _LEAST_CALLS and sum(spent) >= least:
            break
    return statistics.median(spent)
