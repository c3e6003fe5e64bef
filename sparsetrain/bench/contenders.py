"""One linear layer in several forms, each ready to be timed.

Legend: N tokens, K in_features, M out_features, nnz stored values.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sparsetrain import seeds
from sparsetrain.bench.config import BLOCK_BACKENDS, PEERS
from sparsetrain.bench.memory import STATE_BYTES, layer_bytes, peak_bytes
from sparsetrain.bench.peers import PEER_LAYERS, Skipped, step_of
from sparsetrain.bench.timing import Work
from sparsetrain.errors import UserError
from sparsetrain.sparsity import SparseLinear, SparsityPattern
from sparsetrain.sparsity.backends.base import BACKENDS, resolve_backend
from sparsetrain.sparsity.patterns.draw import random_pattern

DENSE = "dense"

_TOLERANCE = 1e-4


@dataclass
class Contender:
    """A layer whose step can be timed.

    Attributes:
        work: the step: forward, then the gradients of input and weight.
        weight: the dense matrix ``[M, K]`` that it multiplies by, for a check; None where it is not at hand.
        state_bytes: what stays between steps in training with AdamW, divided by ``stored``; None if unknown.
        stored: number of trained weights.
        torch_memory: whether all memory of a step is torch's, so that its peak can be seen.
        note: what a reader must know to compare it.
    """

    work: Work
    stored: int
    weight: Tensor | None = None
    state_bytes: Callable[[], int] | None = None
    torch_memory: bool = False
    note: str = ""


@dataclass(frozen=True)
class LayerCase:
    """The layer of a cell: K, M, N, sparsity, block of block backends, seed."""

    in_features: int
    out_features: int
    tokens: int
    sparsity: float
    block: tuple[int, int]
    seed: int

    def draw(self, rows: int, columns: int, name: str) -> Tensor:
        """Return normal numbers ``[rows, columns]`` that depend on seed and name alone."""
        return torch.randn(rows, columns, generator=seeds.generator(self.seed, "bench", name))

    def pattern(self, block: tuple[int, int] = (1, 1)) -> SparsityPattern:
        """Return a random pattern ``[M, K]`` of the case's density in such blocks.

        Raises:
            Skipped: a block that does not divide the matrix.
        """
        rows, columns = self.out_features, self.in_features
        if rows % block[0] or columns % block[1]:
            raise Skipped(f"blocks of {block[0]}x{block[1]} do not divide {rows}x{columns}")
        generator = seeds.generator(self.seed, "bench", "mask")
        coarse = random_pattern((rows // block[0], columns // block[1]), 1.0 - self.sparsity, generator)
        return SparsityPattern((rows, columns), coarse.row_ptr, coarse.col, block)


def contender(name: str, case: LayerCase) -> Contender:
    """Return the layer of ``case`` in the form called ``name``: dense, a backend, or a peer.

    Raises:
        Skipped: this form cannot be measured here; the message says why.
    """
    x = case.draw(case.tokens, case.in_features, "input")
    g = case.draw(case.tokens, case.out_features, "gradient")
    if name == DENSE:
        return _dense(case, x, g, torch.float32)
    if name == "dense_bf16":
        return _dense(case, x, g, torch.bfloat16)
    if name in PEERS:
        pattern = case.pattern()
        values = torch.randn(pattern.nnz, generator=seeds.generator(case.seed, "bench", "weight"))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what is in beta, and of how others make their arrays
            work, weight, state, note = PEER_LAYERS[name](pattern, values, x, g)
        return Contender(work, pattern.nnz, weight, state, state is not None, note)
    return _backend(name, case, x, g)


def measure_memory(entry: Contender) -> dict[str, Any]:
    """Return bytes per stored weight and the peak activation memory of a step, those that can be known.

    The gradient of the weights, which lives on until the optimizer's step, is part of the former, not of the latter;
    the input, which a form may keep for the backward pass or not, is part of the latter.
    """
    found: dict[str, Any] = {}
    if entry.state_bytes is not None:
        found["state_bytes_per_weight"] = entry.state_bytes() / entry.stored
    if entry.torch_memory and (fresh := entry.work.fresh) is not None:
        gradients: list[Tensor] = []
        found["peak_activation_bytes"] = peak_bytes(lambda: gradients.extend(fresh()), lambda: gradients)
    return found


def wrong(entry: Contender, case: LayerCase) -> str | None:
    """Return how far the forward result is from that of a dense product with the same weight, if it is too far."""
    if entry.weight is None:
        return None
    x = case.draw(case.tokens, case.in_features, "input")[:64]
    expected = x.double() @ entry.weight.double().t()
    result = torch.as_tensor(entry.work.forward()).detach().double()
    error = float((result[:64] - expected).norm() / expected.norm())
    return None if error <= _TOLERANCE else f"computes something else: relative error {error:.1e}"


def _dense(case: LayerCase, x: Tensor, g: Tensor, dtype: torch.dtype) -> Contender:
    linear = nn.Linear(case.in_features, case.out_features, bias=False, dtype=dtype)
    with torch.no_grad():
        linear.weight.copy_(case.draw(case.out_features, case.in_features, "weight") / case.in_features**0.5)
    work = step_of(linear, [linear.weight], x.to(dtype), g.to(dtype))
    if dtype == torch.bfloat16:
        return Contender(work, linear.weight.numel(), note="weights, activations and gradients in bfloat16")
    size = linear.weight.numel()
    return Contender(work, size, linear.weight.detach(), lambda: STATE_BYTES * size, torch_memory=True)


def _backend(name: str, case: LayerCase, x: Tensor, g: Tensor) -> Contender:
    if name != "auto" and name not in BACKENDS:
        raise Skipped(f"backend '{name}' is not there in this version")
    pattern = case.pattern(case.block if name in BLOCK_BACKENDS else (1, 1))
    try:
        chosen = resolve_backend(name, pattern, case.tokens, x.dtype, x.device)
    except UserError as error:
        raise Skipped(str(error)) from None
    layer = SparseLinear(case.in_features, case.out_features, pattern=pattern, bias=False, backend=name, seed=case.seed)
    # On a pattern of its own: the check leaves positions behind, which are no part of the layer's state.
    own = layer.pattern
    weight = SparsityPattern(own.shape, own.row_ptr, own.col, own.block).scatter(layer.values.detach())
    notes = [f"blocks of {case.block[0]}x{case.block[1]}"] if name in BLOCK_BACKENDS else []
    notes += [f"chose {chosen}"] if name == "auto" else []
    work = step_of(layer, [layer.values], x, g)
    return Contender(work, pattern.nnz, weight, lambda: layer_bytes(layer), torch_memory=True, note=", ".join(notes))
