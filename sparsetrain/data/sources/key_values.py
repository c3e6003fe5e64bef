"""The source ``key_values``: generated lists of pairs with questions, from which a model learns to look things up.

A question cannot be answered without the list above it, so a model that predicts the text well reads its whole context.
The rows are those of the retrieval probe of `sparsetrain.training.probes`, whose draws are other ones.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict

import numpy as np

from sparsetrain.data.sources.base import Document, Source
from sparsetrain.data.sources.pairs import DIGITS, LETTERS, KeyValuesConfig, distinct, row_bytes, rows
from sparsetrain.data.sources.registry import SourceConfig, register_source
from sparsetrain.seeds import derive_seed

_FORMAT = 1  # of the documents; a new number rebuilds every corpus


class KeyValues(Source):
    """Documents of pairs, then of questions with their answers; the id of a document is its number."""

    licence = "generated: no rights are claimed"

    def __init__(self, config: KeyValuesConfig) -> None:
        self._config = config

    def identity(self) -> dict[str, object]:
        """Return the settings, of which the documents are a function."""
        return {"format": _FORMAT, **asdict(self._config)}

    def documents(self) -> Iterator[Document]:
        """Yield the documents in the order of their numbers; a larger number of documents adds to a smaller one."""
        for number in range(self._config.documents):
            yield Document(str(number), key_values(self._config, number))

    def size_estimate(self) -> int:
        """Return the mean size times the number of documents, in bytes."""
        return self._config.documents * (self._config.shortest + self._config.longest) // 2


def key_values(config: KeyValuesConfig, number: int) -> str:
    """Return one document, a function of the seed, the sizes, the questions and its number."""
    random = np.random.default_rng(derive_seed(config.seed, "key_values", number))
    size = int(random.integers(config.shortest, config.longest + 1))
    pairs = size // row_bytes(config.marks) - config.questions
    keys, values = (distinct(random, alphabet, pairs, config.marks) for alphabet in (LETTERS, DIGITS))
    asked = random.integers(pairs, size=config.questions)
    return rows(keys, values) + rows([keys[i] for i in asked], [values[i] for i in asked])


@register_source("key_values")
def _key_values(config: SourceConfig) -> KeyValues:
    return KeyValues(config.key_values)
