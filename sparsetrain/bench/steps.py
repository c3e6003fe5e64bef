"""Whole training steps to be timed: a model, its sparsity and backend, and the tokens of the step."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from sparsetrain import seeds
from sparsetrain.bench.timing import Work, run_once
from sparsetrain.cost.cluster.schedule import VALUE_BYTES
from sparsetrain.cost.operations import Operation, step_operations
from sparsetrain.cost.sizes import Layers, Sizes
from sparsetrain.models import ModelConfig, Transformer
from sparsetrain.sparsity import SparsityConfig

TORCH_TYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
"""Types that products can be computed in on a CPU, by name."""

_LEAST_CALLS, _LEAST_SECONDS = 3, 0.5


@dataclass(frozen=True)
class StepCase:
    """A training step of ``batch`` sequences: loss, gradients, and the update by fused AdamW.

    Another ``dtype`` than float32 is that of autocast.
    """

    model: ModelConfig
    sparsity: float
    backend: str
    context: int
    batch: int
    dtype: str = "float32"

    def operations(self) -> Sequence[Operation]:
        """Return its operations."""
        sizes = Sizes.of(self.model)
        densities = dict.fromkeys(sizes.matrices(), 1.0 - self.sparsity) if self.sparsity else {}
        layers, value_bytes = [Layers(sizes.layers, densities)], VALUE_BYTES[self.dtype]
        return step_operations(sizes, float(self.context), float(self.batch), layers, value_bytes=value_bytes)

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

        def forward() -> torch.Tensor:
            with torch.autocast("cpu", TORCH_TYPES[self.dtype], enabled=self.dtype != "float32"):
                return model.loss(tokens, targets)

        return Work(forward, backward)


def step_seconds(work: Work, least: float = _LEAST_SECONDS) -> float:
    """Return the median seconds of a step over at least three calls and ``least`` seconds, after two warm-up calls."""
    spent: list[float] = []
    for number in range(1 << 20):
        _, seconds = run_once(work)
        if number >= 2:  # the first calls compile kernels and make the optimizer's state
            spent.append(seconds)
        if len(spent) >= _LEAST_CALLS and sum(spent) >= least:
            break
    return statistics.median(spent)
