"""Token files, and the samples on which a model is trained and evaluated.

Shapes: B samples, T = context tokens. A token file holds the tokens of the documents, with an end token after each
document. It has no header; the tokens are little-endian uint16 or uint32, as the corpus's manifest says.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

from sparsetrain.errors import UserError, check_choice
from sparsetrain.seeds import derive_seed

IGNORED = -100  # target of a position without a loss

_DTYPES: dict[str, np.dtype[Any]] = {"uint16": np.dtype("<u2"), "uint32": np.dtype("<u4")}


@dataclass
class Batch:
    """Inputs and targets of a model, each a LongTensor [B, T].

    Args:
        tokens: the inputs.
        targets: ``targets[b, t]`` is the token to predict after ``tokens[b, :t + 1]``, or -100 for no loss.
        slots: ``slots[b, t]`` is the index of the soft-prompt vector at this position, or -1 for a token. None if the
            batch has no soft prompt.
        bytes: ``bytes[b, t]`` are the UTF-8 bytes of text that the target stands for, 0 without a loss. None if they
            are not known. They stay on the CPU.
    """

    tokens: torch.Tensor
    targets: torch.Tensor
    slots: torch.Tensor | None = None
    bytes: torch.Tensor | None = None

    def to(self, device: torch.device) -> Batch:
        """Return the batch on ``device``."""
        slots = None if self.slots is None else self.slots.to(device)
        return Batch(self.tokens.to(device), self.targets.to(device), slots, self.bytes)

    def inputs(self) -> dict[str, torch.Tensor]:
        """Return the keyword arguments of a model's forward pass; ``slots`` only if the batch has a soft prompt."""
        inputs = {"tokens": self.tokens, "targets": self.targets}
        return inputs if self.slots is None else {**inputs, "slots": self.slots}

    def split(self, rows: int) -> Iterator[Batch]:
        """Yield the batch in parts of at most ``rows`` rows."""
        for start in range(0, len(self.tokens), rows):
            some = slice(start, start + rows)
            slots, size = (None if each is None else each[some] for each in (self.slots, self.bytes))
            yield Batch(self.tokens[some], self.targets[some], slots, size)


