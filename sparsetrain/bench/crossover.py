"""Measurement of the crossover table: the density up to which a sparse backend is faster than dense computation."""

from __future__ import annotations

import functools
import math
import statistics
import time
import warnings
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparsetrain.sparsity.backends.auto import FALLBACK, Crossover
from sparsetrain.sparsity.backends.base import BACKENDS
from sparsetrain.sparsity.backends.few_tokens import few_tokens
from sparsetrain.sparsity.layers.linear import SparseLinear
from sparsetrain.sparsity.patterns.draw import random_pattern
from sparsetrain.sparsity.patterns.pattern import SparsityPattern

DTYPES = (torch.float32, torch.bfloat16)
SIDES = (64, 128, 256, 512, 1024)
TOKENS = (1, 16, 32, 48, 64, 256, 2048)  # up to 32 and up to 48 there are other kernels
FEW_TOKENS = (1, 2, 4, 8, 12, 16, 32, 48)
DECODING_SIDES = (*SIDES, 2048)
_OUT_OF_CACHE, _MOST_LAYERS = 1 << 26, 64  # bytes of the weights that take turns, and layers at most
DENSITIES = (0.05, 0.2, 0.5, 0.9)
_LEAST_SECONDS = 2e-3  # a timing of shorter steps repeats them until it takes this long
_HOPELESS = 4  # dense is not timed further if it is this many times slower even when nearly all weights are stored


