"""Texts on the command line that Hydra's grammar would read otherwise."""

from __future__ import annotations

from pathlib import Path

import pytest

from sparsetrain.cli.resolve import load


@pytest.mark.parametrize(
    "text",
    [
        "Methods: we did a, b and c",
        "In patients (n = 20)",
        "Don't stop",
        "[1] it is",
        "50 % {of} them",
        "a = b",
        "plain",
    ],
)
def test_a_prompt_may_be_any_sentence(text: str, tmp_path: Path) -> None:
    assert load("generate", [f"init_from={tmp_path}", f"prompt={text}"]).prompt == text


def test_a_quoted_text_and_null_mean_what_hydra_says() -> None:
    assert load("generate", ["init_from='a b'", "prompt='it is'"]).prompt == "it is"
    assert load("pretrain", ["data.path=null"]).data.path is None


def test_a_path_may_have_brackets_and_spaces(tmp_path: Path) -> None:
    path = tmp_path / "my notes (1), b=2.txt"
    path.write_text("some text")
    assert load("pretrain", [f"data.path={path}"]).data.path == str(path)
