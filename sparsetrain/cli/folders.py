"""Directories of a user's own configuration files, which ``--config-dir`` and ``SPARSETRAIN_CONF`` name.

Such a directory has the form of the library's ``conf/``: a folder for each group, and in it a file for each choice.
`using` makes the directories of ``--config-dir`` known while a command runs; the variable counts in Python as well.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import NamedTuple

from sparsetrain.errors import UserError
from sparsetrain.files import typed_path

OPTION = "--config-dir"
SHORT = "-cd"
VARIABLE = "SPARSETRAIN_CONF"
"""The environment variable that names directories; its separator is the one of ``PATH``."""


class Named(NamedTuple):
    """A directory as a user named it: the option or the variable, and the text."""

    by: str
    text: str


_TYPED: ContextVar[tuple[Named, ...]] = ContextVar("typed", default=())


def taken(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return the words of a command without ``--config-dir DIR``, wherever it stands, and the directories.

    Raises:
        UserError: the option has no value.
    """
    rest: list[str] = []
    found: list[str] = []
    left = list(words)
    while left:
        word = left.pop(0)
        option, equals, value = word.partition("=")
        if option not in (OPTION, SHORT):
            rest.append(word)
        elif equals or left:
            found.append(value if equals else left.pop(0))
        else:
            raise UserError(f"{option} needs a value: a directory")
    return rest, found


@contextmanager
def using(typed: Iterable[str]) -> Iterator[None]:
    """Let the directories of ``--config-dir`` count while a command runs.

    Raises:
        UserError: one of them does not exist or cannot be read.
    """
    named = tuple(Named(OPTION, text) for text in typed)
    _checked(named)
    before = _TYPED.set(named)
    try:
        yield
    finally:
        _TYPED.reset(before)


def places() -> list[Path]:
    """Return the directories that count, absolute, each once: those of ``--config-dir``, then the variable's.

    Raises:
        UserError: one of them does not exist or cannot be read.
    """
    return _checked(_named())


def note() -> str:
    """Return the end of an error's line, which names the directories that count, since its cause may lie in one."""
    by: dict[str, list[str]] = {}
    for name, text in _named():
        by.setdefault(name, []).append(text)
    said = ", ".join(f"{name}={os.pathsep.join(texts)}" for name, texts in by.items())
    return f" (with {said})" if said else ""


def options_in(folder: Path, group: str) -> list[str]:
    """Return the choices that a directory has for a group; that of a subfolder is ``SUBFOLDER/NAME``."""
    place = folder / group
    return sorted(
        str(path.relative_to(place).with_suffix(""))
        for path in place.rglob("*.yaml")
        if _shows(path.relative_to(place)) and path.is_file()
    )


def folders_in(folder: Path) -> list[str]:
    """Return the names of the folders of a directory that hold files of configuration."""
    inner = (path for path in folder.iterdir() if _shows(Path(path.name)) and path.is_dir())
    return sorted(path.name for path in inner if any(each.is_file() for each in path.glob("*.yaml")))


def _shows(path: Path) -> bool:
    return not any(part.startswith((".", "_")) for part in path.parts)


def _named() -> tuple[Named, ...]:
    texts = os.environ.get(VARIABLE, "").split(os.pathsep)
    return (*_TYPED.get(), *(Named(VARIABLE, text) for text in texts if text))


def _checked(named: Iterable[Named]) -> list[Path]:
    found: dict[Path, Path] = {}
    for by, text in named:
        place = typed_path(text, by).absolute()
        if not place.exists():
            raise UserError(f"{by}={text}: no such directory")
        if not place.is_dir():
            raise UserError(f"{by}={text} is a file; name the directory that holds the folders, such as experiment/")
        try:
            os.listdir(place)
        except OSError as error:
            raise UserError(f"{by}={text}: {os.strerror(error.errno or 0)}") from None
        found.setdefault(place.resolve(), place)
    return list(found.values())