def step_seconds(layers: Sequence[nn.Module], x: Tensor, g: Tensor, repeats: int) -> list[float]:
    """Return the median time of forward pass, input gradient and weight gradient of each layer, in seconds.

    The layers take turns, so that a disturbance of the machine affects all of them.
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
    """Return the density in [0, 1] up to which the sparse backend is faster.

    Both times are linear in the density; the dense one is because the masked backend writes values into a matrix and
    reads gradients from one. Fitted lines are less sensitive to a single disturbed timing than the points.

    Args:
        densities: at least two densities.
        sparse, dense: seconds at each density.
    """
    at = np.asarray(densities)
    lines = [np.polyfit(at, times, 1, w=1.0 / np.asarray(times)) for times in (sparse, dense)]
    slope, ahead = lines[0][0] - lines[1][0], lines[1][1] - lines[0][1]
    if slope <= 0.0:
        return float(ahead > slope / 2)  # the lines do not cross this way: the one that is faster at 0.5 decides
    return float(np.clip(ahead / slope, 0.0, 1.0))


def tuned() -> dict[str, tuple[int, int]]:
    """Return the backends that ``auto`` chooses among, with the block size of the patterns to measure each with."""
    found = {name: BACKENDS[name].tuned_with for name in BACKENDS.names()}
    return {name: block for name, block in found.items() if block is not None}


def measurable() -> list[tuple[str, torch.dtype]]:
    """Return the backends of `tuned` with the types that each computes in on a CPU."""
    pairs = []
    for name, (rows, columns) in tuned().items():
        pattern = SparsityPattern.from_mask(torch.ones(2 * rows, 2 * columns, dtype=torch.bool), (rows, columns))
        refusal = BACKENDS[name].refusal
        pairs += [(name, dtype) for dtype in DTYPES if refusal(dtype, torch.device("cpu"), pattern) is None]
    return pairs


def measure(
    backend: str,
    threads: Sequence[int],
    dtype: torch.dtype = torch.float32,
    sides: Sequence[int] = SIDES,
    tokens: Sequence[int] = TOKENS,
    repeats: int = 5,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Crossover:
    """Return the crossover table of ``backend``, one of `tuned`, against ``masked``.

    Args:
        threads: thread counts to measure.
        dtype: dtype of inputs and values.
        sides: sizes of the square layers.
        tokens: numbers of input rows.
        repeats: number of timings; the median counts.
        progress: called with the number of cases done and the number of all cases.
    """
    return _measured(
        threads,
        sides,
        tokens,
        lambda side: lambda rows: _case(backend, dtype, side, rows, repeats),
        progress,
    )


def measure_decoding(
    threads: Sequence[int],
    sides: Sequence[int] = DECODING_SIDES,
    tokens: Sequence[int] = FEW_TOKENS,
    repeats: int = 5,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Crossover:
    """Return the densities up to which a sparse product of few tokens is faster than a dense one, forward only.

    The weights of several layers take turns, so that they come from memory as in decoding.

    Args:
        threads, sides, repeats, progress: as for `measure`.
        tokens: numbers of tokens, at most `few_tokens.MOST`.
    """

    def of_side(side: int) -> Callable[[int], float]:
        layers = {density: _weights(side, density) for density in DENSITIES}
        return lambda rows: _decoding_case(layers, torch.randn(rows, side), repeats)

    return _measured(threads, sides, tokens, of_side, progress)


def _measured(
    threads: Sequence[int],
    sides: Sequence[int],
    tokens: Sequence[int],
    of_side: Callable[[int], Callable[[int], float]],
    progress: Callable[[int, int], None],
) -> Crossover:
    """Return the table of the densities that ``of_side(side)(tokens)`` measures on each number of threads."""
    before, done, total = torch.get_num_threads(), 0, len(threads) * len(sides) * len(tokens)
    density: list[list[list[float]]] = []
    try:
        for count in threads:
            torch.set_num_threads(count)
            density.append([])
            for side in sides:
                case = of_side(side)
                density[-1].append([])
                for rows in tokens:
                    density[-1][-1].append(round(case(rows), 3))
                    done += 1
                    progress(done, total)
    finally:
        torch.set_num_threads(before)
    return Crossover(list(sides), list(tokens), list(threads), density)


def _weights(side: int, density: float) -> list[SparseLinear]:
    count = max(1, min(_MOST_LAYERS, _OUT_OF_CACHE // (4 * side * side)))
    return [_layer(side, density, "csr", "csr", torch.float32) for _ in range(count)]


@torch.no_grad()
def _decoding_case(layers: Mapping[float, Sequence[SparseLinear]], x: Tensor, repeats: int) -> float:
    dense = [layer.dense_weight() for layer in next(iter(layers.values()))]
    products: list[Callable[[], object]] = [
        lambda: [F.linear(x, weight) for weight in dense],
        *(functools.partial(_products, x, some) for some in layers.values()),
    ]
    for product in products:
        product()  # builds and compiles
    rounds: list[list[float]] = []
    for _ in range(max(2, repeats)):
        rounds.append([])
        for product in products:
            started = time.perf_counter()
            product()
            rounds[-1].append(time.perf_counter() - started)
    first, *sparse = (statistics.median(times) for times in zip(*rounds, strict=True))
    densities = [some[0].pattern.density for some in layers.values()]
    return crossing(densities, sparse, [first] * len(sparse))


def _products(x: Tensor, layers: Sequence[SparseLinear]) -> None:
    for layer in layers:
        few_tokens(x, layer.values, layer.pattern)


def _case(backend: str, dtype: torch.dtype, side: int, tokens: int, repeats: int) -> float:
    x, g = torch.randn(tokens, side).to(dtype).requires_grad_(), torch.randn(tokens, side).to(dtype)
    layers = [_layer(side, density, backend, name, dtype) for name in (backend, FALLBACK) for density in DENSITIES]
    sparse, dense = layers[len(DENSITIES) - 1], layers[-1]
    # Twice, because the first step builds and compiles. A processor without bfloat16 instructions is slow when dense.
    once = [min(_seconds(layer, x, g, 1) for _ in range(2)) for layer in (sparse, dense)]
    if once[1] > _HOPELESS * once[0]:
        return 1.0
    seconds = step_seconds(layers, x, g, repeats)
    densities = [layer.pattern.density for layer in layers[: len(DENSITIES)]]
    return crossing(densities, seconds[: len(DENSITIES)], seconds[len(DENSITIES) :])


def _layer(side: int, density: float, measured: str, backend: str, dtype: torch.dtype) -> SparseLinear:
    block = tuned()[measured]
    rows, columns = side // block[0], side // block[1]
    coarse = random_pattern((rows, columns), max(density, 1 / (rows * columns)), torch.Generator().manual_seed(0))
    pattern = SparsityPattern((side, side), coarse.row_ptr, coarse.col, block)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".* have no weight: they are constant")
        return SparseLinear(side, side, pattern=pattern, bias=False, backend=backend, seed=0, dtype=dtype)
