"""Terminal output shows data without interpreting it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from sparsetrain.report.show import show_run
from sparsetrain.screen import say, sparkline

TEXTS = ["diverged at [/b] 3", "loss [red]nan[/red]", "a :tada: b", "[link=http://x]y[/link]", "[" + "x" * 300 + "]"]


@pytest.mark.parametrize("text", TEXTS)
def test_markup_in_a_line_is_shown_as_it_is(text: str, screen: Any) -> None:
    """Brackets are not a style, words between colons are not an emoji, and lines are not wrapped."""
    say(screen, text)
    assert screen.file.getvalue() == f"{text}\n"


def test_an_escape_sequence_does_not_reach_the_terminal(screen: Any) -> None:
    """Control characters become visible; tabs and line ends stay."""
    say(screen, "a\x1b[31mb\x07\u009bc\td\n")
    assert screen.file.getvalue().split() == ["a\ufffd[31mb\ufffd\ufffdc", "d"]


@pytest.mark.parametrize("text", TEXTS)
def test_what_a_result_says_is_shown_as_it_is(text: str, tmp_path: Path, screen: Console) -> None:
    """In the report of a run, and in its table of masks."""
    masks = {"rule": f"SET{text}", "layers": {text[:40]: {"density": 0.5}}}
    (tmp_path / "result.json").write_text(json.dumps({"status": "diverged", "message": text, "masks": masks}))
    show_run(tmp_path, screen)
    shown = screen.file.getvalue()  # type: ignore[attr-defined]
    assert f"message            {text}\n" in shown
    assert f"masks              SET{text}\n" in shown
    assert text[:40] in shown


def test_a_curve_is_drawn_with_what_the_terminal_has() -> None:
    assert sparkline([0, 1, 2, 4], "utf-8") == " \u2582\u2584\u2588"
    assert sparkline([0, 1, 2, 4], "ascii") == sparkline([0, 1, 2, 4], None) == " :=@"
    assert sparkline([0.0, 0.0], "utf-8") == "  "
    assert sparkline([], "utf-8") == ""