def token_dtype(choice: str, vocab_size: int) -> np.dtype[Any]:
    """Return the dtype of a token file; ``auto`` takes the smallest that holds the vocabulary.

    Raises:
        UserError: the choice is unknown, or the vocabulary does not fit.
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
    """A token file, mapped into memory, so that only the windows in use are read.

    Args:
        path: the file.
        dtype: the type of its tokens, read as little-endian.
        length: the number of tokens that the manifest gives; None accepts any.
        sizes: the bytes of text of its tokens: int64 [vocabulary] by token, or a `TokenFile` of as many numbers by
            place. None if they are not needed.

    Raises:
        UserError: the file is missing, empty, or of another length.
    """

    def __init__(
        self,
        path: Path,
        dtype: np.dtype[Any] | str,
        length: int | None = None,
        sizes: torch.Tensor | TokenFile | None = None,
    ) -> None:
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
        self._sizes = sizes

    def __len__(self) -> int:
        return int(self._data.shape[0])

    @property
    def dtype(self) -> np.dtype[Any]:
        """The dtype of the stored tokens."""
        return self._data.dtype

    def window(self, start: int, length: int) -> torch.Tensor:
        """Return LongTensor [length], the tokens from ``start`` on; raises `IndexError` beyond the file."""
        if start < 0 or length < 0 or start + length > len(self):
            raise IndexError(f"tokens {start} to {start + length} of {len(self)}")
        return torch.from_numpy(self._data[start : start + length].astype(np.int64))

    def bytes(self, start: int, length: int) -> torch.Tensor | None:
        """Return LongTensor [length], the UTF-8 bytes of text that each token stands for; None if unknown."""
        if isinstance(self._sizes, TokenFile):
            return self._sizes.window(start, length)
        return None if self._sizes is None else self._sizes[self.window(start, length)]

    def count(self, token: int, end: int) -> int:
        """Return how often a token occurs before the place ``end``."""
        return int(np.count_nonzero(self._data[:end] == token))

    def windows(self, starts: npt.NDArray[np.int64], length: int) -> torch.Tensor:
        """Return LongTensor [len(starts), length], one window per start."""
        out = np.empty((len(starts), length), dtype=np.int64)
        for row, start in zip(out, starts, strict=True):
            row[:] = self._data[start : start + length]
        return torch.from_numpy(out)


class Samples(Protocol):
    """Training data as a pure function of the sample index."""

    def batch(self, first: int, count: int) -> Batch:
        """Return samples ``first`` to ``first + count - 1``."""
        ...


class PackedSamples:
    """Training samples: windows of context + 1 tokens, cut from a token file without regard to document borders.

    Each epoch cuts the file into windows without overlap and visits them in random order. The first window begins at
    a random offset, so that the cuts differ between epochs. A sample is a function of (seed, phase, sample index)
    alone, so a run can resume from its number of samples at any batch size.

    Args:
        token_file: the tokens.
        context: input tokens per sample.
        seed: of the offsets and orders.
        phase: the purpose of the samples; two phases with the same seed have different orders.

    Raises:
        UserError: ``context`` is below 1, or the file is shorter than one window.
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
        # The count does not depend on an epoch's offset, so that a sample index determines its epoch.
        self.samples_per_epoch: int = max(1, (tokens - context) // self._width)
        self._largest_offset = min(context, tokens - self.samples_per_epoch * self._width)
        self._starts = lru_cache(maxsize=2)(self._starts_of_epoch)  # two, for a batch that spans two epochs

    def _starts_of_epoch(self, epoch: int) -> npt.NDArray[np.int64]:
        random = np.random.default_rng(derive_seed(self._seed, "samples", self._phase, epoch))
        offset = int(random.integers(self._largest_offset + 1))
        return offset + random.permutation(self.samples_per_epoch) * self._width

    def start(self, index: int) -> int:
        """Return the place in the file at which a sample begins."""
        return int(self._starts(index // self.samples_per_epoch)[index % self.samples_per_epoch])

    def batch(self, first: int, count: int) -> Batch:
        """Return samples ``first`` to ``first + count - 1``; tokens and targets are [count, context]."""
        starts = [self.start(index) for index in range(first, first + count)]
        rows = self._file.windows(np.asarray(starts, dtype=np.int64), self._width)
        return Batch(tokens=rows[:, :-1].contiguous(), targets=rows[:, 1:].contiguous())


def document_border(token_file: TokenFile, end_token: int, share: float) -> int | None:
    """Return the first place, behind ``1 - share`` of the tokens, at which a document begins.

    It is None if no document begins there, so that the file cannot be divided.
    """
    tokens = len(token_file)
    first = min(tokens - 1, int((1.0 - share) * tokens))
    ends = (token_file.window(first, tokens - 1 - first) == end_token).nonzero().flatten()
    return first + int(ends[0]) + 1 if len(ends) else None


def sequential_windows(
    token_file: TokenFile, context: int, limit: int | None = None, begin: int = 0, end: int | None = None
) -> Batch:
    """Return the windows on which a corpus is evaluated, the same at each call: tokens, targets, bytes [N, context].

    Each token of the range except the first is the target of exactly one position. The last window is padded with
    zeros, whose targets are ignored.

    Args:
        token_file: the tokens.
        context: tokens per window.
        limit: largest number of windows, spread evenly over the range; None takes all.
        begin, end: the range of tokens; by default the whole file.

    Raises:
        UserError: the range has fewer than two tokens, or ``context`` or ``limit`` is below 1.
    """
    tokens = (len(token_file) if end is None else end) - begin
    if tokens < 2:
        raise UserError(f"{token_file.path.name} holds {tokens} token; evaluation needs at least 2")
    if context < 1 or (limit is not None and limit < 1):
        raise UserError(f"context={context} and the limit of windows ({limit}) must be at least 1")
    count = -(-(tokens - 1) // context)
    indices = np.arange(count, dtype=np.int64)
    if limit is not None and limit < count:
        indices = np.arange(limit, dtype=np.int64) * count // limit
    inputs = torch.zeros(len(indices), context, dtype=torch.int64)
    targets = torch.full((len(indices), context), IGNORED, dtype=torch.int64)
    sizes = None if token_file.bytes(0, 1) is None else torch.zeros_like(inputs)
    for row, index in enumerate(indices.tolist()):
        length = min(context, tokens - 1 - index * context)
        start = begin + index * context
        window = token_file.window(start, length + 1)
        inputs[row, :length] = window[:-1]
        targets[row, :length] = window[1:]
        known = token_file.bytes(start + 1, length)
        if sizes is not None and known is not None:
            sizes[row, :length] = known
    return Batch(tokens=inputs, targets=targets, bytes=sizes)
