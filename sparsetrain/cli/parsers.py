"""Verbs with a parser of their own: an ``argparse`` parser whose errors are one line, like all others."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any, NoReturn

from sparsetrain.cli.verbs import find, spoken
from sparsetrain.errors import UserError, nearest
from sparsetrain.screen import width


class _Formatter(argparse.HelpFormatter):
    """Wraps at the width of all help texts."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **{"width": width(), **options})


class Parser(argparse.ArgumentParser):
    """A parser that raises `UserError` for errors and accepts no abbreviated options."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        usual = {"add_help": False, "allow_abbrev": False, "formatter_class": _Formatter}
        super().__init__(*arguments, **{**usual, **options})

    def error(self, message: str) -> NoReturn:
        program = self.prog.removeprefix("sparsetrain ")
        raise UserError(f"{program}: {message}; see {self.prog} --help")

    @property
    def subparsers(self) -> dict[str, Parser]:
        """The parsers of the subcommands."""
        found = [action.choices for action in self._actions if isinstance(action, argparse._SubParsersAction)]
        return dict(found[0]) if found else {}

    def usages(self) -> list[str]:
        """Return how the verb is typed, in one line for each subcommand."""
        parsers = list(self.subparsers.values()) or [self]
        return [" ".join(parser.format_usage().split()[1:]) for parser in parsers]

    def described(self) -> str:
        """Return the help of the arguments, without the usage, which `usages` gives."""
        parsers = list(self.subparsers.values()) or [self]
        return "\n\n".join(parser.format_help().partition("\n\n")[2].rstrip() for parser in parsers)

    @property
    def takes_the_rest(self) -> bool:
        """Whether the arguments after the first are passed on to another verb."""
        return any(action.nargs == argparse.REMAINDER for action in self._actions)

    def check(self, arguments: Sequence[str]) -> None:
        """Raise `UserError` for a missing or unknown subcommand, or an unknown option."""
        program = self.prog.removeprefix("sparsetrain ")
        if self.subparsers:
            if not arguments or arguments[0] not in self.subparsers:
                said = f", not {arguments[0]!r}" if arguments else ""
                raise UserError(f"{program} needs a subcommand{said}: {'; '.join(self.usages())}")
            self.subparsers[arguments[0]].check(arguments[1:])
            return
        known = [option for action in self._actions for option in action.option_strings]
        for word in arguments:
            if word.startswith("-") and word.partition("=")[0] not in known:
                there = f"; there are {', '.join(known)}" if known else ""
                raise UserError(f"{program} has no option '{word}'{nearest(word, known)}{there}")
            if self.takes_the_rest and not word.startswith("-"):
                return


def parser_of(verb: str) -> Parser:
    """Return the parser of a verb."""
    parser = Parser(f"sparsetrain {spoken(verb)}")
    find(verb).add_arguments(parser)
    return parser


def parsed(verb: str, arguments: Sequence[str]) -> argparse.Namespace:
    """Return the parsed arguments of a verb.

    Raises:
        UserError: the parser refuses them.
    """
    parser = parser_of(verb)
    parser.check(arguments)
    return parser.parse_args(arguments)
