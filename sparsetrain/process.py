"""Process-wide setup of the command line: standard streams, signals and exit statuses.

This module is imported first, before libraries that take seconds to import. If the process is the command
``sparsetrain`` or ``python -m sparsetrain``, signals keep their default effect until the command line installs its
handlers: an exception raised while a library defines its classes would turn into another one, with a traceback. In any
other process the import changes nothing.

Exit statuses: 0 success; 1 a diverged run; 2 unusable input; 130 after SIGINT; 141 if the reader of the output is gone;
143 after SIGTERM.
"""

from __future__ import annotations

import os
import select
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import pairwise
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)
INTERRUPTED = "interrupted; the same command resumes from the last checkpoint"
NOBODY_READS = 128 + signal.SIGPIPE


class Terminated(KeyboardInterrupt):
    """Raised for SIGTERM outside the training loop, which has its own handlers."""


def is_command(arguments: Sequence[str], original: Sequence[str]) -> bool:
    """Return whether ``sys.argv`` and ``sys.orig_argv`` are those of the command line."""
    if not arguments:
        return False
    if arguments[0] == "-m":  # Python has not resolved the module yet
        return "-msparsetrain" in original or ("-m", "sparsetrain") in pairwise(original)
    return os.path.basename(arguments[0]) == "sparsetrain"


def _begin() -> None:
    """Set default signal handlers, and open standard streams that the process was started without."""
    by_default()
    # Otherwise the first file opened would get the descriptor of a missing stream, and prints would go into it.
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(descriptor, True)
    os.close(descriptor)
    for name, number in (("stdout", 1), ("stderr", 2)):
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(number, "w", encoding="utf-8", closefd=False))


def by_default() -> None:
    """Make SIGINT and SIGTERM end the process at once, unless it was started to ignore them, as with ``&``."""
    for number in SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, signal.SIG_DFL)


def importing(frame: FrameType | None) -> bool:
    """Return whether a module is being imported in ``frame`` or its callers, up to `cli.main.main`."""
    while frame is not None:
        code = frame.f_code
        if code.co_filename.startswith("<frozen importlib"):
            return True
        if code.co_name == "main" and frame.f_globals.get("__name__") == "sparsetrain.cli.main":
            return False
        frame = frame.f_back
    return False


def end(number: int) -> None:
    """End the process at once with the status of a signal; leftover temporary files are removed by a later process."""
    with suppress(OSError):
        os.write(2, f"sparsetrain: {INTERRUPTED}\n".encode())
    os._exit(128 + number)


class Stop:
    """A signal handler: the first signal unwinds the program and removes temporary files; a second one ends it."""

    def __init__(self) -> None:
        self.number: int | None = None

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if self.number is not None or importing(frame):
            end(number)
        self.number = number
        raise Terminated if number == signal.SIGTERM else KeyboardInterrupt


@contextmanager
def handled(handler: Stop) -> Iterator[None]:
    """Install ``handler`` for SIGINT and SIGTERM inside the block; it has no effect outside the main thread."""
    before = {}
    try:
        for number in SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:
                before[number] = signal.signal(number, handler)
    except ValueError:  # only the main thread may set handlers
        before.clear()
    try:
        yield
    finally:
        for number, former in before.items():
            signal.signal(number, former)


def nobody_reads() -> bool:
    """Return whether the reader of the output is gone; if so, discard further output."""
    lost = False
    for stream in (sys.stdout, sys.stderr):
        try:
            number = stream.fileno()
        except (AttributeError, OSError, ValueError):
            continue  # a stream without a descriptor, in a test or a notebook
        poll = select.poll()
        poll.register(number, select.POLLOUT)
        if any(event & select.POLLERR for _, event in poll.poll(0)):
            lost = True
            silence(number)
    return lost


def silence(number: int) -> None:
    """Redirect a descriptor to the null device, so that Python's final flush succeeds."""
    with suppress(OSError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, number)
        os.close(nowhere)


if is_command(getattr(sys, "argv", []), sys.orig_argv):
    _begin()
