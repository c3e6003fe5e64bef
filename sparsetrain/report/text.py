"""Formatting of numbers and names for a reader: units, intervals, and text that is safe to show."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Iterator, Mapping
from typing import Any

ABSENT = "-"
"""The cell of a table for a missing value."""


def clean(text: object) -> str:
    """Return ``text`` on one line without control, format or unpaired surrogate characters.

    Names come from configurations, and a terminal would execute an escape sequence in a name.
    """
    kept = ("\ufffd" if unicodedata.category(c) in {"Cc", "Cf", "Cs"} else c for c in " ".join(str(text).split()))
    return "".join(kept)


def shorten(text: object, length: int) -> str:
    """Return `clean` text of at most ``length`` characters; shortened text ends with an ellipsis."""
    whole = clean(text)
    return whole if len(whole) <= length else whole[: length - 1].rstrip() + "…"


def percent(fraction: float, digits: int = 1) -> str:
    """Return ``0.753`` as ``75.3 %``."""
    return f"{100 * fraction:.{digits}f} %"


def brackets(interval: list[float]) -> str:
    """Return the ends of an interval of fractions in percent, as ``[56.9, 65.4]``."""
    return f"[{100 * interval[0]:.1f}, {100 * interval[1]:.1f}]"


def si(value: float, unit: str) -> str:
    """Return ``1.234e15, "FLOP"`` as ``1.23 PFLOP``: three significant digits and a decimal prefix."""
    return _scaled(value, 1000.0, ("", "k", "M", "G", "T", "P", "E", "Z", "Y"), unit)


def byte_size(value: float) -> str:
    """Return a number of bytes with a binary prefix, such as ``4.20 MiB``."""
    return _scaled(value, 1024.0, ("", "Ki", "Mi", "Gi", "Ti", "Pi"), "B")


def tick(shown: str) -> str:
    """Return a formatted number without trailing zeros: ``1.50 M`` as ``1.5 M``, ``40.0 %`` as ``40 %``."""
    number, _, unit = shown.partition(" ")
    if "." in number:
        number = number.rstrip("0").rstrip(".")
    return f"{number} {unit}".strip()


def duration(seconds: float) -> str:
    """Return ``4.2 s``, ``3 min 07 s`` or ``2 h 05 min``."""
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def scalar(value: object) -> str:
    """Return a configuration's value as text: large integers with commas, floats to six digits, the rest `clean`."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}" if abs(value) >= 10_000 else str(value)
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, list | tuple):
        return ", ".join(scalar(item) for item in value)
    if isinstance(value, Mapping):  # an entry of a list, such as a phase
        return f"{{{', '.join(f'{clean(name)}: {scalar(item)}' for name, item in value.items() if item is not None)}}}"
    return clean(value)


def flatten(mapping: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yield ``(dotted name, value)`` for a nested mapping, in its order."""
    for name, value in mapping.items():
        dotted = f"{prefix}{clean(name)}"
        if isinstance(value, Mapping):
            yield from flatten(value, f"{dotted}.")
        else:
            yield dotted, scalar(value)


def _scaled(value: float, base: float, prefixes: tuple[str, ...], unit: str) -> str:
    if value == 0:
        return f"0 {unit}"
    exponent = min(max(int(math.log(abs(value), base)), 0), len(prefixes) - 1)
    # 999.9 would print as "1000", so a value that rounds up to the base takes the next prefix.
    if abs(value) / base**exponent >= base - 0.5 and exponent + 1 < len(prefixes):
        exponent += 1
    scaled = value / base**exponent
    if exponent == 0 and value == round(value):
        return f"{value:.0f} {unit}"
    digits = sum(abs(scaled) < bound for bound in (9.995, 99.95))
    return f"{scaled:.{digits}f} {prefixes[exponent]}{unit}"
