"""Quantities with units, as machine files write them: ``3.35 TB/s``, ``80 GiB``, ``5 us``, ``2.5 USD/h``."""

from __future__ import annotations

import math
import re

from sparsetrain.errors import UserError

_DECIMAL = {"": 1.0, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "P": 1e15, "E": 1e18}
_BINARY = {"Ki": 2.0**10, "Mi": 2.0**20, "Gi": 2.0**30, "Ti": 2.0**40}
_SMALL = {"": 1.0, "m": 1e-3, "u": 1e-6, "n": 1e-9}

FLOP_RATE, BANDWIDTH, SIZE, TIME, POWER, PRICE = "FLOP/s", "B/s", "B", "s", "W", "USD/h"
_UNITS: dict[str, dict[str, float]] = {
    FLOP_RATE: {f"{prefix}FLOP/s": factor for prefix, factor in _DECIMAL.items()},
    BANDWIDTH: {f"{prefix}B/s": factor for prefix, factor in (_DECIMAL | _BINARY).items()}
    | {f"{prefix}bit/s": factor / 8.0 for prefix, factor in _DECIMAL.items()},
    SIZE: {f"{prefix}B": factor for prefix, factor in (_DECIMAL | _BINARY).items()},
    TIME: {f"{prefix}s": factor for prefix, factor in _SMALL.items()} | {"min": 60.0, "h": 3600.0, "d": 86400.0},
    POWER: {f"{prefix}W": factor for prefix, factor in _DECIMAL.items()},
    PRICE: {"USD/h": 1.0},
}
_QUANTITY = re.compile(r"\s*([0-9.]+(?:[eE][+-]?[0-9]+)?)\s*([A-Za-z/]+)\s*")


def parse(text: str, unit: str, field: str, least: float = 0.0) -> float:
    """Return the value of a quantity in a base unit.

    Args:
        text: a number and a unit, such as ``"3.35 TB/s"``.
        unit: one of the base units above.
        field: the name of the setting, for messages.
        least: the value must be above this number; a price may also be equal to it.

    Raises:
        UserError: the text is no quantity, its unit is unknown, or its value is not positive or not finite.
    """
    known = _UNITS[unit]
    found = _QUANTITY.fullmatch(text)
    example = f"a number and one of {', '.join(known)}"
    if found is None:
        raise UserError(f"{field}={text!r} is not a positive quantity: give {example}")
    if found[2] not in known:
        raise UserError(f"{field}={text!r} has the unknown unit {found[2]!r}: give {example}")
    try:
        value = float(found[1]) * known[found[2]]
    except ValueError:
        raise UserError(f"{field}={text!r} is not a positive quantity: give {example}") from None
    if not (math.isfinite(value) and (value > least or (unit == PRICE and value >= least))):
        raise UserError(f"{field}={text!r} must be a finite number above 0")
    return value
