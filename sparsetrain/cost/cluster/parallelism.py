"""How a step is divided among devices, and which divisions a model allows."""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np

from sparsetrain.cost.sizes import Number, Sizes
from sparsetrain.errors import UserError, check_choice

NONE, SELECTIVE, FULL = "none", "selective", "full"
RECOMPUTE = (NONE, SELECTIVE, FULL)
FUSED, UNFUSED = "fused", "unfused"
ZERO_STAGES = (0, 1, 2, 3)


@dataclass(frozen=True)
class Parallelism:
    """How one step is divided. Sizes may be arrays, one value for each configuration.

    A device is at one place of each dimension, so a step takes ``data * tensor * pipeline`` devices. Neighbours in the
    tensor dimension are next to each other in a node, then those in the data dimension, then the stages.

    Args:
        data: replicas, each of which computes its share of the batch.
        tensor: devices that share every matrix: by output features, then by input features (arXiv 1909.08053).
        pipeline: stages of consecutive blocks, with one forward and one backward pass in turn (1F1B).
        interleave: chunks of blocks that each stage has; they divide the bubble by their number (arXiv 2104.04473).
        micro_batch: sequences of one forward pass; None is a replica's whole share.
        sequence: whether what stands between the products is divided by tokens, too (arXiv 2205.05198).
        zero: what replicas share instead of repeating: 1 the optimizer's state, 2 also gradients, 3 also weights
            (arXiv 1910.02054).
        recompute: activations that the backward pass computes again: ``none``, ``selective`` (attention), ``full``.
        attention: ``fused``, or ``unfused``, which writes and reads the T x T matrix of every head.
        overlap: whether communication between replicas goes on while the device computes.
        reduce_bytes: bytes of a gradient on its way to the other replicas.
    """

    data: Number = 1.0
    tensor: Number = 1.0
    pipeline: Number = 1.0
    interleave: Number = 1.0
    micro_batch: Number | None = None
    sequence: bool = False
    zero: int = 0
    recompute: str = NONE
    attention: str = FUSED
    overlap: bool = True
    reduce_bytes: float = 4.0

    def __post_init__(self) -> None:
        check_choice("parallelism.recompute", self.recompute, RECOMPUTE)
        check_choice("parallelism.attention", self.attention, (FUSED, UNFUSED))
        if self.zero not in ZERO_STAGES:
            raise UserError(f"parallelism.zero={self.zero!r} is not one of 0, 1, 2, 3")
        for each in fields(self):
            value = getattr(self, each.name)
            if each.name in _WHOLE and value is not None and not _is_whole(value):
                raise UserError(f"parallelism.{each.name}={_shown(value)} must be a whole number of at least 1")
        if not self.reduce_bytes > 0.0:
            raise UserError(f"parallelism.reduce_bytes={self.reduce_bytes} must be above 0")

    @property
    def devices(self) -> Number:
        """Devices that the step takes."""
        return self.data * self.tensor * self.pipeline

    def micro_batches(self, global_batch: Number) -> tuple[Number, Number]:
        """Return the sequences of a micro-batch, and how many of them each replica computes in a step."""
        share = global_batch / self.data
        micro = share if self.micro_batch is None else self.micro_batch
        return micro, share / micro


_WHOLE = ("data", "tensor", "pipeline", "interleave", "micro_batch")


def check_split(sizes: Sizes, global_batch: Number, parallelism: Parallelism) -> None:
    """Check that a model and a batch can be divided.

    Raises:
        UserError: heads, widths or the vocabulary are no multiple of ``tensor``, blocks none of the stages and their
            chunks, the batch none of the replicas and their micro-batches, or the interleaved schedule has no stages.
    """
    split, stages = parallelism.tensor, parallelism.pipeline
    chunks = stages * parallelism.interleave
    _divides("tensor", split, "attention heads", sizes.heads)
    _divides("tensor", split, "width of all keys", sizes.kv_width)
    _divides("tensor", split, "width of the MLP", sizes.ffn)
    _divides("pipeline * interleave", chunks, "blocks", sizes.layers)
    _divides("data", parallelism.data, "sequences of the batch", global_batch)
    if np.any((np.asarray(parallelism.interleave) > 1) & (np.asarray(stages) == 1)):
        raise UserError(f"parallelism.interleave={_shown(parallelism.interleave)} needs pipeline of at least 2")
    if parallelism.micro_batch is not None:
        _divides("micro_batch", parallelism.micro_batch, "sequences of a replica", global_batch / parallelism.data)
    if parallelism.sequence and not np.all(np.asarray(split) > 1):
        raise UserError("parallelism.sequence=true divides the work of tensor parallelism: tensor must be at least 2")


def _divides(name: str, parts: Number, what: str, whole: Number) -> None:
    bad = np.asarray(np.mod(whole, parts) != 0.0)
    if bad.any():
        shown_parts, shown_whole = (
            np.broadcast_to(np.asarray(value, dtype=float), bad.shape)[bad].flat[0] for value in (parts, whole)
        )
        raise UserError(f"parallelism.{name}={shown_parts:g} does not divide the {shown_whole:g} {what}")


def _is_whole(value: Number) -> bool:
    array = np.asarray(value, dtype=float)
    return bool(np.all(np.isfinite(array) & (array >= 1.0) & (array == np.rint(array))))


def _shown(value: Number) -> str:
    array = np.asarray(value).ravel()
    return f"{array[0]:g}" if len(array) == 1 else f"{array.min():g}...{array.max():g}"
