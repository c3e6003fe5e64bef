"""What settings mean: the ``Args`` sections of the docstrings of their dataclasses, as plain text for a terminal."""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Iterator

# Sections of a docstring that may follow ``Args``.
_SECTIONS = re.compile(r"^(?:Args|Attributes|Raises|Returns|Yields|Notes?|Examples?):$")
_ENTRY = re.compile(r"(\w+(?:, \w+)*): +(.*)")
_INNER = re.compile(r"(?<=[.;]) (?=(\w+): )")
_SENTENCE = re.compile(r"(?<![ (]e\.g\.)(?<![ (]i\.e\.)(?<=[.!?])\s+(?=[A-Z`\"(\d])")


def meaning(kind: type, name: str) -> str:
    """Return what a docstring of a dataclass, or of a base class, says about the setting ``name``; else ``""``.

    It is one line, with the marks of the docstring; `plain` removes them.
    """
    return next((found[name] for base in kind.__mro__ if name in (found := _meanings(base))), "")


def about(kind: type) -> str:
    """Return the first sentence of the docstring of a class."""
    return plain(first_sentence(" ".join(_text(kind).split())))


def details(kind: type) -> list[str]:
    """Return the paragraphs of the docstring of a class before its ``Args``."""
    before = re.split(r"^(?:Args|Raises):$", _text(kind), maxsplit=1, flags=re.MULTILINE)[0]
    return [plain(paragraph) for paragraph in re.split(r"\n\s*\n", before) if paragraph.strip()]


def first_sentence(text: str) -> str:
    """Return the first sentence of a line of a docstring."""
    return _SENTENCE.split(text, maxsplit=1)[0]


def plain(text: str) -> str:
    """Return a part of a docstring as one line, without its marks, with YAML's words for Python's."""
    line = " ".join(text.split())
    line = re.sub(r"``(.+?)``", lambda found: _unquoted(found[1]), line)
    line = re.sub(r"\*\*(.+?)\*\*", r"\1", line)
    line = re.sub(r"`([^`]+)`", r"\1", line)
    return re.sub(r"\bNone\b", "null", line)


def _unquoted(code: str) -> str:
    return re.sub(r"^\"([^\"]*)\"$", r"\1", code)


def _text(kind: type) -> str:
    return inspect.cleandoc(vars(kind).get("__doc__") or "")


@functools.cache
def _meanings(kind: type) -> dict[str, str]:
    """Return the entries of the ``Args`` section of a class's own docstring, by the names of its settings."""
    found: dict[str, str] = {}
    for names, text in _entries(_text(kind)):
        for name in names:
            found[name] = " ".join(text.split())
    return found


def _entries(text: str) -> Iterator[tuple[list[str], str]]:
    """Yield the names and the text of each entry of ``Args``; a line may hold several entries, one after the other."""
    inside, names, lines = False, list[str](), list[str]()
    for line in [*text.split("\n"), "Raises:"]:
        if _SECTIONS.match(line):
            if names:
                yield from _divided(names, " ".join(lines))
            inside, names, lines = line == "Args:", [], []
        elif inside and (entry := re.fullmatch(r" {4}" + _ENTRY.pattern, line)) is not None:
            if names:
                yield from _divided(names, " ".join(lines))
            names, lines = entry[1].split(", "), [entry[2]]
        elif inside:
            lines.append(line)


def _divided(names: list[str], text: str) -> Iterator[tuple[list[str], str]]:
    """Yield an entry, and the entries that follow it in its last line: ``grow: ... . grown_moments: ...``."""
    parts = _INNER.split(text)
    yield names, parts[0]
    for name, part in zip(parts[1::2], parts[2::2], strict=True):
        yield [name], part.removeprefix(f"{name}: ")
