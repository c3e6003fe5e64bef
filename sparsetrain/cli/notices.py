"""Warnings on the command line: one line each on stderr.

The library warns in two ways. `warnings.warn` asks a caller to change the code, for example if an optimizer was built
too early or a mask has no seed. In Python, such a warning shows the caller's line and can be filtered by category. A
logger below ``sparsetrain`` reports a problem that the program survived, for example a damaged checkpoint or scarce
memory. It writes to the handlers of `logging`, or to stderr. The command line shows both in the same way.
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
    """Prints ``warning: ...`` to the current stderr, which a progress bar may have replaced."""

    def emit(self, record: logging.LogRecord) -> None:
        line = " ".join(record.getMessage().split("\n"))
        print(f"{record.levelname.lower()}: {printable(line)}", file=sys.stderr, flush=True)


@contextmanager
def notices_on_stderr() -> Iterator[None]:
    """Show warnings of the library's loggers and of `warnings` on stderr; a nested call has no effect.

    The warnings do not reach the root logger, where Hydra's own handler would show them again.
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
