"""The command line inside a test, in a separate directory."""

from __future__ import annotations

from pathlib import Path

import pytest

from sparsetrain.cli import main

TINY = [
    *("model=tiny", "data.tokenizer=bytes", "data.context=48", "parameterization.base_width=16"),
    *("budget.batch_size=4", "loop.eval_sequences=4", "budget.steps=3"),
]


class Shell:
    """Runs commands in a separate directory."""

    def __init__(self, home: Path, capfd: pytest.CaptureFixture[str], notes: Path, questions: Path) -> None:
        self.home, self.capfd = home, capfd
        self.tiny = [*TINY, f"data.path={notes}"]
        self.task = ["task=pubmedqa", f"task.path={questions}"]

    def run(self, *words: str) -> tuple[int, str, str]:
        """Return status, standard output and standard error of ``sparsetrain WORDS``."""
        self.capfd.readouterr()
        status = main(words)
        out, err = self.capfd.readouterr()
        return status, out, err

    def listing(self) -> list[str]:
        return sorted(str(path.relative_to(self.home)) for path in self.home.rglob("*"))

    def refused(self, *words: str) -> str:
        """Assert that a command ends with status 2, one line, and nothing written; return the line."""
        before = self.listing()
        status, out, err = self.run(*words)
        assert (status, err.count("\n")) == (2, 1), (out, err)
        assert err.startswith("sparsetrain: ")
        assert "Traceback" not in out + err
        assert self.listing() == before
        return err

    def trained(self, *words: str, run_dir: str = "run") -> Path:
        status, _, err = self.run("pretrain", *self.tiny, f"run_dir={run_dir}", *words)
        assert status == 0, err
        return self.home / run_dir
