"""The entry point of ``sparsetrain VERB [overrides]``: it finds the verb and turns errors into exit statuses."""

from __future__ import annotations

import errno
import os
import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from sparsetrain import __version__, plugins, process
from sparsetrain.cli import folders
from sparsetrain.cli.notices import notices_on_stderr
from sparsetrain.cli.parsers import parsed, parser_of
from sparsetrain.cli.verb import GROUPS, named
from sparsetrain.cli.verbs import VERBS, find, spoken
from sparsetrain.cli.verbs import typed as typed_verb
from sparsetrain.errors import UserError, single_line
from sparsetrain.files import NO_SPACE, file_errors
from sparsetrain.screen import width, wrapped

_HELP = ("--help", "-h")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status; `sparsetrain.process` lists the statuses."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        with process.handled(process.Stop()), notices_on_stderr():
            try:
                status = _run(given)
                sys.stdout.flush()  # here a failed write can still be told from an error of the run
                return status
            except UserError as error:
                return _refused(single_line(error))
            except KeyboardInterrupt as stop:
                print(f"sparsetrain: {process.INTERRUPTED}", file=sys.stderr)
                return 143 if isinstance(stop, process.Terminated) else 130
            except OSError as error:
                if error.errno == errno.EPIPE:
                    raise
                return _refused(_system_error(error))
    except BrokenPipeError:
        if process.nobody_reads():
            return process.NOBODY_READS
        raise
    except SystemExit as error:
        if isinstance(error.__context__, BrokenPipeError):  # rich turns a broken pipe into SystemExit
            return process.NOBODY_READS
        raise


def _refused(line: str) -> int:
    print(f"sparsetrain: {line}", file=sys.stderr)
    return 2


def _system_error(error: OSError) -> str:
    """Return an error of the operating system as one line that names the file.

    Raises:
        OSError: ``error`` itself, if it is not about a full disk, a file name or a permission.
    """
    place = Path(os.fsdecode(error.filename)) if isinstance(error.filename, str | bytes) else None
    try:
        with file_errors(place or Path("the disk or the output")):
            raise error
    except UserError as refused:
        if error.errno in NO_SPACE:
            process.silence(1)  # else Python tries again, at exit, to write the rest of its buffer
            return single_line(refused)
        return f"{place}: {error.strerror}" if place else single_line(refused)


def _run(given: list[str]) -> int:
    command = shlex.join(["sparsetrain", *given])
    given, typed = folders.taken(_load_plugins(given))
    with folders.using(typed):
        return _obeyed(given, command)


def _obeyed(given: list[str], command: str) -> int:
    """Run the verb of a command without the options that may stand anywhere; ``command`` is the whole of it."""
    if not given or given == ["help"] or (given[0] in _HELP and len(given) == 1):
        print(_help())
        return 0
    if given[0] in (*_HELP, "help"):  # sparsetrain help VERB
        given = [*given[1:], _HELP[0]]
    if given[0] in ("-V", "--version"):
        print(f"sparsetrain {__version__}")
        return 0
    name, rest = typed_verb(given)
    verb = find(name)
    if any(word in _HELP for word in rest):
        print(_verb_help(name, rest))
        return 0
    if verb.parser is not None:
        arguments = parsed(name, rest)
        return named(verb.run)(arguments) or 0
    return _execute(name, rest, command)


def _load_plugins(given: list[str]) -> list[str]:
    """Import the plugins that ``--plugin`` names; return the other arguments."""
    rest, named_plugins = [], []
    left = list(given)
    while left:
        option, equals, value = left.pop(0).partition("=")
        if option != "--plugin":
            rest.append(option + equals + value)
        elif equals or left:
            named_plugins.append(value if equals else left.pop(0))
        else:
            raise UserError("--plugin needs a value: a Python file or a module")
    plugins.name(named_plugins)
    plugins.load()
    return rest


def _execute(verb: str, arguments: list[str], command: str) -> int:
    from sparsetrain.cli.arguments import Arguments
    from sparsetrain.cli.help import show
    from sparsetrain.cli.multirun import run_multirun, run_together
    from sparsetrain.cli.resolve import load
    from sparsetrain.cli.start import start

    folders.places()  # an error in their names is reported as it is
    given = Arguments.of(verb, arguments)
    try:
        if given.asks:
            show(verb, given)
            return 0
        if find(verb).together:
            return run_together(verb, given)
        if given.multirun:
            return run_multirun(verb, given, command)
        return start(verb, load(verb, given.overrides), command)
    except UserError as error:
        raise UserError(f"{single_line(error)}{folders.note()}") from None


def _help() -> str:
    columns = width()
    lines = [
        "sparsetrain: train language models whose weights are sparse from the first step",
        "",
        "usage: sparsetrain VERB [key=value ...]   one run",
        "       sparsetrain VERB -m key=a,b,c ...  a multirun over all combinations",
        "       sparsetrain VERB --plugin FILE.py  use what a file of yours registers",
        "       sparsetrain VERB --config-dir DIR  use the presets of a directory",
        "       sparsetrain VERB --force           run even if memory seems too small",
        "       sparsetrain VERB --help [SETTING]  settings, choices and examples",
        "       sparsetrain --version",
    ]
    for group, heading in GROUPS.items():
        rows = {name: verb.about for name, verb in VERBS.items() if verb.group == group}
        if rows:
            lines += ["", f"{heading}:"]
            lines += [line for name, about in rows.items() for line in wrapped(about, columns, f"  {name:11}  ")]
    end = (
        "A run lives in a directory named after its configuration. The same command resumes it if it was stopped, and "
        "does nothing if it is done. Start with: sparsetrain pipeline experiment=demo"
    )
    return "\n".join([*lines, "", *wrapped(end, columns)])


def _verb_help(name: str, words: Sequence[str]) -> str:
    """Return the help of a verb, or of the sections and settings among the ``words`` behind it."""
    verb, columns = find(name), width()
    topics = [] if verb.parser is not None else _topics(name, words)
    if topics:
        from sparsetrain.cli.help import describe_topics

        return describe_topics(name, topics, columns)
    lines = _usage(name, columns)
    lines += ["", *wrapped(verb.about, columns), "", "examples:"]
    lines += [line for example in verb.examples for line in _continued(example, columns)]
    if verb.parser is not None:
        return "\n".join([*lines, "", parser_of(name).described()])
    from sparsetrain.cli.help import describe

    return "\n".join([*lines, "", describe(name, columns)])


def _continued(command: str, columns: int) -> list[str]:
    """Return a command as lines that a shell reads as one."""
    lines = ["  "]
    for word in re.findall(r"(?:'[^']*'|[^\s'])+", command):
        if len(lines[-1]) + len(word) + len(" \\") > columns and lines[-1].strip():
            lines[-1] += "\\"
            lines.append("      ")
        lines[-1] += f"{word} "
    return [line.rstrip() for line in lines]


def _topics(name: str, words: Sequence[str]) -> list[str]:
    from sparsetrain.cli.arguments import Arguments

    given = Arguments.of(name, [word for word in words if word not in _HELP])
    return [word for word in given.overrides if "=" not in word]


def _usage(name: str, columns: int) -> list[str]:
    """Return the lines that say how a verb is typed."""
    verb = find(name)
    if verb.usage is None and verb.parser is not None:
        usages = parser_of(name).usages()
    else:
        usages = [f"sparsetrain {spoken(name)} {verb.usage or '[key=value ...]'}"]
    heads = ["usage: ", *[" " * len("usage: ")] * (len(usages) - 1)]
    return [line for head, usage in zip(heads, usages, strict=True) for line in wrapped(usage, columns, head, " " * 11)]
