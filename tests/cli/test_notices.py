"""Warnings of the library and of Python on the command line, and in a program that has not configured logging."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path

import pytest
from fresh import Fresh

from sparsetrain.cli import multirun
from sparsetrain.cli.notices import notices_on_stderr


def test_every_warning_is_one_line_on_stderr_and_nowhere_else(
    capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    log = logging.getLogger("sparsetrain.runs.checkpoint")
    before = warnings.showwarning, list(warnings.filters), list(logging.getLogger("sparsetrain").handlers)
    with notices_on_stderr(), notices_on_stderr():
        warnings.simplefilter("always")
        log.info("not shown")
        log.warning("checkpoint %s refused:\n%s", "step-1", "\x1b[31m it is\a damaged [/b] 100 %")
        warnings.warn("built too early,\n100 % sure", stacklevel=1)
    assert capsys.readouterr() == (
        "",
        "warning: checkpoint step-1 refused: \ufffd[31m it is\ufffd damaged [/b] 100 %\n"
        "warning: built too early, 100 % sure\n",
    )
    assert caplog.messages == []  # Hydra's handler at the root would print it on stdout
    log.warning("again")
    assert caplog.messages == ["again"]
    assert (warnings.showwarning, list(warnings.filters), list(logging.getLogger("sparsetrain").handlers)) == before


def test_a_point_in_a_process_of_a_launcher_shows_its_warnings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Such a process runs the job alone, without `main`."""
    monkeypatch.setattr(multirun, "convert", lambda *_: None)
    monkeypatch.setattr(multirun, "start", lambda *_: logging.getLogger("sparsetrain.runs").warning("damaged") or 0)
    job = multirun.Job("pretrain", [], "sparsetrain pretrain", tmp_path)
    assert job._run({}) == 0
    assert capsys.readouterr() == ("", "warning: damaged\n")


def test_a_program_that_has_not_configured_logging_sees_warnings_on_stderr(fresh: Fresh, tmp_path: Path) -> None:
    script = (
        "import logging, pathlib, sys\n"
        "from sparsetrain.runs.checkpoint import OptimizerTensors, load_checkpoint, save_checkpoint\n"
        "place = pathlib.Path(sys.argv[1])\n"
        "for step in (1, 2): save_checkpoint(place, step, {}, OptimizerTensors({}, []), {}, 3)\n"
        "(place / 'step-00000002' / 'state.json').unlink()\n"
        "load_checkpoint(place)\n"
        "logging.getLogger('sparsetrain').setLevel(logging.ERROR)\n"
        "load_checkpoint(place)\n"
    )
    done = fresh.run(script, str(tmp_path))
    assert (done.stdout, done.stderr) == ("", "checkpoint step-00000002 refused: state.json is missing\n")
