"""Test rows whose text stands in a training text: windows of words, compared by hash.

A word is a run of letters and digits, in lower case. A test row counts if 13 of its words in a row (or all of them, if
it has 8 to 12) stand in the training text in this order. Shorter rows are not compared: such texts occur by chance.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

import numpy as np

WINDOW, SHORTEST = 13, 8  # words
_WORD = re.compile(r"\w+")
_FACTOR = np.uint64(0x9E3779B97F4A7C15)


def repeated_rows(texts: Sequence[str], training: Iterable[str]) -> tuple[int, int]:
    """Return how many of the texts stand in the training text, and how many were compared.

    Args:
        texts: the texts of test rows.
        training: pieces of the training text, in order. A window that two pieces share is not seen.
    """
    windows: dict[int, list[np.ndarray]] = {}
    rows: dict[int, list[int]] = {}
    for row, text in enumerate(texts):
        words = _words(text)
        if len(words) >= SHORTEST:
            size = min(WINDOW, len(words))
            found = _hashes(words, size)
            windows.setdefault(size, []).append(found)
            rows.setdefault(size, []).extend([row] * len(found))
    wanted = {size: np.unique(np.concatenate(found)) for size, found in windows.items()}
    seen = {size: np.zeros(len(found), dtype=bool) for size, found in wanted.items()}
    for piece in training:
        words = _words(piece)
        for size, known in wanted.items():
            if len(words) >= size:
                found = _hashes(words, size)
                places = np.minimum(np.searchsorted(known, found), len(known) - 1)
                seen[size][places[known[places] == found]] = True
    repeated: set[int] = set()
    for size, known in wanted.items():
        hits = seen[size][np.searchsorted(known, np.concatenate(windows[size]))]
        repeated.update(np.array(rows[size])[hits].tolist())
    return len(repeated), len({row for members in rows.values() for row in members})


def _words(text: str) -> np.ndarray:
    """Return a hash of each word, uint64; hashes of Python's strings differ from process to process."""
    found = list(map(hash, _WORD.findall(text.lower())))
    return np.array(found, dtype=np.int64).view(np.uint64)


def _hashes(words: np.ndarray, size: int) -> np.ndarray:
    """Return a hash of each window of ``size`` words, which depends on their order."""
    found = np.zeros(len(words) - size + 1, dtype=np.uint64)
    for place in range(size):
        found = found * _FACTOR + words[place : place + len(found)]
    return found
