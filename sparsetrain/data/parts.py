"""Long texts in parts, so that neither an encoder nor the training of a tokenizer holds one whole."""

from __future__ import annotations

from collections.abc import Iterator

_SEARCHED = 4096  # characters in which a border is looked for


def parts(text: str, most: int) -> Iterator[str]:
    """Yield a text in parts of at most ``most`` characters, which joined give it.

    A part ends before a space between two letters, where the usual tokenizers begin a token, if there is one among its
    last characters. The tokens of the parts are then those of the text.
    """
    start = 0
    while len(text) - start > most:
        end = start + most
        for place in range(end, max(start + 1, end - _SEARCHED), -1):
            if text[place] == " " and text[place - 1].isalpha() and text[place + 1 : place + 2].isalpha():
                end = place
                break
        yield text[start:end]
        start = end
    yield text[start:]
