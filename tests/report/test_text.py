"""Units and cleaned text, against tables of expected strings."""

from __future__ import annotations

import re
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparsetrain.report.text import brackets, byte_size, clean, duration, flatten, percent, shorten, si, tick


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (0, "0 FLOP"),
        (1, "1 FLOP"),
        (999, "999 FLOP"),
        (999.7, "1.00 kFLOP"),
        (1_234, "1.23 kFLOP"),
        (1.16e14, "116 TFLOP"),
        (99.99e9, "100 GFLOP"),
        (9.999e15, "10.0 PFLOP"),
        (999_600, "1.00 MFLOP"),
        (1e30, "1000000 YFLOP"),
    ],
)
def test_decimal_prefixes(value: float, shown: str) -> None:
    assert si(value, "FLOP") == shown


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.00 KiB"),
        (1536, "1.50 KiB"),
        (2**31, "2.00 GiB"),
        (2**20 - 1, "1.00 MiB"),
    ],
)
def test_binary_prefixes(value: float, shown: str) -> None:
    assert byte_size(value) == shown


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (0, "0.0 s"),
        (59.94, "59.9 s"),
        (59.96, "1 min 00 s"),
        (187, "3 min 07 s"),
        (3599.6, "1 h 00 min"),
        (7500, "2 h 05 min"),
    ],
)
def test_durations(value: float, shown: str) -> None:
    assert duration(value) == shown


def test_percent_interval_and_ticks() -> None:
    assert percent(0.7534) == "75.3 %"
    assert brackets([0.5691, 0.654]) == "[56.9, 65.4]"
    assert [tick(s) for s in ("1.50 M", "40.0 %", "100", "0 B", "10 k")] == ["1.5 M", "40 %", "100", "0 B", "10 k"]


@given(st.floats(1e-3, 1e24))
def test_prefixed_value_is_within_one_percent(value: float) -> None:
    number, unit = re.fullmatch(r"(\S+) (\S?)X", si(value, "X")).groups()  # type: ignore[union-attr]
    exponent = " kMGTPEZY".index(unit or " ")
    assert float(number) * 1000.0**exponent == pytest.approx(value, rel=0.01, abs=0.006)


@given(st.text())
def test_clean_text_is_one_printable_encodable_line(text: str) -> None:
    shown = clean(text)
    assert not any(unicodedata.category(c) in {"Cc", "Cf", "Cs", "Zl", "Zp"} for c in shown)
    shown.encode()
    assert clean(shown) == shown


def test_escape_sequences_and_bidi_marks_do_not_survive() -> None:
    assert clean("a\x1b[31mb\u202ec\nd") == "a\ufffd[31mb\ufffdc d"


@given(st.text(), st.integers(2, 30))
def test_shortened_text_fits(text: str, length: int) -> None:
    assert len(shorten(text, length)) <= length


def test_nested_settings_are_flattened_in_order() -> None:
    nested = {"b": {"c": 0.5, "d": {"e": None}}, "a": [1, 20_000], "f": True}
    assert list(flatten(nested)) == [("b.c", "0.5"), ("b.d.e", "none"), ("a", "1, 20,000"), ("f", "yes")]
