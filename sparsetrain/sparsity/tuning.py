"""Measures the crossover table of this machine: where a sparse backend becomes faster than computing densely."""

from __future__ import annotations

import math
import statistics
import time
import warnings
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from sparsetrain.sparsity.auto import FALLBACK, Crossover
from sparsetrain.sparsity.init import random_pattern
from sparsetrain.sparsity.linear import SparseLinear
from sparsetrain.sparsity.pattern import SparsityPattern

BLOCKS = {"csr": (1, 1), "bsr": (16, 16)}  # what each backend is measured with
SIDES, TOKENS = (64, 128, 256, 512, 1024), (16, 64, 256, 2048)
DENSITIES = (0.05, 0.1, 0.2, 0.35, 0.5, 0.65, 0.8, 1.0)
_LEAST_SECONDS = 2e-3  # of one timing: shorter steps are repeated inside it


def step_seconds(layer: nn.Module, x: Tensor, g: Tensor, repeats: int) -> float:
    """Return the median time of forward, input gradient and weight gradient, in seconds."""

    def step() -> None:
        layer.zero_grad(set_to_none=True)
        x.grad = None
        layer(x).backward(g)

    step()
    started = time.perf_counter()
    step()
    inner = max(1, math.ceil(_LEAST_SECONDS / max(1e-7, time.perf_counter() - started)))
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        for _ in range(inner):
            step()
        times.append((time.perf_counter() - started) / inner)
    return statistics.median(times)


def crossing(densities: Sequence[float], ratios: Sequence[float]) -> float:
    """Return the density at which a ratio of times, which grows with the density, passes 1; 0 if it never is below.

    Args:
        densities: increasing. ratios: time of the sparse backend over that of the dense one, for each.
    """
    if ratios[0] > 1.0:
        return 0.0
    for index in range(1, len(ratios)):
        if ratios[index] > 1.0:
            share = (1.0 - ratios[index - 1]) / (ratios[index] - ratios[index - 1])
            return densities[index - 1] + share * (densities[index] - densities[index - 1])
    return densities[len(ratios) - 1]


def measure(
    backend: str,
    threads: Sequence[int],
    sides: Sequence[int] = SIDES,
    tokens: Sequence[int] = TOKENS,
    repeats: int = 5,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Crossover:
    """Return the crossover table of ``backend``, one of ``BLOCKS``, against ``masked``.

    Args:
        threads: numbers of threads, each measured.
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
                    density[-1][-1].append(round(_cell(backend, side, rows, repeats), 3))
                    done += 1
                    progress(done, total)
    finally:
        torch.set_num_threads(before)
    return Crossover(list(sides), list(tokens), list(threads), density)


def _cell(backend: str, side: int, tokens: int, repeats: int) -> float:
    x = torch.randn(tokens, side, requires_grad=True)
    g = torch.randn(tokens, side)
    ratios: list[float] = []
    for density in DENSITIES:
        layer = _layer(side, density, BLOCKS[backend])
        dense = step_seconds(layer, x, g, repeats)
        layer.backend = backend
        ratios.append(step_seconds(layer, x, g, repeats) / dense)
        if ratios[-1] > 1.0:
            break
    return crossing(DENSITIES, ratios)


def _layer(side: int, density: float, block: tuple[int, int]) -> SparseLinear:
    coarse = random_pattern((side // block[0], side // block[1]), density, torch.Generator().manual_seed(0))
    pattern = SparsityPattern((side, side), coarse.row_ptr, coarse.col, block)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".* have no weight: they are constant")
        return SparseLinear(side, side, pattern=pattern, bias=False, backend=FALLBACK, seed=0)
