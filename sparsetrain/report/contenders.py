"""Contenders of a bench: their titles, and what all tables of them need."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

from sparsetrain.report.text import ABSENT, clean

Values = dict[str, Any]

DENSE = "dense"
DECODING = ("decoding", "generation")
"""Parts of a bench without gradients: layers whose weights come from memory, and a model that generates."""

TITLES = {
    "csr": "sparsetrain csr",
    "bsr": "sparsetrain bsr",
    "sparselab": "SparseLab",
    "sparseprop": "SparseProp",
    "torch_csr": "torch.sparse CSR",
    "dense_bf16": "torch bf16",
    "masked": "sparsetrain masked",
    "auto": "sparsetrain auto",
    "scipy": "scipy CSR",
    "dense": "torch dense",
    "plain_torch": "plain torch GPT",
}
"""Titles of contenders, in the order of the figure's colours."""


def title(name: str) -> str:
    """Return the title of a contender in tables and figures."""
    return TITLES.get(name, clean(name))


def grouped(rows: Iterable[Values], *keys: str) -> list[tuple[tuple[Any, ...], list[Values]]]:
    """Return the rows by the values of ``keys``, in order."""
    groups: dict[tuple[Any, ...], list[Values]] = {}
    for row in rows:
        groups.setdefault(tuple(row[key] for key in keys), []).append(row)
    return list(groups.items())


def geometric_mean(ratios: Sequence[float]) -> float | None:
    """Return the geometric mean of ratios, or None without any."""
    return math.exp(sum(map(math.log, ratios)) / len(ratios)) if ratios else None


def times(ratio: float | None) -> str:
    """Return a ratio as ``2.47x``."""
    return ABSENT if ratio is None else f"{ratio:.2f}x"
