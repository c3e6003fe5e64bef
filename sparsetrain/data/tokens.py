"""Token files, and the samples a model is trained and evaluated on.

Shapes: B samples, T = context tokens. A token file is the documents' tokens, each document followed by the token
that ends it, as little-endian uint16 or uint32 without a header; the corpus's manifest says which.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from sparsetrain.errors import UserError, check_choice
from sparsetrain.seeds import derive_seed

IGNORED = -100  # target of a position that has no loss

_DTYPES: dict[str, np.dtype[Any]] = {"uint16": np.dtype("<u2"), "uint32": np.dtype("<u4")}


@dataclass
class Batch:
    """What a model is fed. All tensors are LongTensor [B, T].

    ``targets[b, t]`` is the token to predict after ``tokens[b, :t + 1]``, or -100 where there is no loss.
    ``slots[b, t]`` is the index of the soft-prompt vector that stands at that place, or -1; None where a batch has no
    soft prompt.
    """

    tokens: torch.Tensor
    targets: torch.Tensor
    slots: torch.Tensor | None = None

    def to(self, device: torch.device) -> Batch:
        """Return the batch on ``device``."""
        slots = None if self.slots is None else self.slots.to(device)
        return Batch(self.tokens.to(device), self.targets.to(device), slots)

    def inputs(self) -> dict[str, torch.Tensor]:
        """Return what a model's forward pass takes, by the names of its arguments; slots only where there are any."""
        inputs = {"tokens": self.tokens, "targets": self.targets}
        return inputs if self.slots is None else {**inputs, "slots": self.slots}

    def split(self, rows: int) -> Iterator[Batch]:
        """Yield the batch in parts of at most ``rows`` rows."""
        for start in range(0, len(self.tokens), rows):
            chosen = slice(start, start + rows)
            slots = None if self.slots is None else self.slots[chosen]
            yield Batch(self.tokens[chosen], self.targets[chosen], slots)


def token_dtype(choice: str, vocab_size: int) -> np.dtype[Any]:
    """Return the dtype of a token file; ``auto`` takes the smaller one that holds the vocabulary.

    Raises `UserError` for an unknown choice and for a vocabulary that does not fit.
    """
    check_choice("token_dtype", choice, ("auto", *_DTYPES))
    if choice == "auto":
        choice = "uint16" if vocab_size <= 1 << 16 else "uint32"
    dtype = _DTYPES[choice]
    limit = np.iinfo(dtype).max + 1
    if vocab_size > limit:
        raise UserError(
            f"token_dtype={choice} holds {limit} tokens, the vocabulary has {vocab_size}; use auto or uint32"
        )
    return dtype


class TokenFile:
    """A token file, mapped into memory: nothing is read until it is asked for.

    ``length`` is the number of tokens the file is said to have; `UserError` if it has another.
    """

    def __init__(self, path: Path, dtype: np.dtype[Any] | str, length: int | None = None) -> None:
        self.path = Path(path)
        kind = np.dtype(dtype).newbyteorder("<")
        if not self.path.is_file():
            raise UserError(f"{self.path}: no such token file; delete its directory to build it again")
        size = self.path.stat().st_size
        expected = size if length is None else length * kind.itemsize
        if size != expected or size % kind.itemsize:
            raise UserError(
                f"{self.path} has {size} bytes, its manifest says {expected}; delete its directory to build it again"
            )
        if size == 0:
            raise UserError(f"{self.path} holds no tokens")
        self._data = np.memmap(self.path, dtype=kind, mode="r")

    def __len__(self) -> int:
        return int(self._data.shape[0])

    @property
    def dtype(self) -> np.dtype[Any]:
        """The type tokens are stored as."""
        return self._data.dtype

    def window(self, start: int, length: int) -> torch.Tensor:
        """Return LongTensor [length] of the tokens from ``start`` on; `IndexError` beyond the file."""
        if start < 0 or length < 0 or start + length > len(self):
            raise IndexError(f"tokens {start} to {start + length} of {len(self)}")
        return torch.from_numpy(self._data[start : start + length].astype(np.int64))

    def windows(self, starts: npt.NDArray[np.int64], length: int) -> torch.Tensor:
        """Return LongTensor [len(starts), length], one window per start."""
        out = np.empty((len(starts), length), dtype=np.int64)
        for row, start in zip(out, starts, strict=True):
            row[:] = self._data[start : start + length]
        return torch.from_numpy(out)


