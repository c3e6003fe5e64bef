"""Contenders of a layer: one linear layer in several implementations, each ready to be timed.

Shapes: N tokens, K in_features, M out_features, nnz stored values.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sparsetrain import seeds
from sparsetrain.bench.config import BLOCK_BACKENDS, PEERS
from sparsetrain.bench.memory import STATE_BYTES, layer_bytes, peak_bytes
from sparsetrain.bench.peers import Skipped, peer_layer, step_of
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
        work: the step: forward pass, then the gradients of input and weight.
        stored: number of trained weights.
        weight: the dense matrix ``[M, K]`` that it multiplies by, to check the result; None if unavailable.
        state_bytes: returns the bytes held between steps of training with AdamW; None if unknown.
        torch_memory: whether torch allocates all memory of a step, so that its peak can be measured.
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
    """The layer of a cell: K, M, N, sparsity, the block size of block backends, and the seed."""

    in_features: int
    out_features: int
    tokens: int
    sparsity: float
    block: tuple[int, int]
    seed: int

    def draw(self, rows: int, columns: int, name: str) -> Tensor:
        """Return normal numbers ``[rows, columns]`` that depend only on the seed and the name."""
        return torch.randn(rows, columns, generator=seeds.generator(self.seed, "bench", name))

    def pattern(self, block: tuple[int, int] = (1, 1)) -> SparsityPattern:
        """Return a random pattern ``[M, K]`` of the case's density, in blocks of the given size.

        Raises:
            Skipped: the block does not divide the matrix.
        """
        rows, columns = self.out_features, self.in_features
        if rows % block[0] or columns % block[1]:
            raise Skipped(f"blocks of {block[0]}x{block[1]} do not divide {rows}x{columns}")
        generator = seeds.generator(self.seed, "bench", "mask")
        coarse = random_pattern((rows // block[0], columns // block[1]), 1.0 - self.sparsity, generator)
        return SparsityPattern((rows, columns), coarse.row_ptr, coarse.col, block)

    def values(self, pattern: SparsityPattern) -> Tensor:
        """Return normal numbers for the nonzeros of an unstructured pattern."""
        return torch.randn(pattern.nnz, generator=seeds.generator(self.seed, "bench", "weight"))


def contender(name: str, case: LayerCase) -> Contender:
    """Return the layer of ``case`` in the implementation ``name``: dense, a backend, or a peer.

    Raises:
        Skipped: it cannot be measured here; the message says why.
    """
    x = case.draw(case.tokens, case.in_features, "input")
    g = case.draw(case.tokens, case.out_features, "gradient")
    if name == DENSE:
        return _dense(case, x, g, torch.float32)
    if name == "dense_bf16":
        return _dense(case, x, g, torch.bfloat16)
    if name in PEERS:
        pattern = case.pattern()
        values = case.values(pattern)
        peer = peer_layer(name, pattern, values)
        work, note = peer.step(x, g)
        if peer.index_bytes is None or work.backward is None:
            return Contender(work, pattern.nnz, peer.dense, note=note)
        held = STATE_BYTES * pattern.nnz + peer.index_bytes
        return Contender(work, pattern.nnz, peer.dense, lambda: held, torch_memory=True, note=note)
    return _backend(name, case, x, g)


def measure_memory(entry: Contender) -> dict[str, Any]:
    """Return the bytes per stored weight and the peak activation memory of a step, as far as they are known.

    The gradient of the weights, which exists until the optimizer's step, counts to the former only. The input, which
    some implementations keep for the backward pass, counts to the latter.
    """
    found: dict[str, Any] = {}
    if entry.state_bytes is not None:
        found["state_bytes_per_weight"] = entry.state_bytes() / entry.stored
    if entry.torch_memory and (fresh := entry.work.fresh) is not None:
        gradients: list[Tensor] = []
        found["peak_activation_bytes"] = peak_bytes(lambda: gradients.extend(fresh()), lambda: gradients)
    return found


def wrong(entry: Contender, case: LayerCase) -> str | None:
    """Return the relative error against a dense product with the same weight as a message, or None if it is small."""
    if entry.weight is None:
        return None
    x = case.draw(case.tokens, case.in_features, "input")
    return error_of(torch.as_tensor(entry.work.forward()), x, entry.weight)


def error_of(result: Tensor, x: Tensor, weight: Tensor) -> str | None:
    """Return the relative error of the first 64 rows of ``x @ weight.T`` as a message, or None if it is small."""
    expected = x[:64].double() @ weight.double().t()
    error = float((result[:64].detach().double() - expected).norm() / expected.norm())
    return None if error <= _TOLERANCE else f"wrong result: relative error {error:.1e}"


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
    layer, notes = backend_layer(name, case, x.dtype)
    # A separate pattern, because `scatter` caches positions that are not part of the layer's state.
    own = layer.pattern
    weight = SparsityPattern(own.shape, own.row_ptr, own.col, own.block).scatter(layer.values.detach())
    work = step_of(layer, [layer.values], x, g)
    return Contender(work, own.nnz, weight, lambda: layer_bytes(layer), torch_memory=True, note=", ".join(notes))


def backend_layer(name: str, case: LayerCase, dtype: torch.dtype = torch.float32) -> tuple[SparseLinear, list[str]]:
    """Return the layer of ``case`` with a backend of the library, and notes about it.

    Raises:
        Skipped: the backend cannot compute it here; the message says why.
    """
    if name != "auto" and name not in BACKENDS:
        raise Skipped(f"backend '{name}' does not exist in this version")
    pattern = case.pattern(case.block if name in BLOCK_BACKENDS else (1, 1))
    try:
        chosen = resolve_backend(name, pattern, case.tokens, dtype, torch.device("cpu"))
    except UserError as error:
        raise Skipped(str(error)) from None
    layer = SparseLinear(case.in_features, case.out_features, pattern=pattern, bias=False, backend=name, seed=case.seed)
    notes = [f"blocks of {case.block[0]}x{case.block[1]}"] if name in BLOCK_BACKENDS else []
    return layer, notes + ([f"chose {chosen}"] if name == "auto" else [])
