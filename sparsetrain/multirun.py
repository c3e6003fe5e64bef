"""The options of the command line that come from Hydra: multiruns, and questions about the configuration.

A multirun that is told to stop, by Ctrl-C or SIGTERM, begins no further point, and every run that is going finishes its
step and saves. With a launcher that has processes of its own the word goes through the directory ``.sweep-*``, which
all of them see: the terminal sends Ctrl-C to all processes, but a batch system sends SIGTERM to the first one alone.
"""

from __future__ import annotations

import os
import re
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from types import FrameType
from typing import Any
from uuid import uuid4

import hydra
import yaml
from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException
from rich.console import Console

from sparsetrain import process
from sparsetrain.config import (
    as_file,
    as_typed,
    check,
    complete,
    config_directory,
    convert,
    launches_processes,
    one_line,
    points,
    register,
    with_sweep,
)
from sparsetrain.errors import UserError, check_choice, nearest, single_line
from sparsetrain.files import file_errors, temporary_directory, typed_path
from sparsetrain.overrides import SEARCH_PATH, search_path_override
from sparsetrain.screen import say
from sparsetrain.stages.sweep import sweep_cost
from sparsetrain.verbs import start

_VALUED = {"--cfg": "-c", "--package": "-p", "--info": "-i", "--config-dir": "-cd"}
_PLAIN = {"--multirun": "-m", "--resolve": "", "--hydra-help": ""}
_SHORT = {"--force": "force=true"}  # options that are short for a setting
_CHOICES = {
    "--cfg": ("job", "hydra", "all"),
    "--info": ("all", "config", "defaults", "defaults-tree", "plugins", "searchpath"),
}
_STOP = "stop"  # the file in a multirun's directory that says so
_LOOK_EVERY = 0.5  # seconds between two looks at it


@dataclass
class Words:
    """What was typed behind a verb: options with their values, and overrides."""

    options: dict[str, str] = field(default_factory=dict)
    overrides: list[str] = field(default_factory=list)
    folder: str | None = None  # of ``--config-dir``

    @classmethod
    def of(cls, verb: str, words: list[str]) -> Words:
        """Return the words sorted.

        Raises:
            UserError: an unknown option, or one without the value that it needs.
        """
        found = cls()
        long = {short: name for name, short in (_VALUED | _PLAIN).items() if short}
        left = list(words)
        while left:
            word = left.pop(0)
            if not word.startswith("-") or word in _SHORT:
                found.overrides.append(_SHORT.get(word, word))
                continue
            said, equals, value = word.partition("=")
            name = long.get(said, said)
            if name not in _VALUED | _PLAIN:
                known = (*_VALUED, *_PLAIN, *_SHORT, *long, "--help")
                raise UserError(f"no option '{said}'{nearest(said, known)}; settings are written key=value")
            if name in _VALUED and not equals:
                if left and (name != "--info" or left[0] in _CHOICES[name]):
                    value = left.pop(0)
                elif name != "--info":
                    raise UserError(f"{said} needs a value: {', '.join(_CHOICES.get(name, ('a name',)))}")
                else:
                    value = "all"
            if name in _CHOICES:
                check_choice(said, value, _CHOICES[name])
            found.options[name] = value
        if (folder := found.options.pop("--config-dir", None)) is not None:
            place = typed_path(folder, "--config-dir").absolute()
            if not place.is_dir():
                raise UserError(f"--config-dir={folder}: no such directory")
            if any(word.startswith(f"{SEARCH_PATH}=") for word in found.overrides):
                raise UserError(f"--config-dir={folder}: give either this or {SEARCH_PATH}")
            found.overrides.append(search_path_override(place))
            found.folder = folder
        if "--resolve" in found.options and "--cfg" not in found.options:
            raise UserError(f"--resolve goes with --cfg: sparsetrain {verb} --cfg job --resolve")
        return found

    def said(self, error: UserError) -> str:
        """Return an error as one line, with the directory of configurations that may be its cause."""
        return single_line(error) + (f" (with --config-dir={self.folder})" if self.folder is not None else "")

    @property
    def multirun(self) -> bool:
        return "--multirun" in self.options

    @property
    def asks(self) -> bool:
        """Whether it is a question about the configuration, which runs nothing."""
        return any(name in self.options for name in ("--cfg", "--package", "--info", "--hydra-help"))


