"""This process as a command: its standard streams, its signals, and the statuses that it ends with.

Imported first of all, before the libraries that take seconds. Where the process is the command ``sparsetrain``, or
``python -m sparsetrain``, a signal until then ends it as the system does by default: an exception that is raised while
a library defines its classes would come out as another one, with a traceback. In any other process nothing changes.

Statuses: 0; 1 for a diverged run; 2 for input that cannot be used; 130 after SIGINT; 141 where nobody reads the output
any more; 143 after SIGTERM.
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
INTERRUPTED = "interrupted; the same command goes on from the last checkpoint"
NOBODY_READS = 128 + signal.SIGPIPE


class Terminated(KeyboardInterrupt):
    """SIGTERM outside a training loop, which has handlers of its own."""


def is_command(arguments: Sequence[str], original: Sequence[str]) -> bool:
    """Return whether ``sys.argv`` and ``sys.orig_argv`` are those of the command line."""
    if not arguments:
        return False
    if arguments[0] == "-m":  # python is still looking for the module
        return "-msparsetrain" in original or ("-m", "sparsetrain") in pairwise(original)
    return os.path.basename(arguments[0]) == "sparsetrain"


def _begin() -> None:
    """Leave signals to the system, and give the process the standard streams that it was started without."""
    by_default()
    # Otherwise the first file that is opened would take the number of the output, and what is printed would go there.
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(descriptor, True)
    os.close(descriptor)
    for name, number in (("stdout", 1), ("stderr", 2)):
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(number, "w", encoding="utf-8", closefd=False))


def by_default() -> None:
    """Have SIGINT and SIGTERM end the process at once, unless it was started to ignore them, as behind ``&``."""
    for number in SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, signal.SIG_DFL)


def importing(frame: FrameType | None) -> bool:
    """Return whether a module is being imported in ``frame``, or in what was called from within `cli.main.main`."""
    while frame is not None:
        code = frame.f_code
        if code.co_filename.startswith("<frozen importlib"):
            return True
        if code.co_name == "main" and frame.f_globals.get("__name__") == "sparsetrain.cli.main":
            return False
        frame = frame.f_back
    return False


def end(number: int) -> None:
    """End the process at once, as after this signal. What it was writing is not yet in place, and is cleared later."""
    with suppress(OSError):
        os.write(2, f"sparsetrain: {INTERRUPTED}\n".encode())
    os._exit(128 + number)


class Stop:
    """A handler: the first signal unwinds the program and removes temporary files; a second ends it at once."""

    def __init__(self) -> None:
        self.number: int | None = None

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if self.number is not None or importing(frame):
            end(number)
        self.number = number
        raise Terminated if number == signal.SIGTERM else KeyboardInterrupt


@contextmanager
def handled(handler: Stop) -> Iterator[None]:
    """Have ``handler`` receive SIGINT and SIGTERM; outside the main thread nothing changes."""
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
    """Return whether the reader of the output has gone away; if so, what is still printed goes nowhere."""
    lost = False
    for stream in (sys.stdout, sys.stderr):
        try:
            number = stream.fileno()
        except (AttributeError, OSError, ValueError):
            continue  # a stream of a test or a notebook
        poll = select.poll()
        poll.register(number, select.POLLOUT)
        if any(event & select.POLLERR for _, event in poll.poll(0)):
            lost = True
            silence(number)
    return lost


def silence(number: int) -> None:
    """Point a descriptor to nowhere, so that the last flush of Python succeeds."""
    with suppress(OSError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, number)
        os.close(nowhere)


if is_command(getattr(sys, "argv", []), sys.orig_argv):
    _begin()
