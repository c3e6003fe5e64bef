"""Errors caused by a user's input, and helpers for their messages."""

from __future__ import annotations

import difflib
import os
import sysconfig
import traceback
from collections.abc import Iterable
from typing import Any, SupportsFloat


class UserError(ValueError):
    """Input that cannot be used: a configuration value, a file, a shape, a checkpoint.

    The message is one line that names the field, the value and what is allowed. The command line prints it without a
    traceback and exits with status 2.
    """


class NotFiniteError(UserError):
    """Weights or gradients are infinite or NaN where a rule must rank them.

    The training loop treats it as divergence, because the input was usable before training.
    """


def within(place: str, section: str, error: UserError) -> UserError:
    """Return an error that begins with the name of a section as one about the section at ``place``.

    Any other error gets ``place`` in front.
    """
    said = str(error)
    rest = said.removeprefix(section)
    return UserError(f"{place}{rest}" if rest != said and not rest[:1].isalnum() else f"{place}: {said}")


def single_line(error: BaseException) -> str:
    """Return the message of an error as one line."""
    return " ".join(str(error).split("\n"))


def described(error: BaseException, skipped: tuple[str, ...] = ()) -> str:
    """Return an error of a user's code as one line, such as ``"KeyError: 'nope' (file.py, line 3)"``.

    The place is the last line outside of installed libraries; if libraries alone took part, their last line.

    Args:
        error: the error.
        skipped: beginnings of names of files that cannot be the place.
    """
    if isinstance(error, UserError):
        return single_line(error)
    if isinstance(error, SyntaxError) and error.filename:
        return f"{type(error).__name__}: {error.msg} ({os.path.basename(error.filename)}, line {error.lineno})"
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if not frame.filename.startswith(skipped)]
    libraries = tuple({sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")})
    own = [frame for frame in frames if not frame.filename.startswith(libraries)] or frames
    said = " ".join(str(error).split())
    line = f"{type(error).__name__}: {said}" if said else type(error).__name__
    return f"{line} ({os.path.basename(own[-1].filename)}, line {own[-1].lineno})" if own else line


def nearest(word: str, options: Iterable[str]) -> str:
    """Return ``" (did you mean 'x'?)"`` for the option closest to ``word``, or an empty string if none is close."""
    matches = difflib.get_close_matches(word, list(options), n=1, cutoff=0.5)
    return f" (did you mean '{matches[0]}'?)" if matches else ""


def as_number(field: str, value: Any) -> float:
    """Return a number, or what holds one, such as a tensor of one element, as a float.

    Raises:
        UserError: ``value`` is none.
    """
    try:
        if isinstance(value, SupportsFloat):  # a text is none
            return float(value)
    except (TypeError, ValueError, RuntimeError, OverflowError):  # of an array of several, or of a huge integer
        pass
    raise UserError(f"{field}={' '.join(repr(value).split()):.60} must be a number")


def check_choice(field: str, value: str, options: Iterable[str]) -> None:
    """Raise `UserError` unless ``value`` is one of ``options``."""
    allowed = list(options)
    if value not in allowed:
        hint = nearest(str(value), allowed)
        raise UserError(f"{field}={value!r} is not one of {', '.join(allowed)}{hint}")
