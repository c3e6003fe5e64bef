"""What a mask update holds on top of what training holds anyway, in float32 dense layers.

Counted is every byte that torch's allocator hands out and every array of numpy, at their highest, above what was
held before: the optimizer's step and its moments, the layers and their indices are there already. The two highs are
added although they need not coincide. There are three equal layers, so that what grows with the model would show.
"""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sparsetrain as st
from sparsetrain.bench.memory import peak_bytes
from sparsetrain.sparsity import Rule

SIDE, LAYERS, TOKENS = 512, 3, 8


def rise(call: Callable[[], Any]) -> int:
    """Return by how many bytes memory rises during ``call`` above where it stood."""
    arrays = 0

    def traced() -> None:
        nonlocal arrays
        before = tracemalloc.get_traced_memory()[0]
        tracemalloc.reset_peak()
        call()
        arrays = tracemalloc.get_traced_memory()[1] - before

    tracemalloc.start()
    try:
        tensors = peak_bytes(traced)
    finally:
        tracemalloc.stop()
    return tensors + arrays


class Training:
    """A small batch, so that a step without an update holds little; all memory is counted in dense layers."""

    def __init__(self, rule: Rule, backend: str = "csr", side: int = SIDE, **plan: Any) -> None:
        self.dense = 4 * side * side
        self.model = nn.Sequential(*(nn.Linear(side, side, bias=False) for _ in range(LAYERS)))
        if plan:
            settings = st.SparsityConfig(sparsity=rule.sparsity or 0.0, backend=backend, **plan)
            self.manager = st.MaskManager(self.model, rule, plan=settings, seed=0)
        else:
            self.manager = st.MaskManager(self.model, rule, backend=backend, seed=0)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3)
        self.x = torch.randn(TOKENS, side)

    def loss(self) -> Tensor:
        return self.model(self.x).square().mean()

    def step(self) -> tuple[float, float]:
        """Return what the backward pass, beside the gradients that it leaves, and the manager's step held."""
        loss = self.loss()
        backward = rise(loss.backward)
        del loss  # and with it the last reference to the layers' tensors of before the update
        backward -= sum(layer.values.grad.nbytes for layer in self.manager.layers.values())
        self.optimizer.step()
        update = rise(lambda: self.manager.step(self.optimizer))
        self.optimizer.zero_grad()
        return backward / self.dense, update / self.dense


def measured(training: Training) -> tuple[float, float]:
    """Return what the backward pass and the manager's step hold at an update.

    Updates are those of steps 3 and 6. The profiler does not see how memory is freed that was allocated before it
    first ran, so the first update only makes tensors that it knows.
    """
    *_, quiet, update = (training.step() for _ in range(6))
    print(f"dense layers: backward {quiet[0]:.3f}, with an update {update[0]:.3f}; update {update[1]:.3f}")
    return update


# What does not grow with a layer is half a small one where many weights are kept; those layers are larger.
CASES: dict[str, Callable[[], Training]] = {
    "set": lambda: Training(st.SET(sparsity=0.9, every=3)),
    "set, protected": lambda: Training(st.SET(sparsity=0.9, every=3, protect_rows=True)),
    "set at 50 %": lambda: Training(st.SET(sparsity=0.5, every=3), side=2 * SIDE),
    "rigl": lambda: Training(st.RigL(sparsity=0.9, every=3)),
    "rigl, scaled": lambda: Training(st.RigL(sparsity=0.9, every=3, grown_scale=0.1)),
    "rigl in blocks": lambda: Training(st.RigL(sparsity=0.9, every=3), "bsr", pattern="block", block=[4, 4]),
    "rigl by heads": lambda: Training(st.RigL(sparsity=0.9, every=3), bands=[4, 2]),
    "gmp from dense": lambda: Training(st.GMP(sparsity=0.9, every=3, stop=999), side=2 * SIDE),
    "gmp near its end": lambda: Training(st.GMP(sparsity=0.95, initial_sparsity=0.9, every=3, stop=9)),
}
# Nothing but the kernels' own memory, which grows with the weights, belongs to a backward pass that ranks nothing.
RANKS_GRADIENTS = [name for name in CASES if name.startswith("rigl")]


@pytest.mark.parametrize("name", list(CASES))
def test_an_update_holds_about_one_dense_layer(name: str) -> None:
    backward, update = measured(CASES[name]())
    assert update <= 1.5
    if name in RANKS_GRADIENTS:
        assert backward <= 1.5
