"""Lines for a terminal, shown as they are: brackets are no markup, and no escape sequence in a name is obeyed."""

from __future__ import annotations

import unicodedata
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text


def plain(line: object, style: str = "") -> Text:
    """Return ``line`` as text that rich does not parse, with control characters made visible."""
    from rich.text import Text  # slow to import

    shown = (c if c in "\n\t" or unicodedata.category(c) not in {"Cc", "Cs"} else "\ufffd" for c in str(line))
    return Text("".join(shown), style=style)


def say(console: Console, line: object, style: str = "") -> None:
    """Print ``line``, which may hold names, paths and messages of others, without folding it.

    Every line that says something about data goes this way: `Console.print` takes ``[red]`` and ``[/b]`` in a string
    for markup, and ``:tada:`` for a picture.
    """
    console.print(plain(line, style), highlight=False, soft_wrap=True)
