"""Verbs with a parser of their own: ``argparse``, whose errors are said in one line as all others are."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any, NoReturn

from sparsetrain.cli.verbs import find
from sparsetrain.errors import UserError, nearest


class Parser(argparse.ArgumentParser):
    """A parser whose errors are `UserError`, and whose options are not abbreviated."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **{"add_help": False, "allow_abbrev": False, **options})

    def error(self, message: str) -> NoReturn:
        program = self.prog.removeprefix("sparsetrain ")
        raise UserError(f"{program}: {message}; {self.prog} --help shows how")

    @property
    def subparsers(self) -> dict[str, Parser]:
        """The parsers of the subcommands."""
        found = [action.choices for action in self._actions if isinstance(action, argparse._SubParsersAction)]
        return dict(found[0]) if found else {}

    @property
    def takes_the_rest(self) -> bool:
        """Whether the words behind the first ones are for somebody else."""
        return any(action.nargs == argparse.REMAINDER for action in self._actions)

    def check(self, words: Sequence[str]) -> None:
        """Raise `UserError` for a missing subcommand, or an option that does not exist."""
        program = self.prog.removeprefix("sparsetrain ")
        if self.subparsers:
            if not words or words[0] not in self.subparsers:
                usages = "; ".join(" ".join(sub.format_usage().split()[1:]) for sub in self.subparsers.values())
                said = f", not {words[0]!r}" if words else ""
                raise UserError(f"{program} needs a subcommand{said}: {usages}")
            self.subparsers[words[0]].check(words[1:])
            return
        known = [option for action in self._actions for option in action.option_strings]
        for word in words:
            if word.startswith("-") and word.partition("=")[0] not in known:
                there = f"; there are {', '.join(known)}" if known else ""
                raise UserError(f"{program} has no option '{word}'{nearest(word, known)}{there}")
            if self.takes_the_rest and not word.startswith("-"):
                return


def parser_of(verb: str) -> Parser:
    """Return the parser of a verb."""
    parser = Parser(f"sparsetrain {verb}")
    find(verb).add_words(parser)
    return parser


def parsed(verb: str, words: Sequence[str]) -> argparse.Namespace:
    """Return the words of a verb as its parser reads them.

    Raises:
        UserError: words that it cannot read.
    """
    parser = parser_of(verb)
    parser.check(words)
    return parser.parse_args(words)
