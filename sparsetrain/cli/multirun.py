"""Multiruns: run every point of a sweep, in this process or through one of Hydra's launchers, and stop them cleanly.

When a multirun is told to stop, by Ctrl-C or SIGTERM, it starts no further point, and each running point finishes its
step and saves. A launcher with its own processes needs one more thing: a terminal sends Ctrl-C to all processes, but a
batch system sends SIGTERM only to the first one. So the first process creates a file in the directory ``.sweep-*``,
and the others look for it.
"""

from __future__ import annotations

import itertools
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any
from uuid import uuid4

from hydra.core.override_parser.types import Override
from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from sparsetrain import process
from sparsetrain.cli import folders
from sparsetrain.cli.arguments import Arguments
from sparsetrain.cli.checks import as_typed, check
from sparsetrain.cli.compose import compose, own_groups, run_hydra
from sparsetrain.cli.notices import notices_on_stderr
from sparsetrain.cli.overrides import SEARCH_PATH, choices, is_hydras, parse
from sparsetrain.cli.resolve import convert
from sparsetrain.cli.start import start
from sparsetrain.cli.verb import named
from sparsetrain.cli.verbs import find
from sparsetrain.errors import UserError, single_line
from sparsetrain.files import file_errors, temporary_directory
from sparsetrain.screen import say

_STOP = "stop"  # the file in a multirun's directory that tells the other processes to stop
_LOOK_EVERY = 0.5  # seconds between two looks for that file


def with_sweep(verb: str, overrides: Iterable[str]) -> list[str]:
    """Return the overrides, and as further overrides the entries of the experiment's ``hydra.sweeper.params``.

    An override on the command line replaces the experiment's for the same key. Hydra itself would run every
    combination of the two.
    """
    given = list(overrides)
    parsed = parse(given)
    params = _params(_hydras(verb, parsed))
    keys = {override.key_or_group for override in parsed}
    _check_together(verb, parsed)
    added = as_typed(verb, [f"{key}={value}" for key, value in params.items() if key not in keys], sweep=True)
    return [*added, *given, "hydra.sweeper.params=null"] if params else given


def _check_together(verb: str, parsed: Sequence[Override]) -> None:
    """Raise `UserError` if one of several swept experiments has a sweep or launcher of its own, which Hydra ignores."""
    typed = {override.key_or_group for override in parsed}
    for override in parsed:
        if not override.is_sweep_override() or override.key_or_group not in ("experiment", *own_groups(verb)):
            continue
        plain = _hydras(verb, parsed)
        for choice in choices(override):
            alone = parse([f"{override.get_key_element()}={choice}"])
            own = _hydras(verb, [*(each for each in parsed if each is not override), *alone])
            lost = ["hydra.launcher"] if own.launcher != plain.launcher else []
            lost += [f"hydra.sweeper.params.{key}" for key in _params(own).keys() - _params(plain).keys() - typed]
            if lost:
                raise UserError(f"{override.input_line}: {choice} sets {min(lost)}, which counts only if it runs alone")


def _params(hydras: DictConfig) -> dict[str, Any]:
    """Return the sweep of an experiment: values of settings as they would be typed."""
    found = OmegaConf.to_container(hydras.sweeper).get("params")  # type: ignore[union-attr]
    return {} if found is None else {str(key): value for key, value in found.items()}


def launches_processes(verb: str, overrides: Iterable[str]) -> bool:
    """Return whether the launcher of a multirun runs points in its own processes; joblib does not for one job."""
    launcher = _hydras(verb, parse(overrides)).launcher
    return not str(launcher.get("_target_")).endswith(".BasicLauncher") and launcher.get("n_jobs") != 1


def _hydras(verb: str, parsed: Iterable[Override]) -> DictConfig:
    """Return Hydra's own settings of a multirun."""
    single = [str(override.input_line) for override in parsed if not override.is_sweep_override()]
    tree: DictConfig = compose(verb, [*single, "hydra.mode=MULTIRUN"], hydras=True).hydra
    return tree


def points(
    verb: str, overrides: Iterable[str], refused: Callable[[UserError], None] | None = None
) -> Iterator[Any | None]:
    """Yield the configuration of each point of a multirun; for a point that is refused, yield None.

    Args:
        refused: called with the error of each refused point.
    """
    parsed = [o for o in parse(overrides) if not is_hydras(o) or o.key_or_group == SEARCH_PATH]
    values = [
        [f"{o.get_key_element()}={value}" for value in o.sweep_string_iterator()]
        if o.is_sweep_override()
        else [str(o.input_line)]
        for o in parsed
    ]
    for point in itertools.product(*values):
        try:
            yield convert(verb, compose(verb, list(point)), point)  # `check` has seen the whole sweep
        except UserError as error:
            if refused is not None:
                refused(error)
            yield None


