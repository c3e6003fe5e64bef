"""Memory of layers and steps: bytes held between steps, and the peak during a step."""

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

# Value, gradient and two moments in float32, per weight.
STATE_BYTES = 16


def pattern_bytes(pattern: SparsityPattern) -> int:
    """Return the bytes of a pattern's indices and of everything derived from it so far; each array counts once."""
    by_address = dict(_arrays((pattern.row_ptr, pattern.col, pattern._derived)))
    return sum(by_address.values())


def layer_bytes(layer: SparseLinear) -> int:
    """Return the bytes that a sparse layer holds between steps of training with AdamW, without its bias."""
    return STATE_BYTES * layer.values.numel() + pattern_bytes(layer.pattern)


def bytes_per_nonzero(module: nn.Module) -> float | None:
    """Return `layer_bytes` divided by nonzeros over all sparse layers of ``module``; None if it has none."""
    layers = [module] if isinstance(module, SparseLinear) else [layer for _, layer in sparse_layers(module)]
    nnz = sum(layer.pattern.nnz for layer in layers)
    return sum(map(layer_bytes, layers)) / nnz if nnz else None


def peak_bytes(step: Callable[[], Any], aside: Callable[[], Iterable[Tensor]] | None = None) -> int:
    """Return how much the memory that torch holds rises during ``step``, in bytes.

    All allocations by torch's allocator count, including scratch memory of the sparse kernels. Memory that other
    libraries allocate is not seen, nor is the release of memory that was allocated before.

    Args:
        aside: called after ``step``; returns tensors that ``step`` created and that do not count.
    """
    activities = [torch.profiler.ProfilerActivity.CPU]
    with _muted(), torch.profiler.profile(activities=activities, profile_memory=True) as profiler:
        step()
    assert profiler.profiler is not None
    results = profiler.profiler.kineto_results
    assert results is not None
    left: set[int | None] = set()
    if aside is None:  # a flat list suffices: it has no addresses but needs no traversal
        changes = sorted(
            (event.start_ns(), 0, event.nbytes()) for event in results.events() if event.name() == "[memory]"
        )
    else:
        changes = sorted(_allocations(results.experimental_event_tree()))
        # Addresses are reused after they are freed, so the last allocation at an address is the tensor's.
        last = {address: number for number, (_, address, size) in enumerate(changes) if size > 0}
        left = {last.get(tensor.untyped_storage().data_ptr()) for tensor in aside()}
    held = np.cumsum([size for number, (_, _, size) in enumerate(changes) if number not in left])
    return int(max(held.max(initial=0), 0))


def _allocations(events: Iterable[Any]) -> Iterator[tuple[int, int, int]]:
    """Yield time, address and bytes of each allocation in torch's event trees; negative bytes mean a release."""
    for event in events:
        if event.tag.name == "Allocation":
            yield event.start_time_ns, event.extra_fields.ptr, event.extra_fields.alloc_size
        yield from _allocations(event.children)


@contextmanager
def _muted() -> Iterator[None]:
    """Discard standard error inside the block: the profiler's library reports there that it starts and stops."""
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
    """Yield address and bytes of each tensor and array inside ``value``."""
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
