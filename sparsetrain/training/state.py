"""Progress counters of a run, the signals and errors that stop it, and the settings of its loop."""

from __future__ import annotations

import resource
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

import torch

from sparsetrain.errors import UserError, check_choice

DEVICES = ("auto", "cpu", "cuda")
PRECISIONS = ("auto", "fp32", "bf16")


@dataclass
class LoopConfig:
    """Settings of the training loop; its length and its batch size belong to the budget.

    Args:
        accumulation: micro-batches per optimizer step.
        micro_batch: sequences per micro-batch, instead of ``accumulation``: their number then follows the batch size,
            and a batch that grows during the run needs no more memory.
        precision: ``fp32``, ``bf16`` (autocast), or ``auto``.
        log_every: steps from one line of ``metrics.jsonl`` to the next; 0 keeps only the last.
        eval_every: steps from one evaluation to the next; 0 keeps only the first and the last.
        eval_sequences: sequences of held-out text, or examples, per evaluation during training.
        checkpoint_every: steps from one checkpoint to the next; 0 keeps only the last.
        keep_last: number of checkpoints to keep.
    """

    accumulation: int = 1
    micro_batch: int | None = None
    precision: str = "auto"
    log_every: int = 10
    eval_every: int = 100
    eval_sequences: int = 256
    checkpoint_every: int = 200
    keep_last: int = 2

    def __post_init__(self) -> None:
        check_choice("loop.precision", self.precision, PRECISIONS)
        for name in ("accumulation", "keep_last", "eval_sequences"):
            if getattr(self, name) < 1:
                raise UserError(f"loop.{name}={getattr(self, name)} must be at least 1")
        if self.micro_batch is not None:
            if self.micro_batch < 1:
                raise UserError(f"loop.micro_batch={self.micro_batch} must be at least 1")
            if self.accumulation != 1:
                raise UserError(
                    f"loop.micro_batch={self.micro_batch} and loop.accumulation={self.accumulation}: one follows from "
                    "the other; give one"
                )
        for name in ("log_every", "eval_every", "checkpoint_every"):
            if getattr(self, name) < 0:
                raise UserError(f"loop.{name}={getattr(self, name)} must be at least 0")

    def micro_batch_of(self, batch_size: int) -> int:
        """Return the sequences per micro-batch of a step with ``batch_size`` sequences."""
        return self.micro_batch or batch_size // self.accumulation


@dataclass
class TrainState:
    """Progress of a run. A resumed run needs this, its configuration and its tensors, and nothing else.

    ``seconds`` are those of the whole loop. ``step_seconds`` are those of its training steps alone, without
    evaluations, checkpoints and the compilation of kernels; None if an older version began the run.
    """

    step: int = 0
    samples_seen: int = 0
    tokens_seen: int = 0
    seconds: float = 0.0
    step_seconds: float | None = 0.0


class Clock:
    """Counts the seconds of a run, including those before interruptions."""

    def __init__(self, before: float) -> None:
        self._started = time.monotonic() - before

    def seconds(self) -> float:
        return time.monotonic() - self._started


class Diverged(RuntimeError):
    """The loss, a gradient or a weight is no longer finite; the message gives step, checkpoint and likely causes."""


class Interrupted(RuntimeError):
    """A signal stopped the run after its state was saved; ``exit_code`` is 128 + the signal number."""

    def __init__(self, message: str, signal_number: int) -> None:
        super().__init__(message)
        self.exit_code = 128 + signal_number


class StopRequest:
    """A signal handler: the first SIGINT or SIGTERM sets ``signal_number``, a second SIGINT raises at once."""

    def __init__(self) -> None:
        self.signal_number: int | None = None

    def __call__(self, number: int, _frame: FrameType | None) -> None:
        if self.signal_number is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal_number = number


@contextmanager
def stop_requests() -> Iterator[StopRequest]:
    """Yield a `StopRequest` that handles SIGINT and SIGTERM; outside the main thread it is never set."""
    request = StopRequest()
    previous = {}
    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            previous[number] = signal.signal(number, request)
    except ValueError:  # only the main thread may set handlers
        previous.clear()
    try:
        yield request
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def resolve_device(name: str) -> torch.device:
    """Return the device for ``auto``, ``cpu`` or ``cuda``.

    Raises:
        UserError: another name, or ``cuda`` without a CUDA device.
    """
    check_choice("device", name, DEVICES)
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("device=cuda: this torch sees no CUDA device; use device=cpu or device=auto")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def resolve_precision(name: str, device: torch.device) -> tuple[torch.dtype | None, str]:
    """Return the autocast dtype (None: no autocast) and the reason for it."""
    if name == "fp32":
        return None, "fp32: asked for"
    if name == "bf16":
        return torch.bfloat16, "bf16 autocast: asked for"
    if device.type == "cuda" and torch.cuda.is_bf16_supported():
        return torch.bfloat16, "bf16 autocast: this GPU computes in bf16"
    if device.type == "cuda":
        return None, "fp32: this GPU does not compute in bf16"
    return None, "fp32: the reference on a CPU; loop.precision=bf16 uses autocast"


def peak_rss_bytes() -> int:
    """Return the peak resident set size of this process, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
