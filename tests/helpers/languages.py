"""Made text of two languages with different scripts: words of a fixed dictionary, drawn by Zipf's law."""

from __future__ import annotations

import random

LATIN = "etaoinshrdlu"
ARABIC = "\u0627\u0644\u0645\u0646\u0648\u064a\u0631\u062a\u0628\u0639\u062d\u0642"
VOWELS = "\u064e\u0650\u064f\u0652"  # marks above and below letters


def words(alphabet: str, marks: str = "", count: int = 200, seed: int = 0) -> list[str]:
    """Return different words of two to seven letters, with a mark behind each letter if there are any."""
    draw = random.Random(seed)
    found: dict[str, None] = {}
    while len(found) < count:
        letters = draw.choices(alphabet, k=draw.randint(2, 7))
        found["".join(letter + (draw.choice(marks) if marks else "") for letter in letters)] = None
    return list(found)


def documents(dictionary: list[str], count: int, length: int = 40, seed: int = 0) -> list[str]:
    """Return texts of ``length`` words with punctuation, numbers and line breaks."""
    draw = random.Random(seed)
    weights = [1.0 / rank for rank in range(1, len(dictionary) + 1)]
    found = []
    for number in range(count):
        drawn = draw.choices(dictionary, weights, k=length)
        ends = draw.choices([" ", " ", " ", " ", ", ", ". ", ".\n\n", f" {number} ", ' "'], k=length)
        found.append("".join(word + end for word, end in zip(drawn, ends, strict=True)))
    return found


ENGLISH = documents(words(LATIN), 300)
WRITTEN_ARABIC = documents(words(ARABIC, VOWELS), 300, seed=1)
