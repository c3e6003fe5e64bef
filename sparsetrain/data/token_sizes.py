"""The bytes of a text that each of its tokens stands for, from where the tokens end.

A token counts from the end of the token before it to its own end, so that white space which no token holds belongs to
the next token. What follows the last token belongs to the end of the document. The numbers of a text therefore add up
to its UTF-8 bytes exactly, whatever the tokenizer drops, changes or does not know.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt


def bytes_before(text: str) -> npt.NDArray[np.int64]:
    """Return int64 [characters + 1]: the UTF-8 bytes before each character, and those of the whole text."""
    if text.isascii():
        return np.arange(len(text) + 1, dtype=np.int64)
    points = np.frombuffer(text.encode("utf-32-le"), dtype="<u4")
    widths = 1 + (points >= 0x80).astype(np.int64) + (points >= 0x800) + (points >= 0x10000)
    return np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(widths)])


def token_sizes(text: str, ends: Sequence[int]) -> npt.NDArray[Any]:
    """Return int64 [tokens + 1], the bytes of each token and then those behind the last one; they sum to the text's.

    Args:
        text: the text.
        ends: the character behind each token, as the `tokenizers` library gives it. It may fall back, as after a
            character of which several tokens hold the bytes; the first of them then counts it.
    """
    before = bytes_before(text)
    reached = np.maximum.accumulate(np.clip(np.asarray([0, *ends], dtype=np.int64), 0, len(text)))
    return np.diff(before[np.append(reached, len(text))])
