"""Test rows in a training text, against a search for lists of words."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from sparsetrain.data.tasks.text_overlap import SHORTEST, WINDOW, repeated_rows

words = st.lists(st.sampled_from(["a", "b"]), max_size=40)


def stands(text: list[str], training: list[str]) -> bool:
    size = min(WINDOW, len(text))
    windows = {tuple(training[n : n + size]) for n in range(len(training) - size + 1)}
    return any(tuple(text[n : n + size]) in windows for n in range(len(text) - size + 1))


@given(texts=st.lists(words, max_size=5), training=st.lists(words, max_size=3))
def test_it_finds_what_a_search_finds(texts: list[list[str]], training: list[list[str]]) -> None:
    found = repeated_rows([" ".join(text) for text in texts], [" ".join(piece) for piece in training])
    compared = [text for text in texts if len(text) >= SHORTEST]
    assert found == (sum(any(stands(text, piece) for piece in training) for text in compared), len(compared))


def test_case_and_punctuation_do_not_count_and_order_does() -> None:
    text = "One, two: three (four) five; six seven -- eight"
    assert repeated_rows([text], ["zero one two three four five six seven eight nine"]) == (1, 1)
    assert repeated_rows([text], ["zero one two three four five seven six eight nine"]) == (0, 1)
    assert repeated_rows(["One two."], ["one two"]) == (0, 0)
    assert repeated_rows([text], []) == (0, 1)