def run_multirun(verb: str, arguments: Arguments, command: str) -> int:
    """Run every point of a multirun and return their highest exit status. ``command`` would start it again."""
    overrides = as_typed(verb, arguments.overrides, sweep=True)
    check(verb, overrides, sweep=True)
    overrides = with_sweep(verb, overrides)
    check(verb, overrides, sweep=True)
    cost = find(verb).cost
    if cost is not None:
        console = Console()
        say(console, named(cost)(points(verb, overrides), console).describe())
    # In the working directory, not in /tmp: the points may run on other machines, which share only the former.
    with file_errors(Path.cwd()), temporary_directory(Path.cwd(), ".sweep-") as notes:
        job = Job(verb, overrides, command, notes)
        if launches_processes(verb, overrides):
            with _waiting(notes) as stop:
                try:
                    run_hydra(verb, arguments.options, overrides, job)
                except Exception:
                    if stop.number is None:  # else the cause is a process that was stopped while it was starting
                        raise
            if stop.number is not None:
                print(f"sparsetrain: {process.INTERRUPTED}", file=sys.stderr)
                return 128 + stop.number
        else:
            run_hydra(verb, arguments.options, overrides, job)
        found = [path.name.partition("-")[0] for path in notes.iterdir()]
        return max((int(status) for status in found if status.isdigit()), default=0)


def run_together(verb: str, arguments: Arguments) -> int:
    """Run a verb once, with the configurations of all points.

    Raises:
        UserError: a point is refused; nothing has been printed or written then.
    """
    overrides = as_typed(verb, arguments.overrides, sweep=True)
    check(verb, overrides, sweep=True)
    if arguments.multirun:
        overrides = with_sweep(verb, overrides)
        check(verb, overrides, sweep=True)
    refused: list[UserError] = []
    configs = [config for config in points(verb, overrides, refused.append) if config is not None]
    if refused:
        raise refused[0]
    named(find(verb).run)(configs)
    return 0


class _Wait(process.Stop):
    """A signal handler: the first signal stops the points in other processes gently, a second one ends them."""

    def __init__(self, notes: Path) -> None:
        super().__init__()
        self.notes = notes
        self.unwinding = False

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if self.unwinding:
            process.end(number)
        if self.number is None:
            self.number = number
            (self.notes / _STOP).touch()
            return
        self.unwinding = True
        raise KeyboardInterrupt


@contextmanager
def _waiting(notes: Path) -> Iterator[_Wait]:
    """Make the first signal stop the points in other processes gently.

    The main thread blocks the signals while the launcher starts processes. These inherit the block and lift it when
    they have a handler: a signal during Python's imports would end them, and the sweep, with a traceback. A thread of
    this process that was started earlier still accepts the signals.
    """
    stop = _Wait(notes)
    done = threading.Event()
    listener = threading.Thread(target=done.wait, daemon=True, name="sparsetrain-signals")
    with process.handled(stop):
        listener.start()
        before = signal.pthread_sigmask(signal.SIG_BLOCK, process.SIGNALS)
        try:
            yield stop
        finally:
            done.set()
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


class _Gentle:
    """The signal handler in a launcher's process: the first signal unwinds the point but does not end the process."""

    def __init__(self) -> None:
        self.number: int | None = None
        self.busy = self.raised = False

    def __call__(self, number: int, frame: FrameType | None) -> None:
        self.number = self.number or number
        if self.busy and not self.raised and not process.importing(frame):
            self.raised = True
            raise process.Terminated if self.number == signal.SIGTERM else KeyboardInterrupt


_gentle = _Gentle()


class Job:
    """One point of a multirun; a class, so that a launcher can pickle it into another process.

    A failure is printed at once and noted in the directory ``notes``, and the sweep continues with its other points.
    An exception would make Hydra print it again in another form.
    """

    def __init__(self, verb: str, overrides: list[str], command: str, notes: Path) -> None:
        self.verb, self.overrides, self.command, self.notes = verb, overrides, command, notes
        self.note = folders.note()  # a launcher's process knows no `--config-dir`
        self.launcher = (os.uname().nodename, os.getpid())

    def __call__(self, tree: Any) -> None:
        if self.launcher == (os.uname().nodename, os.getpid()):
            status = self._run(tree)
            if status > 2:
                raise process.Terminated if status == 143 else KeyboardInterrupt
        else:
            status = self._run_apart(tree)
        if status:
            (self.notes / f"{status}-{uuid4().hex}").touch()

    def _run(self, tree: Any) -> int:
        try:
            with notices_on_stderr():  # `main` does not run in a launcher's process
                return start(self.verb, convert(self.verb, tree, self.overrides), self.command)
        except UserError as error:
            print(f"sparsetrain: {single_line(error)}{self.note}", file=sys.stderr, flush=True)
            return 2

    def _run_apart(self, tree: Any) -> int:
        """Run in a process of the launcher until a signal arrives here or the launcher has received one."""
        stop = self.notes / _STOP
        over = threading.Event()
        watch = threading.Thread(target=_watch, args=(stop, over), daemon=True, name="sparsetrain-stop")
        _gentle.busy = True
        try:
            for number in process.SIGNALS:
                signal.signal(number, _gentle)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, process.SIGNALS)
            if stop.exists() or _gentle.number is not None:
                return 0
            watch.start()
            status = self._run(tree)
        except KeyboardInterrupt as error:
            status = 143 if isinstance(error, process.Terminated) else 130
        finally:
            _gentle.busy = False
            over.set()
        if status > 2:
            stop.touch()
            # The first signal says how the point ended: an import may have ignored it, and `_watch` sends another.
            status = 128 + (_gentle.number or status - 128)
        return status


def _watch(stop: Path, over: threading.Event) -> None:
    """Send this process SIGTERM repeatedly while the file ``stop`` exists, until ``over`` is set.

    One signal is not enough: the handler ignores a signal that arrives while Python imports a module.
    """
    while not over.wait(_LOOK_EVERY):
        if stop.exists():
            os.kill(os.getpid(), signal.SIGTERM)
