"""Advice for a workload that is too large: the largest value of one setting whose likely footprint fits in memory."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace

from sparsetrain.cost.footprint import ACTIVATIONS, BATCH, CACHE, EMBEDDINGS, LOGITS, WEIGHTS, Workload
from sparsetrain.errors import UserError

Knobs = Mapping[str, str]
"""The settings that may be changed: their names here, such as `batch_size`, mapped to their configuration keys."""

# The settings that are tried first, by the part that needs most memory.
_ORDER = {
    ACTIVATIONS: ("batch_size", "accumulation", "context"),
    LOGITS: ("batch_size", "accumulation", "context"),
    BATCH: ("batch_size", "context"),
    CACHE: ("cached",),
    WEIGHTS: ("d_model", "n_layers"),
    EMBEDDINGS: ("vocab_size", "max_context", "d_model"),
}
_MOST_MICRO_BATCHES = 4096


def what_fits(workload: Workload, size: int, knobs: Knobs) -> list[str]:
    """Return up to two settings, ``name=value``, each of which makes the workload fit in ``size`` bytes on its own.

    The list is empty if no single setting is enough.
    """
    first = _ORDER[workload.footprint().main.name]
    order = [name for name in (*first, *(name for name in knobs if name not in first)) if name in knobs]
    found = ((name, _largest(workload, name, size)) for name in order)
    return [f"{knobs[name]}={value}" for name, value in found if value is not None][:2]


def _largest(workload: Workload, name: str, size: int) -> int | None:
    """Return the largest value below the present one that fits; for accumulation, the smallest above it; or None."""
    model = workload.model

    def fits(change: Callable[[int], Workload], value: int) -> bool:
        try:
            return change(value).footprint().likely <= size
        except UserError:  # the model is invalid, for example with a head of odd width under RoPE
            return False

    def of_model(field: str) -> Callable[[int], Workload]:
        return lambda value: replace(workload, model=replace(model, **{field: value}))  # type: ignore[arg-type]

    if name == "accumulation":
        rows, now = workload.batch_size, workload.batch_size // max(1, workload.micro_batch)
        values = (n for n in range(now + 1, min(rows, _MOST_MICRO_BATCHES) + 1) if rows % n == 0)
        return next((n for n in values if fits(lambda n: replace(workload, micro_batch=rows // n), n)), None)
    if name == "d_model":
        step = model.n_heads * (math.ceil(2 / model.rope_fraction) if model.positions == "rope" else 1)
        found = _bisect(lambda k: fits(of_model("d_model"), k * step), model.d_model // step)
        return None if found is None else found * step
    changes: dict[str, tuple[Callable[[int], Workload], int]] = {
        "batch_size": (
            lambda n: replace(workload, batch_size=n, micro_batch=n, evaluated=min(workload.evaluated, n)),
            workload.batch_size,
        ),
        "context": (lambda n: replace(workload, context=n), workload.context),
        "cached": (lambda n: replace(workload, cached=n), workload.cached),
        "prompt_tokens": (lambda n: replace(workload, prompt_tokens=n), workload.prompt_tokens),
        **{field: (of_model(field), getattr(model, field)) for field in ("n_layers", "vocab_size", "max_context")},
    }
    change, now = changes[name]
    return _bisect(lambda n: fits(change, n), now)


def _bisect(fits: Callable[[int], bool], now: int) -> int | None:
    """Return the largest n from 1 to ``now - 1`` that fits, or None; if n fits, every smaller n must fit."""
    if now <= 1 or not fits(1):
        return None
    low, high = 1, now
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
