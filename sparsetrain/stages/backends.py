"""The backend of each sparse layer of a run: chosen once when the run starts, and saved in its directory.

Backends round differently. If a resumed run chose again, with another crossover table, it could not continue to the
same bits.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import torch

from sparsetrain.errors import UserError
from sparsetrain.files import write_json
from sparsetrain.models import Transformer
from sparsetrain.reading import read_json
from sparsetrain.runs.layout import BACKENDS
from sparsetrain.sparsity import sparse_layers
from sparsetrain.sparsity.backends.auto import choose
from sparsetrain.sparsity.backends.base import check_backend, resolve_backend


def settle_backends(
    model: Transformer,
    directory: Path,
    tokens: int,
    autocast: torch.dtype | None,
    densities: Mapping[str, float] | None = None,
) -> None:
    """Give each sparse layer of ``model`` the backend saved with the run, or choose one and save it.

    Args:
        tokens: rows of a layer's input in training.
        autocast: dtype of the autocast region, or None.
        densities: mean density over the training, by layer, if masks change it; None to use the current densities.

    Raises:
        UserError: the saved choice is unreadable, or a configured backend cannot compute a layer.
    """
    path = directory / BACKENDS
    saved: dict[str, str] = read_json(path, dict[str, str]) if path.exists() else {}
    chosen: dict[str, str] = {}
    for name, layer in sparse_layers(model):
        dtype, device, pattern = autocast or layer.values.dtype, layer.values.device, layer.pattern
        if name in saved:
            try:
                check_backend(saved[name], name)
            except UserError as error:
                raise UserError(f"{path}: {error}; install the backend, or delete the file to choose again") from None
            chosen[name] = saved[name]
        elif layer.backend == "auto":
            density = None if densities is None else densities.get(name)
            chosen[name] = choose(pattern, tokens, dtype, device, density)
        else:
            chosen[name] = resolve_backend(layer.backend, pattern, tokens, dtype, device)
        layer.backend = chosen[name]
    if chosen and chosen != saved:
        write_json(path, chosen)


def backend_names(model: Transformer) -> set[str]:
    """Return the backends of the sparse layers of a model."""
    return {layer.backend for _, layer in sparse_layers(model)}


def backends(model: Transformer) -> str:
    """Return the backends of a model with the number of layers of each, or ``dense`` if no layer is sparse."""
    counts = Counter(layer.backend for _, layer in sparse_layers(model))
    if len(counts) == 1:
        return next(iter(counts))
    return ", ".join(f"{name} ({count} layers)" for name, count in sorted(counts.items())) or "dense"
