"""Quoting of text values in overrides, so that Hydra reads them as they were typed.

Hydra's grammar gives commas, brackets, equals signs, quotes, digits and ``true`` a meaning that they do not have in a
sentence or a file name, and OmegaConf gives one to ``${``. So the value of a setting of type text is put into quotes,
only here, before either of them reads it.

* A value that is already in quotes, ``'...'`` or ``"..."``, means the text between them.
* ``null`` means no value, for a setting that may be null.
* ``${name}`` is replaced by that setting or resolver if it exists; settings that hold prose keep it as text.
* In a multirun, commas outside quotes separate values. If they could also belong to the text, the override is refused
  with a message that shows how to write it.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any, get_origin, get_type_hints

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Quote, QuotedString
from omegaconf import OmegaConf

from sparsetrain.errors import UserError
from sparsetrain.stages.config import PATHS, RUNS

# Settings that hold sentences: every character in them is text.
PROSE = ("prompt", "words")

_QUOTED = re.compile(r"""'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*\"""", re.DOTALL)
_WORD = re.compile(r"[\w./:+@%*~=-]+")  # a value without spaces, which may be one of several in a multirun
_COLLECTION = re.compile(r"\s*(?:\[.*\]|\{.*\})\s*", re.DOTALL)  # a list or a mapping in Hydra's grammar
_FUNCTION = re.compile(r"(?:choice|glob|interval|range|shuffle|sort|tag)\(.*\)", re.DOTALL)  # of Hydra's grammar
_INTERPOLATION = re.compile(r"\$\{\s*([\w.]+)\s*([:}])")


@dataclasses.dataclass(frozen=True)
class TextSetting:
    """A setting whose value is text. ``optional``: it may be null. ``many``: it is a list of texts."""

    name: str
    optional: bool
    many: bool

    @property
    def prose(self) -> bool:
        return self.name.rpartition(".")[2] in PROSE

    @property
    def path(self) -> bool:
        return self.name in (*(".".join(names) for names in PATHS), *RUNS)


def text_settings(schema: type, prefix: str = "") -> dict[str, TextSetting]:
    """Return the settings of a configuration that hold text, by dotted name."""
    found: dict[str, TextSetting] = {}
    for entry in dataclasses.fields(schema):
        name, hint = f"{prefix}{entry.name}", entry.type
        arms = (hint, *getattr(hint, "__args__", ()))
        if str in arms and get_origin(hint) is not dict:
            found[name] = TextSetting(name, type(None) in arms, get_origin(hint) is list)
        for arm in arms:
            if isinstance(arm, type) and dataclasses.is_dataclass(arm) and get_origin(hint) is not list:
                found |= text_settings(_resolved(arm), f"{name}.")
    return found


@functools.cache
def _resolved(kind: type) -> type:
    """Return a copy of a dataclass whose field types are types instead of their names."""
    hints = get_type_hints(kind)
    return dataclasses.make_dataclass(
        kind.__name__, [(entry.name, hints[entry.name], None) for entry in dataclasses.fields(kind)]
    )


def quoted(
    overrides: Iterable[str], settings: dict[str, TextSetting], known: Callable[[str], bool], sweep: bool = False
) -> list[str]:
    """Return the overrides with quotes around the values of settings that hold text.

    Args:
        known: returns whether a name is the name of a setting, so that ``${name}`` stands for its value.
        sweep: whether commas outside quotes separate values.

    Raises:
        UserError: in a sweep, a comma may separate values or belong to the text.
    """
    result = []
    for override in overrides:
        key, equals, value = override.partition("=")
        setting = settings.get(key.lstrip("+"))
        if equals and setting is not None:
            override = f"{key}={_quoted(setting, value, known, sweep)}"
        result.append(override)
    return result


def _quoted(setting: TextSetting, value: str, known: Callable[[str], bool], sweep: bool) -> str:
    if setting.many:
        inner = value.strip()
        if not (inner.startswith("[") and inner.endswith("]")) or set(inner[1:-1]) & set("[]{}"):
            return value  # nested lists and dicts: Hydra's grammar decides
        return f"[{','.join(_one(setting, piece.strip(), known) for piece in _pieces(inner[1:-1]) if piece.strip())}]"
    pieces = list(_pieces(value)) if sweep else [value]
    if len(pieces) == 1:
        return _one(setting, value, known)
    if _FUNCTION.fullmatch(value) and not setting.prose:
        return value
    pieces = [piece.strip() for piece in pieces]
    if all(_is_quoted(piece) or (_WORD.fullmatch(piece) and not setting.prose) for piece in pieces):
        return ",".join(_one(setting, piece, known) for piece in pieces)
    whole = QuotedString(value, Quote.single).with_quotes()
    raise UserError(
        f"{setting.name}={value}: in a multirun, commas outside quotes separate values; for one text with commas write "
        f"{setting.name}={whole} (quotes inside those of the shell), for several {setting.name}='...','...'"
    )


def _pieces(text: str) -> Iterator[str]:
    """Yield the parts of ``text`` between commas; commas inside a quoted part do not separate."""
    start = 0
    while True:
        match = re.compile(rf"\s*(?:{_QUOTED.pattern})\s*(?=,|$)", re.DOTALL).match(text, start)
        end = match.end() if match else text.find(",", start)
        if end < 0 or end >= len(text):
            yield text[start:]
            return
        yield text[start:end]
        start = end + 1


def _is_quoted(value: str) -> bool:
    return _QUOTED.fullmatch(value) is not None


def _one(setting: TextSetting, value: str, known: Callable[[str], bool]) -> str:
    """Return one text in quotes, or null."""
    if value == "null" and setting.optional and not setting.many:
        return value
    if setting.path and _COLLECTION.fullmatch(value):
        whole = QuotedString(value, Quote.single).with_quotes()
        raise UserError(
            f"{setting.name}={value} must be a path, not a list or a mapping; for a path of this name write "
            f"{setting.name}={whole} (quotes inside those of the shell)"
        )
    text = OverridesParser.create().parse_rule(value, "primitive").text if _is_quoted(value) else value
    if setting.prose or not any(_names_something(match, known) for match in _INTERPOLATION.finditer(text)):
        text = without_interpolation(text)
    return QuotedString(text, Quote.single).with_quotes()


def _names_something(match: re.Match[str], known: Callable[[str], bool]) -> bool:
    name, end = match.groups()
    return OmegaConf.has_resolver(name) if end == ":" else known(name)


def without_interpolation(text: str) -> str:
    """Escape ``text`` for OmegaConf: put a backslash before each ``${``, and double the backslashes before it."""
    return re.sub(r"(\\*)\$\{", lambda match: f"{2 * match[1]}\\${{", text)


def with_interpolation(text: str) -> str:
    """Undo `without_interpolation`; a text that contains a real interpolation is returned unchanged."""
    found = re.findall(r"(\\*)\$\{", text)
    if any(len(marks) % 2 == 0 for marks in found):
        return text
    return re.sub(r"(\\*)\$\{", lambda match: f"{match[1][: len(match[1]) // 2]}${{", text)


def plain_value(value: Any) -> Any:
    """Return a value of a sweep, unwrapped if Hydra marked it as quoted."""
    return value.text if isinstance(value, QuotedString) else value
