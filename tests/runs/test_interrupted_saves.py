"""Saves that are interrupted, a full disk, and readers during a save."""

from __future__ import annotations

import builtins
import errno
import io
import os
import re
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
from checkpoints import FILES, load, save

from sparsetrain.errors import UserError

# All system calls by which a save changes the disk.
CALLS: list[tuple[Any, str]] = [
    (os, "mkdir"),
    (os, "open"),
    (os, "fsync"),
    (os, "rename"),
    (os, "replace"),
    (os, "unlink"),
    (os, "rmdir"),
    (builtins, "open"),
    (io, "open"),
    (safetensors.torch, "save_file"),
]


class Killed(BaseException):
    """The process is dead: every call fails from now on, so that no clean-up can help."""


class Saboteur:
    """Counts file system calls and makes them fail: from call number ``at`` on, or only at that call."""

    def __init__(self, patch: pytest.MonkeyPatch, at: int, mode: str) -> None:
        self.count, self.at, self.mode = 0, at, mode
        for module, name in CALLS:
            patch.setattr(module, name, self.wrap(getattr(module, name)))

    def wrap(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            self.count += 1
            if self.mode == "full" and self.count == self.at:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            if self.mode == "killed" and self.count >= self.at:
                raise Killed
            return call(*args, **kwargs)

        return wrapped


def prepare_first(directory: Path) -> None:
    """The save is the first of the run."""


def prepare_next(directory: Path) -> None:
    """The save follows another, which it removes."""
    save(directory, 1, keep_last=1)


def prepare_again(directory: Path) -> None:
    """The save replaces the only checkpoint."""
    save(directory, 2, keep_last=1, mark=1)


def sabotaged(tmp_path: Path, mode: str, prepare: Callable[[Path], None]) -> Iterator[tuple[Path, BaseException]]:
    """Save checkpoint 2 once for each file system call that can fail, and yield the directory each time."""
    at = 0
    while True:
        at += 1
        directory = tmp_path / f"{at}"
        prepare(directory)
        with pytest.MonkeyPatch.context() as patch:
            saboteur = Saboteur(patch, at, mode)
            failure: BaseException | None = None
            try:
                save(directory, 2, keep_last=1, mark=2)
            except (Killed, UserError) as error:
                failure = error
        if failure is None and saboteur.count < at:
            assert at > 20  # otherwise the calls were not intercepted
            return
        if failure is not None:
            yield directory, failure


def loadable(directory: Path) -> tuple[int, Any] | None:
    """Return step and mark of the checkpoint that a run would resume from; none may be refused."""
    try:
        checkpoint, refusals = load(directory)
    except UserError as error:
        assert str(error).endswith("has no checkpoint")  # noqa: PT017
        return None
    assert refusals == []
    return checkpoint.step, checkpoint.state["mark"]


@pytest.mark.parametrize("mode", ["killed", "full"])
@pytest.mark.parametrize(("prepare", "old"), [(prepare_first, None), (prepare_next, (1, 0)), (prepare_again, (2, 1))])
def test_a_save_stopped_at_any_call_leaves_the_old_or_the_new(
    tmp_path: Path, mode: str, prepare: Callable[[Path], None], old: tuple[int, int] | None
) -> None:
    outcomes = []
    for directory, failure in sabotaged(tmp_path, mode, prepare):
        outcomes.append(loadable(directory))
        assert outcomes[-1] in (old, (2, 2))
        if mode == "full":
            assert isinstance(failure, UserError)
            assert re.fullmatch(
                r"checkpoint step-00000002 could not be saved in \S+: No space left on device; free some space there.*",
                str(failure),
            )
            assert not list(directory.glob(".writing-*"))
            assert not (directory / ".latest").exists()
        save(directory, 3, keep_last=1)  # the next save clears leftovers
        assert sorted(os.listdir(directory)) == ["latest", "step-00000003"]
    assert {old, (2, 2)} == set(outcomes)
    # Once the new checkpoint is in place, the old one never returns.
    assert outcomes == sorted(outcomes, key=lambda outcome: outcome == (2, 2))


def test_a_full_disk_in_the_tensor_writer_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def write(*_: object) -> None:
        raise safetensors.SafetensorError("I/O error: No space left on device (os error 28)")

    save(tmp_path, 1)
    monkeypatch.setattr(safetensors.torch, "save_file", write)
    with pytest.raises(UserError, match=r"No space left on device .* free some space there or choose another run_dir"):
        save(tmp_path, 2)
    assert sorted(os.listdir(tmp_path)) == ["latest", "step-00000001"]


def test_a_directory_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"could not be saved in .*file/checkpoints: .*check that the directory can be"):
        save(tmp_path / "file" / "checkpoints", 1)


def test_an_unexpected_error_leaves_no_unfinished_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def write(*_: object) -> None:
        raise KeyboardInterrupt

    save(tmp_path, 1)
    monkeypatch.setattr(safetensors.torch, "save_file", write)
    with pytest.raises(KeyboardInterrupt):
        save(tmp_path, 2)
    assert sorted(os.listdir(tmp_path)) == ["latest", "step-00000001"]


def test_nothing_is_renamed_before_it_is_durable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    rename, replace, fsync = os.rename, os.replace, os.fsync

    def record(verb: str, call: Callable[..., None]) -> Callable[..., None]:
        def recorded(*args: Any) -> None:
            source = Path(os.readlink(f"/proc/self/fd/{args[0]}") if verb == "fsync" else args[0])
            events.append(f"{verb} {source.relative_to(tmp_path)}")
            call(*args)

        return recorded

    save(tmp_path, 1)
    monkeypatch.setattr(os, "fsync", record("fsync", fsync))
    monkeypatch.setattr(os, "rename", record("rename", rename))
    monkeypatch.setattr(os, "replace", record("replace", replace))
    save(tmp_path, 2, keep_last=1)
    working = ".writing-step-00000002"
    assert events == [
        *(f"fsync {working}/{file}" for file in FILES),
        f"fsync {working}",
        "fsync .latest",
        f"rename {working}",
        "fsync .",
        "replace .latest",
        "fsync .",
        "rename step-00000001",
    ]


# ------------------------------------------------------------------------------------------ concurrent readers


@pytest.mark.parametrize("again", [False, True])
def test_a_reader_always_finds_a_whole_checkpoint_while_the_run_saves(tmp_path: Path, again: bool) -> None:
    save(tmp_path, 0)
    done = threading.Event()

    def read() -> list[Any]:
        seen = []
        while not done.is_set():
            checkpoint, refusals = load(tmp_path)
            assert refusals == []
            seen.append(checkpoint.state["mark"])
        return seen

    with ThreadPoolExecutor(2) as pool:
        readers = [pool.submit(read) for _ in range(2)]
        try:
            for mark in range(1, 60):
                save(tmp_path, 0 if again else mark, keep_last=1, mark=mark)
        finally:
            done.set()
        for reader in readers:
            seen = reader.result()
            assert len(set(seen)) > 5
            assert seen == sorted(seen)
