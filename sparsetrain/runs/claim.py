"""Who may write to a run directory: one process at a time, and only for the run that the directory is of."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import yaml
from filelock import FileLock, Timeout

from sparsetrain.errors import UserError
from sparsetrain.files import clear_leftovers, file_errors, write_text
from sparsetrain.runs import checkpoint
from sparsetrain.runs.identity import differences
from sparsetrain.runs.layout import (
    BACKENDS,
    CHECKPOINTS,
    CONFIG,
    LOCK,
    METRICS,
    PREDICTIONS,
    TASK,
    TOKENIZER,
    TRAIN_IDS,
)
from sparsetrain.runs.origin import Origin
from sparsetrain.runs.recorded import Recorded, read_recorded
from sparsetrain.runs.result import RunResult, finished

_LONGEST = 600  # characters of what differs, in a message


@contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Keep every other process out of a run directory, which is made if it is not there.

    What a process that was killed left in it is removed first. The system releases the lock of a killed process, also
    where a process that it forked lives on. The file of the lock stays.

    Raises:
        UserError: another process is writing to it, it is not writable, or its file system has no locks.
    """
    # Preserved, it also has no substitute: a file that stands for the lock would outlive a killed process.
    lock = FileLock(directory / LOCK, mode=0o644, blocking=False, thread_local=False, preserve_lock_file=True)
    try:
        with file_errors(directory):
            directory.mkdir(parents=True, exist_ok=True)
            lock.acquire()
    except Timeout:
        raise UserError(f"run_dir={directory} is in use by another process; wait for it or choose another") from None
    except OSError as error:
        raise UserError(
            f"run_dir={directory} cannot be locked ({error.strerror}); choose one on another file system"
        ) from None
    try:
        with file_errors(directory):
            clear_leftovers(directory)
            checkpoint.clear_leftovers(directory / CHECKPOINTS)
        yield
    finally:
        lock.release()


@contextmanager
def claimed(directory: Path, run: Recorded, origin: Origin) -> Iterator[RunResult | None]:
    """Claim a directory for this process and the run ``run``; yield the run's result, if it is done.

    A `UserError` inside, before the first checkpoint, leaves no trace: with the mistake put right, the same directory
    can be used.

    Raises:
        UserError: another process is writing to it, it holds another run, or it is not writable.
    """
    made = [place for place in (directory, *directory.parents) if not place.exists()]
    with locked(directory):
        fresh = not (directory / CONFIG).exists()
        try:
            if fresh:
                write_text(directory / CONFIG, yaml.safe_dump(run.plain(), sort_keys=False))
            else:
                check_same(directory, run, origin)
            yield finished(directory)
        except UserError:
            if fresh:
                _remove_traces(directory, made)
            raise


def check_same(directory: Path, run: Recorded, origin: Origin | None) -> None:
    """Raise `UserError` if the run of a directory, which has one, is not ``run``."""
    if changed := differences(run, read_recorded(directory, run.schema), origin):
        raise UserError(
            f"run_dir={directory} holds a run with another configuration: {_listed(changed[:3])}; choose another "
            "run_dir or delete that one"
        )


def _listed(texts: list[str]) -> str:
    whole = ", ".join(texts)
    return whole if len(whole) <= _LONGEST else f"{whole[: _LONGEST - 1]}…"


def _remove_traces(directory: Path, made: list[Path]) -> None:
    """Remove what a run wrote that did not come to a checkpoint, and the directories ``made`` for it."""
    traces = {LOCK, CONFIG, TOKENIZER, TRAIN_IDS, METRICS, BACKENDS, TASK, PREDICTIONS}
    if not traces.issuperset(entry.name for entry in directory.iterdir()):
        return
    with suppress(OSError):
        for name in traces:
            (directory / name).unlink(missing_ok=True)
        for place in made:
            place.rmdir()
