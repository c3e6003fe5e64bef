"""The one error that a user's input can cause, and the words that make its message helpful."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """Input that cannot be used: a configuration value, a file, a shape, a checkpoint.

    The message is a single line that names the field, the value and what is allowed. The command line prints
    it without a traceback and exits with status 2.
    """


class NotFiniteError(UserError):
    """Weights or gradients that are infinite or NaN where they must be ranked, by their magnitudes for example.

    A training loop takes it for divergence: what was put in was usable, and the training made it so.
    """


def single_line(error: BaseException) -> str:
    """Return what an error says as one line."""
    return " ".join(str(error).split("\n"))


def nearest(word: str, options: Iterable[str]) -> str:
    """Return ``" (did you mean 'x'?)"`` for the option closest to ``word``, or an empty string if none is close."""
    matches = difflib.get_close_matches(word, list(options), n=1, cutoff=0.5)
    return f" (did you mean '{matches[0]}'?)" if matches else ""


def check_choice(field: str, value: str, options: Iterable[str]) -> None:
    """Raise `UserError` unless ``value`` is one of ``options``."""
    allowed = list(options)
    if value not in allowed:
        hint = nearest(str(value), allowed)
        raise UserError(f"{field}={value!r} is not one of {', '.join(allowed)}{hint}")
