"""Bytes: what a layer holds between steps, and what a step needs on top."""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sparsetrain.sparsity import SparseLinear, SparsityPattern, sparse_layers

# Value, gradient and two moments in float32.
STATE_BYTES = 16


def pattern_bytes(pattern: SparsityPattern) -> int:
    """Return the bytes of a pattern's indices and of everything derived from it so far, each array counted once."""
    by_address = dict(_arrays((pattern.row_ptr, pattern.col, pattern._derived)))
    return sum(by_address.values())


def layer_bytes(layer: SparseLinear) -> int:
    """Return the persistent bytes of a sparse layer in training with AdamW, its bias left out."""
    return STATE_BYTES * layer.values.numel() + pattern_bytes(layer.pattern)


def bytes_per_nonzero(module: nn.Module) -> float | None:
    """Return `layer_bytes` over nonzeros of all sparse layers of ``module``; None if it has none."""
    layers = [module] if isinstance(module, SparseLinear) else [layer for _, layer in sparse_layers(module)]
    nnz = sum(layer.pattern.nnz for layer in layers)
    return sum(map(layer_bytes, layers)) / nnz if nnz else None


def peak_bytes(step: Callable[[], Any], aside: Callable[[], Iterable[Tensor]] | None = None) -> int:
    """Return how far the bytes that torch holds rise during ``step`` above where they stood before it.

    Every allocation of torch's allocator counts, scratch memory of the sparse kernels included. The memory that other
    libraries allocate themselves is not seen. What was allocated outside of such calls is not seen to be freed.

    Args:
        aside: called after ``step``; the tensors that it returns, which ``step`` leaves behind, do not count, from
            their allocation on.
    """
    activities = [torch.profiler.ProfilerActivity.CPU]
    with _muted(), torch.profiler.profile(activities=activities, profile_memory=True) as profiler:
        step()
    assert profiler.profiler is not None
    results = profiler.profiler.kineto_results
    assert results is not None
    left: set[int | None] = set()
    if aside is None:  # the list of events has no addresses, and no trees of objects to walk
        changes = sorted(
            (event.start_ns(), 0, event.nbytes()) for event in results.events() if event.name() == "[memory]"
        )
    else:
        changes = sorted(_allocations(results.experimental_event_tree()))
        # An address is used again when it is free: the last time counts.
        last = {address: number for number, (_, address, size) in enumerate(changes) if size > 0}
        left = {last.get(tensor.untyped_storage().data_ptr()) for tensor in aside()}
    held = np.cumsum([size for number, (_, _, size) in enumerate(changes) if number not in left])
    return int(max(held.max(initial=0), 0))


def _allocations(events: Iterable[Any]) -> Iterator[tuple[int, int, int]]:
    """Yield time, address and bytes of every allocation in torch's trees of events; bytes below 0 were freed."""
    for event in events:
        if event.tag.name == "Allocation":
            yield event.start_time_ns, event.extra_fields.ptr, event.extra_fields.alloc_size
        yield from _allocations(event.children)


@contextmanager
def _muted() -> Iterator[None]:
    """Drop what is written to standard error: the profiler's library says there that it starts and stops."""
    sys.stderr.flush()
    kept = os.dup(2)
    try:
        with open(os.devnull, "wb") as nothing:
            os.dup2(nothing.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def _arrays(value: Any) -> Iterator[tuple[int, int]]:
    """Yield address and bytes of every tensor and array inside ``value``."""
    if isinstance(value, Tensor):
        storage = value.untyped_storage()
        yield storage.data_ptr(), storage.nbytes()
    elif isinstance(value, np.ndarray):
        yield value.__array_interface__["data"][0], value.nbytes
    elif isinstance(value, dict):
        for item in value.values():
            yield from _arrays(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _arrays(item)
    elif isinstance(value, SparsityPattern):
        yield from _arrays((value.row_ptr, value.col, value._derived))
    elif dataclasses.is_dataclass(value):
        for entry in dataclasses.fields(value):
            yield from _arrays(getattr(value, entry.name))
