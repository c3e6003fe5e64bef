"""Lists of pairs of a key and a value, and questions about them: of the source ``key_values`` and of a probe.

A row is a key of letters, a space, a value of as many digits, and the end of the line. A question is the row of its key
once more, so that its value can be found above.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from sparsetrain.errors import UserError

LETTERS, DIGITS = "abcdefghijklmnopqrstuvwxyz", "0123456789"
MARKS = 6
"""Usual letters of a key, and digits of a value."""
MOST_MARKS = 12  # 26^13 is beyond 64 bits


@dataclass
class KeyValuesConfig:
    """The documents of the source ``key_values``.

    Args:
        documents: number of documents.
        shortest: least bytes of a document. Rows are equally long, so at most one is missing.
        longest: most bytes of a document.
        questions: the last rows of a document, each of which repeats one of the pairs above.
        marks: letters of a key, and digits of a value.
        seed: seed of the documents.

    Raises:
        UserError: a number is out of range, or a document of such a size has no pair, or more pairs than values.
    """

    documents: int = 4000
    shortest: int = 128
    longest: int = 256
    questions: int = 4
    marks: int = MARKS
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("documents", 2), ("questions", 1), ("seed", 0)):
            if getattr(self, name) < least:
                raise UserError(f"{name}={getattr(self, name)} must be at least {least}")
        check_marks(self.marks)
        least = row_bytes(self.marks) * (self.questions + 1)
        if self.shortest < least:
            raise UserError(
                f"shortest={self.shortest} is too small; a pair and questions={self.questions} need {least} bytes"
            )
        if self.longest < self.shortest:
            raise UserError(f"longest={self.longest} must be at least shortest={self.shortest}")
        pairs = self.longest // row_bytes(self.marks) - self.questions
        if pairs > most_pairs(self.marks):
            raise UserError(
                f"longest={self.longest} has {pairs} pairs; marks={self.marks} gives {most_pairs(self.marks)} values"
            )


def check_marks(marks: int) -> None:
    """Raise `UserError` for a number of marks out of range."""
    if not 1 <= marks <= MOST_MARKS:
        raise UserError(f"marks={marks} must be from 1 to {MOST_MARKS}")


def row_bytes(marks: int) -> int:
    """Return the bytes of a row."""
    return 2 * (marks + 1)


def most_pairs(marks: int) -> int:
    """Return how many pairs can have different values."""
    return len(DIGITS) ** marks


def distinct(random: np.random.Generator, alphabet: str, count: int, marks: int = MARKS) -> list[str]:
    """Return ``count`` different words of ``marks`` characters; there must be as many."""
    base = len(alphabet)
    numbers = random.choice(base**marks, size=count, replace=False, shuffle=False)
    return ["".join(alphabet[int(number) // base**i % base] for i in range(marks)) for number in numbers]


def rows(keys: Sequence[str], values: Sequence[str]) -> str:
    """Return a row for each key and its value."""
    return "".join(f"{key} {value}\n" for key, value in zip(keys, values, strict=True))
