"""Measures the crossover table of this machine: where a sparse backend becomes faster than computing densely."""

from __future__ import annotations

import math
import statistics
import time
import warnings
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from sparsetrain.sparsity.backends.auto import FALLBACK, Crossover
from sparsetrain.sparsity.layers.linear import SparseLinear
from sparsetrain.sparsity.patterns.draw import random_pattern
from sparsetrain.sparsity.patterns.pattern import SparsityPattern

DTYPES = (torch.float32, torch.bfloat16)
BLOCKS = {"csr": (1, 1), "bsr": (16, 16)}  # what each backend is measured with
SIDES, TOKENS = (64, 128, 256, 512, 1024), (16, 64, 256, 2048)
DENSITIES = (0.05, 0.2, 0.5, 0.9)
_LEAST_SECONDS = 2e-3  # of one timing: shorter steps are repeated inside it
_HOPELESS = 4  # times as slow as the sparse backend, where nearly all weights are there: dense is not timed again


def step_seconds(layers: Sequence[nn.Module], x: Tensor, g: Tensor, repeats: int) -> list[float]:
    """Return the median time of forward, input gradient and weight gradient of each layer, in seconds.

    The layers take turns, so that what disturbs the machine for a while disturbs all of them.
    """
    for layer in layers:
        _seconds(layer, x, g, 1)
    steps = [max(1, math.ceil(_LEAST_SECONDS / max(1e-7, _seconds(layer, x, g, 1)))) for layer in layers]
    turns = list(zip(layers, steps, strict=True))
    rounds = [[_seconds(layer, x, g, count) for layer, count in turns] for _ in range(repeats)]
    return [statistics.median(times) for times in zip(*rounds, strict=True)]


def _seconds(layer: nn.Module, x: Tensor, g: Tensor, steps: int) -> float:
    started = time.perf_counter()
    for _ in range(steps):
        layer.zero_grad(set_to_none=True)
        x.grad = None
        layer(x).backward(g)
    return (time.perf_counter() - started) / steps


def crossing(densities: Sequence[float], sparse: Sequence[float], dense: Sequence[float]) -> float:
    """Return the density in [0, 1] up to which the sparse backend is the faster one.

    Both times grow with the density as straight lines do, the dense one's because values are written into a matrix and
    gradients read from one. Lines are less at the mercy of a disturbed timing than the points are.

    Args:
        densities: at least two. sparse, dense: seconds at each.
    """
    at = np.asarray(densities)
    lines = [np.polyfit(at, times, 1, w=1.0 / np.asarray(times)) for times in (sparse, dense)]
    slope, ahead = lines[0][0] - lines[1][0], lines[1][1] - lines[0][1]
    if slope <= 0.0:
        return float(ahead > slope / 2)  # no density from which on dense is faster: whichever is so at a half
    return float(np.clip(ahead / slope, 0.0, 1.0))


def measure(
    backend: str,
    threads: Sequence[int],
    dtype: torch.dtype = torch.float32,
    sides: Sequence[int] = SIDES,
    tokens: Sequence[int] = TOKENS,
    repeats: int = 5,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Crossover:
    """Return the crossover table of ``backend``, one of ``BLOCKS``, against ``masked``.

    Args:
        threads: numbers of threads, each measured.
        dtype: of inputs and values.
        progress: called with the cells that are done and all.
    """
    before, done, total = torch.get_num_threads(), 0, len(threads) * len(sides) * len(tokens)
    density: list[list[list[float]]] = []
    try:
        for count in threads:
            torch.set_num_threads(count)
            density.append([])
            for side in sides:
                density[-1].append([])
                for rows in tokens:
                    density[-1][-1].append(round(_cell(backend, dtype, side, rows, repeats), 3))
                    done += 1
                    progress(done, total)
    finally:
        torch.set_num_threads(before)
    return Crossover(list(sides), list(tokens), list(threads), density)


def _cell(backend: str, dtype: torch.dtype, side: int, tokens: int, repeats: int) -> float:
    x, g = torch.randn(tokens, side).to(dtype).requires_grad_(), torch.randn(tokens, side).to(dtype)
    layers = [_layer(side, density, backend, name, dtype) for name in (backend, FALLBACK) for density in DENSITIES]
    sparse, dense = layers[len(DENSITIES) - 1], layers[-1]
    # Twice each: the first step builds and compiles. A processor may lack all that dense bfloat16 needs to be fast.
    once = [min(_seconds(layer, x, g, 1) for _ in range(2)) for layer in (sparse, dense)]
    if once[1] > _HOPELESS * once[0]:
        return 1.0
    seconds = step_seconds(layers, x, g, repeats)
    densities = [layer.pattern.density for layer in layers[: len(DENSITIES)]]
    return crossing(densities, seconds[: len(DENSITIES)], seconds[len(DENSITIES) :])


def _layer(side: int, density: float, measured: str, backend: str, dtype: torch.dtype) -> SparseLinear:
    block = BLOCKS[measured]
    rows, columns = side // block[0], side // block[1]
    coarse = random_pattern((rows, columns), max(density, 1 / (rows * columns)), torch.Generator().manual_seed(0))
    pattern = SparsityPattern((side, side), coarse.row_ptr, coarse.col, block)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".* have no weight: they are constant")
        return SparseLinear(side, side, pattern=pattern, bias=False, backend=backend, seed=0, dtype=dtype)
