"""Warnings on the command line: one line each on stderr.

The library warns in two ways. `warnings.warn` says what a caller should change in the code: an optimizer that was built
too early, a mask without a seed. A logger below ``sparsetrain`` says what a running program met and got past: a damaged
checkpoint, scarce memory. In Python the first names the caller's line and can be filtered by category, and the second
goes where `logging` is configured to write, or to stderr. Here both are shown alike.
"""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from sparsetrain.screen import printable

_LIBRARY = logging.getLogger("sparsetrain")


class _Stderr(logging.Handler):
    """Prints ``warning: ...`` to what stderr is at that moment, which a progress bar may have replaced."""

    def emit(self, record: logging.LogRecord) -> None:
        line = " ".join(record.getMessage().split("\n"))
        print(f"{record.levelname.lower()}: {printable(line)}", file=sys.stderr, flush=True)


@contextmanager
def notices_on_stderr() -> Iterator[None]:
    """Show warnings of the library's loggers, and of Python's `warnings`, on stderr; inside another such, do nothing.

    They do not go on to the root logger, where Hydra's own handler would show them again.
    """
    if any(isinstance(handler, _Stderr) for handler in _LIBRARY.handlers):
        yield
        return
    handler, propagate = _Stderr(logging.WARNING), _LIBRARY.propagate
    _LIBRARY.addHandler(handler)
    _LIBRARY.propagate = False
    try:
        with warnings.catch_warnings():
            # The line that describes the model counts its empty rows; one warning per layer would bury it.
            warnings.filterwarnings("ignore", message=".* have no weight: they are constant")
            warnings.showwarning = _log  # type: ignore[assignment]
            yield
    finally:
        _LIBRARY.removeHandler(handler)
        _LIBRARY.propagate = propagate


def _log(message: Warning | str, *_: Any) -> None:
    _LIBRARY.warning("%s", message)
