"""The run directory of a configuration: its name, when it is used again, and when it is refused."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from sparsetrain.data import Tokenizer, prepare
from sparsetrain.errors import UserError
from sparsetrain.runs.claim import claimed, locked
from sparsetrain.runs.origin import Origin
from sparsetrain.stages import (
    FinetuneConfig,
    PretrainConfig,
    PromptConfig,
    RunResult,
    finetune,
    pretrain,
    prompt,
)
from sparsetrain.stages.config import identify

Configure = Callable[..., Any]


def listing(directory: Path) -> list[str]:
    return sorted(str(path.relative_to(directory)) for path in directory.rglob("*"))


def test_a_finished_run_is_skipped(sparse: RunResult, configure: Configure, screen: Console) -> None:
    before = {path: path.stat().st_mtime_ns for path in sparse.directory.rglob("*") if path.is_file()}
    again = pretrain(configure(PretrainConfig, run_dir=sparse.directory), screen)
    assert again.values == sparse.values
    assert f"pretrain: already done in {sparse.directory}" in screen.file.getvalue()  # type: ignore[attr-defined]
    assert {path: path.stat().st_mtime_ns for path in sparse.directory.rglob("*") if path.is_file()} == before


def test_a_run_directory_of_another_configuration_is_refused(
    sparse: RunResult, configure: Configure, screen: Console
) -> None:
    with pytest.raises(UserError, match=r"holds a run with another configuration: optimizer\.lr=0\.1 \(there: 0\.004"):
        pretrain(configure(PretrainConfig, {"optimizer.lr": 0.1}, run_dir=sparse.directory), screen)
    # Settings that do not change the result do not change the run.
    changes = {"loop.log_every": 7, "loop.keep_last": 9}
    assert pretrain(configure(PretrainConfig, changes, run_dir=sparse.directory, threads=1), screen).complete


def test_a_run_directory_of_another_text_is_refused(
    configure: Configure, notes: Path, tmp_path: Path, screen: Console
) -> None:
    text = tmp_path / "notes.txt"
    shutil.copy(notes, text)
    config = configure(PretrainConfig, {"data.path": str(text)}, run_dir=tmp_path / "run")
    pretrain(config, screen)
    text.write_text(text.read_text() + "\n\nOne paragraph more.")
    with pytest.raises(UserError, match=r"another configuration: corpus=file-\w+ \(there: file-\w+\)"):
        pretrain(config, screen)


def test_two_processes_on_one_run_directory_are_refused(configure: Configure, tmp_path: Path, screen: Console) -> None:
    config = configure(PretrainConfig, run_dir=tmp_path / "run")
    holder = (
        "import fcntl, os, sys\n"
        "lock = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT)\n"
        "fcntl.flock(lock, fcntl.LOCK_EX)\n"
        "print('held', flush=True)\n"
        "sys.stdin.read()\n"
    )
    (tmp_path / "run").mkdir()
    with subprocess.Popen(
        [sys.executable, "-c", holder, str(tmp_path / "run" / ".lock")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        with pytest.raises(UserError, match=r"run_dir=.*/run is in use by another process; wait for it or choose"):
            pretrain(config, screen)
        assert listing(tmp_path / "run") == [".lock"]
        other.communicate("")
    assert pretrain(config, screen).complete


def test_a_killed_process_holds_no_directory_though_a_process_that_it_forked_lives_on(tmp_path: Path) -> None:
    holder = (
        "import os, pathlib, sys\n"
        "from sparsetrain.runs.claim import locked\n"
        "with locked(pathlib.Path(sys.argv[1])):\n"
        "    if os.fork() == 0:\n"  # has given up its copy of the lock, which it does when it begins
        "        print('held', flush=True)\n"
        "    sys.stdin.read()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", holder, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        with pytest.raises(UserError, match="is in use by another process"), locked(tmp_path):
            pass
        other.kill()
        other.wait()
        with locked(tmp_path):
            assert (tmp_path / ".lock").stat().st_mode & 0o777 == 0o644
    assert listing(tmp_path) == [".lock"]


@pytest.mark.parametrize("reason", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reason: int) -> None:
    def flock(*_: object) -> None:
        raise OSError(reason, os.strerror(reason))

    monkeypatch.setattr(fcntl, "flock", flock)
    line = rf"run_dir=.* cannot be locked \({os.strerror(reason)}\); choose one on another file system"
    with pytest.raises(UserError, match=line), locked(tmp_path):
        pass


def test_what_a_killed_run_left_is_gone_after_the_next(
    sparse: RunResult, configure: Configure, tmp_path: Path, screen: Console
) -> None:
    """Also in the directory of a finished run, in its checkpoints, and in the cache."""
    prepare(configure(PretrainConfig).data, progress=False)
    (corpora,) = tmp_path.rglob("corpora")
    before = listing(sparse.directory), listing(corpora)
    last = max((sparse.directory / "checkpoints").glob("step-*"))
    for kind in (".removing-", ".writing-", ".replaced-"):
        shutil.copytree(last, last.with_name(kind + last.name))
    (last.parent / ".latest").touch()
    (sparse.directory / ".train_ids.txt.abcdefgh.part").touch()
    (corpora / ".file-0.abcdefgh.part").mkdir()
    (corpora / ".file-0.abcdefgh.part" / "train.bin").touch()
    assert pretrain(configure(PretrainConfig, run_dir=sparse.directory), screen).complete
    assert (listing(sparse.directory), listing(corpora)) == before


def fails_inside(directory: Path, config: PretrainConfig) -> None:
    origin = Origin("text", None, Tokenizer.bytes(), set())
    with claimed(directory, identify("pretrain", config, origin), origin):
        raise UserError("a mistake")


def test_a_mistake_leaves_no_trace_and_the_directory_can_be_used(configure: Configure, tmp_path: Path) -> None:
    config = configure(PretrainConfig)
    with pytest.raises(UserError, match="a mistake"):
        fails_inside(tmp_path / "deep" / "run", config)
    assert listing(tmp_path) == []
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").touch()  # existing files stay
    with pytest.raises(UserError, match="a mistake"):
        fails_inside(tmp_path / "mine", config)
    assert "mine/file" in listing(tmp_path)


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        (
            PretrainConfig,
            {"sparsity.sparsity": 0.9999},
            "blocks.0.attn.qkv: .*leaves no weight at all in a 96x32 matrix",
        ),
        (FinetuneConfig, {"task.path": "nowhere"}, "task.path=nowhere: no ori_pqal.json there"),
        (FinetuneConfig, {"data.context": 4}, "context=4 leaves no room for a source"),
        (
            PretrainConfig,
            {"model.positions": "learned", "data.context": 100},
            "data.context=100 is longer than model.max_context=64",
        ),
        (PretrainConfig, {"data.context": 100_000}, r"fewer than context \+ 1 = 100001"),
    ],
)
def test_what_is_found_late_leaves_no_directory(
    configure: Configure, tmp_path: Path, screen: Console, kind: type, changes: dict[str, Any], message: str
) -> None:
    start = {PretrainConfig: pretrain, FinetuneConfig: finetune}[kind]
    with pytest.raises(UserError, match=message) as caught:
        start(configure(kind, changes, run_dir=tmp_path / "runs" / "x"), screen)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "runs").exists()


# The directory of a run without run_dir.


def test_the_default_directory_says_what_it_holds(
    configure: Configure, tmp_path: Path, screen: Console, notes: Path
) -> None:
    text = tmp_path / "notes.txt"
    shutil.copy(notes, text)
    changes = {"data.path": str(text), "budget.steps": 1}
    one = pretrain(configure(PretrainConfig, changes, runs_dir=tmp_path / "runs"), screen)
    assert one.directory.name.startswith("pretrain-d32-L2-s0.75-lr0.004-seed0-")
    assert one.directory.parent == tmp_path / "runs"
    shorter = {**changes, "data.context": 32}
    assert pretrain(configure(PretrainConfig, shorter, runs_dir=tmp_path / "runs"), screen).directory != one.directory
    moved = tmp_path / "moved.txt"
    text.rename(moved)
    changes["data.path"] = str(moved)
    assert pretrain(configure(PretrainConfig, changes, runs_dir=tmp_path / "runs"), screen).values == one.values
    moved.write_text(moved.read_text() + "\n\nOne paragraph more.")
    assert pretrain(configure(PretrainConfig, changes, runs_dir=tmp_path / "runs"), screen).directory != one.directory


def test_a_moved_task_is_the_same_and_a_finished_run_needs_none(
    configure: Configure, questions: Path, tmp_path: Path, screen: Console
) -> None:
    own = Path(shutil.copytree(questions, tmp_path / "own"))
    changes = {"task.path": str(own), "budget.steps": 1}
    first = finetune(configure(FinetuneConfig, changes, runs_dir=tmp_path / "runs"), screen)
    moved = own.rename(tmp_path / "moved")
    again = configure(FinetuneConfig, {**changes, "task.path": str(moved)}, runs_dir=tmp_path / "runs")
    assert finetune(again, screen).directory == first.directory
    shutil.rmtree(moved)
    assert finetune(again, screen).directory == first.directory
    named = configure(FinetuneConfig, changes, run_dir=first.directory)
    assert finetune(named, screen).values == first.values
    with pytest.raises(UserError, match=r"task\.path=.*moved: no ori_pqal.json there"):
        finetune(configure(FinetuneConfig, {"task.path": str(moved)}, runs_dir=tmp_path / "runs"), screen)


def test_a_retrained_source_makes_another_run(
    sparse: RunResult, configure: Configure, tmp_path: Path, screen: Console
) -> None:
    config = configure(FinetuneConfig, runs_dir=tmp_path / "runs", init_from=sparse.directory)
    first = finetune(config, screen)
    assert finetune(config, screen).directory == first.directory  # the same weights: already done
    shutil.rmtree(sparse.directory)
    pretrain(configure(PretrainConfig, {"optimizer.lr": 1e-3}, run_dir=sparse.directory), screen)
    second = finetune(config, screen)
    assert second.directory != first.directory
    assert second["source"] != first["source"]
    with pytest.raises(UserError, match="holds a run with another configuration: source="):
        finetune(configure(FinetuneConfig, run_dir=first.directory, init_from=sparse.directory), screen)


def test_a_run_can_be_used_when_its_corpus_is_gone(
    configure: Configure, tmp_path: Path, screen: Console, notes: Path
) -> None:
    own = tmp_path / "own.txt"
    shutil.copy(notes, own)
    text = {"data.path": str(own)}
    trained = pretrain(configure(PretrainConfig, text, run_dir=tmp_path / "trained"), screen)
    own.unlink()
    tuned = finetune(configure(FinetuneConfig, text, run_dir=tmp_path / "t", init_from=trained.directory), screen)
    assert tuned.complete
    assert prompt(configure(PromptConfig, text, run_dir=tmp_path / "p", init_from=tuned.directory), screen).complete


def test_starting_from_an_unfinished_run_is_said(
    sparse: RunResult, configure: Configure, tmp_path: Path, screen: Console, caplog: pytest.LogCaptureFixture
) -> None:
    (sparse.directory / "result.json").unlink()
    finetune(configure(FinetuneConfig, run_dir=tmp_path / "tuned", init_from=sparse.directory), screen)
    assert f"{sparse.directory} is not finished; its weights are those of step 12" in caplog.messages
