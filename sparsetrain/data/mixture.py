"""Samples drawn from several corpora in exact shares, as a pure function of the sample index.

All samples of a stream have the same number of tokens, so shares of samples are shares of tokens.

The stream is cut into windows. A window's samples are divided among the corpora by largest remainders (Hamilton's
method): a corpus with weight w is due w times the samples so far, minus what earlier windows gave it. So no
corpus is ever further than one sample from its share at the end of a window. Inside a window the samples of a corpus
are spread evenly, each at a random place of its own stratum, so that a window that is cut short has the shares too.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from sparsetrain.data.tokens import Batch, Samples
from sparsetrain.errors import UserError, as_number, nearest
from sparsetrain.seeds import derive_seed

WINDOW = 1000  # samples

Weights = Mapping[str, float]


class Place(NamedTuple):
    """Where a sample of a mixture comes from: the corpus, and the number of the sample among those of the corpus."""

    name: str
    number: int


def normalised(weights: Weights, names: Sequence[str], where: str) -> dict[str, float]:
    """Return the shares of tokens of all ``names``, which sum to 1; 0 for a name without a weight.

    Raises:
        UserError: a weight is negative or not finite, they do not sum to a positive number, or a name is unknown.
    """
    if not isinstance(weights, Mapping):
        raise UserError(f"{where}={weights!r:.60} must be weights by name, such as {{{names[0]}: 1}}")
    shares = dict.fromkeys(names, 0.0)
    for name, weight in weights.items():
        if name not in shares:
            known = f"{nearest(str(name), names)}; the corpora are {', '.join(names)}"
            raise UserError(f"{where}.{name} is no corpus{known}")
        if isinstance(weight, bool):
            raise UserError(f"{where}.{name}={weight} must be a number")
        shares[name] = as_number(f"{where}.{name}", weight)
        if not 0.0 <= shares[name] < math.inf:
            raise UserError(f"{where}.{name}={weight} must be at least 0 and finite")
    total = sum(shares.values())
    if not 0.0 < total < math.inf:
        shown = ", ".join(f"{name}: {weight:g}" for name, weight in shares.items())
        raise UserError(f"{where}={{{shown}}} must have a positive and finite sum, not {total:g}")
    return {name: weight / total for name, weight in shares.items()}


class Mixture:
    """Samples of several corpora, each with its share of the tokens, which may change at given samples.

    ```python
    mixture = sparsetrain.Mixture({"prose": prose, "code": code}, {"prose": 0.37, "code": 0.63}, seed=0)
    mixture.shares(100_000)  # {"prose": 37000, "code": 63000}
    mixture.batch(64, 32)  # samples 64 to 95
    ```

    A sample is a function of (seed, phase, index) alone, and so is the corpus that it comes from. The samples of a
    corpus are read in their order, also across a change of the weights.

    Args:
        samples: by name, the samples of each corpus; all have the same number of tokens.
        weights: of the tokens, by name or in the order of ``samples``; they need not sum to 1. A name without a weight
            is left out.
        seed: of the order in which the corpora take turns.
        phase: the purpose of the samples; two phases with the same seed have different orders.
        changes: later weights, as ``(first sample, weights)``, in the order of the samples.
        window: samples in a window.

    Raises:
        UserError: ``samples`` is no mapping from names to samples, a weight is negative or unknown, the weights have no
            positive sum, or ``changes`` are out of order.
    """

    def __init__(
        self,
        samples: Mapping[str, Samples],
        weights: Weights | Sequence[float],
        seed: int = 0,
        phase: str | int = "mixture",
        changes: Sequence[tuple[int, Weights]] = (),
        window: int = WINDOW,
    ) -> None:
        if not isinstance(samples, Mapping) or not samples:
            raise UserError(f"samples={samples!r:.60}: a mixture is of at least one corpus, each by its name")
        for name, each in samples.items():
            if not hasattr(each, "batch"):
                raise UserError(f"samples: {name} is a {type(each).__name__} without a method batch")
        if window < 1:
            raise UserError(f"window={window} must be at least 1")
        self._samples = dict(samples)
        self.names = list(self._samples)
        if not isinstance(weights, Mapping):
            if not isinstance(weights, Iterable):
                raise UserError(f"weights={weights!r:.60} are neither numbers by name nor a list of numbers")
            given = list(weights)
            if len(given) != len(self.names):
                raise UserError(f"weights has {len(given)} numbers; there are {len(self.names)} corpora")
            weights = dict(zip(self.names, given, strict=True))
        self._firsts = [0, *(first for first, _ in changes)]
        if any(later <= earlier for earlier, later in zip(self._firsts, self._firsts[1:], strict=False)):
            raise UserError(f"changes begin at the samples {self._firsts[1:]}; they must ascend from 1 on")
        self._segments = [
            _Segment(np.array(list(normalised(each, self.names, "weights").values())), window, (seed, phase, number))
            for number, each in enumerate([weights, *(later for _, later in changes)])
        ]
        zero = np.zeros(len(self.names), dtype=np.int64)
        self._before = [zero]  # samples of each corpus before each segment
        for segment, first, end in zip(self._segments, self._firsts, self._firsts[1:], strict=False):
            self._before.append(self._before[-1] + segment.counts(end - first))

    def weights_at(self, index: int) -> dict[str, float]:
        """Return the shares of tokens at sample ``index``; they sum to 1."""
        segment = self._segments[bisect.bisect_right(self._firsts, index) - 1]
        return dict(zip(self.names, segment.weights.tolist(), strict=True))

    def shares(self, n: int) -> dict[str, int]:
        """Return how many of the first ``n`` samples come from each corpus."""
        if n < 0:
            raise UserError(f"n={n} must be at least 0")
        return dict(zip(self.names, self._counts(n).tolist(), strict=True))

    def _counts(self, n: int) -> npt.NDArray[np.int64]:
        number = bisect.bisect_right(self._firsts, n) - 1
        return self._before[number] + self._segments[number].counts(n - self._firsts[number])

    def places(self, first: int, count: int) -> list[Place]:
        """Return where samples ``first`` to ``first + count - 1`` come from.

        Raises:
            IndexError: ``first`` or ``count`` is negative.
        """
        if first < 0 or count < 0:
            raise IndexError(f"samples {first} to {first + count}")
        seen = self._counts(first)
        found = []
        for index in range(first, first + count):
            number = bisect.bisect_right(self._firsts, index) - 1
            corpus = self._segments[number].corpus(index - self._firsts[number])
            found.append(Place(self.names[corpus], int(seen[corpus])))
            seen[corpus] += 1
        return found

    def batch(self, first: int, count: int) -> Batch:
        """Return samples ``first`` to ``first + count - 1``; tokens and targets are [count, context]."""
        places = self.places(first, count)
        rows: dict[str, list[int]] = {}
        for row, place in enumerate(places):
            rows.setdefault(place.name, []).append(row)
        # Those of one corpus follow each other there, since it is read in order.
        parts = {name: self._samples[name].batch(places[of[0]].number, len(of)) for name, of in rows.items()}
        order = torch.tensor([row for of in rows.values() for row in of]).argsort()
        tokens, targets = (
            torch.cat([getattr(part, field) for part in parts.values()])[order] for field in ("tokens", "targets")
        )
        return Batch(tokens, targets)


class _Segment:
    """The order in which corpora take turns while their weights stay the same; samples are counted from its first one.

    Args:
        weights: shares, which sum to 1.
        window: samples in a window.
        key: what the order depends on.
    """

    def __init__(self, weights: npt.NDArray[np.float64], window: int, key: tuple[int, str | int, int]) -> None:
        self.weights, self._window, self._key = weights, window, key
        self._ends = [np.zeros(len(weights), dtype=np.int64)]  # samples of each corpus before each window
        self._orders = lru_cache(maxsize=4)(self._order)

    def counts(self, n: int) -> npt.NDArray[np.int64]:
        """Return the number of samples of each corpus among the first ``n``."""
        whole, rest = divmod(n, self._window)
        found = self._before(whole)
        if rest:
            found = found + np.bincount(self._orders(whole)[:rest], minlength=len(self.weights))
        return found.astype(np.int64)

    def corpus(self, index: int) -> int:
        """Return the corpus of a sample."""
        window, place = divmod(index, self._window)
        return int(self._orders(window)[place])

    def _before(self, window: int) -> npt.NDArray[np.int64]:
        while len(self._ends) <= window:
            due = self.weights * (len(self._ends) * self._window) - self._ends[-1]
            self._ends.append(self._ends[-1] + _apportioned(due, self._window))
        return self._ends[window]

    def _order(self, window: int) -> npt.NDArray[np.int64]:
        counts = self._before(window + 1) - self._before(window)
        seed, phase, number = self._key
        random = np.random.default_rng(derive_seed(seed, "mixture", phase, number, window))
        corpora = np.repeat(np.arange(len(counts)), counts)
        strata = np.concatenate([np.arange(count) for count in counts])
        places = (strata + random.random(len(corpora))) / np.maximum(counts, 1)[corpora]
        return corpora[np.argsort(places, kind="stable")]


def _apportioned(due: npt.NDArray[np.float64], seats: int) -> npt.NDArray[np.int64]:
    """Return integers of at least 0 that sum to ``seats``, by largest remainders of the quotas ``due``.

    The quotas sum to ``seats`` up to rounding; one that earlier windows have overdrawn is negative.
    """
    quotas = np.maximum(due, 0.0)
    # A quota that should be an integer may lie a rounding error below it.
    whole = np.floor(quotas + 1e-6).astype(np.int64)
    left = seats - int(whole.sum())
    order = np.argsort(-(quotas - whole), kind="stable")
    while left > 0:
        for corpus in order[:left]:
            whole[corpus] += 1
        left = seats - int(whole.sum())
    for corpus in order[::-1]:  # quotas above their sum, after a negative one was cut off
        taken = min(int(whole[corpus]), max(0, -left))
        whole[corpus] -= taken
        left += taken
    return whole