def show(verb: str, words: Words) -> None:
    """Print what is asked about the configuration."""
    overrides = complete(as_typed(verb, words.overrides, words.multirun))
    check(verb, overrides, sweep=words.multirun)
    if words.options.get("--cfg") != "job" or words.multirun:
        _hydra(verb, words, overrides, lambda _tree: None)
        return
    # Not Hydra's own answer: in it, a text with `${` would stand as OmegaConf needs it.
    shown: Any = as_file(verb, overrides, resolve="--resolve" in words.options)
    package = words.options.get("--package", "_global_")
    for part in package.split(".") if package != "_global_" else ():
        if not isinstance(shown, dict) or part not in shown:
            raise UserError(f"--package={package}: {verb} has no such section")
        shown = shown[part]
    if not isinstance(shown, dict | list):
        print(shown)
        return
    if package != "_global_":
        print(f"# @package {package}")
    print(yaml.dump(shown, Dumper=_Dumper, default_flow_style=False, allow_unicode=True, sort_keys=False), end="")


class _Dumper(yaml.SafeDumper):
    """Writes text in quotes also where only OmegaConf, which follows YAML 1.2, would read it as a number."""


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    number = re.fullmatch(r"[-+]?[\d_.]+(?:[eE][-+]?\d+)?", text)
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="'" if number else None)


_Dumper.add_representer(str, _text)


def _hydra(verb: str, words: Words, overrides: list[str], job: Any) -> None:
    register()
    # Hydra would otherwise replace the error of a job by a page of its own.
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")
    launch = hydra.main(version_base="1.3", config_path=str(config_directory().absolute()), config_name=verb)
    options = chain.from_iterable([name, value] if value else [name] for name, value in words.options.items())
    before, sys.argv = sys.argv, [f"sparsetrain {verb}", *options, *overrides]
    try:
        launch(job)()
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(one_line(error)) from None
    finally:
        sys.argv = before


def run_multirun(verb: str, words: Words, command: str) -> int:
    """Run every point of a multirun; return the highest status among them. ``command`` is what would start it again."""
    overrides = complete(as_typed(verb, words.overrides, sweep=True))
    check(verb, overrides, sweep=True)
    overrides = with_sweep(verb, overrides)
    check(verb, overrides, sweep=True)
    if verb == "pretrain":
        console = Console()
        say(console, sweep_cost(points("pretrain", overrides), console).describe())
    # Here and not in the system's directory: the points may run on other machines that share this one.
    with file_errors(Path.cwd()), temporary_directory(Path.cwd(), ".sweep-") as notes:
        job = Job(verb, words, overrides, command, notes)
        if launches_processes(verb, overrides):
            with _waiting(notes) as stop:
                try:
                    _hydra(verb, words, overrides, job)
                except Exception:
                    if stop.number is None:  # else a process that it stopped while it was starting
                        raise
            if stop.number is not None:
                print(f"sparsetrain: {process.INTERRUPTED}", file=sys.stderr)
                return 128 + stop.number
        else:
            _hydra(verb, words, overrides, job)
        found = [path.name.partition("-")[0] for path in notes.iterdir()]
        return max((int(status) for status in found if status.isdigit()), default=0)


class _Wait(process.Stop):
    """The first signal tells the runs in other processes to stop, and waits for them; a second ends them."""

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
    """Have the first signal stop the points in other processes gently.

    Processes that are started meanwhile inherit that the signals are blocked, and let them through once they have a
    handler: one that came while Python imports would end them with a traceback, and the sweep with them. In this
    process a thread, begun before, lets them through.
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
    """The handler of a process that a launcher has started: it unwinds a point, once, and leaves the process alone."""

    def __init__(self) -> None:
        self.number: int | None = None
        self.busy = self.raised = False

    def __call__(self, number: int, frame: FrameType | None) -> None:
        self.number = self.number or number
        if self.busy and not self.raised and not process.importing(frame):
            self.raised = True
            raise process.Terminated if number == signal.SIGTERM else KeyboardInterrupt


_gentle = _Gentle()


class Job:
    """One point of a multirun. A class, so that a launcher can send it to another process.

    What fails is said at once and noted in the directory ``notes``, and the sweep goes on with its other points; an
    exception would make Hydra say it again in its own words.
    """

    def __init__(self, verb: str, words: Words, overrides: list[str], command: str, notes: Path) -> None:
        self.verb, self.words, self.overrides, self.command, self.notes = verb, words, overrides, command, notes
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
            return start(self.verb, convert(self.verb, tree, self.overrides), self.command)
        except UserError as error:
            print(f"sparsetrain: {self.words.said(error)}", file=sys.stderr, flush=True)
            return 2

    def _run_apart(self, tree: Any) -> int:
        """Run in a process of the launcher's, until a signal comes here or the launcher has had one."""
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
        return status


def _watch(stop: Path, over: threading.Event) -> None:
    """Send this process SIGTERM while the file ``stop`` is there, until the point is over.

    Again and again: one that comes while Python imports is let pass.
    """
    while not over.wait(_LOOK_EVERY):
        if stop.exists():
            os.kill(os.getpid(), signal.SIGTERM)
