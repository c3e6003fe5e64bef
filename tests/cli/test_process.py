"""How the command ends: on signals at any time, closed readers, and outputs and disks without space."""

from __future__ import annotations

import importlib
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from shell import Shell

from sparsetrain import process
from sparsetrain.cli import main, multirun

COMMAND = [sys.executable, "-m", "sparsetrain"]


@pytest.mark.parametrize(
    ("arguments", "original", "expected"),
    [
        (["/usr/bin/sparsetrain", "data"], ["python", "/usr/bin/sparsetrain", "data"], True),
        (["-m", "data"], ["python", "-u", "-m", "sparsetrain", "data"], True),
        (["-m", "data"], ["python", "-msparsetrain", "data"], True),
        (["-m", "tests"], ["python", "-m", "pytest", "tests"], False),
        (["/x/train.py", "-m", "sparsetrain"], ["python", "train.py", "-m", "sparsetrain"], False),
        (["-c"], ["python", "-c", "import sparsetrain"], False),
        ([], ["python"], False),
    ],
)
def test_only_the_command_gives_signals_back_to_the_system(
    arguments: list[str], original: list[str], expected: bool
) -> None:
    assert process.is_command(arguments, original) is expected


# A signal while a library defines a class: Python 3.11 turns the exception raised there into a RuntimeError.
HOOK = """
import functools, os
real = functools.cached_property.__set_name__
def set_name(self, owner, name):
    real(self, owner, name)
    if "NUMBER" in os.environ and owner.__module__.startswith(os.environ["WHERE"]):
        os.kill(os.getpid(), int(os.environ.pop("NUMBER")))
functools.cached_property.__set_name__ = set_name
"""


