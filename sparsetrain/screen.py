"""Output to a terminal without interpretation: brackets are not markup, and escape sequences have no effect."""

from __future__ import annotations

import shutil
import sys
import textwrap
import unicodedata
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text


def printable(line: object) -> str:
    """Return ``line`` with control characters replaced by a visible mark, so that a terminal cannot interpret them."""
    return "".join(c if c in "\n\t" or unicodedata.category(c) not in {"Cc", "Cs"} else "\ufffd" for c in str(line))


NARROW, WIDE = 80, 120  # columns of a text that is no terminal's, and at most


def width() -> int:
    """Return the columns of a help text: those of the terminal, at most `WIDE`; `NARROW` where it is none."""
    return max(40, min(WIDE, shutil.get_terminal_size().columns)) if sys.stdout.isatty() else NARROW


def wrapped(text: str, columns: int, first: str = "", rest: str | None = None) -> list[str]:
    """Return ``text`` as lines of at most ``columns``, the first behind ``first`` and the others behind ``rest``.

    Words stay whole, so a path or a name that is longer has a line of its own.
    """
    return textwrap.wrap(
        text,
        columns,
        initial_indent=first,
        subsequent_indent=" " * len(first) if rest is None else rest,
        break_long_words=False,
        break_on_hyphens=False,
    ) or [first.rstrip()]


_BARS, _PLAIN_BARS = " \u2581\u2582\u2583\u2584\u2585\u2586\u2587\u2588", " .:-=+*#@"


def sparkline(values: Sequence[float], encoding: str | None) -> str:
    """Return a line of one mark a value, as high as the value between zero and the largest one.

    Args:
        values: at least 0 each.
        encoding: of the terminal; block characters are used where it has them.
    """
    try:
        _BARS.encode(encoding or "ascii")
        bars = _BARS
    except (LookupError, UnicodeEncodeError):
        bars = _PLAIN_BARS
    most = max(values, default=0.0) or 1.0
    return "".join(bars[round(value / most * (len(bars) - 1))] for value in values)


def plain(line: object, style: str = "") -> Text:
    """Return ``line`` as text that rich does not parse, with control characters replaced by a visible mark."""
    from rich.text import Text  # slow to import

    return Text(printable(line), style=style)


def say(console: Console, line: object, style: str = "") -> None:
    """Print ``line`` without markup and without wrapping; it may contain names, paths and messages from outside.

    Every line that contains data must use this function: `Console.print` interprets ``[red]`` and ``[/b]`` as markup
    and ``:tada:`` as an emoji.
    """
    console.print(plain(line, style), highlight=False, soft_wrap=True)