class PackedSamples:
    """Training samples: windows of context + 1 tokens, cut from a token file without regard to document borders.

    In each epoch the file is cut into windows that do not overlap, from a random offset on so that the cuts move from
    epoch to epoch, and the windows come in random order. A sample is a function of (seed, phase, sample index)
    alone, so that a run resumes from the number of samples it has seen, at any batch size. ``phase`` names what the
    samples are for; equal seeds in two phases draw different orders.
    """

    def __init__(self, token_file: TokenFile, context: int, seed: int, phase: str | int) -> None:
        if context < 1:
            raise UserError(f"context={context} is too small; the least is 1")
        tokens = len(token_file)
        self._width = context + 1
        if tokens < self._width:
            raise UserError(
                f"{token_file.path.name} holds {tokens} tokens, fewer than context + 1 = {self._width}; use a smaller "
                "context or more text"
            )
        self._file = token_file
        self._seed = seed
        self._phase = phase
        # The count is the same in every epoch, whatever its offset, so that an index tells its epoch.
        self.samples_per_epoch: int = max(1, (tokens - context) // self._width)
        self._largest_offset = min(context, tokens - self.samples_per_epoch * self._width)
        self._starts = lru_cache(maxsize=2)(self._starts_of_epoch)  # two, for batches across a border

    def _starts_of_epoch(self, epoch: int) -> npt.NDArray[np.int64]:
        random = np.random.default_rng(derive_seed(self._seed, "samples", self._phase, epoch))
        offset = int(random.integers(self._largest_offset + 1))
        return offset + random.permutation(self.samples_per_epoch) * self._width

    def batch(self, first: int, count: int) -> Batch:
        """Return samples ``first`` to ``first + count - 1``; tokens and targets are [count, context]."""
        starts = [
            self._starts(index // self.samples_per_epoch)[index % self.samples_per_epoch]
            for index in range(first, first + count)
        ]
        rows = self._file.windows(np.asarray(starts, dtype=np.int64), self._width)
        return Batch(tokens=rows[:, :-1].contiguous(), targets=rows[:, 1:].contiguous())


def sequential_windows(token_file: TokenFile, context: int, limit: int | None = None) -> Batch:
    """Return the windows a corpus is evaluated on, the same at each call: tokens and targets [N, context].

    Each token of the file but the first is the target of exactly one position. The last window is filled up with
    zeros, whose targets are ignored. With ``limit``, at most that many windows, spread evenly over the file.
    Raises `UserError` if the file has fewer than two tokens.
    """
    tokens = len(token_file)
    if tokens < 2:
        raise UserError(f"{token_file.path.name} holds {tokens} token; evaluation needs at least 2")
    if context < 1 or (limit is not None and limit < 1):
        raise UserError(f"context={context} and the limit of windows ({limit}) must be at least 1")
    count = -(-(tokens - 1) // context)
    chosen = np.arange(count, dtype=np.int64)
    if limit is not None and limit < count:
        chosen = np.arange(limit, dtype=np.int64) * count // limit
    inputs = torch.zeros(len(chosen), context, dtype=torch.int64)
    targets = torch.full((len(chosen), context), IGNORED, dtype=torch.int64)
    for row, index in enumerate(chosen.tolist()):
        start = index * context
        length = min(context, tokens - 1 - start)
        window = token_file.window(start, length + 1)
        inputs[row, :length] = window[:-1]
        targets[row, :length] = window[1:]
    return Batch(tokens=inputs, targets=targets)