@pytest.mark.parametrize(
    ("number", "where", "statuses"),
    [(signal.SIGINT, "torch", (130, -2)), (signal.SIGTERM, "pyparsing", (143, -15))],
)
def test_a_signal_while_libraries_are_imported_ends_the_program(
    tmp_path: Path, number: int, where: str, statuses: tuple[int, int]
) -> None:
    """Before `main` starts and within a verb; no traceback of a foreign class."""
    (tmp_path / "sitecustomize.py").write_text(HOOK)
    env = os.environ | {"PYTHONPATH": str(tmp_path), "NUMBER": str(int(number)), "WHERE": where}
    done = subprocess.run(
        [*COMMAND, "data", "data.path=nowhere.txt"], env=env, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode in statuses, done.stderr[-300:]
    assert "Traceback" not in done.stderr


def test_the_second_signal_ends_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first signal unwinds the program; a second one, or one during an import, ends it with only a status."""
    asked: list[int] = []
    monkeypatch.setattr(process, "end", asked.append)
    stop = process.Stop()
    with process.handled(stop):
        with pytest.raises(process.Terminated):
            os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert asked == [signal.SIGINT]
    assert signal.getsignal(signal.SIGINT) is not stop


def test_an_import_is_seen_from_what_it_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "seen_while_imported.py").write_text(
        "import sys\nfrom sparsetrain.process import importing\nSEEN = importing(sys._getframe())\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    assert __import__("seen_while_imported").SEEN
    assert not process.importing(sys._getframe())


@pytest.mark.parametrize("ready", ["--version", "tune"])
def test_a_reader_that_goes_away_is_no_error(ready: str) -> None:
    """``sparsetrain VERB | head -1`` ends as other programs do, whether Python or rich prints."""
    words = [*COMMAND, ready] if ready == "--version" else [sys.executable, "-c", RICH]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as running:
        assert running.stdout is not None
        assert running.stderr is not None
        running.stdout.close()
        assert running.stderr.read() == ""
    assert running.returncode == 141


RICH = """
import sys
from rich.console import Console
from sparsetrain.cli import main
from sparsetrain.screen import say
sys.modules["sparsetrain.cli.main"]._run = lambda words: say(Console(), "words") or 0
sys.exit(main(["report"]))
"""


def test_outputs_that_are_closed_or_full() -> None:
    """Without standard streams nothing is printed and no file gets their descriptors; a full output gives one line."""
    closed = subprocess.run(["sh", "-c", '"$@" >&- 2>&- <&-', "sh", *COMMAND, "--version"], check=False, timeout=120)
    assert closed.returncode == 0
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [*COMMAND, "--version"], stdout=full, stderr=subprocess.PIPE, text=True, check=False, timeout=120
        )
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "no space left" in done.stderr


def test_what_the_system_refuses_anywhere_is_one_line(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    """A full disk or a missing permission is reported with its file, even under code that expects neither."""
    found = importlib.import_module("sparsetrain.stages.pretrain")
    for number, words in ((28, "no space left on a[/b]; free some"), (13, "a[/b]: Permission denied")):

        def refuse(*_: object, number: int = number, **__: object) -> None:
            raise OSError(number, os.strerror(number), "a[/b]")

        monkeypatch.setattr(found, "prepare_corpora", refuse)
        assert words in shell.refused("pretrain", *shell.tiny)
    monkeypatch.setattr(found, "prepare_corpora", lambda *_, **__: Path("/proc/self/mem").read_bytes())
    with pytest.raises(OSError, match="Input/output"):  # a defect of the program or machine
        main(["pretrain", *shell.tiny])


def test_tune_looks_for_room_before_it_measures(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise the table of a long measurement could not be saved."""

    def full(_descriptor: int) -> None:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(os, "fsync", full)
    line = shell.refused("tune", "threads=[1]", "sides=[32]", "tokens=[16]", "repeats=1")
    assert re.search(r"no space left on .*cache.*SPARSETRAIN_CACHE", line)


def test_a_cache_with_brackets_in_its_name_can_hold_a_table(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    """The printed path shows brackets and colons instead of taking them for markup."""
    monkeypatch.setenv("SPARSETRAIN_CACHE", "a[/b] :b:")
    tune = importlib.import_module("sparsetrain.bench.tune")
    monkeypatch.setattr(tune, "measure", lambda *_: None)
    monkeypatch.setattr(tune, "_shown", lambda *_: "")
    monkeypatch.setattr(tune, "save", lambda *_: Path("a[/b] :b:/crossover.json"))
    status, out, _ = shell.run("tune", "threads=[1]")
    assert status == 0
    assert "saved in a[/b] :b:/crossover.json" in out


def test_a_point_that_ignored_a_signal_ends_as_that_signal_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C during an import is ignored there, and another signal follows until the point ends."""
    gentle = multirun._Gentle()
    gentle.busy = True
    importing = iter([True, False])
    monkeypatch.setattr(process, "importing", lambda _: next(importing))
    gentle(signal.SIGINT, None)
    with pytest.raises(KeyboardInterrupt) as ended:
        gentle(signal.SIGTERM, None)
    assert ended.type is KeyboardInterrupt


@pytest.fixture
def workers() -> Iterator[Callable[[], list[int]]]:
    """Return the processes that joblib computes points in; they end after the test, not five minutes later."""
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    from joblib.externals.loky import get_reusable_executor

    yield lambda: [child.pid for child in multiprocessing.active_children() if child.pid is not None]
    get_reusable_executor(reuse=True).shutdown(wait=True, kill_workers=True)


@pytest.mark.slow
def test_a_sweep_runs_side_by_side_and_an_interrupted_one_saves_every_run_that_was_going(
    shell: Shell, workers: Callable[[], list[int]]
) -> None:
    """One test, because the processes import for seconds: the second sweep is computed in those of the first."""
    # The launcher is that of a file of the user's, which its processes read as well.
    place = shell.home / "mine" / "place"
    place.mkdir(parents=True)
    launcher = "defaults: [override /hydra/launcher: joblib]\nhydra: {launcher: {n_jobs: 2}}\n"
    (place / "here.yaml").write_text(f"# @package _global_\n{launcher}")
    side_by_side = ["--config-dir", "mine", "place=here"]

    words = ["pretrain", "-m", *shell.tiny, "data.max_documents=50,1,60"]
    status, _, err = shell.run(*words, *side_by_side)
    assert (status, err.count("\n")) == (2, 1), err  # the point that cannot be is one line
    assert "data.max_documents=1 is too small" in err
    assert err.endswith(" (with --config-dir=mine)\n")
    assert len(list(shell.home.glob("runs/*/result.json"))) == len(workers()) == 2
    # The same points, wherever they were computed.
    status, out, _ = shell.run(*words)
    assert (status, out.count("pretrain: already done")) == (2, 2)

    # Ctrl-C reaches all processes: each run saves, and no new one starts.
    def interrupt() -> None:
        until = time.monotonic() + 240
        begun = (shell.home / "swept").glob
        while time.monotonic() < until and sum(run.stat().st_size > 0 for run in begun("*/metrics.jsonl")) < 2:
            time.sleep(0.1)
        for number in (*workers(), os.getpid()):
            os.kill(number, signal.SIGINT)

    words = ["pretrain", "-m", *shell.tiny, "budget.steps=20000", "loop.checkpoint_every=20000", "loop.log_every=1"]
    presses = threading.Thread(target=interrupt)
    presses.start()
    status, out, err = shell.run(*words, "seed=0,1,2,3", "runs_dir=swept", *side_by_side)
    presses.join()
    assert status == 130, err
    assert "Traceback" not in out + err
    assert (out + err).count("saved in swept/") == 2
    runs = list((shell.home / "swept").glob("pretrain-*"))
    assert len(runs) == 2
    assert all(any((run / "checkpoints").glob("step-*")) for run in runs)
    assert not list(shell.home.glob(".sweep-*"))
