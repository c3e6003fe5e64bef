"""What a setting allows, as its own check says it.

The checks of the dataclasses are the only place that knows choices and ranges. Their messages name what is allowed, so
this module gives a setting values that it cannot take, and reads the answers.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from types import UnionType
from typing import Any, Union, get_args, get_origin

from sparsetrain.errors import UserError
from sparsetrain.settings import build

_WORD = "?"  # no registry has such a name: see `sparsetrain.registry`
_FAR = 10**9
_NUMBER = r"-?\d+(?:\.\d+)?(?:e[-+]?\d+)?"
_CHOICES = re.compile(r"'\?' is not one of (.+?)(?: \(did you mean .*)?$")
_RANGES = (
    (re.compile(r"([\[(]" + _NUMBER + ", " + _NUMBER + r"[\])])"), "in {}"),
    (re.compile(rf"\b(from {_NUMBER} to {_NUMBER})\b"), "{}"),
    (re.compile(rf"\b(at least {_NUMBER}(?: and (?:at most|below) {_NUMBER})?)(?![\w=])"), "of {}"),
    (re.compile(rf"\b(above {_NUMBER}(?: and (?:at most|below) {_NUMBER})?)(?![\w=])"), "{}"),
    (re.compile(rf"the least is ({_NUMBER})$"), "of at least {}"),
    (re.compile(r"is not a (positive) integer"), "of at least 1"),
    (re.compile(r"is not a (non-negative) integer"), "of at least 0"),
    (re.compile(r"is not (positive)$"), "above 0"),
)


def arms(hint: Any) -> tuple[Any, ...]:
    """Return the types of a union, or the type itself, without None."""
    found = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    return tuple(arm for arm in found if arm is not type(None))


def choices(kind: type, values: Mapping[str, Any], name: str, hint: Any) -> list[str]:
    """Return the values that a setting of text takes; an empty list if it takes any, or if its check is not reached.

    Args:
        kind: the dataclass of the section.
        values: the section's other settings.
        name: the setting.
        hint: its type; of a list, the choices are those of an entry.
    """
    probes: list[Any] = [_WORD] if str in arms(hint) else [[_WORD]] if list[str] in arms(hint) else []
    for probe in probes:
        found = _CHOICES.search(_answer(kind, values, name, probe))
        if found is not None:
            return [choice.strip("'") for choice in found[1].split(", ")]
    return []


def limits(kind: type, values: Mapping[str, Any], name: str, hint: Any) -> str:
    """Return the range of a number as its check says it, such as ``of at least 1`` or ``in [0, 1)``, or ``""``."""
    wanted = {int, float} & set(arms(hint))
    for probe in (-_FAR, _FAR) if wanted else ():
        value = probe if int in wanted else float(probe)
        answer = _answer(kind, values, name, value)
        # The check of another setting, which this value contradicts, says nothing about this one.
        _, said, allowed = answer.partition(f"{name}={value}")
        if said:
            for pattern, text in _RANGES:
                if (found := pattern.search(allowed)) is not None:
                    return text.format(found[1])
    return ""


def _answer(kind: type, values: Mapping[str, Any], name: str, value: Any) -> str:
    """Return the message with which a section refuses a value, or ``""``."""
    try:
        build(kind, {**values, name: value})
    except UserError as error:
        return str(error)
    except Exception:  # a plugin's check may fail in any way; help then says less
        return ""
    return ""


def joined(words: Iterable[str]) -> str:
    """Return ``a``, ``a or b``, ``a, b or c``."""
    listed = list(words)
    return " or ".join([", ".join(listed[:-1]), listed[-1]] if len(listed) > 1 else listed)
